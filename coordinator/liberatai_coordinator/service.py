"""The coordinator's service: makes happen what `fleet`, `plan`, `round` and `runner` decide.

One asyncio loop: events of the link come in, frames are checked in the contract's order, decisions are
carried out, receipts follow only after the ledger has committed. Long work runs in threads.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from liberatai_coordinator.config import CoordinatorConfig, JobSpec
from liberatai_coordinator.fleet.devices import Device, Fleet, Status
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.intake.fencing import Fencing
from liberatai_coordinator.intake.presence import LEAF, Presence
from liberatai_coordinator.intake.uploads import Uploads
from liberatai_coordinator.jobs.attendance import Attendance
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.runner import COUNTERS, Runner
from liberatai_coordinator.models.updates import check_update
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import (
    JobRow,
    StoredUpdate,
)
from liberatai_core.contract import limits, messages
from liberatai_core.contract.frame import Signer, claimed_key, key_id, open_frame, seal
from liberatai_core.contract.messages import (
    Capability,
    CoordinatorState,
    Credit,
    EpochSeen,
    Event,
    Message,
    Offer,
    Receipt,
    Report,
    SessionSeen,
    State,
    Telemetry,
    Update,
)
from liberatai_core.contract.topics import Place, Topics, parse
from liberatai_core.errors import (
    BusyError,
    DiskError,
    FrameError,
    LiberataiError,
    RoundUnknownError,
    SignatureError,
    TopicError,
)
from liberatai_core.link.link import Connected, Disconnected, Link, Received, Refused

log = logging.getLogger(__name__)

RETRY = (BusyError.code, DiskError.code)
"""Refusals after which the device keeps its update and tries again."""

DISK_RETRY_S = 10.0
"""Pause before a job goes on after a full disk."""

RESUME_S = 10.0
"""How long an update waits for a restarted job to find its round, before the device is told to try again."""

MAX_REFUSALS = 32
"""Refusals of the broker that are kept and logged: every blob and device has topics of its own."""

GOODBYE_S = 5.0
"""How long a stopping coordinator tries to say so."""


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
    uploads: Uploads = field(default_factory=lambda: Uploads(max_bytes=limits.MAX_OBJECT_BYTES))
    runners: dict[str, Runner] = field(default_factory=dict)
    connected: str = ""
    broker_refuses: dict[tuple[str, str], str] = field(default_factory=dict)
    started_s: float = field(default_factory=time.time)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _jobs: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _recalled: dict[str, Runner] = field(default_factory=dict)
    _recalling: asyncio.Lock = field(default_factory=asyncio.Lock)
    _said_refusals: set[tuple[str, str]] = field(default_factory=set)
    _counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    devices: Presence = field(init=False)
    fencing: Fencing = field(init=False)
    jumps: int = 0

    def __post_init__(self) -> None:
        self.fencing = Fencing(
            ledger=self.ledger,
            fleet=self.config.fleet,
            coordinator=self.config.coordinator,
            public_key=self.signer.public_key,
            jumps=self.jumps,
        )
        self.devices = Presence(
            fleet=self.fleet,
            ledger=self.ledger,
            jobs=Attendance(runners=self.runners, answer_baseless=self._spawn_baseless),
            answer=self._answer,
        )

    # --- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled, or until `fencing.behind`: then the same must be started once more."""
        self.devices.restore()
        self.devices.set_connected(False)
        self._spawn(self.devices.run())
        presence = self.topics.coordinator(self.config.coordinator)
        self.publisher.retained[presence] = self.presence("online")
        # Its own presence, too: before anything is said, it is heard whether this is a copy.
        await self.link.subscribe(presence, *self.topics.from_devices)
        await self.link.open()
        rows = self.ledger.jobs.all()
        for row in rows:  # from the oldest: the newest word of a device counts
            told = self.ledger.jobs.value(row.name, COUNTERS)
            if told is not None:
                self._counters |= msgspec.msgpack.decode(told, type=dict[str, tuple[int, int]])
        for row in rows:
            if row.state in {"waiting", "running", "paused"}:
                self.start_job(row)
        try:
            async for event in self.link.events():
                match event:
                    case Received():
                        await self._received(event)
                        if self.fencing.behind:
                            return
                    case Connected(protocol=protocol):
                        log.info("connected to %s (%s)", self.config.broker, protocol)
                        self.connected = protocol
                        self.devices.set_connected(True)
                        self.broker_refuses.clear()
                        self._spawn(self.publisher.republish())
                    case Disconnected(reason=reason, retry_in_s=retry):
                        if self.connected or retry > 1:
                            log.warning("no broker: %s; next try in %.1f s", reason, retry)
                        self.connected = ""
                        self.devices.set_connected(False)
                        # The longest pause is short while devices wait for receipts of a round.
                        self.link.urgent(any(job.open_round is not None for job in self.runners.values()))
                    case Refused():
                        self._broker_refused(event)
        finally:
            await self._stop(presence)

    def _broker_refused(self, event: Refused) -> None:
        """Say once in words what the broker does not do; cut blobs smaller if they are too long for it."""
        kind = event.what, event.topic
        line = f"{'E_SIZE' if event.what == 'size' else 'E_BROKER'}: {event.words}"
        if kind not in self._said_refusals and len(self._said_refusals) < MAX_REFUSALS:
            self._said_refusals.add(kind)
            log.warning("%s", line)
        if len(self.broker_refuses) < MAX_REFUSALS:
            self.broker_refuses[kind] = line
        if event.what == "size":
            self._spawn(self.publisher.cut_anew())

    async def _stop(self, presence: str) -> None:
        for task in [*self._jobs.values(), *self._tasks]:
            task.cancel()
        self.devices.save_traffic()
        if not self.fencing.behind:
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

    # --- what comes in -------------------------------------------------------------------------

    async def _received(self, event: Received) -> None:
        """Check and handle one message. Whatever it is, the coordinator lives on."""
        try:
            place = parse(event.topic, self.topics.fleet)
            if place.leaf == "x" and place.part is not None:
                await self._chunk(place, event)
                return
            if place.side == "co":
                self._own_presence(place, event)
            elif event.payload:
                await self._frame(place, event)
                return
        except LiberataiError as error:
            owner = self.fleet.owner(claimed_key(event.payload)) or ""
            self._count(owner, error)
            log.info("refused on %s: %s %s", event.topic, error.code, error)
        except Exception:
            log.exception("fault while handling a message on %s", event.topic)
        self.link.ack(event.token)

    async def _frame(self, place: Place, event: Received) -> None:
        opened = open_frame(event.payload, self.topics.fleet, self.fleet.key)
        message = opened.message
        self._require_own(message, opened.public_key, place)
        match message:
            case Update() if place.leaf == "x":
                self.devices.note_alive(message.device)
                self._spawn(self._update(message, event.payload, event.token))
                return
            case Offer() if place.leaf == "x":
                self.devices.note_alive(message.device)
                await self._offer(message)
            case State() | Capability() | Report() | Telemetry() | Event() if (
                place.leaf == LEAF[type(message)]
            ):
                await self.devices.hear(message, opened.public_key, retained=event.retained)
            case EpochSeen() if place.leaf == "ev":
                self.fencing.shown(message.device, message.word)
            case _:
                raise FrameError(f"{type(message).__name__} does not belong on {event.topic}")
        self.link.ack(event.token)

    def _own_presence(self, place: Place, event: Received) -> None:
        if place.owner == self.config.coordinator and event.payload:
            self.fencing.own_presence(event.payload)

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

    def _spawn_baseless(self, device: Device) -> None:
        self._spawn(self._baseless(device.id))

    async def _baseless(self, device: str) -> None:
        """Let one job answer a device that does not hold what it was told to go on from.

        Its word does not name a job, but it has one task slot: what stands there is of the open round that
        it was invited to, or else of the last job that finished with it, which may be long ago.
        """
        if self.fleet.require(device).status != "approved":
            return
        try:
            await self._answer_baseless(device)
        except LiberataiError as error:
            log.warning("%s asks for the whole path: %s %s", device, error.code, error)

    async def _answer_baseless(self, device: str) -> None:
        part = [job for job in self.runners.values() if device in job.roster.assigned and not job.finished]
        for job in part:
            if job.open_round is not None and device in job.open_round.invitations:
                await job.base_missing(device)
                return
        if any(job.roster.assigned[device].structure and not self._jobs[job.job.name].done() for job in part):
            return  # between two rounds: its next task follows
        for row in reversed(self.ledger.jobs.all()):
            stored = self.ledger.jobs.value(row.name, "plan") if self._is_finished(row) else None
            given = msgspec.msgpack.decode(stored, type=list[Assignment]) if stored else []
            if any(one.device == device and one.structure for one in given):
                await (await self._recalled_job(row)).base_missing(device)
                return

    def _is_finished(self, row: JobRow) -> bool:
        return row.state == "finished" or (row.name in self.runners and self.runners[row.name].finished)

    async def _recalled_job(self, row: JobRow) -> Runner:
        """Return a finished job, also after a restart."""
        async with self._recalling:
            job = self.runners.get(row.name) or self._recalled.get(row.name)
            if job is None:
                job = self._runner(row)
                await job.recall()
                self._recalled[row.name] = job
        return job

    async def _offer(self, offer: Offer) -> None:
        self.fleet.admit(offer.device)
        job = self.runners.get(offer.job)
        if job is not None and not job.resumed.is_set():
            return  # too early to say anything: the device repeats its offer
        known = job is not None and job.may_upload(offer.device, offer.round)
        stored = self.ledger.updates.has(offer.job, offer.device, offer.update_id)
        if stored or not known:
            # Say it before bytes move: a receipt for the whole upload.
            code = "E_DUP" if stored else RoundUnknownError.code
            await self._receipt(offer.device, offer.update_id, accepted=stored, code=code)
            return
        await self._answer(self.uploads.offer(offer))

    async def _chunk(self, place: Place, event: Received) -> None:
        result = self.uploads.chunk(place.owner, place.transfer or "", place.part or 0, event.payload)
        if isinstance(result, Credit):
            self.devices.note_alive(place.owner)
            await self._answer(result)
        elif result is not None:
            opened = open_frame(result, self.topics.fleet, self.fleet.key)
            self._require_own(opened.message, opened.public_key, place)
            if not isinstance(opened.message, Update):
                raise FrameError(f"an upload is an Update, not a {type(opened.message).__name__}")
            self._spawn(self._update(opened.message, result, event.token))
            return
        self.link.ack(event.token)

    async def _answer(self, message: Credit | SessionSeen) -> None:
        await self.publisher.send(self.topics.down(message.device, "xa"), message)

    # --- updates -------------------------------------------------------------------------------

    async def _update(self, update: Update, frame: bytes, token: int) -> None:
        """Decide about an update; acknowledge only when its fate is on disk."""
        try:
            if self._receipted(update):
                await self._receipt(update.device, update.update_id, accepted=True, code="E_DUP")
                self.link.ack(token)
                return
            self.fleet.admit(update.device)
            await self._resumed(update.job)
            self._require_meaning(update)
            for action in self._decide(update):
                await self._act(action, frame)
        except LiberataiError as error:
            self._count(update.device, error)
            if update.device in self.fleet.devices and self.fleet.devices[update.device].status != "pending":
                await self._receipt(
                    update.device,
                    update.update_id,
                    accepted=False,
                    code=error.code,
                    text=str(error),
                    retry=error.code in RETRY,
                )
        except Exception:
            # Not acknowledged: the broker and the device's outbox still have it.
            log.exception("fault while storing an update of %s", update.device)
            return
        self.link.ack(token)

    def _receipted(self, update: Update) -> bool:
        """Whether a device that is shut out now sends again what was counted before."""
        shut_out = self.fleet.devices[update.device].status == "quarantined"
        return shut_out and self.ledger.updates.has(update.job, update.device, update.update_id)

    async def _resumed(self, job_name: str) -> None:
        """Wait until a job that was interrupted, or is buffered and between two rounds, knows its round.

        Raises:
            BusyError: it takes longer; the device keeps its update and tries again.
        """
        job = self.runners.get(job_name)
        if job is None or job.resumed.is_set():
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.resumed.wait(), RESUME_S)
        if not job.resumed.is_set():  # or not any more
            raise BusyError(f"job {job_name} is between two rounds")

    def _require_meaning(self, update: Update) -> None:
        """Refuse an update whose bytes mean nothing in its structure, before it is stored."""
        job = self.runners.get(update.job)
        newest = job.versions.newest if job else None
        if job is None or newest is None or update.structure not in newest.members:
            return  # the round's own rules refuse it, with the better reason
        structure = newest.members[update.structure].structure
        check_update(update, structure, job.job)

    def _decide(self, update: Update) -> list[deciding.Action]:
        job = self.runners.get(update.job)
        actions = job.decide(deciding.UpdateArrived(update=update)) if job else []
        refused = not actions or any(isinstance(action, deciding.Refuse) for action in actions)
        if refused and self.ledger.updates.has(update.job, update.device, update.update_id):
            return [deciding.Accept(device=update.device, update_id=update.update_id, code="E_DUP")]
        if job is not None and job.open_round is not None:
            return actions
        error = RoundUnknownError(f"no open round {update.round} of {update.job}")
        return [deciding.Refuse(device=update.device, update_id=update.update_id, error=error)]

    async def _act(self, action: deciding.Action, frame: bytes) -> None:
        match action:
            case deciding.Store(update=update):
                await self._store(update, frame)
            case deciding.Accept(device=device, update_id=update_id, code=code):
                await self._receipt(device, update_id, accepted=True, code=code)
            case deciding.Refuse(error=error):
                raise error
            case _:
                pass

    async def _store(self, update: Update, frame: bytes) -> None:
        job = self.runners[update.job]
        stored = StoredUpdate(
            update_id=update.update_id,
            job=update.job,
            # Not the update's own: a late one of a buffered job counts in the round that is open now.
            round=job.open_round.number if job.open_round else update.round,
            device=update.device,
            structure=update.structure,
            samples=update.samples,
            frame=frame,
            received_s=time.time(),
            path=job.path_after(update.device),
        )
        try:
            outcome = await self.ledger.updates.store(stored)
        except LiberataiError:
            job.decide(deciding.StoreFailed(device=update.device, update_id=update.update_id))
            raise
        if outcome == "stored":
            self.fleet.count_update(update.device)
        event = deciding.UpdateStored(device=update.device, update_id=update.update_id, outcome=outcome)
        for action in job.decide(event):
            await self._act(action, frame)

    async def _receipt(
        self,
        device: str,
        update_id: bytes,
        *,
        accepted: bool,
        code: str = "",
        text: str = "",
        retry: bool = False,
    ) -> None:
        receipt = Receipt(
            device=device,
            update_id=update_id,
            accepted=accepted,
            code=code,
            text=text[: limits.MAX_TEXT],
            retry=retry,
        )
        await self.publisher.send(self.topics.down(device, "xa"), receipt)

    def _count(self, device: str, error: LiberataiError) -> None:
        self.fleet.count_refusal(device, error)
        self.ledger.refusals.count(device, error.code)

    # --- jobs ----------------------------------------------------------------------------------

    def _runner(self, row: JobRow) -> Runner:
        job = msgspec.json.decode(row.spec, type=JobSpec)
        return Runner(
            job=job,
            row=row,
            ledger=self.ledger,
            versions=Versions(job=job, ledger=self.ledger, repository=self.repository),
            publisher=self.publisher,
            fleet=self.fleet,
            coordinator=self.config.coordinator,
            counters=self._counters,
        )

    def start_job(self, row: JobRow) -> None:
        """Run a job of the ledger, or let it wait for its turn."""
        made = self._runner(row)
        if row.state != "paused":
            made.running.set()
        self.runners[row.name] = made
        self._jobs[row.name] = asyncio.create_task(self._run_job(made))

    async def _run_job(self, job: Runner) -> None:
        """Run a job when it is its turn: a device has one task slot, so jobs follow each other."""
        name = job.job.name
        try:
            before = [one for one, task in self._jobs.items() if one != name and not task.done()]
            if self._turn.locked() and before:
                job.waits = f"waits: its devices serve job {before[0]} first"
            async with self._turn:
                job.waits = ""
                if self.ledger.jobs.get(name).state == "waiting":
                    self.ledger.jobs.set_state(name, "running")
                try:
                    await self._run_on(job)
                finally:
                    await job.settled()
                self.ledger.jobs.set_state(name, "finished")
                log.info("job %s finished", name)
        except asyncio.CancelledError:
            raise
        except LiberataiError as error:
            log.error("job %s failed: %s %s", name, error.code, error)  # noqa: TRY400 - one line, no traceback
            await self._fail(job, f"{error.code}: {error}")
        except Exception as error:
            log.exception("job %s failed", name)
            await self._fail(job, f"E_INTERNAL: {error}")

    async def _run_on(self, job: Runner) -> None:
        """Run a job, and run it again from its ledger when the disk was full or busy (promise P8)."""
        while True:
            try:
                await job.run()
            except (BusyError, DiskError) as error:
                log.warning("job %s waits: %s %s", job.job.name, error.code, error)
                await asyncio.sleep(DISK_RETRY_S)
            else:
                return

    async def _fail(self, job: Runner, reason: str) -> None:
        try:
            self.ledger.jobs.set_state(job.job.name, "failed", reason)
            await job.stop("failed")
        except LiberataiError:
            log.exception("job %s could not be ended cleanly; a restart tries it again", job.job.name)

    def pause_job(self, name: str) -> None:
        """Open no further round of a job."""
        self.runners[name].running.clear()
        self.ledger.jobs.set_state(name, "paused")

    def resume_job(self, name: str) -> None:
        """Go on with a paused job."""
        self.ledger.jobs.set_state(name, "running")
        self.runners[name].running.set()

    async def abort_job(self, name: str) -> None:
        """End a job now; its versions stay."""
        self._jobs[name].cancel()
        await asyncio.gather(self._jobs[name], return_exceptions=True)
        self.ledger.jobs.set_state(name, "aborted", "aborted by an operator")
        await self.runners[name].stop("aborted")

    async def delete_job(self, name: str) -> None:
        """Forget an ended job; its versions stay."""
        self.runners.pop(name, None)
        self._recalled.pop(name, None)
        await asyncio.to_thread(self.ledger.jobs.delete, name)

    # --- devices -------------------------------------------------------------------------------

    def set_status(self, device: str, status: Status, reason: str) -> Device:
        """Let a device in, or shut it out.

        Raises:
            UnknownDeviceError: nobody has heard of it.
        """
        return self.devices.set_status(device, status, reason)


def presence_frame(signer: Signer, coordinator: str, epoch: int, state: str) -> bytes:
    """Return a signed CoordinatorState."""
    body = CoordinatorState(
        coordinator=coordinator, epoch=epoch, state=msgspec.convert(state, messages.Presence)
    )
    return seal(body, signer)
