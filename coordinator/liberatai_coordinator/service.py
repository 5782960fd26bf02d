"""The coordinator's service: the loop. Events of the link come in, and go to whoever handles them.

Frames are opened in batches beside the loop (`intake.frames`); what devices say of themselves, updates and
offers each have one owner; jobs run by themselves (`jobs.queue`).
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from liberatai_coordinator import clock
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.invitations import Invitation
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.control.asking import Asking
from liberatai_coordinator.control.doors import Doors
from liberatai_coordinator.control.rollouts import Rollouts
from liberatai_coordinator.control.shadows import Shadows
from liberatai_coordinator.fleet.devices import Device, Fleet
from liberatai_coordinator.fleet.facts import members
from liberatai_coordinator.intake.broker_refusals import BrokerRefusals
from liberatai_coordinator.intake.enrolment import Enrolment
from liberatai_coordinator.intake.fencing import Fencing
from liberatai_coordinator.intake.flow import Flow
from liberatai_coordinator.intake.frames import Frame, Frames, Opened, require_own
from liberatai_coordinator.intake.presence import LEAF, Presence
from liberatai_coordinator.intake.updates import Updates
from liberatai_coordinator.intake.uploads import Uploads
from liberatai_coordinator.jobs.attendance import Attendance
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.queue import Jobs
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.models.retention import sweep
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_core.contract.frame import Signer, claimed_key
from liberatai_core.contract.messages import (
    Answer,
    Capability,
    CertificateReply,
    CertificateRequest,
    EpochSeen,
    Event,
    Have,
    Offer,
    Report,
    SessionSeen,
    State,
    Telemetry,
    Update,
)
from liberatai_core.contract.topics import Topics, parse
from liberatai_core.errors import FrameError, LiberataiError
from liberatai_core.link.link import Connected, Disconnected, Link, Received, Refused

log = logging.getLogger(__name__)

EXPIRE_S = 60.0
"""Between two looks for uploads that nobody goes on with."""

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
    authority: Authority | None = None
    jumps: int = 0
    jobs: Jobs = field(init=False)
    frames: Frames = field(init=False)
    updates: Updates = field(init=False)
    devices: Presence = field(init=False)
    fencing: Fencing = field(init=False)
    doors: Doors = field(init=False)
    enrolment: Enrolment | None = field(init=False)
    asking: Asking = field(init=False)
    shadows: Shadows = field(init=False)
    rollouts: Rollouts = field(init=False)
    connected: str = ""
    flow: Flow = field(default_factory=Flow)
    broker_refuses: BrokerRefusals = field(default_factory=BrokerRefusals)
    started_s: float = field(default_factory=clock.wall)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _behind: asyncio.Event = field(default_factory=asyncio.Event)
    _restored: bool = False

    def __post_init__(self) -> None:
        self.fencing = Fencing(
            ledger=self.ledger,
            fleet=self.config.fleet,
            coordinator=self.config.coordinator,
            public_key=self.signer.public_key,
            jumps=self.jumps,
        )
        self.jobs = Jobs(
            ledger=self.ledger,
            repository=self.repository,
            publisher=self.publisher,
            fleet=self.fleet,
            coordinator=self.config.coordinator,
        )
        self.devices = Presence(
            fleet=self.fleet,
            ledger=self.ledger,
            jobs=Attendance(runners=self.jobs.runners, answer_baseless=self._answer_baseless),
            answer=self._answer_session,
        )
        self.doors = Doors(
            presence=self.devices, fleet=self.fleet, ledger=self.ledger, publisher=self.publisher
        )
        self.asking = Asking(fleet=self.fleet, publisher=self.publisher, epoch=self.ledger.epoch)
        self.shadows = Shadows(fleet=self.fleet, ledger=self.ledger, publisher=self.publisher)
        self.doors.opened = self._opened
        self.rollouts = Rollouts(
            fleet=self.fleet,
            ledger=self.ledger,
            repository=self.repository,
            publisher=self.publisher,
            shadows=self.shadows,
            members=lambda asked: members(self.fleet, asked, clock.wall()),
        )
        self.shadows.heard_of = self.rollouts.heard
        self.doors.forgotten = self._forgotten
        self.updates = Updates(
            ledger=self.ledger,
            fleet=self.fleet,
            jobs=self.jobs,
            publisher=self.publisher,
            ack=self.link.ack,
            refused=self._count,
            again=lambda frame: self.frames.add(frame),  # noqa: PLW0108 - made below
        )
        self.enrolment = self._enrolment()
        self.frames = Frames(
            fleet=self.topics.fleet,
            key=self.fleet.key,
            look=self.updates.look,
            handle=self._handle_all,
        )

    def _enrolment(self) -> Enrolment | None:
        if self.authority is None:
            return None
        return Enrolment(
            config=self.config,
            fleet=self.fleet,
            authority=self.authority,
            remember=self._enrolled,
            sync=self._sync_broker,
            note=self.doors.note,
            send=self._send_certificate,
            renew_link=self.link.renew,
        )

    async def _answer_request(self, opened: Opened, request: CertificateRequest) -> None:
        """Answer beside the loop: what a certificate costs, no other device waits for."""
        frame, enrolment = opened.frame, self.enrolment
        if enrolment is None:
            return
        try:
            await enrolment.hear(
                request,
                opened.public_key,
                frame.place,
                lambda error: self._refuse(frame.topic, frame.payload, error),
            )
        except Exception:
            log.exception("fault while answering a request on %s", frame.topic)

    def _enrolled(self, device: Device, invitation: Invitation) -> None:
        """Write down a device that came with an invitation, with what the invitation says of it."""
        self.devices.enrolled(device)
        self.doors.note(device.id, "invited", text=f"{invitation.claim}, {device.status}")
        if invitation.group:
            self.doors.label(device.id, {"group": invitation.group})
        self.doors.welcome(device.id)

    async def _sync_broker(self) -> None:
        if self.doors.broker is not None:
            await self.doors.broker(self.doors.shut_out, "", "")

    async def _send_certificate(self, to: str, reply: CertificateReply) -> None:
        await self.publisher.send(self.topics.provisioning(to, "crt"), reply)

    def _forgotten(self, device: str) -> None:
        self.shadows.forget(device)
        self.rollouts.forget(device)

    @property
    def runners(self) -> dict[str, Runner]:
        """The jobs that have not ended, by name."""
        return self.jobs.runners

    # --- life ----------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Take over what the ledger remembers of devices: before `run` and all questions, not on the loop.

        Files that a crash left behind go, too.
        """
        self.doors.restore()
        await asyncio.to_thread(self.devices.restore)
        self.doors.restored()
        if self.enrolment is not None:
            await self.enrolment.load()
        await _sweep(self.ledger, self.repository)  # now, for nobody makes files yet
        self._restored = True

    async def run(self) -> None:
        """Serve until cancelled, or until `fencing.ends`: behind, the same must be started once more."""
        if not self._restored:
            self.doors.restore()
            self.devices.restore()
            self.doors.restored()
        self.devices.set_connected(False)
        self._spawn(self.devices.run())
        self._spawn(self.frames.run())
        self._spawn(_expire(self.updates.uploads))
        self.shadows.restore()
        self.rollouts.restore()
        if self.enrolment is not None:
            self._spawn(self.enrolment.look_after())
            await self.link.subscribe(self.topics.requests)
        presence = self.topics.coordinator(self.config.coordinator)
        self.publisher.retained[presence] = self.fencing.presence(self.signer, "online")
        # Its own presence, too: before anything is said, it is heard whether this is a copy.
        await self.link.subscribe(presence, *self.topics.from_devices)
        await self.link.open()
        self.doors.begin()
        self._spawn(self.shadows.publish())
        self._spawn(self.rollouts.run())
        self.jobs.resume()
        self._spawn(_commit(self.jobs))
        listening = asyncio.create_task(self._listen())
        behind = asyncio.create_task(self._behind.wait())
        try:
            await asyncio.wait({listening, behind}, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()
        finally:
            listening.cancel()
            behind.cancel()
            await self._stop(presence)

    async def _listen(self) -> None:
        breath_s = clock.monotonic()
        async for event in self.link.events():
            match event:
                case Received():
                    self._received(event)
                case Connected(protocol=protocol):
                    log.info("connected to %s (%s)", self.config.broker, protocol)
                    self.connected = protocol
                    self.devices.set_connected(True)
                    self.broker_refuses.lines.clear()
                    self._spawn(self.publisher.republish())
                case Disconnected(reason=reason, retry_in_s=retry):
                    if self.connected or retry > 1:
                        log.warning("no broker: %s; next try in %.1f s", reason, retry)
                    self.connected = ""
                    self.devices.set_connected(False)
                    # The longest pause is short while devices wait for receipts of a round.
                    self.link.urgent(any(job.open_round is not None for job in self.runners.values()))
                case Refused():
                    self.broker_refuses.heard(event)
                    if event.what == "size":
                        self._spawn(self.publisher.cut_anew())
            if clock.monotonic() - breath_s > BREATH_S:
                await asyncio.sleep(0)
                breath_s = clock.monotonic()

    async def _stop(self, presence: str) -> None:
        for task in [*self.jobs.cancel(), *self._tasks]:
            task.cancel()
        self.updates.cancel()
        self.doors.cancel()
        self.devices.save_traffic()
        if not self.fencing.ends:
            goodbye = self.fencing.presence(self.signer, "offline")
            with contextlib.suppress(TimeoutError, LiberataiError):
                await asyncio.wait_for(self.link.publish(presence, goodbye, retain=True), GOODBYE_S)
        await self.link.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
            if place.side == "co":
                self._own_presence(frame)
            elif event.payload:
                self.flow.require_calm(place, clock.monotonic(), retained=event.retained)
                self.frames.add(frame)
                return
        except LiberataiError as error:
            self._refuse(event.topic, event.payload, error)
        except Exception:
            log.exception("fault while handling a message on %s", event.topic)
        self.link.ack(event.token)

    def _own_presence(self, frame: Frame) -> None:
        if frame.place.owner == self.config.coordinator and frame.payload:
            self.fencing.own_presence(frame.payload)
            self._note_fencing()

    def _note_fencing(self) -> None:
        if self.fencing.ends:
            self._behind.set()

    def _refuse(self, topic: str, payload: bytes, error: LiberataiError) -> None:
        self._count(self.fleet.owner(claimed_key(payload)) or "", error)
        log.info("refused on %s: %s %s", topic, error.code, error)

    def _count(self, device: str, error: LiberataiError) -> None:
        self.fleet.refusals.setdefault(device, Counter())[error.code] += 1
        self.ledger.refusals.count(device, error.code)

    async def _handle_all(self, batch: list[Opened]) -> None:
        for opened in batch:
            frame = opened.frame
            try:
                if await self._handle(opened):
                    continue
            except LiberataiError as error:
                self._refuse(frame.topic, frame.payload, error)
            except Exception:
                log.exception("fault while handling a message on %s", frame.topic)
            self.link.ack(frame.token)

    async def _handle(self, opened: Opened) -> bool:
        """Give a message to whoever handles it; True: they acknowledge it."""
        frame, message = opened.frame, opened.message
        if isinstance(message, CertificateRequest) and frame.place.leaf == "csr":
            if self.enrolment is not None:
                self.enrolment.require_turn(frame.place.owner)
                self._spawn(self._answer_request(opened, message))
            return False
        if message is not None:
            require_own(self.fleet, message, opened.public_key, frame.place)
        if isinstance(message, Update) and frame.place.leaf == "x":
            self.devices.note_alive(message.device)
            self.updates.take(opened, message)
            return True
        if opened.error is not None:
            raise opened.error
        if frame.place.leaf == "x" and frame.place.part is not None:
            self.devices.note_alive(frame.place.owner)
            self.updates.chunk(frame)
            return True
        match message:
            case Offer() if frame.place.leaf == "x":
                self.devices.note_alive(message.device)
                self.updates.offer(opened, message)
                return True
            case State() | Capability() | Report() | Telemetry() | Event() if (
                frame.place.leaf == LEAF[type(message)]
            ):
                await self.devices.hear(message, opened.public_key, retained=frame.retained)
            case Answer() if frame.place.leaf == "rsp":
                self.devices.note_alive(message.device)
                self.asking.heard(message)
            case Have() if frame.place.leaf == "have":
                self.shadows.heard(message)
            case EpochSeen() if frame.place.leaf == "ev":
                self.fencing.shown(message.device, message.word)
                self._note_fencing()
            case _:
                raise FrameError(f"{type(message).__name__} does not belong on {frame.topic}")
        return False

    def _answer_baseless(self, device: Device) -> None:
        self._spawn(_give_whole_path(self.jobs, device.id))

    async def _opened(self, device: str) -> None:
        """Serve a device that may come in again; what stood at the broker of it was taken away."""
        await self.shadows.publish_one(device)
        with contextlib.suppress(LiberataiError):  # without a broker it will say everything by itself
            await self.asking.remind(device)

    async def _answer_session(self, seen: SessionSeen) -> None:
        await self.publisher.send(self.topics.down(seen.device, "xa"), seen)


async def _give_whole_path(jobs: Jobs, device: str) -> None:
    try:
        await jobs.base_missing(device)
    except LiberataiError as error:
        log.warning("%s asks for the whole path: %s %s", device, error.code, error)


async def _commit(jobs: Jobs) -> None:
    """Commit versions that a crash, or a release without a model repository, left out."""
    try:
        made = await asyncio.to_thread(jobs.commits.publish_all)
    except LiberataiError as error:
        log.warning("not all versions are committed: %s %s", error.code, error)
    else:
        if made:
            log.info("committed %d versions to the model repository", made)


async def _sweep(ledger: Ledger, repository: Repository) -> None:
    """Remove files that a crash left behind."""
    try:
        await asyncio.to_thread(sweep, ledger, repository)
    except LiberataiError as error:
        log.warning("files that no version needs are not removed: %s %s", error.code, error)


async def _expire(uploads: Uploads) -> None:
    while True:
        await asyncio.sleep(EXPIRE_S)
        uploads.expire(clock.monotonic())
