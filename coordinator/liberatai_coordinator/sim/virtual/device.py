"""One simulated device: the agent's own session, with a link, a clock, a disk and a trainer of virtual time.

What `session` decides is made happen here as `liberatai_agent.service` does it: the same frames on the same
topics, verified by the same code. What comes back takes as long as the link, the disk and the processor of
the device's profile would.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Protocol

from msgspec.structs import replace

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import session as s
from liberatai_agent.children.messages import Failed
from liberatai_agent.exchange.hearing import Ear
from liberatai_agent.privacy import outward
from liberatai_agent.session.fits import Limits, trainer_of
from liberatai_agent.work.training import rounds_away, update_of, work_of
from liberatai_coordinator.fleet.plan import training_s
from liberatai_coordinator.sim.line import Line
from liberatai_coordinator.sim.virtual.blobs import Blobs
from liberatai_coordinator.sim.virtual.disk import Disk
from liberatai_coordinator.sim.virtual.learning import Learn
from liberatai_coordinator.sim.virtual.seen import Seen
from liberatai_core import __version__
from liberatai_core.contract.chunks import count
from liberatai_core.contract.frame import Signer, expect, seal
from liberatai_core.contract.limits import MAX_SINGLE_BYTES
from liberatai_core.contract.messages import (
    BlobManifest,
    BlobRef,
    Capability,
    EpochSeen,
    Event,
    Message,
    Offer,
    Report,
    Request,
    State,
    TaskSpec,
    Telemetry,
    Want,
)
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import LiberataiError
from liberatai_core.link.link import Will
from liberatai_core.link.memory import Connection, MemoryBroker, Packet
from liberatai_core.link.mqtt.reconnect import Loss, Reconnect
from liberatai_core.link.packet import publish_bytes

BLOB_TIMEOUT_S: Final = 60.0
HANDSHAKE_BYTES: Final = 3000
"""TCP, TLS 1.3 with certificates of both sides, CONNECT: what a connection takes before its first message."""
START_S: Final = 2.0
"""From the start of the program to its first connection."""
SUBSCRIBE_BYTES: Final = 8
LITTLE_S: Final = 0.001


class World(Protocol):
    """What devices share."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that everything runs on."""

    broker: MemoryBroker
    topics: Topics
    coordinator_key: bytes
    blobs: Blobs
    seen: Seen

    def macs(self, spec: TaskSpec) -> int:
        """Return the multiply-adds of a structure per sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What a simulated device is made of.

    Attributes:
        capability: what it says of itself; the session number is set at every start.
        data_path: its private file, "" where training is replaced.
        write_mb_s: of its disk.
        learn: its training.
        fails: why every training fails, "" if none does.
    """

    capability: Capability
    data_path: str
    write_mb_s: float
    learn: Learn
    fails: str = ""


