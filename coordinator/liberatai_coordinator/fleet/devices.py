"""Who is there and what it can do: the registry of devices as values. Pure: time is an argument.

A device introduces itself with a signed Capability that carries its key. What then happens is the
operator's choice (`enrolment`): nothing it says counts before it is approved.

What a device said of itself stands at the broker for ever, true or not: a will may be refused, a broker may
be replaced. So a device is believed to be there only as long as it gives signs of life, and no device is
while the coordinator has no broker.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from liberatai_coordinator.fleet.keys import BuriedKeys, Knock, knock
from liberatai_coordinator.fleet.traffic import NO_TRAFFIC, DeviceTraffic
from liberatai_coordinator.fleet.watch import Watch
from liberatai_core.contract import limits
from liberatai_core.contract.frame import key_id
from liberatai_core.contract.messages import Capability, Event, Message, Report, State, Telemetry
from liberatai_core.errors import (
    NotFoundError,
    ReplayError,
    RevokedError,
    SchemaError,
    SignatureError,
    UnknownDeviceError,
)

Status = Literal["pending", "approved", "quarantined"]
Enrolment = Literal["approve", "allowlist", "open"]

MAX_PENDING = 1000
"""Devices that wait for approval: a stranger cannot fill the memory with names."""

MAX_DEVICES = 100_000
"""Devices in all, if the settings say nothing else: the same for whoever gets past the broker."""

PENDING_SILENT_S = 3600.0
"""After so long a silence one that waits for approval gives its place to a newcomer, if there is no other."""

PENDING_KEPT_S = 7 * 86_400.0
"""A week without a word: whoever still wants in says so again."""

SILENT_INTERVALS, SILENT_LEAST_S = 3.0, 30.0
"""Who says nothing for so many of its telemetry intervals, and at least so long, may be anywhere."""

EXPIRED_AT_ONCE = 1000
"""Devices that are looked at together: some milliseconds; the turn of the others comes a moment later."""

CLONE_S, CLONE_TURNS = 3600.0, 3
"""So many numbers that go back, each within an hour of the last one, are two machines with one key; a device
that was put back from a copy does it once."""

ANSWER_S = 10.0
"""Between two answers to a device whose session number went back: a replayed frame must not cause a flood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What an operator has said of a device, since when (Unix seconds) and why."""

    since_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device as the coordinator knows it.

    Attributes:
        said: the state that it said last, "unknown" before its first word.
        last_seen_s: wall clock of its last sign of life.
        alive_s: the coordinator's own clock then, or when it came to know what the broker has in store.
        silent: it gave no sign of life for too long.
        note: what is odd about it, in words; "" where nothing is.
        ignores: why it does not believe this coordinator, by its own word; "" if it does.
        traffic: what its socket carried, as far as it said so.
        updates: of this device that were stored, in all jobs.
        labels: (name, value) that operators gave it, by name.
        drained: it gets no new task since then; None: it may get one.
        status_s, state_s, phase_s: when status, state and phase changed last (Unix seconds); 0: not known.
        turns: how often its session number went back on a live connection: two machines with one key do that
            in turns.
        turned_s: when it did so last.
    """

    id: str
    public_key: bytes
    status: Status
    capability: Capability | None = None
    session: int = 0
    said: str = "unknown"
    report: Report | None = None
    telemetry: Telemetry | None = None
    last_event: Event | None = None
    last_seen_s: float = 0.0
    alive_s: float = 0.0
    silent: bool = False
    reason: str = ""
    note: str = ""
    ignores: str = ""
    traffic: DeviceTraffic = NO_TRAFFIC
    updates: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    drained: Mark | None = None
    status_s: float = 0.0
    state_s: float = 0.0
    phase_s: float = 0.0
    turns: int = 0
    turned_s: float = 0.0

    @property
    def state(self) -> str:
        """What it is believed to be: what it said, unless it is silent."""
        return "unknown" if self.silent and self.said in LIVING else self.said

    @property
    def cloned(self) -> bool:
        """Whether two machines seem to use its key."""
        return self.turns >= CLONE_TURNS

    @property
    def online(self) -> bool:
        """Whether it said so, no will has contradicted it, and it is not silent."""
        return self.said == "online" and not self.silent

    @property
    def silence_s(self) -> float:
        """After how many seconds without a sign of life nothing is known of it."""
        interval_s = self.capability.telemetry_s if self.capability else 60.0
        return max(SILENT_LEAST_S, SILENT_INTERVALS * interval_s)


