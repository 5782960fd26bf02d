"""An agent that has no certificate yet: it asks, waits, and says on its own screen for whom."""

import asyncio
import contextlib
import json
import logging
import os
import time

from liberatai_agent.config import AgentConfig
from liberatai_agent.membership.identity import Identity
from liberatai_agent.membership.joining import join, why_join
from liberatai_agent.store.files import replace_quickly
from liberatai_agent.store.state_folder import StateLock
from liberatai_agent.store.status import FILE
from liberatai_core import __version__
from liberatai_core.contract.frame import fingerprint
from liberatai_core.errors import LiberataiError
from liberatai_core.sd_notify import notify, pause_s

log = logging.getLogger(__name__)

REFUSED_RETRY_S = 300.0
"""Between two questions of a device that was refused: only an operator changes that."""


async def wait_for_certificate(config: AgentConfig) -> None:
    """Return when there is a certificate.

    Raises:
        LockedError: another agent uses the state folder. ConfigError, DiskError: it cannot be used.
    """
    lock = StateLock(config.state_path)
    try:
        identity = Identity(config.state_path, config.device, config.fleet)
        log.info("%s: asking for one at %s", why_join(config), config.claim_broker)
        notify("READY=1")
        beating = asyncio.create_task(_beat())
        try:
            await _join(config, identity)
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
    finally:
        lock.close()


async def _join(config: AgentConfig, identity: Identity) -> None:
    said = ""

    def say(phase: str, text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            log.warning("%s%s", "waits for approval: " if phase == "pending" else "", text)
        _show(config, identity, phase, text)
        notify(f"STATUS={phase}: {text}")

    say("joining", why_join(config))
    while True:
        try:
            await join(config, identity, say)
        except LiberataiError as error:
            say("refused", f"{error.code}: {error}")
            await asyncio.sleep(REFUSED_RETRY_S)
        else:
            log.info("this device has its certificate")
            return


async def _beat() -> None:
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(pause_s())


def _show(config: AgentConfig, identity: Identity, phase: str, text: str) -> None:
    """Write what `liberatai-agent status` shows."""
    found = {
        "device": config.device,
        "fleet": config.fleet,
        "version": __version__,
        "pid": os.getpid(),
        "running": True,
        "broker": config.claim_broker,
        "connected": False,
        "phase": phase,
        "reason": text,
        "public_key": identity.signer.public_key.hex(),
        "key": fingerprint(identity.signer.public_key),
        "updated_at": time.time(),
    }
    with contextlib.suppress(OSError):
        replace_quickly(config.state_path / FILE, json.dumps(found, indent=1).encode())