class Device:
    """One device.

    Attributes:
        disk: what survives a crash.
        skew_s: how far its clock is ahead.
        running: it has been started and not crashed.
        busy_s: virtual seconds that it trained.
        rounds: updates that were receipted.
        body_bytes: of the newest sparse stream.
    """

    __slots__ = (
        "_connection",
        "_ear",
        "_events",
        "_fetching",
        "_handling",
        "_reconnect",
        "_timer",
        "_training",
        "_world",
        "body",
        "body_bytes",
        "busy_s",
        "connected_s",
        "disk",
        "id",
        "key",
        "line",
        "phase",
        "random",
        "rounds",
        "running",
        "session",
        "signer",
        "skew_s",
        "telemetry_s",
    )

    def __init__(self, world: World, body: Body, line: Line, key: bytes, seed: int) -> None:
        self._world, self.body, self.line = world, body, line
        self.id = body.capability.device
        self.key = key
        self.signer = Signer.from_seed(key, world.topics.fleet)
        self.random = Random(f"{seed}|{self.id}|device")  # noqa: S311 - a simulation
        self.disk = Disk()
        self.skew_s = 0.0
        self.running = False
        self.busy_s, self.rounds, self.body_bytes = 0.0, 0, 0
        self.phase = ""
        self.connected_s = 0.0
        self.telemetry_s = body.capability.telemetry_s
        self.session = s.Session(device=self.id)
        self._ear = Ear(world.topics.fleet, self.id, world.coordinator_key)
        self._events: deque[on.Happened] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None
        self._training: asyncio.TimerHandle | None = None
        self._fetching: dict[str, _Fetch] = {}
        self._reconnect = Reconnect(
            client_id=self.id, secure=False, cap_s=120.0, urgent_cap_s=10.0, spread_s=5.0
        )

    # --- life ----------------------------------------------------------------------------------

    def start(self, after_s: float = START_S) -> None:
        """Start the agent, as after a boot or a crash."""
        if self.running:
            return
        self.running = True
        self._events.clear()
        self.disk.session += 1
        self.session = s.Session(device=self.id)
        self._happened(
            on.Started(
                number=self.disk.session,
                unsent=self.disk.unsent(),
                finished=tuple(self.disk.finished),
                epoch=self.disk.epoch,
                path=self.disk.path,
                measured=False,
            )
        )
        self._measured()
        self._later(after_s, self._connect)

    def crash(self) -> None:
        """End as SIGKILL ends a process: the broker notices, nothing but the disk stays."""
        if not self.running:
            return
        self.running = False
        self._let_go()
        if self._connection is not None:
            self._connection = None
            self._world.broker.kill(self.id)
        self.session = s.Session(device=self.id)
        self._world.seen.note(self.id, "crashed")

    def leave(self) -> None:
        """Say goodbye and end, as a device does that is switched off in order."""
        if not self.running:
            return
        if self._connection is not None:
            self._publish("state", self._state("offline"), retain=True)
            connection, self._connection = self._connection, None
            # What was said is on its way before the connection closes.
            self._world.loop.call_at(
                self.line.up.last_s + LITTLE_S, self._world.broker.end, connection, "closed"
            )
        self.running = False
        self._let_go()
        self.session = s.Session(device=self.id)
        self._world.seen.note(self.id, "left")

    def jump(self, by_s: float) -> None:
        """Let the clock jump."""
        self.skew_s += by_s
        if self.running:
            self._due()

    def fill(self, full: bool) -> None:
        """Fill the disk, or free it."""
        self.disk.full = full

    def _let_go(self) -> None:
        for handle in (self._timer, self._training, *(one.timer for one in self._fetching.values())):
            if handle is not None:
                handle.cancel()
        self._timer = self._training = None
        self._fetching.clear()
        self._events.clear()
        self.line.cut()

    def _measured(self) -> None:
        capability = replace(self.body.capability, session=self.disk.session)
        self._happened(
            on.MachineChanged(
                tier=capability.tier, storage_bytes=capability.storage_bytes, capability=capability
            )
        )

    @property
    def connected(self) -> bool:
        """Whether a connection to the broker stands."""
        return self._connection is not None

    # --- connection ----------------------------------------------------------------------------

    def _connect(self) -> None:
        if not self.running or self._connection is not None:
            return
        away = self._world.broker.away(self.id)
        if away is not None:
            self._retry(Loss(away), 0.0)
            return
        self.line.send(self._world.loop.time(), HANDSHAKE_BYTES // 2)
        arrived_s = self.line.receive(self._world.loop.time(), HANDSHAKE_BYTES // 2)
        self._world.loop.call_at(arrived_s + 2 * self.line.rtt_s, self._connected)

    def _connected(self) -> None:
        if not self.running or self._connection is not None or self._world.broker.away(self.id) is not None:
            if self.running and self._connection is None:
                self._retry(Loss("no answer"), 0.0)
            return
        broker, topics = self._world.broker, self._world.topics
        will = Will(topic=topics.up(self.id, "state"), payload=self._state("lost"))

        def receive(packet: Packet, token: int) -> None:
            self._receive(connection, packet, token)

        connection = Connection(self.id, will, receive)
        known = broker.connect(connection)
        self._connection = connection
        self.connected_s = self._world.loop.time()
        self._reconnect.welcomed()
        connection.lost.add_done_callback(lambda lost: self._lost(connection, lost.result()))
        broker.resume(connection)
        for topic_filter in topics.to_device(self.id):
            self.line.send(self._world.loop.time(), SUBSCRIBE_BYTES + len(topic_filter))
            broker.subscribe(connection, topic_filter)
        self._happened(on.LinkUp(session_present=known, packet_bytes=broker.max_packet_bytes))
        self._world.seen.note(self.id, self.phase)

    def _lost(self, connection: Connection, reason: str) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        self.line.cut()
        for blob in list(self._fetching):
            self._fetch_failed(blob, "E_LINK", reason)
        self._happened(on.LinkDown())
        self._world.seen.note(self.id, "away")
        self._retry(
            Loss(reason, code=0x8E if "taken over" in reason else 0),
            self._world.loop.time() - self.connected_s,
        )

    def _retry(self, loss: Loss, lasted_s: float) -> None:
        self._reconnect.urgent = bool(self.session.pending) or self.session.task is not None
        pause = self._reconnect.lost(loss, lasted_s, self.random.uniform)
        self._later(pause.seconds, self._connect)

    # --- what comes ----------------------------------------------------------------------------

    def _receive(self, connection: Connection, packet: Packet, token: int) -> None:
        size = publish_bytes(packet.topic, len(packet.payload), qos=packet.qos)
        arrives_s = self.line.receive(self._world.loop.time(), size)
        self._world.loop.call_at(arrives_s, self._arrived, connection, packet, token)

    def _arrived(self, connection: Connection, packet: Packet, token: int) -> None:
        if connection is not self._connection:
            return  # it comes again with the next connection
        blob = self._fetching.get(packet.topic.split("/")[5]) if "/pub/b/" in packet.topic else None
        if blob is not None:
            self._part(blob, packet)
        elif "/pub/" not in packet.topic:
            try:
                event = self._ear.hear(packet.topic, packet.payload)
            except LiberataiError as error:
                self._world.seen.note(self.id, "refused", f"{error.code}: {error}")
            else:
                if isinstance(event, Want | Request):
                    # No operator speaks to it.
                    self._world.seen.note(self.id, "unanswered", type(event).__name__)
                elif event is not None:
                    self._happened(event)
        if token and connection is self._connection:
            self._world.broker.acknowledge(connection, token)

    # --- the session ---------------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._world.loop.time() + self.skew_s

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back, unless the device has crashed and started anew in the meantime."""
        number = self.disk.session
        self._world.loop.call_later(
            seconds, lambda: callback() if self.running and self.disk.session == number else None
        )

    def _happened(self, event: on.Happened) -> None:
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                one = self._events.popleft()
                if self.session.now_s < self._now_s():
                    self._step(on.Tick(now_s=self._now_s()))
                if not isinstance(one, on.Tick):
                    self._step(one)
        finally:
            self._handling = False
        if not self.running:
            return
        phase = s.report_of(self.session).phase
        if phase != self.phase:
            self.phase = phase
            self._world.seen.note(self.id, phase)
        self._wait_for_due()

    def _wait_for_due(self) -> None:
        due_s = s.due_s(self.session) - self.skew_s
        if self._timer is not None:
            if self._timer.when() == due_s and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if due_s < float("inf"):
            self._timer = self._world.loop.call_at(max(due_s, self._world.loop.time() + LITTLE_S), self._due)

    def _due(self) -> None:
        self._timer = None
        if self.running:
            self._happened(on.Tick(now_s=self._now_s()))

    def _step(self, event: on.Happened) -> None:
        self.session, actions = s.step(self.session, event)
        for action in actions:
            try:
                self._perform(action)
            except LiberataiError as error:
                self._world.seen.note(self.id, "fault", f"{error.code}: {error}")

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.PublishState(capability=capability):
                if capability is not None:
                    self._publish("caps", self._seal(capability), retain=True)
                self._publish("state", self._state("online"), retain=True)
            case do.PublishCapability(capability=capability):
                self._publish("caps", self._seal(capability), retain=True)
            case do.PublishReport():
                self._publish("rep", self._seal(self._report(action)), retain=True)
            case do.Emit():
                self._world.seen.note(self.id, "event", f"{action.name} {action.code} {action.text}".strip())
                self._publish("ev", self._seal(self._event(action)))
            case do.FetchBlobs(refs=refs):
                for ref in refs:
                    self._fetch(ref)
            case do.DropBlobs(keep=keep):
                for blob in [blob for blob in self._fetching if blob not in keep]:
                    self._end_fetch(blob)
                self.disk.blobs &= keep
            case do.ReadSpec(blob=blob):
                self._happened(on.SpecRead(blob=blob, spec=self._world.blobs.spec(blob)))
            case do.KeepPath(path=path):
                self.disk.path = path
            case do.WarmTrainer():
                pass
            case do.StartTraining():
                self._train(action)
            case do.StopTraining():
                self._stop_training()
            case do.StoreUpdate():
                pause_s = len(action.result.body) / (self.body.write_mb_s * 1e6)
                self._later(pause_s, lambda: self._store(action))
            case do.SendUpdate(update_id=uid):
                one = self.disk.updates.get(uid)
                if one is not None:
                    self._send(self._world.topics.upload(self.id, one.transfer), one.frame)
            case do.SendOffer():
                self._offer(action)
            case do.SendChunks():
                self._send_chunks(action)
            case do.Forget(update_id=uid):
                stored = self.disk.updates.pop(uid, None)
                if stored is not None:
                    self.rounds += 1
                    self._world.seen.receipted(self.id, uid, stored)
            case do.RestoreResidual(update_id=uid):
                self.disk.give_back(uid)
            case do.RememberEpoch(epoch=epoch, word=word):
                self.disk.epoch, self.disk.word = epoch, word
            case do.ShowEpoch():
                if self.disk.word:
                    seen = EpochSeen(device=self.id, session=self.disk.session, word=self.disk.word)
                    self._publish("ev", self._seal(seen))
            case do.RaiseSession(known=known):
                self.disk.session = max(self.disk.session, known) + 1
                self._happened(on.Renumbered(number=self.disk.session))
                self._measured()
                if self._connection is not None:
                    self._world.broker.end(self._connection, "a higher session number")

    # --- files ---------------------------------------------------------------------------------

    def _fetch(self, ref: BlobRef) -> None:
        if ref.blob in self._fetching:
            return
        if ref.blob in self.disk.blobs:
            self._happened(on.BlobStored(blob=ref.blob))
            return
        timer = self._world.loop.call_later(
            BLOB_TIMEOUT_S, self._fetch_failed, ref.blob, "E_NOT_FOUND", "nothing came"
        )
        fetch = self._fetching[ref.blob] = _Fetch(ref, timer)
        self._ask(fetch, None if ref.size_bytes > MAX_SINGLE_BYTES else 0)

    def _ask(self, fetch: "_Fetch", part: int | None) -> None:
        topic = self._world.topics.blob(fetch.ref.blob, part)
        fetch.asked.append(topic)
        arrives_s = self.line.send(self._world.loop.time(), SUBSCRIBE_BYTES + len(topic))
        self._world.loop.call_at(arrives_s, self._subscribe, self._connection, fetch, topic)

    def _subscribe(self, connection: Connection | None, fetch: "_Fetch", topic: str) -> None:
        if (
            connection is not None
            and connection is self._connection
            and self._fetching.get(fetch.ref.blob) is fetch
        ):
            self._world.broker.subscribe(connection, topic)

    def _part(self, fetch: "_Fetch", packet: Packet) -> None:
        place, ref, world = packet.topic.rpartition("/")[2], fetch.ref, self._world
        if place == "m":
            try:
                manifest = expect(packet.payload, BlobManifest, world.topics.fleet, self._ear.key)
            except LiberataiError as error:
                world.seen.note(self.id, "refused", f"{error.code}: {error}")
                return
            fetch.parts = dict.fromkeys(range(count(ref.size_bytes, manifest.chunk_bytes)), b"")
            for number in fetch.parts:
                self._ask(fetch, number)
            return
        if ref.size_bytes > MAX_SINGLE_BYTES and not fetch.parts:
            return
        fetch.parts[int(place)] = packet.payload
        if not all(fetch.parts.values()):
            return
        content = packet.payload if len(fetch.parts) == 1 else b"".join(fetch.parts.values())
        if not world.blobs.keep(ref, content):
            self._fetch_failed(ref.blob, "E_DIGEST", "not what its name says")
        elif self.disk.full:
            self._fetch_failed(ref.blob, "E_DISK", "no space left on device")
        else:
            self._end_fetch(ref.blob)
            self.disk.blobs.add(ref.blob)
            self._happened(on.BlobStored(blob=ref.blob))

    def _fetch_failed(self, blob: str, code: str, text: str) -> None:
        self._end_fetch(blob)
        self._happened(on.BlobFailed(blob=blob, code=code, text=text))

    def _end_fetch(self, blob: str) -> None:
        fetch = self._fetching.pop(blob, None)
        if fetch is None:
            return
        fetch.timer.cancel()
        if self._connection is not None:
            for topic in fetch.asked:
                self._world.broker.unsubscribe(self._connection, topic)

    # --- training ------------------------------------------------------------------------------

    def _train(self, action: do.StartTraining) -> None:
        seconds = training_s(action.spec.training, self._world.macs(action.spec), self.body.capability)
        seconds = max(LITTLE_S, seconds * self.random.uniform(0.9, 1.1))
        self._training = self._world.loop.call_later(seconds, self._trained, action, seconds)

    def _limits(self) -> Limits:
        told = self.body.capability
        return Limits(memory_bytes=told.memory_bytes, runtimes=told.runtimes, samples=told.samples)

    def _stop_training(self) -> None:
        if self._training is not None:
            self._training.cancel()
            self._training = None

    def _trained(self, action: do.StartTraining, seconds: float) -> None:
        self._training = None
        self.busy_s += seconds
        if self.body.fails:
            code, _, text = self.body.fails.partition(": ")
            self._happened(on.TrainingFailed(update_id=action.update_id, code=code, text=text))
            return
        task, disk = action.task, self.disk
        residual, left_in, returned = disk.leftover(task.job, action.spec.structure.id)
        work = replace(
            work_of(action, self.body.data_path, self._world.blobs.path),
            residual=residual,
            returned=returned,
            rounds_away=rounds_away(task, left_in) if residual is not None else 0,
            runtime=trainer_of(action.spec, self._limits()),
        )
        answer = self.body.learn(work, self.body.capability.samples)
        if isinstance(answer, Failed):
            failed = on.TrainingFailed(update_id=action.update_id, code=answer.code, text=answer.text)
            self._happened(failed)
            return
        result = replace(answer.result, train_seconds=seconds)
        if result.dropped is not None:
            self._happened(on.LeftoverDropped(code=result.dropped[0], text=result.dropped[1]))
        self._happened(on.Trained(update_id=action.update_id, result=result))

    def _store(self, action: do.StoreUpdate) -> None:
        uid = action.update_id
        try:
            update = update_of(action)
            moved = replace(
                update, sent_bytes=self.line.up.moved_bytes, received_bytes=self.line.down.moved_bytes
            )
            frame = self._seal(moved)
            self.disk.commit(
                update, frame, action.task.task_id, action.result.residual, action.result.returned
            )
        except LiberataiError as error:
            self._happened(on.StoreFailed(update_id=uid, code=error.code, text=str(error)))
            return
        self.body_bytes = len(update.body)
        self._happened(
            on.OutboxStored(
                update_id=uid,
                job=update.job,
                round=update.round,
                transfer=blob_id(frame),
                size_bytes=len(frame),
            )
        )

    # --- what goes -----------------------------------------------------------------------------

    def _offer(self, action: do.SendOffer) -> None:
        one = self.disk.updates.get(action.update_id)
        if one is None:
            return
        offer = Offer(
            device=self.id,
            transfer=one.transfer,
            size_bytes=len(one.frame),
            chunk_bytes=action.chunk_bytes,
            sha256=hashlib.sha256(one.frame).digest(),
            update_id=action.update_id,
            job=one.job,
            round=one.round,
        )
        self._send(self._world.topics.upload(self.id, one.transfer), self._seal(offer))

    def _send_chunks(self, action: do.SendChunks) -> None:
        one = self.disk.updates.get(action.update_id)
        if one is None:
            return
        for number in action.numbers:
            chunk = one.frame[number * action.chunk_bytes : (number + 1) * action.chunk_bytes]
            self._send(self._world.topics.upload(self.id, one.transfer, number), chunk)
        pause_s = max(0.0, self.line.up.last_s - self._world.loop.time())
        self._later(pause_s, lambda: self._happened(on.ChunksSent(update_id=action.update_id)))

    def telemetry(self) -> None:
        """Give a sign of life."""
        if self._connection is None:
            return
        told = Telemetry(
            device=self.id,
            session=self.disk.session,
            sent_bytes=self.line.up.moved_bytes,
            received_bytes=self.line.down.moved_bytes,
        )
        self._publish("tele", self._seal(told), qos=0)

    def _report(self, action: do.PublishReport) -> Report:
        return Report(
            device=self.id,
            session=self.disk.session,
            phase=action.phase,
            job=action.job,
            round=action.round,
            reason=outward(action.reason.partition(":")[0], action.reason),
        )

    def _event(self, action: do.Emit) -> Event:
        return Event(
            device=self.id,
            session=self.disk.session,
            number=action.number,
            name=action.name,
            code=action.code,
            text=outward(action.code, action.text),
        )

    def _state(self, state: Any) -> bytes:
        return self._seal(State(device=self.id, state=state, session=self.disk.session, version=__version__))

    def _seal(self, message: Message) -> bytes:
        return seal(message, self.signer)

    def _publish(self, leaf: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        self._send(self._world.topics.up(self.id, leaf), payload, retain=retain, qos=qos)

    def _send(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        connection = self._connection
        if connection is None:
            return  # the next connection says it again
        arrives_s = self.line.send(self._world.loop.time(), publish_bytes(topic, len(payload), qos=qos))
        self._world.loop.call_at(arrives_s, self._delivered, connection, Packet(topic, payload, qos), retain)

    def _delivered(self, connection: Connection, packet: Packet, retain: bool) -> None:
        if not connection.lost.done():
            try:
                self._world.broker.publish(connection, packet, retain=retain)
            except LiberataiError as error:
                self._world.seen.note(self.id, "refused", f"{error.code}: {error}")


@dataclass(slots=True)
class _Fetch:
    """A blob on its way."""

    ref: BlobRef
    timer: asyncio.TimerHandle
    asked: list[str] = field(default_factory=list)
    parts: dict[int, bytes] = field(default_factory=dict)