OBEYING = ("fetching", "training", "sending")
"""What a device does only for a coordinator that it believes."""

LIVING = ("online", "draining")
"""States that only a living device is in."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What followed from a device's word.

    Attributes:
        device: as it is known now.
        new: it was not known before.
        lasting: something changed that must be remembered over a restart.
        changed: it came, went, or can do other things than before: jobs look again.
        moved: its state is another one than before.
    """

    device: Device
    new: bool
    lasting: bool
    changed: bool
    moved: bool = False


@dataclass(slots=True)
class Fleet:
    """All devices by name, and by key.

    Attributes:
        enrolment: what happens to a key that nobody has seen.
        allowed: device name -> public key, known beforehand.
        max_devices: how many are taken in at most; those that the ledger remembers stay, however many.
        connected: whether there is a broker; without one nobody is there.
        forgotten: names that were given up, until somebody takes note of them.
        wall_s: the time of day, as far as it was told.
        refusals: how often what a device sent was refused, by code; "" for strangers.
        buried: keys that are refused for good.
        knocks: other keys that ask for the name of a known device.
    """

    enrolment: Enrolment
    allowed: dict[str, bytes] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    refusals: dict[str, Counter[str]] = field(default_factory=dict)
    max_devices: int = MAX_DEVICES
    connected: bool = True
    forgotten: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    buried: BuriedKeys = field(default_factory=BuriedKeys)
    knocks: dict[str, Knock] = field(default_factory=dict)
    _since_s: float = 0.0
    _index: dict[bytes, str] = field(default_factory=dict)
    _pending: dict[str, None] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _names: list[str] | None = None
    _watch: Watch = field(default_factory=Watch)
    _answered: dict[str, float] = field(default_factory=dict)

    # --- the registry --------------------------------------------------------------------------

    def restore(self, devices: list[Device]) -> None:
        """Take over what the ledger remembers, and whoever the settings allow."""
        self.devices = {device.id: device for device in devices}
        for name, key in self.allowed.items():
            if key in self.buried.owners:
                continue
            if name not in self.devices or self.devices[name].public_key != key:
                self.devices[name] = Device(id=name, public_key=key, status="approved")
        self._index = {key_id(device.public_key): device.id for device in self.devices.values()}
        self._pending, self._ready, self._watch = {}, set(), Watch()
        for device in list(self.devices.values()):
            self._put(device)

    def key(self, wanted: bytes) -> bytes | None:
        """Return the public key with this key id, or None. A buried one is known: it is refused by name."""
        owner = self.owner(wanted)
        return self.devices[owner].public_key if owner else self.buried.get(wanted)

    def owner(self, wanted: bytes) -> str | None:
        """Return the device that has the key with this key id."""
        return self._index.get(wanted)

    def require(self, device: str) -> Device:
        """Return a device, or raise NotFoundError."""
        if device not in self.devices:
            raise NotFoundError(f"no device {device!r}; `liberatai devices list` shows all")
        return self.devices[device]

    def admit(self, device: str) -> Device:
        """Return the device if what it sends may count.

        Raises:
            RevokedError: quarantined. UnknownDeviceError: not approved yet.
        """
        found = self.require(device)
        if found.status == "quarantined":
            raise RevokedError(f"{device} is quarantined: {found.reason}")
        if found.status == "pending":
            raise UnknownDeviceError(f"{device} waits for approval: `liberatai devices approve {device}`")
        return found

    def set_status(self, device: str, status: Status, reason: str = "") -> Device:
        """Approve, quarantine or release a device."""
        return self._put(replace(self.require(device), status=status, reason=reason, status_s=self.wall_s))

    def set_labels(self, device: str, changes: Mapping[str, str | None]) -> Device:
        """Give a device labels, or take them away (None)."""
        known = self.require(device)
        labels = {**dict(known.labels), **changes}
        kept = sorted((name, value) for name, value in labels.items() if value is not None)
        return self._put(replace(known, labels=tuple(kept)))

    def set_drained(self, device: str, mark: Mark | None) -> Device:
        """Give a device no new task from now on, or (None) let it work again."""
        return self._put(replace(self.require(device), drained=mark))

    def decommission(self, device: str) -> Device:
        """Forget a device and refuse its key for good; returns what was known of it."""
        known = self.set_status(device, "quarantined", "decommissioned")
        self._forget(device)
        self.forgotten.remove(device)
        self.buried.bury(known.public_key, device)
        self.knocks.pop(device, None)
        return known

    def rekey(self, device: str, public_key: bytes, session: int) -> Device:
        """Let a device have another key from now on; the one before is refused for good."""
        known = self.require(device)
        self._index.pop(key_id(known.public_key), None)
        self.buried.bury(known.public_key, device)
        self.buried.dig_up(public_key)
        self._index[key_id(public_key)] = device
        self.knocks.pop(device, None)
        fresh = Device(
            id=device,
            public_key=public_key,
            status="approved",
            session=session,
            alive_s=known.alive_s,
            last_seen_s=known.last_seen_s,
            traffic=known.traffic,
            updates=known.updates,
            labels=known.labels,
            drained=known.drained,
            status_s=self.wall_s,
        )
        return self._put(fresh)

    def enrol(self, device: str, public_key: bytes, status: Status, now_s: float, wall_s: float) -> Device:
        """Register a device with its key; of one that is known, pending becomes approved and nothing else.

        Args:
            device: its name.
            public_key: that it signs with.
            status: "approved", or "pending" where an operator decides.
            now_s: the coordinator's own clock.
            wall_s: the time of day.

        Raises:
            SignatureError: the name has another key. UnknownDeviceError: too many devices.
        """
        self.buried.require_alive(public_key)
        known = self.devices.get(device)
        if known is not None:
            if known.public_key != public_key:
                raise SignatureError(f"{device} has another key")
            is_let_in = known.status == "pending" and status == "approved"
            return self._put(replace(known, status=status)) if is_let_in else known
        self._require_room()
        if status == "pending" and len(self._pending) >= MAX_PENDING:
            raise UnknownDeviceError(f"{len(self._pending)} devices wait for approval already")
        made = self._put(
            Device(id=device, public_key=public_key, status=status, alive_s=now_s, last_seen_s=wall_s)
        )
        self._index[key_id(public_key)] = device
        return made

    def count_update(self, device: str) -> None:
        """Note that one more update of a device is stored, if it was not decommissioned meanwhile."""
        known = self.devices.get(device)
        if known is not None:
            self._put(replace(known, updates=known.updates + 1))

    def ready(self) -> list[Device]:
        """Return devices that can get work: approved, there, introduced, with quota left; by name."""
        if not self.connected:
            return []
        if self._names is None:
            self._names = sorted(self._ready)
        return [self.devices[name] for name in self._names]

    @property
    def ready_names(self) -> frozenset[str]:
        """Names of the devices that `ready` would return."""
        return frozenset(self._ready) if self.connected else frozenset()

    def shown(self, device: Device) -> tuple[str, str]:
        """Return a device's state for people, and what is odd about it in words."""
        if not self.connected and device.said in LIVING:
            return "unknown", "the coordinator has no broker"
        return device.state, device.note or device.ignores

    # --- what devices say ----------------------------------------------------------------------

    def hear(
        self,
        message: Message,
        signer: bytes,
        now_s: float,
        *,
        wall_s: float | None = None,
        retained: bool = False,
    ) -> Heard:
        """Take in what a device says of itself.

        Args:
            message: a verified State, Capability, Report, Telemetry or Event.
            signer: public key that verified it.
            now_s: the coordinator's own clock, which only goes forward.
            wall_s: the time of day; None: as `now_s`.
            retained: the broker had it in store: it is no sign of life.

        Raises:
            UnknownDeviceError: nobody with this name, and new names are not taken.
            SignatureError: the name belongs to another key.
            ReplayError: from an older session than the last one heard.
            SchemaError: from a session that no device reaches.
        """
        name: str = message.device  # type: ignore[attr-defined]
        session: int = message.session  # type: ignore[attr-defined]
        self.buried.require_alive(signer)
        self.wall_s = max(self.wall_s, wall_s or 0.0)
        before = self.devices.get(name)
        known = before or self._introduce(message, signer, now_s)
        if known.public_key != signer:
            if isinstance(message, Capability):
                knock(self.knocks, name, signer, session, self.wall_s)
            raise SignatureError(
                f"{name} has another key: if it was set up anew, `liberatai devices rekey {name}` lets it in"
            )
        if session > limits.MAX_SESSION:
            raise SchemaError(f"{name}: session {session}, at most {limits.MAX_SESSION}")
        if session < known.session:
            if before is not None and not retained and _is_present(message):
                note = f"its session number went back from {known.session} to {session}"
                self._put(_turned(replace(known, note=note), self.wall_s))
            raise ReplayError(f"{name}: session {session}, the last one was {known.session}")
        device = _heard(known, message, session)
        if not retained and not _is_will(message):
            seen_s = now_s if wall_s is None else wall_s
            device = replace(device, last_seen_s=seen_s, alive_s=now_s, silent=False, note="")
        elif before is None or device.said != known.said:
            # What the broker has in store is believed, until the silence after it is too long.
            device = replace(device, alive_s=now_s, silent=False)
        self._put(device)
        if before is None:
            self._index[key_id(device.public_key)] = name
        lasting = device.capability != known.capability or device.session != known.session
        changed = (
            before is None
            or (device.online, device.said) != (before.online, before.said)
            or device.capability != before.capability
        )
        moved = before is None or before.state != device.state
        return Heard(device, before is None, lasting or before is None, changed, moved)

    def note_alive(self, device: str, now_s: float, wall_s: float) -> bool:
        """Take an update, or a part of one, as a sign of life; returns whether the device was silent."""
        known = self.require(device)
        self._put(replace(known, last_seen_s=wall_s, alive_s=now_s, silent=False, note="", ignores=""))
        return known.silent

    def answer_replay(self, message: Message, now_s: float) -> int | None:
        """Return the session that a device put back from a copy must go above; None: say nothing.

        Args:
            message: verified, from an older session, and not in store at the broker.
            now_s: as in `hear`.
        """
        known = self.devices.get(getattr(message, "device", ""))
        if known is None or not _is_present(message):
            return None
        if now_s - self._answered.get(known.id, -ANSWER_S) < ANSWER_S:
            return None
        self._answered[known.id] = now_s
        return known.session

    # --- signs of life -------------------------------------------------------------------------

    def set_connected(self, connected: bool, now_s: float) -> None:
        """Note that the broker went away, or is there: then all have their time to be heard again."""
        self.connected, self._since_s = connected, now_s

    def expire(self, now_s: float) -> list[Device]:
        """Return devices that have become silent, some of them if many: quick, however many there are."""
        found: list[Device] = []
        for _ in range(EXPIRED_AT_ONCE):
            name = self._watch.take(now_s) if self.connected else None
            if name is None:
                break
            device = self.devices.get(name)
            if device is None or device.silent or device.said not in LIVING:
                continue
            spent = device.capability is not None and device.capability.quota_spent
            since_s = now_s if spent else max(device.alive_s, self._since_s)
            if since_s + device.silence_s > now_s:
                self._watch.add(name, since_s + device.silence_s)
                continue
            note = f"nothing heard for {device.silence_s:.0f} s: does the broker refuse what it says?"
            found.append(self._put(replace(device, silent=True, note=note)))
        return found

    def forget_pending(self, now_s: float) -> None:
        """Forget devices that waited for approval and were not heard for long."""
        while self._pending:
            first = next(iter(self._pending))  # heard longest ago
            if now_s - self.devices[first].alive_s < PENDING_KEPT_S:
                return
            self._forget(first)

    # --- within --------------------------------------------------------------------------------

    def _put(self, device: Device) -> Device:
        name = device.id
        before = self.devices.get(name)
        if before is None or before.state != device.state:
            device = replace(device, state_s=self.wall_s)
        if before is None or _phase(before) != _phase(device):
            device = replace(device, phase_s=self.wall_s)
        self.devices[name] = device
        self._pending.pop(name, None)
        if device.status == "pending":
            self._pending[name] = None
        capability = device.capability
        ready = (
            device.status == "approved"
            and device.online
            and device.drained is None
            and capability is not None
            and not capability.quota_spent
        )
        if ready != (name in self._ready):
            self._names = None
            (self._ready.add if ready else self._ready.discard)(name)
        if device.said in LIVING and not device.silent:
            self._watch.add(name, device.alive_s + device.silence_s)
        return device

    def _forget(self, name: str) -> None:
        device = self.devices.pop(name)
        self._index.pop(key_id(device.public_key), None)
        self._pending.pop(name, None)
        self._answered.pop(name, None)
        self.refusals.pop(name, None)
        self.forgotten.append(name)

    def _require_room(self) -> None:
        known = len(self.devices)
        if known >= self.max_devices:
            raise UnknownDeviceError(f"{known} devices are known already: raise max_devices in the settings")

    def _introduce(self, message: Message, signer: bytes, now_s: float) -> Device:
        if not isinstance(message, Capability):
            raise UnknownDeviceError("said something before it introduced itself")
        if self.enrolment == "allowlist":
            raise UnknownDeviceError(f"{message.device} is not in the coordinator's list of devices")
        self._require_room()
        if self.enrolment == "approve" and len(self._pending) >= MAX_PENDING:
            first = next(iter(self._pending))
            if now_s - self.devices[first].alive_s < PENDING_SILENT_S:
                raise UnknownDeviceError(f"{len(self._pending)} devices wait for approval already")
            self._forget(first)
        status: Status = "approved" if self.enrolment == "open" else "pending"
        return Device(id=message.device, public_key=signer, status=status)


