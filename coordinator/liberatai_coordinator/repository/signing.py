"""Signatures of commits: an Ed25519 key over a DSSE envelope (github.com/secure-systems-lab/dsse, v1.0).

The signed payload names the index by its digest, and the model, so a signature of one commit serves no other
one and no other model. Who is believed for which models stands in the repository's trust file.
"""

import base64
import fnmatch
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from liberatai_coordinator.repository.descriptors import (
    EMPTY,
    EMPTY_BLOB,
    ENVELOPE,
    INDEX,
    SIGNATURE,
    Descriptor,
    Digest,
    Manifest,
    decode,
    describe,
    encode,
)
from liberatai_coordinator.repository.names import MODEL, short
from liberatai_core.errors import SchemaError, SignatureError

PAYLOAD: Final = "application/vnd.liberatai.statement.v1+json"
MAX_SIGNATURES: Final = 16

PublicKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Trusted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that is believed.

    Attributes:
        name: whose it is, for people.
        key: Ed25519 public key (hex).
        models: patterns of model names that it may sign, e.g. "digits" or "lab/*".
    """

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    key: PublicKey
    models: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(min_length=1, max_length=256)]

    def covers(self, model: str) -> bool:
        """Whether this key may sign commits of a model."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)


class _Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    commit: Digest
    model: Annotated[str, Meta(pattern=MODEL)]


class _Signature(msgspec.Struct, frozen=True, kw_only=True):
    keyid: Annotated[str, Meta(max_length=128)]
    sig: Annotated[str, Meta(max_length=128)]


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, rename={"payload_type": "payloadType"}):
    payload_type: Annotated[str, Meta(max_length=256)]
    payload: Annotated[str, Meta(max_length=4096)]
    signatures: Annotated[tuple[_Signature, ...], Meta(max_length=MAX_SIGNATURES)]


def public_key(private: bytes) -> str:
    """Return the public key (hex) of a 32-byte private one."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def sign(private: bytes, commit: str, model: str) -> bytes:
    """Return the envelope (JSON) by which a key vouches for a commit."""
    key = Ed25519PrivateKey.from_private_bytes(private)
    payload = encode(_Statement(commit=commit, model=model))
    made = _Envelope(
        payload_type=PAYLOAD,
        payload=base64.b64encode(payload).decode(),
        signatures=(
            _Signature(
                keyid=key.public_key().public_bytes_raw().hex(),
                sig=base64.b64encode(key.sign(_covered(PAYLOAD, payload))).decode(),
            ),
        ),
    )
    return encode(made)


def signature_manifest(envelope: bytes, subject: Descriptor) -> tuple[bytes, list[bytes]]:
    """Return the manifest that refers a signature to its commit, and the blobs that it names."""
    manifest = Manifest(
        schema_version=2,
        artifact_type=SIGNATURE,
        config=describe(EMPTY_BLOB, EMPTY),
        layers=(describe(envelope, ENVELOPE),),
        subject=Descriptor(media_type=INDEX, digest=subject.digest, size=subject.size),
    )
    return encode(manifest), [EMPTY_BLOB, envelope]


def signer_of(envelopes: list[bytes], commit: str, model: str, trusted: tuple[Trusted, ...]) -> Trusted:
    """Return whose signature of a commit is believed.

    Args:
        envelopes: what was found beside the commit.
        commit: digest of its index.
        model: that it says it is of.
        trusted: the trust file.

    Raises:
        SignatureError: none is believed; the text says why and what to do.
    """
    if not envelopes:
        raise SignatureError(f"commit {short(commit)} of {model} is unsigned: refused")
    why = ""
    for content in envelopes:
        try:
            return _checked(decode(content, _Envelope, "signature"), commit, model, trusted)
        except (SignatureError, SchemaError) as error:
            why = why or str(error)
    raise SignatureError(f"commit {short(commit)} of {model}: {why}")


def _checked(envelope: _Envelope, commit: str, model: str, trusted: tuple[Trusted, ...]) -> Trusted:
    if envelope.payload_type != PAYLOAD:
        raise SignatureError(f"a signature of {envelope.payload_type[:80]!r}, not of a commit")
    payload = _bytes_of(envelope.payload)
    statement = decode(payload, _Statement, "signed statement")
    if (statement.commit, statement.model) != (commit, model):
        raise SignatureError(
            f"the signature is of {statement.model} {short(statement.commit)}: content was exchanged"
        )
    unknown = ""
    for one in envelope.signatures:
        known = [key for key in trusted if key.key == one.keyid]
        if not known:
            unknown = unknown or one.keyid
            continue
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(one.keyid))
        try:
            key.verify(_bytes_of(one.sig), _covered(PAYLOAD, payload))
        except InvalidSignature:
            raise SignatureError(f"the signature of {known[0].name} is wrong") from None
        for entry in known:
            if entry.covers(model):
                return entry
        raise SignatureError(f"{known[0].name} is not trusted with the model {model} (see the trust file)")
    name = model.split("/", maxsplit=1)[0]
    raise SignatureError(
        f"signed by an unknown key {unknown[:64] or '(none)'}; if you trust it: "
        f"`liberatai models trust {name} {unknown[:64] or 'KEY'} --model {model}`"
    )


def _covered(payload_type: str, payload: bytes) -> bytes:
    """Return what is signed: DSSE's pre-authentication encoding."""
    name = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise SignatureError("a signature is not base64") from None
