"""Who is there and what it can do: the registry of devices as values. Pure: time is an argument.

A device introduces itself with a signed Capability that carries its key. What then happens is the
operator's choice (`enrolment`): nothing it says counts before it is approved.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from liberatai_core.contract.frame import key_id
from liberatai_core.contract.messages import Capability, Event, Message, Report, State, Telemetry
from liberatai_core.errors import (
    LiberataiError,
    NotFoundError,
    ReplayError,
    RevokedError,
    SignatureError,
    UnknownDeviceError,
)

Status = Literal["pending", "approved", "quarantined"]
Enrolment = Literal["approve", "allowlist", "open"]

MAX_TOTAL = 2**53
"""Totals stop here: counters come from devices, and a database's integers end at 2^63."""

MAX_PENDING = 1000
"""Devices that wait for approval: a stranger cannot fill the memory with names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraffic:
    """Bytes of a device over all its starts.

    Attributes:
        sent_bytes, received_bytes: in total.
        session, session_sent, session_received: the last counters heard, which begin at zero at every start.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    session: int = 0
    session_sent: int = 0
    session_received: int = 0

    def heard(self, session: int, sent: int, received: int) -> "DeviceTraffic":
        """Return the totals after the device told its counters.

        Samples may be lost, doubled or late: within a session only what exceeds the last word is added.
        """
        if session < self.session:
            return self
        last_sent, last_received = (
            (self.session_sent, self.session_received) if session == self.session else (0, 0)
        )
        return DeviceTraffic(
            sent_bytes=min(MAX_TOTAL, self.sent_bytes + max(0, sent - last_sent)),
            received_bytes=min(MAX_TOTAL, self.received_bytes + max(0, received - last_received)),
            session=session,
            session_sent=max(sent, last_sent),
            session_received=max(received, last_received),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device as the coordinator knows it.

    Attributes:
        traffic: what its socket carried, as far as it said so.
        updates: of this device that were stored, in all jobs.
    """

    id: str
    public_key: bytes
    status: Status
    capability: Capability | None = None
    session: int = 0
    state: str = "unknown"
    report: Report | None = None
    telemetry: Telemetry | None = None
    last_event: Event | None = None
    last_seen_s: float = 0.0
    reason: str = ""
    traffic: DeviceTraffic = DeviceTraffic()
    updates: int = 0

    @property
    def online(self) -> bool:
        """Whether it said so, and no will has contradicted it."""
        return self.state == "online"


@dataclass(slots=True)
class Fleet:
    """All devices by name, and by key.

    Attributes:
        enrolment: what happens to a key that nobody has seen.
        allowed: device name -> public key, known beforehand.
    """

    enrolment: Enrolment
    allowed: dict[str, bytes] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    refusals: dict[str, Counter[str]] = field(default_factory=dict)
    _index: dict[bytes, str] = field(default_factory=dict)

    def restore(self, devices: list[Device]) -> None:
        """Take over what the ledger remembers, and whoever the settings allow."""
        self.devices = {device.id: device for device in devices}
        for name, key in self.allowed.items():
            if name not in self.devices or self.devices[name].public_key != key:
                self.devices[name] = Device(id=name, public_key=key, status="approved")
        self._index = {key_id(device.public_key): device.id for device in self.devices.values()}

    def key(self, wanted: bytes) -> bytes | None:
        """Return the public key with this key id, or None."""
        owner = self.owner(wanted)
        return self.devices[owner].public_key if owner else None

    def owner(self, wanted: bytes) -> str | None:
        """Return the device that has the key with this key id."""
        found = self._index.get(wanted)
        return found if found and key_id(self.devices[found].public_key) == wanted else None

    def require(self, device: str) -> Device:
        """Return a device, or raise NotFoundError."""
        if device not in self.devices:
            raise NotFoundError(f"no device {device!r}; `liberatai devices list` shows all")
        return self.devices[device]

    def hear(self, message: Message, signer: bytes, now_s: float) -> tuple[Device, bool]:
        """Take in what a device says of itself.

        Args:
            message: a verified State, Capability, Report, Telemetry or Event.
            signer: public key that verified it.
            now_s: the coordinator's time.

        Returns:
            The device, and whether something changed that must be remembered over a restart.

        Raises:
            UnknownDeviceError: nobody with this name, and new names are not taken.
            SignatureError: the name belongs to another key.
            ReplayError: from an older session than the last one heard.
        """
        name: str = message.device  # type: ignore[attr-defined]
        session: int = message.session  # type: ignore[attr-defined]
        known = self.devices.get(name)
        new = known is None
        if known is None:
            known = self._introduce(message, signer)
        elif known.public_key != signer:
            raise SignatureError(
                f"{name} has another key; after a new set-up list it under `devices:` in coordinator.yaml"
            )
        if session < known.session:
            raise ReplayError(f"{name}: session {session}, the last one was {known.session}")
        device = _heard(known, message, session, now_s)
        self.devices[name] = device
        if new:
            self._index[key_id(device.public_key)] = name
        lasting = device.capability != known.capability or device.session != known.session
        return device, lasting or new

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
        self.devices[device] = replace(self.require(device), status=status, reason=reason)
        return self.devices[device]

    def count_refusal(self, device: str, error: LiberataiError) -> None:
        """Count what was refused, per device (or "" for a stranger) and code."""
        self.refusals.setdefault(device, Counter())[error.code] += 1

    def ready(self) -> list[Device]:
        """Return devices that can get work: approved, online, introduced, with quota left; by name."""
        return sorted(
            (
                d
                for d in self.devices.values()
                if d.status == "approved" and d.online and d.capability and not d.capability.quota_spent
            ),
            key=lambda device: device.id,
        )

    def count_update(self, device: str) -> None:
        """Note that one more update of a device is stored."""
        known = self.require(device)
        self.devices[device] = replace(known, updates=known.updates + 1)

    def _introduce(self, message: Message, signer: bytes) -> Device:
        if not isinstance(message, Capability):
            raise UnknownDeviceError("said something before it introduced itself")
        if self.enrolment == "allowlist":
            raise UnknownDeviceError(f"{message.device} is not in the coordinator's list of devices")
        waiting = sum(device.status == "pending" for device in self.devices.values())
        if self.enrolment == "approve" and waiting >= MAX_PENDING:
            raise UnknownDeviceError(f"{waiting} devices wait for approval already")
        status: Status = "approved" if self.enrolment == "open" else "pending"
        return Device(id=message.device, public_key=signer, status=status)


def _heard(device: Device, message: Message, session: int, now_s: float) -> Device:
    device = replace(device, session=max(session, device.session), last_seen_s=now_s)
    match message:
        case State():
            return replace(device, state=message.state)
        case Capability():
            return replace(device, capability=message)
        case Report():
            return replace(device, report=message)
        case Telemetry():
            traffic = device.traffic.heard(session, message.sent_bytes, message.received_bytes)
            return replace(device, telemetry=message, traffic=traffic)
        case Event():
            return replace(device, last_event=message)
        case _:
            return device
