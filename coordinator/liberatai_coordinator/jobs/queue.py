"""All jobs of a coordinator: they run side by side and share the devices (`sharing`)."""

import asyncio
import logging
from dataclasses import dataclass, field

import msgspec

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.jobs import said
from liberatai_coordinator.jobs.merging import COUNTERS
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.runner import Runner
from liberatai_coordinator.jobs.sharing import Sharing
from liberatai_coordinator.jobs.slots import Slots
from liberatai_coordinator.models.commits import Commits
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.repository.store import Store
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import JobRow
from liberatai_core.errors import BusyError, DiskError, LiberataiError, StateError

log = logging.getLogger(__name__)

DISK_RETRY_S = 10.0
"""Pause before a job goes on after a full disk."""

RECALLED = 4
"""Finished jobs that are kept in memory because devices asked for their models."""

MODELS = "models"
"""Folder of the model repository, beside the ledger."""

LIVE = ("waiting", "running", "paused")
"""States of jobs that have not ended."""


@dataclass(slots=True, kw_only=True)
class Jobs:
    """The jobs.

    Attributes:
        runners: of jobs that have not ended, by name.
        unreadable: jobs that this release cannot read, and why; they are left as they are.
    """

    ledger: Ledger
    repository: Repository
    publisher: Publisher
    fleet: Fleet
    coordinator: str
    runners: dict[str, Runner] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    slots: Slots = field(init=False)
    commits: Commits = field(init=False)
    _counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    _running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _recalled: dict[str, Runner] = field(default_factory=dict)
    _recalling: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.slots = Slots(publisher=self.publisher, sharing=Sharing(on_change=self._wake))
        self.commits = Commits(
            store=Store(self.repository.folder / MODELS),
            ledger=self.ledger,
            repository=self.repository,
            author=self.coordinator,
        )

    def resume(self) -> None:
        """Go on with every job that had not ended when the coordinator did."""
        rows = self.ledger.jobs.all()
        for row in rows:  # from the oldest: the newest word of a device counts
            told = self.ledger.jobs.value(row.name, COUNTERS)
            if told is not None:
                self._counters |= msgspec.msgpack.decode(told, type=dict[str, tuple[int, int]])
        for row in rows:
            # Somebody may have created one meanwhile: it runs already.
            if row.state in LIVE and row.name not in self.runners:
                self.start(row)

    def start(self, row: JobRow) -> None:
        """Run a job from wherever the ledger says it stands."""
        try:
            runner = self._runner(row)
        except msgspec.MsgspecError as error:
            reason = f"another release wrote it: {error}; install that one, or delete the job"
            log.error("job %s cannot be read: %s", row.name, reason)  # noqa: TRY400 - one line, no traceback
            self.unreadable[row.name] = reason
            return
        if row.state != "paused":
            runner.running.set()
        self.runners[row.name] = runner
        self._running[row.name] = asyncio.create_task(self._run(runner))

    def pause(self, name: str) -> None:
        """Open no further round of a job."""
        self.ledger.jobs.set_state(name, "paused")
        said.job(name, "paused: the open round is finished, no other opens")
        if name in self.runners:
            self.runners[name].running.clear()
            self._wake()

    def unpause(self, name: str) -> None:
        """Go on with a paused job."""
        self.ledger.jobs.set_state(name, "running")
        said.job(name, "goes on")
        if name in self.runners:
            self.runners[name].running.set()

    async def abort(self, name: str) -> None:
        """End a job now; its versions stay."""
        runner = self.runners.get(name)
        if runner is None:
            self.ledger.jobs.end(name, "aborted", "aborted by an operator")
            said.job(name, "aborted by an operator")
            return
        running = self._running.pop(name, None)
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if self.ledger.jobs.get(name).state not in LIVE:
            raise StateError(f"job {name} has ended in the meantime: it cannot be aborted")
        await runner.stop("aborted", "aborted by an operator")
        said.job(name, "aborted by an operator")
        self.runners.pop(name, None)

    async def delete(self, name: str) -> None:
        """Forget an ended job, so that its name can be used again; its versions stay.

        Raises:
            StateError: it has not ended. NotFoundError: there is no such job.
        """
        row = self.ledger.jobs.get(name)
        if row.state in LIVE and name not in self.unreadable:
            raise StateError(f"job {name} is {row.state}: `liberatai jobs abort {name}` first")
        if name not in self.unreadable:
            runner = self._recalled.pop(name, None) or self._runner(row)
            runner.tasks.recall()
            await runner.tasks.drop_all()
        await self.slots.clear(name)
        await self.publisher.clear(self.publisher.topics.head(name))
        await asyncio.to_thread(self.ledger.jobs.delete, name)
        said.job(name, "deleted; its versions stay")
        self.unreadable.pop(name, None)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Stop every job where it stands; a restart goes on from there."""
        for task in self._running.values():
            task.cancel()
        return list(self._running.values())

    @property
    def working(self) -> bool:
        """Whether long work of a job is under way in a thread, which nothing can stop."""
        return any(runner.busy for runner in self.runners.values())

    # --- devices -------------------------------------------------------------------------------

    def waits(self) -> dict[str, str]:
        """Return why jobs open no round, in words, by name; "": none, or an operator paused it."""
        told = {name: one.waits if one.running.is_set() else "" for name, one in self.runners.items()}
        return told | self.unreadable

    async def base_missing(self, device: str) -> None:
        """Let one job answer a device that does not hold what it was told to go on from.

        Its word does not name a job, but it has one task slot: what stands there is of the open round that
        it was invited to, or else of the last job that finished with it, which may be long ago.
        """
        owner = self.slots.owners.get(device)
        for name, runner in self.runners.items():
            now = runner.open_round
            if (
                now is not None
                and owner in (None, name)
                and device in now.invitations.keys() - now.stored.keys()
            ):
                await runner.collecting.base_missing(device)
                return
        if owner in self.runners or self.slots.sharing.holder(device) in self.runners:
            return  # between two rounds: its next task follows
        for row in reversed(self.ledger.jobs.all()):
            if row.state == "finished" and owner in (None, row.name) and self._took_part(row.name, device):
                await (await self._recall(row)).collecting.base_missing(device)
                return

    def _took_part(self, job: str, device: str) -> bool:
        stored = self.ledger.jobs.value(job, "plan")
        given = msgspec.msgpack.decode(stored, type=list[Assignment]) if stored else []
        return any(one.device == device and one.structure for one in given)

    async def _recall(self, row: JobRow) -> Runner:
        """Return a finished job, also after a restart."""
        async with self._recalling:
            runner = self._recalled.pop(row.name, None)
            if runner is None:
                runner = self._runner(row)
                await runner.recall()
            self._recalled[row.name] = runner  # the one that was asked for last is the last one
            while len(self._recalled) > RECALLED:
                del self._recalled[next(iter(self._recalled))]
        return runner

    def _wake(self) -> None:
        for runner in self.runners.values():
            runner.opening.fleet_changed.set()

    # --- running -------------------------------------------------------------------------------

    def _runner(self, row: JobRow) -> Runner:
        job = msgspec.json.decode(row.spec, type=JobSpec)
        return Runner(
            job=job,
            row=row,
            ledger=self.ledger,
            versions=Versions(
                job=job, ledger=self.ledger, repository=self.repository, first=row.first_version
            ),
            publisher=self.publisher,
            fleet=self.fleet,
            slots=self.slots,
            coordinator=self.coordinator,
            counters=self._counters,
            commits=self.commits,
        )

    async def _run(self, runner: Runner) -> None:
        name = runner.job.name
        try:
            if self.ledger.jobs.get(name).state == "waiting":
                self.ledger.jobs.set_state(name, "running")
                said.job(name, f"starts, {runner.job.rounds.count} rounds")
            else:
                said.job(name, "goes on where the last start left it")
            try:
                await self._run_on(runner)
            finally:
                await runner.work.settled()
            said.job(name, "finished")
            self._forget(name)
        except asyncio.CancelledError:
            raise
        except LiberataiError as error:
            log.error("job %s failed: %s %s", name, error.code, error)  # noqa: TRY400 - one line, no traceback
            await self._fail(runner, f"{error.code}: {error}")
        except Exception as error:
            log.exception("job %s failed", name)
            await self._fail(runner, f"E_INTERNAL: {error}")

    async def _run_on(self, runner: Runner) -> None:
        """Run a job, and run it again from its ledger when the disk was full or busy (promise P8)."""
        while True:
            try:
                await runner.run()
                runner.finish()
            except (BusyError, DiskError) as error:
                log.warning("job %s waits: %s %s", runner.job.name, error.code, error)
                await asyncio.sleep(DISK_RETRY_S)
            else:
                return

    async def _fail(self, runner: Runner, reason: str) -> None:
        """End a job that cannot go on; a disk that refuses now is tried again until it does not."""
        while True:
            try:
                await runner.stop("failed", reason)
            except (BusyError, DiskError) as error:
                log.warning("job %s cannot be ended yet: %s %s", runner.job.name, error.code, error)
                await asyncio.sleep(DISK_RETRY_S)
            else:
                break
        self._forget(runner.job.name)

    def _forget(self, name: str) -> None:
        """Let a job's memory go: its unlabeled data, its weights."""
        self.runners.pop(name, None)
        self._running.pop(name, None)
