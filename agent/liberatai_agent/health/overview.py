"""What `liberatai-agent status` shows of a running agent; the file is written when something changed.

A card wears out by writing: counters that move all the time do not count as a change.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liberatai_agent.config import AgentConfig
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.machine import probe
from liberatai_agent.membership.identity import Identity
from liberatai_agent.session import Session, report_of
from liberatai_agent.session.state import final_of, missing_of
from liberatai_agent.shadow.models import Deployed
from liberatai_agent.store.faults import Faults
from liberatai_agent.store.files import replace_quickly
from liberatai_agent.store.status import FILE, last_error
from liberatai_core import __version__
from liberatai_core.certificate_file import Dates
from liberatai_core.contract.frame import fingerprint
from liberatai_core.contract.messages import Capability, Step
from liberatai_core.link.link import Connected, Traffic
from liberatai_core.units import date_text

PAUSE_S = 1.0
"""Between two writes: several things change at once."""
REFRESH_S = 3600.0
"""For the counters, and so that an old file is a dead agent's."""
MOVING = frozenset({"updated_at", "sent_bytes", "received_bytes", "link", "refusals", "last_error_at"})
"""What changes all the time."""
STEADY_LINK = ("metered", "day_quota_bytes", "quota_spent")
"""What of the link does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The parts of an agent that its status speaks of."""

    config: AgentConfig
    session: Session
    identity: Identity
    meter: LinkMeter
    faults: Faults
    traffic: Traffic
    connected: Connected | None
    capability: Capability | None
    found: probe.Bench | None
    last_training: dict[str, Any]
    certificate: Dates | None
    blobs: Path
    deployed: Deployed | None
    deployed_files: list[str]
    started_at: float


def overview(seen: Seen, *, stopped: bool) -> dict[str, Any]:
    """Return the status as it is written."""
    config, state, report = seen.config, seen.session, report_of(seen.session)
    caps, found, last = seen.capability, seen.found or probe.Bench(), seen.last_training
    connected = None if stopped else seen.connected
    structure = state.spec[1].structure.id if state.task and state.spec else ""
    return {
        "device": config.device,
        "fleet": config.fleet,
        "version": __version__,
        "pid": os.getpid(),
        "running": not stopped,
        "session": seen.identity.session,
        "public_key": seen.identity.signer.public_key.hex(),
        "key": fingerprint(seen.identity.signer.public_key),
        "certificate": certificate_words(seen.certificate),
        "broker": config.broker,
        "connected": connected is not None,
        "protocol": connected.protocol if connected is not None else "",
        "coordinator": state.coordinator,
        "epoch": state.epoch,
        "phase": "stopped" if stopped else report.phase,
        "reason": report.reason,
        "job": report.job,
        "round": report.round or last.get("round", 0),
        "structure": structure or last.get("structure", ""),
        "tier": caps.tier if caps else "",
        "profile": caps.profile if caps else "",
        "samples": caps.samples if caps else 0,
        "storage_bytes": caps.storage_bytes if caps else 0,
        "sent_bytes": seen.traffic.sent_bytes,
        "received_bytes": seen.traffic.received_bytes,
        "link": _link(seen.meter, metered=caps.metered if caps else None),
        "updates_waiting": len(state.pending),
        "last_training": last,
        "model": _model(final_of(state.work), seen.blobs, complete=not missing_of(state.work)),
        "deployed": _deployed(seen.deployed, seen.deployed_files),
        "broker_refuses": [words for _, words in state.refused],
        "refusals": dict(sorted(seen.faults.refused.items())),
        "updates_refused": dict(state.refusals),
        **last_error(seen.faults.last, seen.faults.last_at, time.time()),
        "data_fault": found.fault,
        "data_warning": found.warning,
        "started_at": seen.started_at,
        "updated_at": time.time(),
    }


def certificate_words(dates: Dates | None) -> str:
    """Return until when a certificate is valid, in days; "" if there is none."""
    if dates is None:
        return ""
    if not dates.is_possible():
        return f"valid until {date_text(dates.end_s)}; this device's clock cannot be right"
    warning = ": it should have been renewed, see the log" if dates.ends_soon() else ""
    return f"valid until {date_text(dates.end_s)}, {dates.days_left():.0f} days left{warning}"


def _link(meter: LinkMeter, *, metered: bool | None) -> dict[str, Any]:
    """Return what is measured and counted of the link; rates are null until they are measured."""
    link = meter.link
    return {
        "up_bits_s": link.up_bits_s,
        "down_bits_s": link.down_bits_s,
        "latency_s": link.latency_s,
        "metered": metered,
        "day_bytes": link.day_bytes,
        "day_quota_bytes": meter.quota_bytes,
        "quota_spent": meter.spent,
        "ever_sent_bytes": link.sent_bytes,
        "ever_received_bytes": link.received_bytes,
    }


def _model(chain: tuple[Step, ...], blobs: Path, *, complete: bool) -> dict[str, Any]:
    """Return the finished model on this device: version, digest and files, oldest first."""
    if not chain:
        return {}
    return {
        "version": chain[-1].version,
        "digest": chain[-1].digest.hex(),
        "complete": complete,
        "files": [str(blobs / step.blob.blob) for step in chain],
    }


def _deployed(one: Deployed | None, files: list[str]) -> dict[str, Any]:
    """Return the model that the fleet has put on this device: a program that uses it reads these files."""
    if one is None:
        return {}
    return {
        "model": one.wish.model,
        "version": one.wish.version,
        "structure": one.structure,
        "digest": one.wish.steps[-1].digest.hex(),
        "evaluation": one.evaluation,
        "files": files,
    }


class StatusFile:
    """Keeps the file.

    Args:
        folder: of the state.
        status: gives what it shows.
    """

    def __init__(self, folder: Path, status: Callable[..., dict[str, Any]]) -> None:
        self._path, self._status = folder / FILE, status
        self._changed = asyncio.Event()
        self._written: dict[str, Any] | None = None

    def changed(self) -> None:
        """Write before long, if there is something new."""
        self._changed.set()

    async def run(self) -> None:
        """Write, for ever."""
        while True:
            self.write()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._changed.wait()
                    self._changed.clear()
                    await self._until_news()
            await asyncio.sleep(PAUSE_S)

    async def _until_news(self) -> None:
        while steady(self._status()) == self._written:
            await self._changed.wait()
            self._changed.clear()

    def write(self, *, stopped: bool = False) -> None:
        """Write the file; a disk that refuses is asked again at the next change."""
        found = self._status(stopped=stopped)
        with contextlib.suppress(OSError):
            replace_quickly(self._path, json.dumps(found, indent=1).encode())
            self._written = steady(found)


def steady(status: dict[str, Any]) -> dict[str, Any]:
    """Return a status without what changes all the time."""
    link = {name: status.get("link", {}).get(name) for name in STEADY_LINK}
    return {name: value for name, value in status.items() if name not in MOVING} | {"link": link}
