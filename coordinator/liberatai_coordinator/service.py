"""The coordinator's service: the loop. Events of the link come in, and go to whoever handles them.

Frames are opened in batches beside the loop (`intake.frames`); what devices say of themselves, updates and
offers each have one owner; jobs run by themselves (`jobs.queue`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.fleet.devices import Device, DeviceTraffic, Fleet, Status
from liberatai_coordinator.intake.frames import Frame, Frames, Opened
from liberatai_coordinator.intake.updates import Updates
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.queue import Jobs
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import DeviceRow, TrafficRow
from liberatai_core.contract.frame import Signer, claimed_key, key_id, seal
from liberatai_core.contract.messages import (
    Capability,
    CoordinatorState,
    Event,
    Message,
    Offer,
    Presence,
    Report,
    State,
    Telemetry,
    Update,
)
from liberatai_core.contract.topics import Place, Topics, parse
from liberatai_core.errors import BaseMissingError, FrameError, LiberataiError, SignatureError, TopicError
from liberatai_core.link.link import Connected, Disconnected, Link, Received

log = logging.getLogger(__name__)

TRAFFIC_S = 60.0
"""Between two writes of what devices' sockets carried. Their counters are totals: a crash loses nothing
but the last words of an agent that started anew in the meantime."""

GOODBYE_S = 5.0
"""How long a stopping coordinator tries to say so."""

BREATH_S = 0.02
"""After so long of messages without a pause, everything else on the loop has its turn."""


@dataclass(slots=True, kw_only=True)
class Service:
    """A running coordinator. Build it with `serve`, or with parts of your own in tests."""

    config: CoordinatorConfig
    link: Link
    ledger: Ledger
    repository: Repository
    signer: Signer
    fleet: Fleet
    publisher: Publisher
    topics: Topics
    jobs: Jobs = field(init=False)
    frames: Frames = field(init=False)
    updates: Updates = field(init=False)
    connected: str = ""
    started_s: float = field(default_factory=time.time)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _saved_traffic: dict[str, DeviceTraffic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs = Jobs(
            ledger=self.ledger,
            repository=self.repository,
            publisher=self.publisher,
            fleet=self.fleet,
            coordinator=self.config.coordinator,
        )
        self.frames = Frames(
            fleet=self.topics.fleet, key=self.fleet.key, look=self._look, handle=self._handle_all
        )
        self.updates = Updates(
            ledger=self.ledger,
            fleet=self.fleet,
            jobs=self.jobs,
            publisher=self.publisher,
            ack=self.link.ack,
            refused=self._count,
            again=self.frames.add,
        )

    @property
    def runners(self) -> dict[str, Runner]:
        """The jobs that have not ended, by name."""
        return self.jobs.runners

    # --- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        traffic, updates = self.ledger.devices.traffic(), self.ledger.updates.counts()
        self.fleet.restore(
            [_device(row, traffic.get(row.id), updates.get(row.id, 0)) for row in self.ledger.devices.all()]
        )
        self._spawn(self._remember_traffic())
        self._spawn(self.frames.run())
        presence = self.topics.coordinator(self.config.coordinator)
        self.publisher.retained[presence] = self.presence("online")
        await self.link.subscribe(*self.topics.from_devices)
        await self.link.open()
        self.jobs.resume()
        try:
            await self._listen()
        finally:
            await self._stop(presence)

    async def _listen(self) -> None:
        breath_s = time.monotonic()
        async for event in self.link.events():
            match event:
                case Received():
                    self._received(event)
                case Connected(protocol=protocol):
                    log.info("connected to %s (%s)", self.config.broker, protocol)
                    self.connected = protocol
                    self._spawn(self.publisher.republish())
                case Disconnected(reason=reason, retry_in_s=retry):
                    if self.connected or retry > 1:
                        log.warning("no broker: %s; next try in %.1f s", reason, retry)
                    self.connected = ""
            if time.monotonic() - breath_s > BREATH_S:
                await asyncio.sleep(0)
                breath_s = time.monotonic()

    async def _stop(self, presence: str) -> None:
        for task in [*self.jobs.cancel(), *self._tasks]:
            task.cancel()
        self.updates.cancel()
        with contextlib.suppress(LiberataiError):
            self._save_traffic()
        with contextlib.suppress(TimeoutError, LiberataiError):
            await asyncio.wait_for(
                self.link.publish(presence, self.presence("offline"), retain=True), GOODBYE_S
            )
        await self.link.close()

    def presence(self, state: str) -> bytes:
        """Return the signed presence of this coordinator."""
        return presence_frame(self.signer, self.config.coordinator, self.ledger.epoch, state)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remember_traffic(self) -> None:
        while True:
            await asyncio.sleep(TRAFFIC_S)
            self._save_traffic()
            self.updates.uploads.expire(time.monotonic())

    def _save_traffic(self) -> None:
        known = {d.id: d.traffic for d in self.fleet.devices.values() if d.status != "pending"}
        changed = {name: told for name, told in known.items() if told != self._saved_traffic.get(name)}
        if changed:
            self.ledger.devices.set_traffic([_traffic_row(name, told) for name, told in changed.items()])
            self._saved_traffic |= changed

    # --- what comes in -------------------------------------------------------------------------

    def _received(self, event: Received) -> None:
        """Let a message be opened. Whatever it is, the coordinator lives on."""
        try:
            place = parse(event.topic, self.topics.fleet)
            frame = Frame(
                place=place,
                topic=event.topic,
                payload=event.payload,
                token=event.token,
                retained=event.retained,
            )
            if event.payload:
                self.frames.add(frame)
                return
        except LiberataiError as error:
            self._refuse(event.topic, event.payload, error)
        except Exception:
            log.exception("fault while handling a message on %s", event.topic)
        self.link.ack(event.token)

    def _refuse(self, topic: str, payload: bytes, error: LiberataiError) -> None:
        self._count(self.fleet.owner(claimed_key(payload)) or "", error)
        log.info("refused on %s: %s %s", topic, error.code, error)

    def _count(self, device: str, error: LiberataiError) -> None:
        self.fleet.count_refusal(device, error)
        self.ledger.refusals.count(device, error.code)

    def _look(self, frame: Frame, message: Message) -> object:
        """Look closer at an update, in the thread that opens frames."""
        if isinstance(message, Update) and frame.place.leaf == "x":
            return self.updates.look(message)
        return None

    def _require_own(self, message: Message, key: bytes, place: Place) -> None:
        """Refuse what one device signs in another's name, or sends on another's topic.

        The broker's access rules do the same, but the broker is not trusted.
        """
        device = getattr(message, "device", None)
        if device != place.owner:
            raise TopicError(f"a message of {device} on the topic of {place.owner}")
        owner = self.fleet.owner(key_id(key))
        if owner != device and not isinstance(message, Capability):
            raise SignatureError(f"{owner} signed in the name of {device}")

    def _handle_all(self, batch: list[Opened]) -> None:
        for opened in batch:
            frame = opened.frame
            try:
                if self._handle(opened):
                    continue
            except LiberataiError as error:
                self._refuse(frame.topic, frame.payload, error)
            except Exception:
                log.exception("fault while handling a message on %s", frame.topic)
            self.link.ack(frame.token)

    def _handle(self, opened: Opened) -> bool:
        """Give a message to whoever handles it; True: they acknowledge it."""
        frame, message, error = opened.frame, opened.message, opened.error
        if message is not None:
            self._require_own(message, opened.public_key, frame.place)
        if isinstance(message, Update) and frame.place.leaf == "x":
            self.updates.take(opened, message)
            return True
        if error is not None:
            raise error
        if frame.place.leaf == "x" and frame.place.part is not None:
            self.updates.chunk(frame)
            return True
        match message:
            case Offer() if frame.place.leaf == "x":
                self.updates.offer(opened, message)
                return True
            case State() | Capability() | Report() | Telemetry() | Event() if (
                frame.place.leaf == LEAF[type(message)]
            ):
                self._hear(message, opened.public_key, retained=frame.retained)
                return False
            case _:
                raise FrameError(f"{type(message).__name__} does not belong on {frame.topic}")

    def _hear(self, message: Message, key: bytes, *, retained: bool) -> None:
        before = self.fleet.devices.get(getattr(message, "device", ""))
        # What the broker had in store is no sign of life.
        now_s = before.last_seen_s if retained and before is not None else 0.0
        device, lasting = self.fleet.hear(message, key, now_s or time.time())
        # A stranger that waits for approval may say what it likes; it is written down once.
        if lasting and (before is None or device.status != "pending"):
            self.ledger.devices.remember(_row(device))
        if isinstance(message, Event) and message.code == BaseMissingError.code:
            self._spawn(self._baseless(device.id))
        if before is None and device.status == "pending":
            log.warning("new device %s waits: `liberatai devices approve %s`", device.id, device.id)
        if before is None or before.online != device.online or before.capability != device.capability:
            self.jobs.fleet_changed(device)

    async def _baseless(self, device: str) -> None:
        if self.fleet.require(device).status != "approved":
            return
        try:
            await self.jobs.base_missing(device)
        except LiberataiError as error:
            log.warning("%s asks for the whole path: %s %s", device, error.code, error)

    # --- devices -------------------------------------------------------------------------------

    def set_status(self, device: str, status: Status, reason: str) -> Device:
        """Let a device in, or shut it out.

        Raises:
            NotFoundError: nobody has heard of it.
        """
        changed = self.fleet.set_status(device, status, reason)
        self.ledger.devices.remember(_row(changed))
        self.ledger.devices.set_status(device, status, reason)
        self.jobs.fleet_changed(changed)
        return changed


LEAF: dict[type[Message], str] = {
    State: "state",
    Capability: "caps",
    Report: "rep",
    Telemetry: "tele",
    Event: "ev",
}
"""Where each message belongs: a State on the topic of a Capability is refused."""


def presence_frame(signer: Signer, coordinator: str, epoch: int, state: str) -> bytes:
    """Return a signed CoordinatorState."""
    body = CoordinatorState(coordinator=coordinator, epoch=epoch, state=msgspec.convert(state, Presence))
    return seal(body, signer)


def _device(row: DeviceRow, traffic: TrafficRow | None, updates: int) -> Device:
    capability = msgspec.msgpack.decode(row.capability, type=Capability) if row.capability else None
    return Device(
        id=row.id,
        public_key=row.public_key,
        status=msgspec.convert(row.status, Status),
        capability=capability,
        session=row.session,
        last_seen_s=row.last_seen_s,
        reason=row.reason,
        traffic=_traffic(traffic) if traffic is not None else DeviceTraffic(),
        updates=updates,
    )


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


def _row(device: Device) -> DeviceRow:
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
