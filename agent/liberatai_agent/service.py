"""Makes happen what `session` decides: one link, one outbox, one training process, one event loop.

Every incoming frame is verified with the one pinned key of the coordinator before it is looked at. A
message is acknowledged after it was handled. What could not be sent is not queued: the next connection
says everything again from the session's state.
"""

import asyncio
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import fits, gate, probe
from liberatai_agent import session as s
from liberatai_agent.blobs import BlobStore, Fetcher
from liberatai_agent.children.messages import File, Work
from liberatai_agent.children.trainer import Trainer
from liberatai_agent.config import AgentConfig, load_profile
from liberatai_agent.link_watch import LinkWatch
from liberatai_agent.outbox import Outbox, StateLock, device_seed, mark_of
from liberatai_core import __version__
from liberatai_core.contract import chunks, topics
from liberatai_core.contract.frame import Opened, Signer, decode_spec, key_id, open_frame, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, MAX_SINGLE_BYTES, MAX_SPEC_BYTES
from liberatai_core.contract.messages import (
    BlobRef,
    Cancel,
    Capability,
    CoordinatorState,
    Credit,
    Event,
    Message,
    Offer,
    Receipt,
    Report,
    State,
    Step,
    Task,
    Telemetry,
    Update,
    update_id,
)
from liberatai_core.errors import CodecError, LiberataiError, LinkError, SchemaError, TopicError
from liberatai_core.link.link import Connected, Disconnected, Link, Received, Traffic, Will

log = logging.getLogger(__name__)

GATE_S = 5.0
"""Between two looks at load, heat and battery."""
MACHINE_S = 30.0
"""Between two looks at limits and the data file."""
STATUS_S = 2.0
"""Between two writes of the status file: people watch it, cards wear out."""
GOODBYE_S = 4.0
"""For the last messages and for closing the link; the whole stop stays below 10 s."""
HEADROOM_BYTES = 4096
"""Topic and properties of a packet."""
REPORT_HOLD_S = 0.5
"""What people wait for (a fault, a closed gate, the first word) is said unless it is over at once."""
ROUTINE_HOLD_S = 20.0
"""A phase of an ordinary round is told when it lasts: a report takes as many bytes as a small update, and a
round that is over by then needs none."""
MAX_EVENTS = 64
"""Events that may wait to be sent; older ones are only in the log."""

LinkFactory = Callable[[Will], Link]


