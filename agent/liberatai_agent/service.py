"""One running agent: wires the parts together, and makes happen what `session` decides.

A message is acknowledged after it was handled. What could not be sent is not queued: the next connection says
everything again from the session's state.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from typing import Any

from msgspec.structs import replace

from liberatai_agent import actions as do
from liberatai_agent import events as on
from liberatai_agent import session as s
from liberatai_agent.children.trainer import Trainer
from liberatai_agent.config import AgentConfig, load_profile
from liberatai_agent.exchange.connection import Connection, LinkFactory
from liberatai_agent.exchange.downloads import Downloads
from liberatai_agent.exchange.hearing import Ear, is_blob
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.exchange.saying import Saying
from liberatai_agent.exchange.uploads import Uploads
from liberatai_agent.health.logbook import Logbook
from liberatai_agent.health.overview import Seen, StatusFile, overview
from liberatai_agent.health.replying import Replying
from liberatai_agent.health.supervisor import Signs, Supervisor, give_memory_back, stands_still
from liberatai_agent.machine.clock import now_s
from liberatai_agent.machine.machine_watch import MachineWatch, Watched, sample
from liberatai_agent.machine.probe import promised_bits_s
from liberatai_agent.membership.belonging import Belonging
from liberatai_agent.membership.identity import Identity
from liberatai_agent.membership.renewal import Renewal
from liberatai_agent.membership.silence import Silence
from liberatai_agent.session.state import Training as TrainingNow
from liberatai_agent.shadow.models import Models
from liberatai_agent.shadow.shadow import Shadow
from liberatai_agent.store.blobs import BlobStore, Fetcher
from liberatai_agent.store.counters import Counters
from liberatai_agent.store.database import Database
from liberatai_agent.store.faults import Faults
from liberatai_agent.store.outbox import Outbox, open_database
from liberatai_agent.store.state_folder import StateLock
from liberatai_agent.updates.trials import Trials
from liberatai_agent.updates.upgrading import Upgrading
from liberatai_agent.work.answering import Answering
from liberatai_agent.work.training import Training
from liberatai_core.contract.frame import fingerprint, seal
from liberatai_core.contract.messages import Have, Request, Telemetry, Update, Want
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import ConfigError, DamagedError, LiberataiError, SignatureError
from liberatai_core.link.link import Link, Received
from liberatai_core.sd_notify import notify

log = logging.getLogger(__name__)

GOODBYE_S = 1.0
"""For the last messages, and again for closing the link: whoever stops a machine does not wait long."""
TRIM_S = 1.0
"""From a receipt to the moment when nobody holds the frame that it is about."""
SOON_S = 0.02
"""The clock of the session is asked for the time no more often than this."""


class Service:
    """One running agent.

    Args:
        config: settings.
        make_link: gives the link to the broker, with this last will.
        trainer: the training process's owner; made from the settings if None.
        blob_timeout_s: how long one blob message is waited for.
        damaged: what ended the agent before this one, and was set aside.

    `run` raises ConfigError, LockedError or DiskError when the agent cannot start, and DamagedError when a
    file of its own turned out to be damaged, and was set aside.
    """

    def __init__(
        self,
        config: AgentConfig,
        make_link: LinkFactory,
        *,
        trainer: Trainer | None = None,
        blob_timeout_s: float = 60.0,
        damaged: str = "",
    ) -> None:
        self._damaged = damaged
        self._config, self._make_link, self._blob_timeout_s = config, make_link, blob_timeout_s
        self._trainer = trainer or Trainer(config.trainer_idle_s, state_dir=config.state_path)
        self._topics = Topics(fleet=config.fleet)
        self._ear = Ear(config.fleet, config.device, config.key_bytes)
        self._belonging = Belonging(config.fleet, config.key_bytes)
        self._session = s.Session(device=config.device)
        self._events: deque[on.Happened] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._silence = Silence(lambda: self._session.measured, self._nobody_spoke)
        self._supervisor = Supervisor(self._signs)
        self._started_at = time.time()
        self._logbook = Logbook()
        self._said = ""
        self.again = False

    # --- life ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the agent to say goodbye and end; from the event loop's thread."""
        # Only here: who ends to begin anew in the same process would be killed for not having stopped.
        notify("STOPPING=1")
        self._supervisor.stop()

    async def run(self) -> None:
        """Run until `stop`."""
        lock = StateLock(self._config.state_path)
        logging.getLogger().addHandler(self._logbook)
        try:
            database = open_database(self._config.state_path, self._config.device)
            try:
                self._build(database)
                await self._run(self._damaged or database.damaged)
            except DamagedError as error:
                database.damaged = str(error)
                database.set_aside()
                raise
            finally:
                database.close()
        finally:
            logging.getLogger().removeHandler(self._logbook)
            lock.close()

    def _build(self, database: Database) -> None:
        config, folder = self._config, self._config.state_path
        self._identity = Identity(folder, config.device, config.fleet)
        profile = load_profile(config)
        self._outbox = Outbox(database, folder, config.device, int(config.outbox_max_mb * (1 << 20)))
        self._counters = Counters(database, config.device)
        self._faults = Faults(self._counters)
        self._store = BlobStore(folder / "blobs")
        self._identity.raise_session(self._counters.take("session"))
        if (epoch := self._counters.take("epoch")) > self._identity.fence(config.key_bytes).epoch:
            self._identity.set_fence(config.key_bytes, epoch)
        # On disk before CONNECT: no two starts of this device have the same number.
        self._identity.next_session()
        own = config.device, self._identity, self._topics
        self._connection = Connection(
            config.device,
            config.broker,
            self._identity,
            self._topics,
            self._make_link,
            self._faults,
            self.happened,
            self._received,
        )
        up_bits_s, down_bits_s = promised_bits_s(config, profile)
        self._meter = LinkMeter(
            folder,
            config.link.quota_bytes,
            lambda: self._connection.traffic,
            now_s,
            up_bits_s=up_bits_s,
            down_bits_s=down_bits_s,
        )

        def link() -> Link:
            return self._connection.link

        run = self._supervisor.run_part
        self._saying = Saying(*own, link, self._meter, self._failed)
        self._uploads = Uploads(*own, link, self._outbox, self._meter, self.happened, self._failed, run)
        fetcher = Fetcher(
            link,
            self._topics,
            self._ear.key,
            self._store,
            self._faults.refuse,
            timeout_s=self._blob_timeout_s,
        )
        self._downloads = Downloads(self._store, fetcher, self._meter, self.happened, run)
        watched = Watched(
            lambda: self._training.pid,
            lambda: self._session.task is not None,
            lambda: isinstance(self._session.work, TrainingNow),
            self._store.size_bytes,
        )
        self._machine = MachineWatch(config, profile, self._identity, self._meter, watched, self.happened)
        self._models = Models(
            folder,
            config.device,
            fetcher,
            config.data or "",
            self._machine.limits,
            self._trainer.train,
            lambda: self._session.storage_bytes,
        )
        self._shadow = Shadow(
            config,
            folder,
            self._ear.key,
            self._models,
            lambda new, paused: self._machine.configure(new, paused=paused),
            lambda have: _tell_have(self._saying, self._status, have),
            Upgrading(config, folder, fetcher, self._machine.look_soon),
        )
        self._replying = Replying(
            config.device,
            self._logbook if config.share_logs else None,
            self._look_again,
            self._saying.answer,
        )
        self._training = Training(
            self._trainer,
            self._store,
            self._outbox,
            config.data or "",
            self._machine.limits,
            self._seal,
            self.happened,
            run,
        )
        self._renewal = Renewal(
            config,
            self._identity,
            self._topics,
            link,
            lambda: self._connection.connected,
            self._failed,
            self._supervisor.crashed,
        )
        self._connection.lost = self._renewal.lost

        def at_rest() -> bool:
            return self._session.task is None and not self._session.pending

        def well() -> bool:
            there = self._connection.connected is not None and self._session.measured
            return there and not stands_still(self._signs(), time.monotonic())

        def anew() -> None:
            self.again = True
            self._supervisor.stop()

        self._trials = Trials(config, self._machine.looked, at_rest, well, anew)
        self._status = StatusFile(folder, self.status)
        self._answering = Answering(config)

    async def _run(self, damaged: str) -> None:
        self.happened(
            on.Started(
                number=self._identity.session,
                unsent=self._outbox.unsent(),
                finished=self._outbox.finished(),
                epoch=self._identity.fence(self._config.key_bytes).epoch,
                path=self._store.recall_path(),
                measured=False,
            )
        )
        for what in filter(None, (damaged, *self._identity.damaged)):
            self.happened(on.StateDamaged(what=what))
        config = self._config
        key = fingerprint(self._identity.signer.public_key)
        log.info(
            "agent %s of fleet %s: session %d, key %s",
            config.device,
            config.fleet,
            self._identity.session,
            key,
        )
        try:
            await self._connection.link.open()
            self._shadow.recall()
            parts = (
                self._shadow.run,
                self._trials.prove,
                self._trials.watch,
                self._connection.listen,
                self._saying.run,
                self._watch_machine,
                self._sample,
                self._status.run,
                self._answering.run,
                self._renewal.run,
            )
            for part in (*parts, self._supervisor.watch):
                self._supervisor.run_part(part())
            notify("READY=1")
            await self._supervisor.wait()
        finally:
            await self._goodbye()
        self._supervisor.require_no_crash()

    async def _goodbye(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._silence.cancel()
        parts = (self._supervisor, self._downloads, self._uploads, self._training)
        await asyncio.gather(*(part.close() for part in parts), self._leave(), return_exceptions=True)
        self._connection.connected = None
        self._faults.save()
        self._meter.count()
        self._meter.save()
        self._status.write(stopped=True)

    async def _leave(self) -> None:
        with contextlib.suppress(LiberataiError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                if self._connection.connected is not None:
                    await self._saying.telemetry(self._telemetry())
                    await self._saying.goodbye()
        with contextlib.suppress(LiberataiError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._connection.link.close()

    def look_soon(self) -> None:
        """Look at the machine and at what its people want before long; from the event loop's thread."""
        self._machine.look_soon()

    # --- events and actions --------------------------------------------------------------------

    def happened(self, event: on.Happened) -> None:
        """Tell the session; what follows from it is done before this returns, in order."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                one = self._events.popleft()
                if isinstance(one, on.BlobFailed | on.TrainingFailed | on.StoreFailed):
                    self._failed(one.code, one.text)
                if isinstance(one, on.LinkUp | on.LinkDown):
                    self._saying.connected(isinstance(one, on.LinkUp))
                if isinstance(one, on.LinkUp):
                    self._shadow.say()
                    self._silence.begin()
                if isinstance(one, on.CoordinatorChanged):
                    self._belonging.believed()
                    self._faults.heal(SignatureError.code)
                    self._faults.heal(ConfigError.code)
                self._step(on.Tick(now_s=now_s()))
                self._step(one)
        except Exception as error:
            # A bug, in whatever callback this is: a clean agent is started.
            self._supervisor.crashed(error)
            raise
        finally:
            self._handling = False
        self._wait_for_due()
        self._tell_service_manager()
        self._connection.link.urgent(bool(self._session.pending) or self._session.task is not None)
        self._status.changed()

    def _step(self, event: on.Happened) -> None:
        before = s.report_of(self._session)
        self._session, actions = s.step(self._session, event)
        after = s.report_of(self._session)
        if after != before:
            log.info("%s", _line(after))
        for action in actions:
            try:
                self._perform(action)
            except LiberataiError as error:
                # Disk trouble: what matters is tried again, by the next receipt, task or start.
                self._failed(error.code, str(error))

    def _tell_service_manager(self) -> None:
        """Show in one line how the agent is: `systemctl status` prints it."""
        where = "connected" if self._connection.connected is not None else "no broker"
        line = f"{where} · {_line(s.report_of(self._session))}"
        if line != self._said:
            self._said = line
            notify(f"STATUS={line}")

    def _wait_for_due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = s.due_s(self._session) - now_s()
        if due_s < float("inf") and not self._supervisor.stopping:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(SOON_S, due_s), lambda: self.happened(on.Tick(now_s=now_s())))

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.PublishState(capability=capability, resting=resting):
                if capability is not None:
                    self._saying.capability(capability)
                self._saying.state("draining" if resting else "online")
            case do.PublishCapability(capability=capability):
                self._saying.capability(capability)
            case do.PublishReport():
                self._saying.report(action)
            case do.Emit():
                log.warning("%s %s %s", action.name, action.code, action.text)
                if action.code:
                    self._faults.note(action.code, action.text, quiet=True)
                self._saying.event(action)
            case do.FetchBlobs(refs=refs):
                for ref in refs:
                    self._downloads.fetch(ref)
            case do.DropBlobs(keep=keep):
                self._downloads.keep_only(keep)
            case do.ReadSpec(blob=blob):
                self._downloads.read_spec(blob)
            case do.KeepPath(path=path, spec=spec):
                self._store.remember_path(path, spec)
            case do.WarmTrainer():
                self._machine.look_soon()
                self._training.warm()
            case do.StartTraining():
                self._training.start(action)
            case do.StopTraining(reason=reason):
                log.info("training stopped: %s", reason)
                self._training.stop()
            case do.StoreUpdate():
                self._training.store(action)
            case do.SendUpdate() | do.SendOffer() | do.SendChunks():
                self._uploads.send(action)
            case do.Forget(update_id=uid):
                self._outbox.forget(uid)
                # A round is over: when it has let go of it, what it took goes back to the machine.
                asyncio.get_running_loop().call_later(TRIM_S, give_memory_back)
            case do.RestoreResidual(update_id=uid):
                self._outbox.give_back(uid)
            case do.RememberEpoch(epoch=epoch, word=word):
                self._identity.set_fence(self._config.key_bytes, epoch, word)
            case do.ShowEpoch():
                self._saying.show_epoch(self._identity.fence(self._config.key_bytes).word)
            case do.RaiseSession(known=known):
                self._supervisor.run_part(self._renumber(known))

    def _failed(self, code: str, text: str) -> None:
        self._faults.note(code, text)
        if code == DamagedError.code:
            self._supervisor.crashed(DamagedError(text))

    # --- hearing and looking -------------------------------------------------------------------

    def _received(self, message: Received) -> None:
        try:
            if message.topic == self._topics.provisioning(self._config.device, "crt"):
                self._renewal.deliver(message.payload)
                self._connection.link.ack(message.token)
                return
            if is_blob(message.topic, self._config.fleet):
                self._downloads.deliver(message)
                return
            event = self._ear.hear(message.topic, message.payload)
            if isinstance(event, Want):
                self._shadow.heard(event, message.payload, self._session.epoch)
            elif isinstance(event, Request):
                self._replying.require_new(event, self._session.epoch, now_s())
                self._supervisor.run_part(self._replying.answer(event))
            elif event is not None:
                self.happened(event)
        except LiberataiError as error:
            self._faults.refuse(error.code, f"{message.topic}: {error}")
            self._belonging.refused(message.topic, message.payload)
            self._note_belonging()
        self._connection.link.ack(message.token)

    def _nobody_spoke(self) -> None:
        self._belonging.silence()
        self._note_belonging()

    def _note_belonging(self) -> None:
        if self._belonging.fault is not None:
            self._failed(*self._belonging.fault)
            self._status.changed()

    async def _look_again(self) -> None:
        """Measure anew, and say anew what the fleet should know: it asks because it misses something."""
        await self._machine.look_at_machine()
        self._saying.again()

    async def _watch_machine(self) -> None:
        """Look at the machine; when it is known what this device can do, tasks may come."""
        await self._machine.first_look()
        await self._connection.subscribe()
        give_memory_back()
        await self._machine.run()

    async def _renumber(self, known: int) -> None:
        try:
            if await self._connection.renumber(known):
                await self._machine.look_at_machine()
                await self._connection.link.open()
        except LiberataiError as error:
            # The disk, for now: the coordinator says it again.
            self._failed(error.code, str(error))

    async def _sample(self) -> None:
        """Send load and traffic now and then; lost samples are lost."""
        self._telemetry()
        while True:
            await asyncio.sleep(self._shadow.config.telemetry_s * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            self._faults.save()
            if self._connection.connected is not None:
                self._note_belonging()  # it holds on, although it is said once
            if self._connection.connected is not None and not self._meter.spent:
                with contextlib.suppress(LiberataiError):
                    await self._saying.telemetry(self._telemetry())

    def _telemetry(self) -> Telemetry:
        traffic = self._connection.traffic
        number = self._identity.session
        return sample(self._config.device, number, traffic.sent_bytes, traffic.received_bytes)

    def _signs(self) -> Signs:
        self._connection.look()
        return Signs(
            connected=self._connection.connected is not None,
            moved_s=self._connection.moved_s,
            keepalive_s=self._config.keepalive_s,
            retry_s=self._connection.retry_s,
            publishing_s=self._saying.publishing_since,
            stopping_s=self._training.stopping_since,
        )

    def _seal(self, update: Update) -> bytes:
        moved = self._connection.traffic
        counted = replace(update, sent_bytes=moved.sent_bytes, received_bytes=moved.received_bytes)
        return seal(counted, self._identity.signer)

    def status(self, *, stopped: bool = False) -> dict[str, Any]:
        """Return what `liberatai-agent status` shows."""
        seen = Seen(
            config=self._config,
            session=self._session,
            identity=self._identity,
            meter=self._meter,
            faults=self._faults,
            traffic=self._connection.traffic,
            connected=self._connection.connected,
            capability=self._machine.capability,
            found=self._machine.found,
            last_training=self._training.last,
            certificate=self._renewal.dates,
            blobs=self._store.path(""),
            deployed=self._models.current,
            deployed_files=self._models.paths(),
            started_at=self._started_at,
        )
        return overview(seen, stopped=stopped)


def _line(report: do.PublishReport) -> str:
    parts = [report.phase, report.job, f"round {report.round}" if report.round else "", report.reason]
    return " · ".join(part for part in parts if part)


def _tell_have(saying: Saying, status: StatusFile, have: Have) -> None:
    """Tell the coordinator, and whoever reads the status, what this device is like now."""
    saying.have(have)
    status.changed()
