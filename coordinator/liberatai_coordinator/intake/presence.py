"""What devices say about themselves: checked, decided by `fleet.devices`, remembered, told to the jobs.

Nothing here waits for the disk: the store writes what is remembered soon, many devices at once, the last
word of each, and goes on trying while the disk is full. And no message costs more because there are many
devices or jobs: what changed is told to the jobs together, a moment later.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.fleet.devices import Device, Fleet, Heard, Mark, Status
from liberatai_coordinator.fleet.traffic import DeviceTraffic
from liberatai_coordinator.intake import said
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import DeviceRow, MarkRow, TombstoneRow, TrafficRow
from liberatai_core.contract.messages import (
    Capability,
    Event,
    Message,
    Report,
    SessionSeen,
    State,
    Telemetry,
)
from liberatai_core.errors import BaseMissingError, LiberataiError, ReplayError, SignatureError

log = logging.getLogger(__name__)

TOLD_S, TOLD_AGAIN_S = 0.05, 0.25
"""Jobs hear of changes together: so long after the first, and not sooner after the last time. Looking at all
devices takes them milliseconds; while ten thousand appear, that must not be all that is done."""

TICK_S = 0.5
"""How exactly silence is noticed; it begins after half a minute at the earliest."""

TRAFFIC_S = 60.0
"""Between two writes of what devices' sockets carried. Their counters are totals: a crash loses nothing
but the last words of an agent that started anew in the meantime."""

UNHEARD = DeviceTraffic()
"""Of all devices whose sockets carried nothing that they told of: one value, not one for each."""

LEAF: dict[type[Message], str] = {
    State: "state",
    Capability: "caps",
    Report: "rep",
    Telemetry: "tele",
    Event: "ev",
}
"""Where each message belongs: a State on the topic of a Capability is refused."""


class Jobs(Protocol):
    """Who must know what becomes of devices."""

    def devices_changed(self, devices: Collection[Device], now_s: float) -> None:
        """Devices came, went or can do other things than before."""

    def reported(self, device: Device, report: Report, now_s: float) -> None:
        """A device said where it stands with its task."""

    def base_missing(self, device: Device) -> None:
        """A device does not hold what its task goes on from."""

    def tick(self, now_s: float) -> None:
        """Time passes while the broker is there."""

    def connected_again(self, now_s: float) -> None:
        """The broker is back."""


@dataclass(slots=True, kw_only=True)
class Presence:
    """Takes in what devices say about themselves.

    Attributes:
        answer: sends a device the session number that it must go above.
    """

    fleet: Fleet
    ledger: Ledger
    jobs: Jobs
    answer: Callable[[SessionSeen], Awaitable[None]]
    _changed: dict[str, Device] = field(default_factory=dict)
    _telling: asyncio.TimerHandle | None = None
    _told_s: float = -TOLD_AGAIN_S
    _moved: set[str] = field(default_factory=set)
    _said: said.Devices = field(default_factory=said.Devices)

    def restore(self) -> None:
        """Take over what the ledger remembers of devices."""
        traffic, updates = self.ledger.devices.traffic(), self.ledger.updates.counts()
        rows, labels = self.ledger.devices.all(), self.ledger.devices.labels()
        drained = {mark.device: mark for mark in self.ledger.devices.marks() if mark.mark == "drained"}
        self.fleet.wall_s = clock.wall()
        known = [_device(row, traffic.get(row.id), updates.get(row.id, 0)) for row in rows]
        del rows  # of a million devices they are half a gigabyte
        for place, one in enumerate(known):
            if one.id in labels or one.id in drained:
                told = tuple(sorted(labels.get(one.id, {}).items()))
                known[place] = replace(one, labels=told, drained=_mark(drained.get(one.id)))
        self.fleet.restore(known)
        self.fleet.refusals = {name: Counter(codes) for name, codes in self.ledger.refusals.all().items()}

    async def run(self) -> None:
        """Notice silence, and save what devices' sockets carried now and then, until cancelled."""
        saved_s = clock.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = clock.monotonic()
            self.fleet.wall_s = max(self.fleet.wall_s, clock.wall())
            silent = self.fleet.expire(now_s)
            if silent:
                self._note_changed(*silent)
            for one in silent:
                self.ledger.events.note(self.fleet.wall_s, one.id, "silent", text=one.note)
            if self.fleet.connected:  # without a broker nobody can say that he is back
                self.jobs.tick(now_s)
            self.fleet.forget_pending(now_s)
            await self._forget()
            if now_s - saved_s >= TRAFFIC_S:
                self.save_traffic()
                saved_s = now_s

    async def hear(self, message: Message, key: bytes, *, retained: bool) -> None:
        """Take in one verified message of a device.

        Args:
            message: a State, Capability, Report, Telemetry or Event on its own topic.
            key: that verified it.
            retained: the broker had it in store.

        Raises:
            LiberataiError: refused; see `Fleet.hear`.
        """
        now_s = clock.monotonic()
        try:
            heard = self.fleet.hear(message, key, now_s, wall_s=clock.wall(), retained=retained)
        except ReplayError:
            if not retained:
                await self._answer_replay(message, now_s)
            raise
        except SignatureError:
            self._note_knock(message)
            raise
        device = heard.device
        # A stranger that waits for approval may say what it likes; it is written down once.
        if heard.lasting and (heard.new or device.status != "pending"):
            self.ledger.devices.remember(device_row(device))
        self._note_event(message, heard)
        if heard.new and device.status == "pending":
            log.warning("new device %s waits: `liberatai devices approve %s`", device.id, device.id)
        if heard.changed:
            self._note_changed(device)
        if isinstance(message, Telemetry):
            self._moved.add(device.id)
        if isinstance(message, Report):
            self.jobs.reported(device, message, now_s)
        if isinstance(message, Event) and message.code == BaseMissingError.code:
            self.jobs.base_missing(device)

    def enrolled(self, device: Device) -> None:
        """Write down a device that came with an invitation."""
        self.ledger.devices.remember(device_row(device))
        self._note_changed(device)

    def note_alive(self, device: str) -> None:
        """Take an update, an offer or a part of an upload as a sign of life."""
        if device in self.fleet.devices and self.fleet.note_alive(device, clock.monotonic(), clock.wall()):
            self._note_changed(self.fleet.devices[device])

    def set_connected(self, connected: bool) -> None:
        """Note that the broker is there, or went away."""
        before = self.fleet.connected
        self.fleet.set_connected(connected, clock.monotonic())
        if before == connected:
            return
        if connected:
            self.jobs.connected_again(clock.monotonic())
        # After a restart nobody has said anything yet: who does not in a while is away.
        quiet = [device for device in self.fleet.devices.values() if device.said == "unknown"]
        self._note_changed(*(quiet if connected else []))

    def set_status(self, device: str, status: Status, reason: str) -> Device:
        """Approve, quarantine or release a device; on disk when this returns.

        Raises:
            NotFoundError: no such device. LiberataiError: it cannot be written; nothing has changed.
        """
        before = self.fleet.require(device)
        self.ledger.devices.remember(device_row(before))
        self.ledger.devices.set_status(device, status, reason)
        changed = self.fleet.set_status(device, status, reason)
        self._note_changed(changed)
        self._tell()  # who is shut out is out now
        return changed

    def set_drained(self, device: str, mark: Mark | None) -> Device:
        """Give a device no new task, or let it work again; it is on disk already."""
        changed = self.fleet.set_drained(device, mark)
        self._note_changed(changed)
        self._tell()
        return changed

    def decommission(self, device: str, reason: str) -> None:
        """Forget a device and refuse its key for good; on disk when this returns.

        Raises:
            NotFoundError: no such device. LiberataiError: it cannot be written; nothing has changed.
        """
        known = self.fleet.require(device)
        grave = TombstoneRow(public_key=known.public_key, device=device, reason=reason, since_s=clock.wall())
        self.ledger.devices.decommission(grave)
        self.ledger.refusals.forget(device)
        # The jobs hear that it is shut out while it is still known: no round waits for it.
        self._note_changed(self.fleet.set_status(device, "quarantined", reason))
        self._tell()
        self.fleet.decommission(device)
        self._moved.discard(device)

    def rekey(self, device: str, public_key: bytes, session: int, grave: TombstoneRow) -> Device:
        """Let a device have another key; on disk when this returns.

        Raises:
            NotFoundError: no such device. LiberataiError: it cannot be written; nothing has changed.
        """
        known = self.fleet.require(device)
        fresh = replace(
            known, public_key=public_key, session=session, status="approved", reason="", capability=None
        )
        self.ledger.devices.rekey(device_row(fresh), grave)
        changed = self.fleet.rekey(device, public_key, session)
        self._note_changed(changed)
        self._tell()
        return changed

    def save_traffic(self) -> None:
        """Let it be written what devices' sockets carried since the last time."""
        known = [self.fleet.devices[name] for name in sorted(self._moved) if name in self.fleet.devices]
        let_in = [one for one in known if one.status != "pending"]
        if let_in:
            self.ledger.devices.set_traffic([_traffic_row(one.id, one.traffic) for one in let_in])
        self._moved = {one.id for one in known if one.status == "pending"}

    def _note_knock(self, message: Message) -> None:
        name: str = message.device  # type: ignore[attr-defined]
        knock = self.fleet.knocks.get(name)
        if isinstance(message, Capability) and knock is not None and knock.times == 1:
            log.warning("another key asks for the name %s: `liberatai devices rekey %s`", name, name)
            self.ledger.events.note(self.fleet.wall_s, name, "knocking", SignatureError.code)

    def _note_event(self, message: Message, heard: Heard) -> None:
        """Note what came to pass; of one that was not let in only that it is there."""
        device, wall_s = heard.device, self.fleet.wall_s
        if heard.new:
            self.ledger.events.note(wall_s, device.id, "appeared", text=device.status)
        if device.status != "approved":
            return
        if heard.moved:
            self.ledger.events.note(wall_s, device.id, device.state)
        if isinstance(message, Event):
            self.ledger.events.note(wall_s, device.id, message.name, message.code, message.text)

    async def _answer_replay(self, message: Message, now_s: float) -> None:
        session = self.fleet.answer_replay(message, now_s)
        if session:
            device: str = message.device  # type: ignore[attr-defined]
            log.warning("%s speaks in an old session: it is told to go above %d", device, session)
            await self.answer(SessionSeen(device=device, session=session))

    def _note_changed(self, *devices: Device) -> None:
        self._changed |= {device.id: device for device in devices}
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_at(max(loop.time() + TOLD_S, self._told_s + TOLD_AGAIN_S), self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told_s = asyncio.get_running_loop().time()
        changed, self._changed = self._changed, {}
        # As they are now: what was changed twice is told once.
        known = [self.fleet.devices[name] for name in changed if name in self.fleet.devices]
        self._said.changed(known, self.fleet.shown)
        self.jobs.devices_changed(known, clock.monotonic())

    async def _forget(self) -> None:
        names, self.fleet.forgotten = self.fleet.forgotten, []
        if not names:
            return
        try:
            await asyncio.to_thread(self.ledger.devices.forget, names)
        except LiberataiError as error:
            self.fleet.forgotten += names
            log.warning("devices that never were let in are not forgotten yet: %s %s", error.code, error)


def device_row(device: Device) -> DeviceRow:
    """Return what the ledger keeps of a device."""
    return DeviceRow(
        id=device.id,
        public_key=device.public_key,
        status=device.status,
        capability=msgspec.msgpack.encode(device.capability) if device.capability else None,
        session=device.session,
        first_seen_s=device.last_seen_s,
        last_seen_s=device.last_seen_s,
        reason=device.reason,
    )


def _device(row: DeviceRow, traffic: TrafficRow | None, updates: int) -> Device:
    return Device(
        id=row.id,
        public_key=row.public_key,
        status=msgspec.convert(row.status, Status),
        capability=_capability(row),
        session=row.session,
        last_seen_s=row.last_seen_s,
        alive_s=clock.monotonic(),
        reason=row.reason,
        traffic=_traffic(traffic) if traffic is not None else UNHEARD,
        updates=updates,
    )


def _capability(row: DeviceRow) -> Capability | None:
    """Return what a device said of itself; of another release it may be unreadable: it will say it again."""
    try:
        return msgspec.msgpack.decode(row.capability, type=Capability) if row.capability else None
    except (msgspec.MsgspecError, LiberataiError):
        log.warning("%s: what the ledger has of it is of another release", row.id)
        return None


def _mark(row: MarkRow | None) -> Mark | None:
    return None if row is None else Mark(since_s=row.since_s, reason=row.reason)


def _traffic(row: TrafficRow) -> DeviceTraffic:
    return DeviceTraffic(
        sent_bytes=row.sent_bytes,
        received_bytes=row.received_bytes,
        session=row.session,
        session_sent=row.session_sent,
        session_received=row.session_received,
    )


def _traffic_row(device: str, told: DeviceTraffic) -> TrafficRow:
    return TrafficRow(
        device=device,
        sent_bytes=told.sent_bytes,
        received_bytes=told.received_bytes,
        session=told.session,
        session_sent=told.session_sent,
        session_received=told.session_received,
    )
