"""One question for a certificate: what is asked, and what is done with the answer.

The private key is made on this device, for every question anew, and is written to disk with the certificate
that belongs to it.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path

from liberatai_agent.children.certificates import CertificateCheck, CertificateTask, ask_child
from liberatai_agent.config import AgentConfig
from liberatai_agent.membership.identity import Identity
from liberatai_core import errors
from liberatai_core.contract.frame import expect, key_id, seal
from liberatai_core.contract.messages import CertificateReply, CertificateRequest
from liberatai_core.contract.topics import claim_name
from liberatai_core.errors import DiskError, LiberataiError, ReplayError, StateError
from liberatai_core.files import make_folder, write_durably

REFUSALS = {
    one.code: one
    for one in (
        errors.BusyError,
        errors.CertificateError,
        errors.DiskError,
        errors.ExpiredError,
        errors.QuotaError,
        errors.RevokedError,
        errors.SignatureError,
        errors.StateError,
        errors.TokenError,
        errors.TooLargeError,
        errors.TopicError,
        errors.UnknownDeviceError,
    )
}
"""What a coordinator may say no with."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question that waits for its answer.

    Attributes:
        frame: what is published.
        nonce: names the answer.
        key: private key (PEM) that was made for it.
    """

    frame: bytes
    nonce: bytes
    key: bytes


async def make_question(config: AgentConfig, identity: Identity, claim: str = "") -> Question:
    """Return a question.

    Args:
        config: settings.
        identity: signs.
        claim: name of the claim credential in `claim_file` by whose door it goes; "": by our own.

    Raises:
        CertificateError: no key could be made.
    """
    # What came with a token is proven with its key; a credential of our own, and the other door, by ours.
    is_invited = claim not in ("", claim_name(config.device))
    task = CertificateTask(
        fleet=config.fleet,
        device=config.device,
        public_key=identity.signer.public_key,
        claim_file=(config.claim_file or "") if is_invited else "",
    )
    made = await ask_child(task)
    nonce = secrets.token_bytes(16)
    request = CertificateRequest(
        device=config.device,
        public_key=identity.signer.public_key,
        nonce=nonce,
        request=made.request,
        claim=claim if is_invited else None,
        proof=made.proof,
    )
    return Question(seal(request, identity.signer), nonce, made.key)


def open_reply(config: AgentConfig, payload: bytes, question: Question) -> CertificateReply:
    """Return the answer to a question, verified with the coordinator's pinned key.

    Raises:
        LiberataiError: it is none, is not the coordinator's, or answers something else.
    """
    key = config.key_bytes
    reply = expect(
        payload, CertificateReply, config.fleet, lambda claimed: key if claimed == key_id(key) else None
    )
    if (reply.device, reply.nonce) != (config.device, question.nonce):
        raise ReplayError("the answer to another question")
    return reply


def refusal_of(reply: CertificateReply) -> LiberataiError:
    """Return what a coordinator refuses with."""
    known = REFUSALS.get(reply.code)
    return known(reply.text) if known is not None else StateError(f"{reply.code}: {reply.text}")


async def keep(config: AgentConfig, question: Question, reply: CertificateReply, where: Path) -> None:
    """Check what was issued, and write it with its key.

    Args:
        config: settings.
        question: that was answered.
        reply: with the certificate; of one that is pending only a claim credential is kept.
        where: file for certificate and key.

    Raises:
        CertificateError: not for our key, name or authority. DiskError: not written.
    """
    certificate = reply.certificate or reply.claim
    if not certificate:
        return
    check = CertificateCheck(
        certificate=reply.certificate,
        claim=reply.claim,
        key=question.key,
        ca_file=config.ca_file or "",
        name=config.device,
    )
    made = await ask_child(check)
    try:
        make_folder(where.parent)
        if made.claim and config.claim_file is not None:
            write_durably(Path(config.claim_file), made.claim)
        if made.key:
            write_durably(where, made.key)
    except OSError as error:
        raise DiskError(f"{error.filename or where}: {error.strerror}") from error
