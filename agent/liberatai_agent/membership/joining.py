"""How a device without a certificate that is valid gets one: by the broker's door for claims.

The same way for a device that was invited, for one that waits for approval, and for one that slept past the
end of its certificate: it shows a claim credential, asks, and is answered. Nothing that the door lets through
is believed but what the coordinator's pinned key has signed.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from liberatai_agent.config import AgentConfig
from liberatai_agent.membership.asking import Question, keep, make_question, open_reply, refusal_of
from liberatai_agent.membership.identity import Identity
from liberatai_core.certificate_file import read_dates
from liberatai_core.contract.messages import CertificateReply
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import CertificateError, ExpiredError, LiberataiError, LinkError
from liberatai_core.link.link import Connected, Disconnected, Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings

log = logging.getLogger(__name__)

ANSWER_S = 60.0
"""For the connection and the answer; then the device asks anew."""
ASK_AGAIN_S, ASK_AGAIN_CAP_S, PATIENCE = 2.0, 60.0, 1.2
"""Between two questions while an operator has to approve the device: soon at first, and ever more rarely."""
RETRY_S, RETRY_CAP_S = 1.0, 60.0
EXPIRED = "it has expired"
"""Part of the link's words for a certificate whose time is over, see `link.mqtt.client.ALERTS`."""

Say = Callable[[str, str], None]
"""Told a phase ("joining", "pending") and words for people."""


def why_join(config: AgentConfig) -> str:
    """Return why this device has to ask for a certificate before it can connect; "": it has not."""
    if config.claim_file is None or config.cert_file is None:
        return ""
    own = Path(config.cert_file)
    if not own.is_file():
        return "this device has no certificate yet"
    now_s = time.time()
    dates = read_dates(own)
    # A clock that was never set shows a time before: that is no reason.
    return f"its certificate ended {-dates.days_left(now_s):.1f} days ago" if now_s > dates.end_s else ""


async def join(config: AgentConfig, identity: Identity, say: Say) -> CertificateReply:
    """Ask until there is a certificate; return the answer that brought it.

    Raises:
        LiberataiError: the coordinator refuses, or the claim is of no use: only an operator changes that.
    """
    losses = asked = 0
    while True:
        try:
            question, reply = await _ask_once(config, identity)
        except LinkError as error:
            pause_s = min(RETRY_CAP_S, RETRY_S * 2**losses) * random.uniform(0.5, 1)  # noqa: S311 - no secret
            losses += 1
            say("joining", f"{error} (next try in {pause_s:.0f} s)")
            await asyncio.sleep(pause_s)
            continue
        losses = 0
        match reply.state:
            case "issued":
                await keep(config, question, reply, Path(config.cert_file or ""))
                return reply
            case "pending":
                await keep(config, question, reply, Path(config.cert_file or ""))
                say("pending", reply.text)
                await asyncio.sleep(min(ASK_AGAIN_CAP_S, ASK_AGAIN_S * PATIENCE**asked))
                asked += 1
            case _:
                raise refusal_of(reply)


async def _ask_once(config: AgentConfig, identity: Identity) -> tuple[Question, CertificateReply]:
    file = Path(config.claim_file or "")
    claim = read_dates(file).name
    topics = Topics(fleet=config.fleet)
    question = await make_question(config, identity, claim)
    settings = MqttSettings.from_files(
        config.claim_broker or "",
        client_id=claim,
        username=None,
        password_file=None,
        ca_file=config.ca_file,
        cert_file=str(file),
        key_file=str(file),
    )
    link = MqttLink(replace(settings, session_expiry_s=0, reconnect_cap_s=5.0, spread_s=0.5))
    await link.subscribe(topics.provisioning(claim, "crt"))
    reason = "the coordinator does not answer"
    await link.open()
    try:
        async with asyncio.timeout(ANSWER_S):
            async for event in link.events():
                match event:
                    case Connected():
                        reason = "the coordinator does not answer"
                        await _publish(link, topics.provisioning(claim, "csr"), question.frame)
                    case Disconnected():
                        reason = event.reason
                        _require_usable(file, reason)
                    case Received():
                        link.ack(event.token)
                        reply = _opened(config, event.payload, question)
                        if reply is not None:
                            return question, reply
    except TimeoutError:
        pass
    finally:
        await link.close()
    raise LinkError(f"{config.claim_broker}: {reason}")


async def _publish(link: MqttLink, topic: str, frame: bytes) -> None:
    try:
        await link.publish(topic, frame)
    except LinkError as error:
        log.info("%s", error)  # the next connection says it again


def _opened(config: AgentConfig, payload: bytes, question: Question) -> CertificateReply | None:
    try:
        return open_reply(config, payload, question)
    except LiberataiError as error:
        log.warning("an answer is not believed: %s %s", error.code, error)
        return None


def _require_usable(file: Path, reason: str) -> None:
    """Give up where waiting is of no use: the broker says what is wrong with the claim."""
    if EXPIRED in reason:
        raise ExpiredError(f"{file}: the time of the claim credential is over: invite this device again")
    if "refuses this program's certificate" in reason:
        raise CertificateError(f"{file}: {reason}")
