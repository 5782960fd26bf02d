"""Who is let in and who is shut out, in the order that leaves nothing open.

    coordinator ─▶ access list and reload ─▶ certificates ─▶ retained words and presence

The coordinator comes first, because it depends on nobody: from then on nothing that the device says counts,
and no round waits for it. The broker's access list closes the connection that is open, the list of revoked
certificates the next one. Last, what stands at the broker about the device goes. A step that fails is told
and tried again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from liberatai_coordinator import clock
from liberatai_coordinator.fleet.devices import Device, Fleet, Mark
from liberatai_coordinator.intake.presence import Presence
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import MarkRow, TombstoneRow
from liberatai_core.contract.frame import fingerprint
from liberatai_core.contract.topics import DOWN_LEAVES, UP_LEAVES
from liberatai_core.errors import ConfigError, LiberataiError, StateError

log = logging.getLogger(__name__)

DRAINED: Final = "drained"
RETRY_S: Final = 5.0
"""Pause before a step at the broker is tried again."""
STANDING: Final = ("state", "caps", "rep", "have")
"""Leaves of what a device lets stand at the broker."""

Step = Callable[[], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Doors:
    """Lets devices in and shuts them out.

    Attributes:
        broker: brings the broker's access list and its revoked certificates in line with the fleet; None: the
            operator does that (`docs/operations.md`). Called with the devices that are shut out, and with the
            name of one whose certificates are to be revoked ("": none), and why.
        forgotten: called with a device that was decommissioned.
        opened: called with a device that is let in again.
        closed: names that were shut out.
    """

    presence: Presence
    fleet: Fleet
    ledger: Ledger
    publisher: Publisher
    broker: Callable[[frozenset[str], str, str], Awaitable[None]] | None = None
    opened: Callable[[str], Awaitable[None]] | None = None
    forgotten: Callable[[str], None] = lambda _device: None
    closed: set[str] = field(default_factory=set)
    retry_s: float = RETRY_S
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def restore(self) -> None:
        """Take over what the ledger remembers: labels, marks, keys that are refused for good."""
        for grave in self.ledger.devices.tombstones():
            self.fleet.buried.bury(grave.public_key, grave.device)
            self.closed.add(grave.device)
        self.publisher.barred |= self.closed

    def restored(self) -> None:
        """Look at the devices that the ledger remembers."""
        self.closed -= {name for name, one in self.fleet.devices.items() if one.status != "quarantined"}
        self.closed |= {name for name, one in self.fleet.devices.items() if one.status == "quarantined"}
        self.publisher.barred = set(self.closed)

    def begin(self) -> None:
        """Bring the broker in line with what the ledger remembers: it may have been changed meanwhile."""
        if self.broker is not None:
            self._spawn(self._at_broker("", ""))

    def welcome(self, device: str) -> None:
        """Let the broker serve a name again that was shut out: an operator invited a device that has it."""
        if device in self.closed and self.fleet.require(device).status != "quarantined":
            self._open(device)

    def note(self, device: str, name: str, code: str = "", text: str = "") -> None:
        """Note an event of the fleet."""
        self.ledger.events.note(clock.wall(), device, name, code, text)

    # --- status ---------------------------------------------------------------------------------

    def approve(self, device: str, key: str = "") -> Device:
        """Let a pending device in; idempotent.

        Args:
            device: its name.
            key: beginning of its key's fingerprint, as the device shows it; "": not compared.

        Raises:
            NotFoundError: no such device. StateError: it is quarantined, or has another key.
        """
        known = self.fleet.require(device)
        if known.status == "quarantined":
            raise StateError(
                f"{device} is quarantined: `liberatai devices release {device}` lets it in again"
            )
        require_key(known.public_key, key, device)
        changed = self.presence.set_status(device, "approved", "")
        self.note(device, "approved")
        if device in self.closed:  # an earlier machine of this name was shut out
            self._open(device)
        return changed

    def reject(self, device: str, reason: str) -> None:
        """Send a pending device away: it is forgotten, and its key is refused for good.

        Raises:
            StateError: it was let in before.
        """
        if self.fleet.require(device).status != "pending":
            raise StateError(f"{device} was let in before: quarantine or decommission it")
        self.decommission(device, reason or "rejected")

    def quarantine(self, device: str, reason: str) -> Device:
        """Shut a device out until it is released."""
        changed = self.presence.set_status(device, "quarantined", reason)
        self.note(device, "quarantined", text=reason)
        self._close(device, revoke="")
        return changed

    def release(self, device: str) -> Device:
        """Let a quarantined device in again.

        Raises:
            StateError: it is not quarantined.
        """
        if self.fleet.require(device).status != "quarantined":
            raise StateError(f"{device} is not quarantined")
        changed = self.presence.set_status(device, "approved", "")
        self.note(device, "released")
        self._open(device)
        return changed

    def decommission(self, device: str, reason: str) -> None:
        """Remove a device for good: its key and its certificates are refused, what is known of it is deleted.

        Its updates stay: versions were made of them. Another machine may have the name later.
        """
        self.fleet.require(device)
        self.presence.decommission(device, reason)
        self.forgotten(device)
        self.note(device, "decommissioned", text=reason)
        self._close(device, revoke=reason or "decommissioned")

    def rekey(self, device: str, key: str = "") -> Device:
        """Take the key that asks for a device's name: it was set up anew. The key before is refused for good.

        Args:
            device: its name.
            key: beginning of the new key's fingerprint; "": the one that knocked last.

        Raises:
            StateError: nobody knocks, or another key does.
        """
        known, knock = self.fleet.require(device), self.fleet.knocks.get(device)
        if knock is None:
            raise StateError(f"{device}: no other key asks for this name; start the device first")
        require_key(knock.public_key, key, device)
        grave = TombstoneRow(
            public_key=known.public_key, device=device, reason="rekeyed", since_s=clock.wall()
        )
        changed = self.presence.rekey(device, knock.public_key, knock.session, grave)
        self.note(device, "rekeyed", text=f"key {fingerprint(knock.public_key)}")
        self._open(device)
        return changed

    # --- work -----------------------------------------------------------------------------------

    def label(self, device: str, changes: Mapping[str, str | None]) -> Device:
        """Give a device labels, or take them away (None)."""
        self.fleet.require(device)
        self.ledger.devices.set_labels(device, changes)
        return self.fleet.set_labels(device, changes)

    def drain(self, device: str, reason: str) -> Device:
        """Give a device no new task; what it works on is finished and counts."""
        self.fleet.require(device)
        mark = Mark(since_s=clock.wall(), reason=reason)
        self.ledger.devices.mark(
            MarkRow(device=device, mark=DRAINED, since_s=mark.since_s, reason=mark.reason)
        )
        self.note(device, "drained", text=reason)
        return self.presence.set_drained(device, mark)

    def resume(self, device: str) -> Device:
        """Let a drained device work again; idempotent."""
        self.fleet.require(device)
        self.ledger.devices.unmark(device, DRAINED)
        self.note(device, "resumed")
        return self.presence.set_drained(device, None)

    # --- the broker -----------------------------------------------------------------------------

    @property
    def shut_out(self) -> frozenset[str]:
        """Names that the broker shall let do nothing."""
        quarantined = {name for name, one in self.fleet.devices.items() if one.status == "quarantined"}
        gone = {name for name in self.closed if name not in self.fleet.devices}
        return frozenset(quarantined | gone)

    def _close(self, device: str, revoke: str) -> None:
        self.closed.add(device)
        self.publisher.barred.add(device)
        self._spawn(self._after(device, revoke))

    async def _let_in(self, device: str) -> None:
        await self._at_broker(device, "")
        if self.opened is not None:
            await self.opened(device)

    def _open(self, device: str) -> None:
        self.closed.discard(device)
        self.publisher.barred.discard(device)
        self._spawn(self._let_in(device))

    async def _after(self, device: str, revoke: str) -> None:
        await self._at_broker(device, revoke)
        await self.clear(device)
        self.note(device, "shut_out")

    async def _at_broker(self, device: str, revoke: str) -> None:
        told = ""
        while self.broker is not None:
            try:
                await self.broker(self.shut_out, device if revoke else "", revoke)
            except LiberataiError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("%s: the broker is not in line yet: %s %s", device, error.code, error)
                    self.note(device, "broker_behind", error.code, told)
                await asyncio.sleep(self.retry_s)
            else:
                return

    async def clear(self, device: str) -> None:
        """Take away what stands at the broker for a device and about it."""
        topics = self.publisher.topics
        for leaf in STANDING:
            if leaf in UP_LEAVES:
                await self.publisher.clear(topics.up(device, leaf))
        for leaf in sorted(DOWN_LEAVES):
            await self.publisher.clear(topics.down(device, leaf))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait until everything that was begun at the broker is done."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        """Leave what is not done at the broker to the next start."""
        for task in self._tasks:
            task.cancel()


def require_key(public_key: bytes, shown: str, device: str) -> None:
    """Refuse a key that is not the one that somebody reads at the device.

    Raises:
        StateError: it is another one. ConfigError: too little of it was given.
    """
    wanted = shown.replace(":", "").replace("-", "").strip().lower()
    if not wanted:
        return
    if len(wanted) < 16:
        raise ConfigError("--key", [f"{shown}: give at least 16 digits of what the device shows"])
    known = fingerprint(public_key).replace("-", "")
    if not (known.startswith(wanted) or public_key.hex().startswith(wanted)):
        raise StateError(f"{device} has key {fingerprint(public_key)}, not {shown}: it is another machine")