@dataclass(slots=True)
class _Letters:
    """What waits to be published: the newest word per retained topic, and a few events."""

    retained: dict[str, bytes] = field(default_factory=dict)
    events: deque[tuple[str, bytes]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    there: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        self.retained.clear()
        self.events.clear()


class Service:
    """One running agent.

    Args:
        config: settings.
        make_link: gives the link to the broker, with this last will.
        trainer: the training process's owner; made from the settings if None.
        blob_timeout_s: how long one blob message is waited for.

    `run` raises ConfigError, LockedError or DiskError when the agent cannot start.
    """

    def __init__(
        self,
        config: AgentConfig,
        make_link: LinkFactory,
        *,
        trainer: Trainer | None = None,
        blob_timeout_s: float = 60.0,
    ) -> None:
        self._config, self._make_link = config, make_link
        self._topics = topics.Topics(fleet=config.fleet)
        self._trainer = trainer or Trainer(config.trainer_idle_s, state_dir=config.state_path)
        self._blob_timeout_s = blob_timeout_s
        self._session = s.Session(device=config.device)
        self._events: deque[on.Happened] = deque()
        self._handling = False
        self._letters = _Letters()
        self._said: do.PublishReport | None = None
        self._saying: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._crash: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._training: asyncio.Task[None] | None = None
        self._uploading = asyncio.Lock()
        self._sending: set[bytes] = set()
        self._refused: dict[str, int] = {}
        self._unsaved_refused: dict[str, int] = {}
        self._connected: Connected | None = None
        self._coordinator = "unknown"
        self._last_error = ""
        self._last_training: dict[str, Any] = {}
        self._started_at = time.time()
        self._load = probe.LoadMeter()
        self._may_fetch = asyncio.Event()
        self._may_fetch.set()

    # --- life ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the agent to say goodbye and end; from the event loop's thread."""
        self._stop.set()

    async def run(self) -> None:
        """Run until `stop`."""
        config = self._config
        lock = StateLock(config.state_path)
        try:
            self._outbox = Outbox(config.state_path / "outbox.db", int(config.outbox_max_mb * (1 << 20)))
            try:
                await self._run()
            finally:
                self._outbox.close()
        finally:
            lock.close()

    async def _run(self) -> None:
        config = self._config
        self._signer = Signer.from_seed(device_seed(config.state_path), config.fleet)
        self._profile = load_profile(config)
        # On disk before CONNECT: no two connections of this device have the same number.
        self._number = self._outbox.next_session()
        self._refused = self._outbox.refusals()
        self._store = BlobStore(config.state_path / "blobs")
        will = Will(topic=self._up("state"), payload=self._seal(self._state("lost")))
        self._link = self._make_link(will)
        up_bits_s, down_bits_s = probe.promised_bits_s(config, self._profile)
        self._watch = LinkWatch(
            config.state_path,
            config.link.quota_bytes,
            self._traffic,
            _now_s,
            up_bits_s=up_bits_s,
            down_bits_s=down_bits_s,
        )
        # Nothing else runs yet, so this may block: a thread for it would stay and take memory.
        self._take_look(probe.bench(config.state_path, config.data))
        self._fetcher = Fetcher(
            self._link, self._topics, self._key, self._store, self._refuse, timeout_s=self._blob_timeout_s
        )
        self._happen(
            on.Started(
                unsent=self._outbox.unsent(),
                finished=self._outbox.finished(),
                epoch=self._outbox.epoch,
                path=self._store.recall_path(),
                tier=self._caps.tier,
                storage_bytes=self._caps.storage_bytes,
                fault=self._found.fault,
                note=self._found.warning,
            )
        )
        log.info(
            "agent %s of fleet %s: session %d, tier %s, %d samples",
            config.device,
            config.fleet,
            self._number,
            self._caps.tier,
            self._caps.samples,
        )
        try:
            await self._link.subscribe(*self._topics.to_device(config.device))
            await self._link.open()
            for work in (self._listen, self._publish_letters, self._tick, self._sample):
                self._spawn(work())
            give_memory_back()
            notify("READY=1")
            await self._stop.wait()
        finally:
            await self._goodbye()
        if self._crash is not None:
            raise self._crash

    async def _goodbye(self) -> None:
        notify("STOPPING=1")
        if self._saying is not None:
            self._saying.cancel()
        crashed = [t for t in (*self._tasks, *self._fetches.values(), self._training) if t is not None]
        for task in crashed:
            task.cancel()
        await asyncio.gather(*crashed, return_exceptions=True)
        await self._trainer.close()
        with contextlib.suppress(LiberataiError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                if self._connected is not None:
                    await self._link.publish(self._up("tele"), self._seal(self._telemetry()), qos=0)
                await self._link.publish(self._up("state"), self._seal(self._state("offline")), retain=True)
        with contextlib.suppress(LiberataiError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._link.close()
        self._connected = None
        self._session = msgspec.structs.replace(self._session, connected=False)
        with contextlib.suppress(LiberataiError):
            self._save_refused()
        self._watch.count()
        self._watch.save()
        self._write_status(stopped=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug: end, so that the supervisor starts a clean agent.
            self._crash = self._crash or task.exception()
            self._stop.set()

    # --- events and actions --------------------------------------------------------------------

    def _happen(self, event: on.Happened) -> None:
        """Tell the session; what follows from it is done before this returns, in order."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                happened = self._events.popleft()
                for one in (on.Tick(now_s=_now_s()), happened):
                    before = s.report_of(self._session)
                    self._session, actions = s.step(self._session, one)
                    after = s.report_of(self._session)
                    if after != before:
                        log.info("%s", _line(after))
                    for action in actions:
                        self._do(action)
        finally:
            self._handling = False

    def _do(self, action: do.Action) -> None:
        try:
            self._act(action)
        except LiberataiError as error:
            # Disk trouble: what matters is tried again, by the next receipt, task or start.
            self._note_error(error.code, str(error))

    def _act(self, action: do.Action) -> None:
        match action:
            case do.PublishState(state=state):
                # The capability carries the key that verifies everything else.
                self._write(self._up("caps"), self._caps)
                self._write(self._up("state"), self._state(state))
            case do.PublishReport():
                self._say_later(action)
            case do.Emit():
                self._emit(action)
            case do.FetchBlobs(refs=refs):
                for ref in refs:
                    self._fetch(ref)
            case do.DropBlobs(keep=keep):
                for blob in [blob for blob in self._fetches if blob not in keep]:
                    self._fetches.pop(blob).cancel()
                self._store.keep_only(keep)
            case do.ReadSpec(blob=blob):
                self._read_spec(blob)
            case do.KeepPath(path=path):
                self._store.remember_path(path)
            case do.WarmTrainer():
                self._spawn(self._warm())
            case do.StartTraining():
                self._training = self._spawn(self._train(action, self._training))
            case do.StopTraining(reason=reason):
                log.info("training stopped: %s", reason)
                if self._training is not None:
                    self._training.cancel()
            case do.StoreUpdate():
                self._store_update(action)
            case do.SendUpdate(update_id=uid):
                if uid not in self._sending:
                    self._sending.add(uid)
                    self._spawn(self._send(uid))
            case do.SendChunks():
                self._spawn(self._send_chunks(action))
            case do.Forget(update_id=uid):
                self._outbox.forget(uid)
            case do.RestoreResidual(update_id=uid):
                self._outbox.give_back(uid)
            case do.RememberEpoch(epoch=epoch):
                self._outbox.remember_epoch(epoch)

    # --- hearing -------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async for event in self._link.events():
            match event:
                case Connected():
                    log.info("connected to %s (%s)", self._config.broker, event.protocol)
                    self._connected = event
                    self._letters.clear()
                    self._said = None
                    self._happen(on.LinkUp(session_present=event.session_present))
                case Disconnected(reason=reason, retry_in_s=retry):
                    if self._connected is not None or reason != self._last_error.partition(": ")[2]:
                        log.warning(
                            "no connection to %s: %s (next try in %.1f s)", self._config.broker, reason, retry
                        )
                    self._last_error = f"E_LINK: {reason}"
                    self._connected = None
                    self._happen(on.LinkDown())
                case Received():
                    self._hear(event)

    def _hear(self, message: Received) -> None:
        try:
            place = topics.parse(message.topic, self._config.fleet)
            if place.side == "pub":
                self._fetcher.deliver(message)
                return
            if message.payload:
                opened = open_frame(message.payload, self._config.fleet, self._key)
                self._obey(place, opened)
        except LiberataiError as error:
            self._refuse(error.code, f"{message.topic}: {error}")
        self._link.ack(message.token)

    def _obey(self, place: topics.Place, opened: Opened) -> None:
        message = opened.message
        match (place.leaf, message):
            case ("state", CoordinatorState()):
                if message.coordinator != place.owner:
                    raise TopicError(f"presence of {message.coordinator}")
                self._happen(on.CoordinatorChanged(state=message.state, epoch=message.epoch))
                if message.epoch == self._session.epoch:
                    self._coordinator = message.state
            case ("task", Task()):
                self._require_own(message.device)
                wanted = update_id(message.device, message.job, message.round, message.base, message.run)
                if message.task_id != wanted:
                    raise SchemaError("task_id does not name this work")
                self._happen(on.TaskArrived(task=message))
            case ("task", Cancel()):
                self._require_own(message.device)
                self._happen(on.CancelArrived(cancel=message))
            case ("xa", Receipt()):
                self._require_own(message.device)
                self._happen(on.ReceiptArrived(receipt=message))
            case ("xa", Credit()):
                self._require_own(message.device)
                uid = self._outbox.of_transfer(message.transfer)
                if uid is not None:
                    self._happen(on.CreditArrived(update_id=uid, have=message.have, chunks=message.chunks))
            case _:
                raise TopicError(f"{type(message).__name__} does not belong here")

    def _require_own(self, device: str) -> None:
        if device != self._config.device:
            raise TopicError(f"meant for {device}")

    def _key(self, claimed: bytes) -> bytes | None:
        pinned = self._config.key_bytes
        return pinned if claimed == key_id(pinned) else None

    def _refuse(self, code: str, text: str) -> None:
        for counts in (self._refused, self._unsaved_refused):
            counts[code] = counts.get(code, 0) + 1
        if self._refused[code] & (self._refused[code] - 1) == 0:
            # The 1st, 2nd, 4th, 8th … of a kind: a flood must not fill the log.
            log.warning("refused %s: %s (%d so far)", code, text[:300], self._refused[code])

    def _save_refused(self) -> None:
        if self._unsaved_refused:
            self._outbox.add_refusals(self._unsaved_refused)
            self._unsaved_refused = {}

    # --- saying --------------------------------------------------------------------------------

    def _up(self, leaf: str) -> str:
        return self._topics.up(self._config.device, leaf)

    def _seal(self, message: Message) -> bytes:
        return seal(message, self._signer)

    def _write(self, topic: str, message: Message) -> None:
        """Publish a retained message, unless a newer one for the topic comes first."""
        self._letters.retained[topic] = self._seal(message)
        self._letters.there.set()

    def _say_later(self, wished: do.PublishReport) -> None:
        """Report a phase if it lasts, and if it is not what was reported last."""
        if self._saying is not None:
            self._saying.cancel()
        routine = self._said is not None and _is_routine(self._said) and _is_routine(wished)
        hold_s = ROUTINE_HOLD_S if routine else REPORT_HOLD_S
        self._saying = asyncio.get_running_loop().call_later(hold_s, self._say, wished)

    def _say(self, wished: do.PublishReport) -> None:
        if self._connected is not None and wished != self._said:
            self._said = wished
            self._write(self._up("rep"), self._report(wished))

    def _emit(self, action: do.Emit) -> None:
        log.warning("%s %s %s", action.name, action.code, action.text)
        if action.code:
            self._note_error(action.code, action.text, quiet=True)
        if self._connected is not None:
            event = Event(
                device=self._config.device,
                session=self._number,
                number=action.number,
                name=action.name,
                code=action.code,
                text=s.outward(action.code, action.text),
            )
            self._letters.events.append((self._up("ev"), self._seal(event)))
            self._letters.there.set()

    async def _publish_letters(self) -> None:
        letters = self._letters
        while True:
            await letters.there.wait()
            letters.there.clear()
            while letters.retained or letters.events:
                retain = bool(letters.retained)
                if retain:
                    topic = next(iter(letters.retained))
                    payload = letters.retained.pop(topic)
                else:
                    topic, payload = letters.events.popleft()
                try:
                    with self._watch.sending(len(payload)):
                        await self._link.publish(topic, payload, retain=retain)
                except LinkError as error:
                    # LinkUp says everything again.
                    log.debug("%s", error)
                except LiberataiError as error:
                    self._note_error(error.code, str(error))

    def _state(self, state: str) -> State:
        return msgspec.convert(
            {
                "device": self._config.device,
                "state": state,
                "session": self._number,
                "version": __version__,
            },
            State,
        )

    def _report(self, action: do.PublishReport) -> Report:
        return Report(
            device=self._config.device,
            session=self._number,
            phase=action.phase,
            job=action.job,
            round=action.round,
            reason=s.outward(action.reason.partition(":")[0], action.reason),
        )

    async def _sample(self) -> None:
        """Send load and traffic now and then; lost samples are lost."""
        probe.cpu_percent()
        while True:
            await asyncio.sleep(self._config.telemetry_s * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            if self._connected is None or self._watch.spent:
                continue
            with contextlib.suppress(LiberataiError):
                await self._link.publish(self._up("tele"), self._seal(self._telemetry()), qos=0)

    def _telemetry(self) -> Telemetry:
        traffic = self._link.traffic
        return Telemetry(
            device=self._config.device,
            session=self._number,
            cpu_percent=probe.cpu_percent() or 0.0,
            memory_available_bytes=probe.memory_available() or 0,
            rss_bytes=probe.rss() or 0,
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            temperature_c=probe.temperature_c(),
        )

    def _traffic(self) -> Traffic:
        return self._link.traffic

    # --- blobs and training --------------------------------------------------------------------

    def _fetch(self, ref: BlobRef) -> None:
        if ref.blob not in self._fetches:
            task = self._spawn(self._fetch_one(ref))
            self._fetches[ref.blob] = task

    async def _fetch_one(self, ref: BlobRef) -> None:
        try:
            await self._may_fetch.wait()
            with self._watch.fetching():
                await self._fetcher.fetch(ref)
        except LiberataiError as error:
            self._forget_fetch(ref)
            self._note_error(error.code, str(error))
            self._happen(on.BlobFailed(blob=ref.blob, code=error.code, text=str(error)))
        else:
            self._forget_fetch(ref)
            self._happen(on.BlobStored(blob=ref.blob))

    def _forget_fetch(self, ref: BlobRef) -> None:
        # A cancelled fetch may have been replaced by a new one of the same blob.
        if self._fetches.get(ref.blob) is asyncio.current_task():
            del self._fetches[ref.blob]

    async def _warm(self) -> None:
        try:
            await self._trainer.warm()
        except LiberataiError as error:
            self._note_error(error.code, str(error))

    def _read_spec(self, blob: str) -> None:
        try:
            spec = decode_spec(self._store.read(blob, MAX_SPEC_BYTES))
        except LiberataiError as error:
            self._note_error(error.code, str(error))
            self._happen(on.BlobFailed(blob=blob, code=error.code, text=str(error)))
        else:
            self._happen(on.SpecRead(blob=blob, spec=spec))

    async def _train(self, action: do.StartTraining, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        task, spec, uid = action.task, action.spec, action.update_id
        try:
            limits = fits.limits_of(self._config, self._caps, spec.deadline_s)
            fits.require_fits(spec, task.density, limits)
            left = self._outbox.leftover(task.job, spec.structure.id, mark_of(spec))
            if left.dropped:
                text = f"{left.dropped} left-overs of a job of this name with other settings"
                self._happen(on.LeftoverDropped(code=CodecError.code, text=text))
            work = Work(
                device=task.device,
                job=task.job,
                round=task.round,
                structure=spec.structure,
                data=spec.data,
                training=spec.training,
                seed=spec.seed,
                density=task.density,
                path=tuple(self._file(step) for step in action.path),
                data_path=self._config.data or "",
                codec=spec.codec,
                residual=left.residual,
                returned=left.returned,
                share_class_counts=spec.share_class_counts,
                trained_share=spec.trained_share,
                rounds_away=max(0, task.round - left.round - 1) if left.residual is not None else 0,
                residual_decay=spec.residual_decay,
                residual_limit=spec.residual_limit,
                memory_bytes=limits.memory_bytes,
                cpu_seconds=limits.cpu_seconds,
            )
            started = time.monotonic()
            result = await self._trainer.train(work)
            result = msgspec.structs.replace(result, train_seconds=time.monotonic() - started)
        except LiberataiError as error:
            self._note_error(error.code, str(error))
            self._happen(on.TrainingFailed(update_id=uid, code=error.code, text=str(error)))
            return
        if result.dropped is not None:
            code, text = result.dropped
            self._happen(on.LeftoverDropped(code=code, text=text))
        self._last_training = {
            "round": task.round,
            "structure": spec.structure.id,
            "samples": result.samples,
            "loss": result.loss,
            "train_seconds": result.train_seconds,
            "update_bytes": len(result.body),
        }
        self._happen(on.Trained(update_id=uid, result=result))

    def _file(self, step: Step) -> File:
        return File(path=str(self._store.path(step.blob.blob)), digest=step.digest)

    def _store_update(self, action: do.StoreUpdate) -> None:
        task, result = action.task, action.result
        try:
            update = Update(
                update_id=action.update_id,
                device=task.device,
                job=task.job,
                round=task.round,
                epoch=task.epoch,
                structure=action.spec.structure.id,
                base=task.base,
                samples=result.samples,
                codec=action.spec.codec,
                body=result.body,
                class_counts=result.class_counts,
                evaluation=result.evaluation,
                train_seconds=result.train_seconds,
                loss=result.loss,
            )
            dropped = self._outbox.commit_training(
                update,
                task_id=task.task_id,
                residual=result.residual,
                mark=mark_of(action.spec),
                returned=result.returned,
            )
        except LiberataiError as error:
            self._note_error(error.code, str(error))
            self._happen(on.StoreFailed(update_id=action.update_id, code=error.code, text=str(error)))
            return
        for uid in dropped:
            self._happen(on.UpdateDropped(update_id=uid, reason="the outbox is full"))
        self._happen(on.OutboxStored(update_id=action.update_id))
        give_memory_back()

    # --- uploads -------------------------------------------------------------------------------

    async def _send(self, uid: bytes) -> None:
        """Send an update, or offer it if it is too long for one message."""
        try:
            async with self._uploading:
                frame = self._outbox.seal(uid, self._seal_update)
                self._outbox.count_attempt(uid)
                xid = topics.blob_id(frame)
                payload = frame if len(frame) <= self._single_bytes else self._offer(uid, frame, xid)
                with self._watch.sending(len(payload)):
                    await self._link.publish(self._topics.upload(self._config.device, xid), payload)
        except LinkError as error:
            # The next connection, or the timer, sends it again.
            log.debug("%s", error)
        except LiberataiError as error:
            self._note_error(error.code, str(error))
        finally:
            self._sending.discard(uid)

    def _seal_update(self, update: Update) -> bytes:
        traffic = self._link.traffic
        counted = msgspec.structs.replace(
            update, sent_bytes=traffic.sent_bytes, received_bytes=traffic.received_bytes
        )
        return self._seal(counted)

    def _offer(self, uid: bytes, frame: bytes, xid: str) -> bytes:
        update = next(one for one in self._outbox.unsent() if one.update_id == uid)
        offer = Offer(
            device=self._config.device,
            transfer=xid,
            size_bytes=len(frame),
            chunk_bytes=self._chunk_bytes,
            sha256=hashlib.sha256(frame).digest(),
            update_id=uid,
            job=update.job,
            round=update.round,
        )
        return self._seal(offer)

    async def _send_chunks(self, action: do.SendChunks) -> None:
        async with self._uploading:
            with contextlib.suppress(LiberataiError):
                frame = self._outbox.seal(action.update_id, self._seal_update)
                xid, size = topics.blob_id(frame), self._chunk_bytes
                lacking = chunks.missing(action.have, chunks.count(len(frame), size))
                for number in lacking[: action.chunks]:
                    topic = self._topics.upload(self._config.device, xid, number)
                    chunk = chunks.cut(frame, number, size)
                    with self._watch.sending(len(chunk)):
                        await self._link.publish(topic, chunk)

    @property
    def _packet_bytes(self) -> int:
        found = self._connected.max_packet_bytes if self._connected is not None else MAX_PACKET_BYTES
        return max(1024, min(found, MAX_PACKET_BYTES) - HEADROOM_BYTES)

    @property
    def _single_bytes(self) -> int:
        return min(MAX_SINGLE_BYTES, self._packet_bytes)

    @property
    def _chunk_bytes(self) -> int:
        return min(CHUNK_BYTES, self._packet_bytes)

    # --- time, machine, status -----------------------------------------------------------------

    async def _tick(self) -> None:
        due = dict.fromkeys(("gate", "machine", "status"), 0.0)
        every = {"gate": GATE_S, "machine": MACHINE_S, "status": STATUS_S}
        due["machine"] = _now_s() + MACHINE_S
        while True:
            self._happen(on.Tick(now_s=_now_s()))
            notify("WATCHDOG=1")
            for name in [name for name, when in due.items() if _now_s() >= when]:
                due[name] = _now_s() + every[name]
                if name == "gate":
                    self._look_at_gate()
                elif name == "machine":
                    await self._look_again()
                else:
                    self._write_status()
            await asyncio.sleep(0.5)

    def _look_at_gate(self) -> None:
        rules = self._config.gate
        load = None
        if rules.max_load_others is not None:
            own = tuple(pid for pid in (os.getpid(), self._trainer.pid) if pid is not None)
            load = self._load.others(own)
        is_open, reason = gate.decide(self._with_quota(snapshot(self._config.state_path, load)), rules)
        if is_open != self._session.gate_open or reason != self._session.gate_reason:
            self._happen(on.GateChanged(open=is_open, reason=reason))

    def _with_quota(self, now: gate.Snapshot) -> gate.Snapshot:
        """Add what the link moved today; downloads wait from here on when the quota is used up."""
        self._watch.count()
        if self._watch.spent:
            self._may_fetch.clear()
        else:
            self._may_fetch.set()
        if self._session.stage in ("training", "storing"):
            # Its bytes are spent already; the update is small, and without it they were spent for nothing.
            return now
        return replace(now, day_bytes=self._watch.day_bytes, day_quota_bytes=self._watch.quota_bytes)

    def _take_look(self, found: probe.Bench) -> None:
        self._data_mark = probe.data_mark(self._config.data)
        self._found = found
        self._caps = self._capability(probe.measure(self._config.state_path))

    def _capability(self, machine: probe.Machine) -> Capability:
        return probe.capability(
            self._config,
            self._profile,
            machine,
            self._found,
            session=self._number,
            public_key=self._signer.public_key,
            link=self._watch.look(),
            quota_spent=self._watch.spent,
        )

    async def _look_again(self) -> None:
        """Notice new limits and new data, and say so."""
        before, fault = self._caps, self._found.fault
        if probe.data_mark(self._config.data) != self._data_mark:
            folder, data = self._config.state_path, self._config.data
            self._take_look(await asyncio.to_thread(probe.bench, folder, data))
        else:
            self._caps = self._capability(probe.measure(self._config.state_path))
        with contextlib.suppress(LiberataiError):
            self._save_refused()
        if _steady(self._caps) == _steady(before) and fault == self._found.fault:
            return
        self._happen(
            on.MachineChanged(
                tier=self._caps.tier,
                storage_bytes=self._caps.storage_bytes,
                fault=self._found.fault,
                note=self._found.warning,
            )
        )
        self._write(self._up("caps"), self._caps)

    def _note_error(self, code: str, text: str, *, quiet: bool = False) -> None:
        line = f"{code}: {text}"
        if line != self._last_error and not quiet:
            log.warning("%s", line)
        self._last_error = line

    def status(self, *, stopped: bool = False) -> dict[str, Any]:
        """Return what `liberatai-agent status` shows."""
        state, report, traffic = self._session, s.report_of(self._session), self._link.traffic
        structure = state.spec[1].structure.id if state.task and state.spec else ""
        structure = structure or self._last_training.get("structure", "")
        return {
            "device": self._config.device,
            "fleet": self._config.fleet,
            "version": __version__,
            "pid": os.getpid(),
            "running": not stopped,
            "session": self._number,
            "public_key": self._signer.public_key.hex(),
            "broker": self._config.broker,
            "connected": self._connected is not None,
            "protocol": self._connected.protocol if self._connected is not None else "",
            "coordinator": self._coordinator,
            "epoch": state.epoch,
            "phase": "stopped" if stopped else report.phase,
            "reason": report.reason,
            "job": report.job,
            "round": report.round or self._last_training.get("round", 0),
            "structure": structure,
            "tier": self._caps.tier,
            "profile": self._caps.profile,
            "samples": self._caps.samples,
            "storage_bytes": self._caps.storage_bytes,
            "sent_bytes": traffic.sent_bytes,
            "received_bytes": traffic.received_bytes,
            "link": self._link_status(),
            "updates_waiting": len(state.pending),
            "last_training": self._last_training,
            "model": self._final_model(),
            "refusals": dict(sorted(self._refused.items())),
            "updates_refused": dict(state.refusals),
            "last_error": self._last_error,
            "data_fault": self._found.fault,
            "data_warning": self._found.warning,
            "started_at": self._started_at,
            "updated_at": time.time(),
        }

    def _link_status(self) -> dict[str, Any]:
        """Return what is measured and counted of the link; rates are null until they are measured."""
        link = self._watch.link
        return {
            "up_bits_s": link.up_bits_s,
            "down_bits_s": link.down_bits_s,
            "latency_s": link.latency_s,
            "metered": self._caps.metered,
            "day_bytes": link.day_bytes,
            "day_quota_bytes": self._watch.quota_bytes,
            "quota_spent": self._watch.spent,
            "ever_sent_bytes": link.sent_bytes,
            "ever_received_bytes": link.received_bytes,
        }

    def _final_model(self) -> dict[str, Any]:
        """Return the finished model on this device: version, digest and files, oldest first."""
        chain = self._session.final
        if not chain:
            return {}
        return {
            "version": chain[-1].version,
            "digest": chain[-1].digest.hex(),
            "complete": not self._session.missing,
            "files": [str(self._store.path(step.blob.blob)) for step in chain],
        }

    def _write_status(self, *, stopped: bool = False) -> None:
        path = self._config.state_path / "status.json"
        part = path.with_name("status.json.tmp")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(self.status(stopped=stopped), indent=1), encoding="utf-8")
            part.replace(path)


def snapshot(state_dir: Path, load_others: float | None = None) -> gate.Snapshot:
    """Return what the gate decides on."""
    percent, on_mains = probe.battery()
    return gate.Snapshot(
        load_others=load_others,
        battery_percent=percent,
        on_mains=on_mains,
        temperature_c=probe.temperature_c(),
        disk_free_bytes=probe.disk_free(state_dir),
        memory_available_bytes=probe.memory_available(),
    )


def _steady(caps: Capability) -> Capability:
    """Return a capability without what changes all the time: 16 MiB of disk are no news."""
    coarse = caps.storage_bytes >> 24 if caps.storage_bytes == caps.disk_free_bytes else caps.storage_bytes
    return msgspec.structs.replace(caps, disk_free_bytes=caps.disk_free_bytes >> 28, storage_bytes=coarse)


def _is_routine(report: do.PublishReport) -> bool:
    return report.phase not in ("failed", "gated") and not report.reason


def _line(report: do.PublishReport) -> str:
    parts = [report.phase, report.job, f"round {report.round}" if report.round else "", report.reason]
    return " · ".join(part for part in parts if part)


def _now_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps and never back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def give_memory_back() -> None:
    """Return freed memory to the system: an agent is idle most of the time (glibc; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def notify(text: str) -> None:
    """Tell systemd how the agent is, if it asked (NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect("\0" + address[1:] if address.startswith("@") else address)
        client.sendall(text.encode())


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the status file of a state folder, None if there is none."""
    try:
        found = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