def _turned(device: Device, wall_s: float) -> Device:
    turns = device.turns + 1 if wall_s - device.turned_s <= CLONE_S else 1
    return replace(device, turns=turns, turned_s=wall_s)


def _phase(device: Device) -> str:
    return device.report.phase if device.report else ""


def _is_will(message: Message) -> bool:
    """Whether the broker says this in the device's name, after the device is gone."""
    return isinstance(message, State) and message.state == "lost"


def _is_present(message: Message) -> bool:
    """Whether only a device that runs says this: not a will or goodbye of an old connection."""
    if isinstance(message, State):
        return message.state in LIVING
    return isinstance(message, Capability | Report)


def _heard(device: Device, message: Message, session: int) -> Device:
    device = replace(device, session=session)
    match message:
        case State():
            return replace(device, said=message.state)
        case Capability():
            return replace(device, capability=message)
        case Report():
            believes = message.phase in OBEYING
            return replace(device, report=message, ignores="" if believes else device.ignores)
        case Telemetry():
            traffic = device.traffic.heard(session, message.sent_bytes, message.received_bytes)
            return replace(device, telemetry=message, traffic=traffic)
        case Event():
            device = replace(device, last_event=message)
            if message.code == ReplayError.code and message.name.startswith("stale_"):
                return replace(device, ignores=f"it does not believe this coordinator: {message.text}")
            return device
        case _:
            return device
