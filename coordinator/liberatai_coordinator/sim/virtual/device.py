"""One simulated device: the agent's own session, with a link, a clock, a disk and a trainer of virtual time.

What `session` decides is made happen here as `liberatai_agent.service` does it: the same frames on the same
topics, verified by the same code. What comes back takes as long as the link, the disk and the processor of
the device's profile would.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final

from msgspec.structs import replace

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import session as s
from liberatai_agent.exchange.hearing import Ear
from liberatai_agent.work.training import update_of
from liberatai_coordinator.sim.line import Line
from liberatai_coordinator.sim.virtual import said
from liberatai_coordinator.sim.virtual.disk import Disk
from liberatai_coordinator.sim.virtual.fetching import Fetching
from liberatai_coordinator.sim.virtual.surroundings import Surroundings
from liberatai_coordinator.sim.virtual.trainer import Body, Trainer
from liberatai_coordinator.sim.virtual.wire import Wire
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import (
    EpochSeen,
    Message,
    Offer,
    Request,
    Telemetry,
    Want,
)
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import LiberataiError
from liberatai_core.link.memory import Packet

START_S: Final = 2.0
"""From the start of the program to its first connection."""
LITTLE_S: Final = 0.001


class Device:
    """One device.

    Attributes:
        disk: what survives a crash.
        skew_s: how far its clock is ahead.
        running: it has been started and not crashed.
        rounds: updates that were receipted.
        body_bytes: of the newest sparse stream.
    """

    __slots__ = (
        "_ear",
        "_events",
        "_fetching",
        "_handling",
        "_timer",
        "_wire",
        "_world",
        "body",
        "body_bytes",
        "disk",
        "id",
        "key",
        "line",
        "phase",
        "rounds",
        "running",
        "session",
        "signer",
        "skew_s",
        "telemetry_s",
        "trainer",
    )

    def __init__(
        self, world: Surroundings, body: Body, line: Line, key: bytes, seed: int, disk: Disk | None = None
    ) -> None:
        self._world, self.body, self.line = world, body, line
        self.id = body.capability.device
        self.key = key
        self.signer = Signer.from_seed(key, world.topics.fleet)
        self.disk = disk or Disk()
        self.skew_s = 0.0
        self.running = False
        self.rounds, self.body_bytes = 0, 0
        self.phase = ""
        self.telemetry_s = body.capability.telemetry_s
        self.session = s.Session(device=self.id)
        self._ear = Ear(world.topics.fleet, self.id, world.coordinator_key)
        self._events: deque[on.Happened] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        random = Random(f"{seed}|{self.id}|device")  # noqa: S311 - a simulation
        self._wire = Wire(world, self, line, random)
        self._fetching = Fetching(world, self._wire, self.disk, self._ear, self._happened, self.note)
        self.trainer = Trainer(world, body, self.disk, random, self._happened)

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
        self.later(after_s, self._wire.connect)

    def crash(self) -> None:
        """End as SIGKILL ends a process: the broker notices, nothing but the disk stays."""
        if not self.running:
            return
        self.running = False
        self._let_go()
        if self._wire.connection is not None:
            self._wire.connection = None
            self._world.broker.kill(self.id)
        self.session = s.Session(device=self.id)
        self.note("crashed")

    def leave(self) -> None:
        """Say goodbye and end, as a device does that is switched off in order."""
        if not self.running:
            return
        if self._wire.connection is not None:
            self._publish("state", said.state(self.id, self.disk.session, "offline"), retain=True)
            connection, self._wire.connection = self._wire.connection, None
            # What was said is on its way before the connection closes.
            self._world.loop.call_at(
                self.line.up.last_s + LITTLE_S, self._world.broker.end, connection, "closed"
            )
        self.running = False
        self._let_go()
        self.session = s.Session(device=self.id)
        self.note("left")

    def jump(self, by_s: float) -> None:
        """Let the clock jump."""
        self.skew_s += by_s
        if self.running:
            self._due()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self.trainer.stop()
        self._fetching.forget()
        self._events.clear()
        self.line.cut()

    def _measured(self) -> None:
        capability = replace(self.body.capability, session=self.disk.session)
        self._happened(
            on.MachineChanged(
                tier=capability.tier, storage_bytes=capability.storage_bytes, capability=capability
            )
        )

    # --- connection ----------------------------------------------------------------------------

    @property
    def urgent(self) -> bool:
        """Whether a task or an update is at stake."""
        return bool(self.session.pending) or self.session.task is not None

    def will(self) -> bytes:
        """Return what the broker says if the connection breaks."""
        return seal(said.state(self.id, self.disk.session, "lost"), self.signer)

    def linked(self, *, known: bool) -> None:
        """Go on with a connection."""
        packet_bytes = self._world.broker.max_packet_bytes
        self._happened(on.LinkUp(session_present=known, packet_bytes=packet_bytes))
        self.note(self.phase)

    def unlinked(self, reason: str) -> None:
        """Go on without a connection."""
        self._fetching.fail("E_LINK", reason)
        self._happened(on.LinkDown())
        self.note("away")

    def arrived(self, packet: Packet) -> None:
        """Take a packet."""
        if self._fetching.take(packet) or "/pub/" in packet.topic:
            return
        try:
            event = self._ear.hear(packet.topic, packet.payload)
        except LiberataiError as error:
            self.note("refused", f"{error.code}: {error}")
            return
        if isinstance(event, Want | Request):
            self.note("unanswered", type(event).__name__)  # no operator speaks to it
        elif event is not None:
            self._happened(event)

    def note(self, what: str, text: str = "") -> None:
        """Note what it does now."""
        self._world.seen.note(self.id, what, text)

    # --- the session ---------------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._world.loop.time() + self.skew_s

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
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
            self.note(phase)
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
                self.note("fault", f"{error.code}: {error}")

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.PublishState(capability=capability):
                if capability is not None:
                    self._publish("caps", capability, retain=True)
                self._publish("state", said.state(self.id, self.disk.session, "online"), retain=True)
            case do.PublishCapability(capability=capability):
                self._publish("caps", capability, retain=True)
            case do.PublishReport():
                self._publish("rep", said.report(self.id, self.disk.session, action), retain=True)
            case do.Emit():
                self.note("event", f"{action.name} {action.code} {action.text}".strip())
                self._publish("ev", said.event(self.id, self.disk.session, action))
            case do.FetchBlobs(refs=refs):
                for ref in refs:
                    self._fetching.fetch(ref)
            case do.DropBlobs(keep=keep):
                self._fetching.keep(keep)
                self.disk.blobs &= keep
            case do.ReadSpec(blob=blob):
                self._happened(on.SpecRead(blob=blob, spec=self._world.blobs.spec(blob)))
            case do.KeepPath(path=path):
                self.disk.path = path
            case do.WarmTrainer():
                pass
            case do.StartTraining():
                self.trainer.start(action)
            case do.StopTraining():
                self.trainer.stop()
            case do.StoreUpdate():
                pause_s = len(action.result.body) / (self.body.write_mb_s * 1e6)
                self.later(pause_s, lambda: self._store(action))
            case do.SendUpdate(update_id=uid):
                one = self.disk.updates.get(uid)
                if one is not None:
                    self._wire.send(self._world.topics.upload(self.id, one.transfer), one.frame)
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
                    self._publish("ev", seen)
            case do.RaiseSession(known=known):
                self.disk.session = max(self.disk.session, known) + 1
                self._happened(on.Renumbered(number=self.disk.session))
                self._measured()
                if self._wire.connection is not None:
                    self._world.broker.end(self._wire.connection, "a higher session number")

    def _store(self, action: do.StoreUpdate) -> None:
        uid = action.update_id
        try:
            update = update_of(action)
            moved = replace(
                update, sent_bytes=self.line.up.moved_bytes, received_bytes=self.line.down.moved_bytes
            )
            frame = seal(moved, self.signer)
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
        self._wire.send(self._world.topics.upload(self.id, one.transfer), seal(offer, self.signer))

    def _send_chunks(self, action: do.SendChunks) -> None:
        one = self.disk.updates.get(action.update_id)
        if one is None:
            return
        for number in action.numbers:
            chunk = one.frame[number * action.chunk_bytes : (number + 1) * action.chunk_bytes]
            self._wire.send(self._world.topics.upload(self.id, one.transfer, number), chunk)
        pause_s = max(0.0, self.line.up.last_s - self._world.loop.time())
        self.later(pause_s, lambda: self._happened(on.ChunksSent(update_id=action.update_id)))

    def telemetry(self) -> None:
        """Give a sign of life."""
        if self._wire.connection is None:
            return
        told = Telemetry(
            device=self.id,
            session=self.disk.session,
            sent_bytes=self.line.up.moved_bytes,
            received_bytes=self.line.down.moved_bytes,
        )
        self._publish("tele", told, qos=0)

    def _publish(self, leaf: str, message: Message, *, retain: bool = False, qos: int = 1) -> None:
        topic = self._world.topics.up(self.id, leaf)
        self._wire.send(topic, seal(message, self.signer), retain=retain, qos=qos)
