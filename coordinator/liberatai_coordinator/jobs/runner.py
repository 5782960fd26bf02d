"""One job from its plan to its last version: does what `plan`, `round` and `aggregation` decide.

Every step is written to the ledger before the world hears of it, and every step can be done again: after a
crash the runner reads where it was and goes on from there. See `docs/architecture.md`, "After a crash".
"""

import asyncio
import logging
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path as Folder

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs import judging, said
from liberatai_coordinator.jobs.collecting import Collecting
from liberatai_coordinator.jobs.materials import candidates_of, load_public, load_test
from liberatai_coordinator.jobs.merging import MERGED, Merging
from liberatai_coordinator.jobs.opening import Opening
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.records import invited_in, shortened, stats_of
from liberatai_coordinator.jobs.roster import Roster
from liberatai_coordinator.jobs.slots import Slots
from liberatai_coordinator.jobs.tasks import STEPS, Tasks
from liberatai_coordinator.jobs.work import Work
from liberatai_coordinator.models import starting
from liberatai_coordinator.models.commits import STARTED, Commits, Started
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import JobRow, RoundRow
from liberatai_core.errors import LiberataiError, NotFoundError
from liberatai_core.structure import Structure

log = logging.getLogger(__name__)

ROUNDS_ONLY = ("history", MERGED, STEPS)
"""Values in the ledger that an ended job does not need."""
KEEP_FRAMES = 2
"""Finished rounds whose frames the ledger keeps."""


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs one job.

    Attributes:
        roster: its devices.
        tasks: what they are told.
        opening: how its rounds open.
        collecting: its open round.
        merging: how its rounds become versions.
        work, beside: long work that rounds wait for, and that which they do not wait for.
        running: cleared while an operator pauses the job.
        counters: see `Merging`; shared by all jobs.
        commits: of all versions, in the model repository.
    """

    job: JobSpec
    row: JobRow
    ledger: Ledger
    versions: Versions
    publisher: Publisher
    fleet: Fleet
    slots: Slots
    coordinator: str
    counters: dict[str, tuple[int, int]]
    commits: Commits
    roster: Roster = field(init=False)
    tasks: Tasks = field(init=False)
    opening: Opening = field(init=False)
    collecting: Collecting = field(init=False)
    merging: Merging = field(init=False)
    running: asyncio.Event = field(default_factory=asyncio.Event)
    work: Work = field(default_factory=Work)
    beside: Work = field(default_factory=Work)
    _tidying: asyncio.Task[None] | None = None
    _structures: dict[str, Structure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job, ledger, versions, fleet = self.job, self.ledger, self.versions, self.fleet
        self.roster = Roster(job=job, ledger=ledger, fleet=fleet, published=self._published)
        self.tasks = Tasks(
            job=job,
            ledger=ledger,
            versions=versions,
            publisher=self.publisher,
            slots=self.slots,
            roster=self.roster,
            coordinator=self.coordinator,
        )
        self.opening = Opening(
            job=job,
            ledger=ledger,
            versions=versions,
            fleet=fleet,
            roster=self.roster,
            tasks=self.tasks,
            sharing=self.slots.sharing,
            work=self.work,
            running=self.running,
        )
        self.collecting = Collecting(tasks=self.tasks, buffered=self.opening.buffered)
        self.merging = Merging(
            job=job,
            ledger=ledger,
            versions=versions,
            fleet=fleet,
            roster=self.roster,
            work=self.work,
            counters=self.counters,
            decoded=self.collecting.decoded,
        )

    @property
    def open_round(self) -> deciding.Round | None:
        """The round that is open now."""
        return self.collecting.now

    @property
    def busy(self) -> bool:
        """Whether a thread works for this job."""
        return self.work.busy or self.beside.busy

    @property
    def waits(self) -> str:
        """Why no round opens, in words; empty while one is open."""
        return self.opening.waits

    # --- the life of a job ---------------------------------------------------------------------

    async def run(self) -> None:
        """Run to the end, from wherever the ledger says the job stands.

        Raises:
            LiberataiError: the job cannot go on; the ledger still has everything.
        """
        self.tasks.recall()
        self.roster.recall()
        row = await self._recall_round()
        self.merging.public = await self.work.do(load_public, self.job, Folder(self.row.base_dir))
        self.merging.test = await self.work.do(load_test, self.job, Folder(self.row.base_dir))
        candidates, self._structures = await self.work.do(candidates_of, self.job)
        self.roster.candidates = {candidate.id: candidate for candidate in candidates}
        if self.versions.newest is None:
            await self._start()
        await self.tasks.publish_newest("running")
        await self.work.do(self.roster.recall_rounds)
        if not self.opening.buffered and (row is None or row.state != "open"):
            self.collecting.resumed.set()
        if row is not None and row.state in {"open", "closed", "aggregated"}:
            await self._round(row)
        while self._published() < self.job.rounds.count:
            await self._round(None)
        await self._finish()

    async def recall(self) -> None:
        """Read a finished job back, so that `base_missing` can answer for it."""
        self.roster.recall()
        self.tasks.recall()
        newest = self.versions.stored()
        if newest is None:
            raise NotFoundError(f"job {self.job.name} has no version")
        await self.work.do(self.versions.restore, newest)
        self.collecting.finished = True
        self.collecting.resumed.set()

    async def stop(self, state: str, reason: str) -> None:
        """End the job before its last version: aborted, or failed.

        The state is written in one transaction with the end of its rounds: the updates of a round without a
        version were receipted, so they are listed as abandoned (promise P1). A crash before it leaves the
        job running, after it only words at the broker.
        """
        await self.work.settled()
        await self.tidied()
        self.ledger.jobs.end(self.job.name, state, reason, forget=ROUNDS_ONLY)
        self.collecting.over()
        self.collecting.resumed.set()
        if not self.roster.assigned:
            self.roster.recall()  # it failed before it was read, e.g. because its data are gone
            self.tasks.recall()
        await self._leave()
        await self.tasks.drop_all()
        if self.versions.newest is not None:
            await self.tasks.publish_head("aborted")

    async def _recall_round(self) -> RoundRow | None:
        """Read the newest version and round back; one that is open takes updates from here on.

        Receipts must not wait for what only tasks and aggregations need: data, and the import of torch.
        """
        newest = self.versions.stored()
        if newest is None:
            return None
        await self.work.do(self.versions.restore, newest)
        row = self.ledger.rounds.newest(self.job.name)
        if row is not None and row.state == "open":
            await self._begin(row)
        return row

    async def _start(self) -> None:
        """Make the plan and the first version."""
        await self.opening.wait_for_devices()
        self.roster.make()
        chosen = {sid: self._structures[sid] for sid in self.roster.keyframe_bytes}
        public, weights = self.merging.public, None
        if self.job.start is not None:
            begun = await self.work.do(starting.begin, self.commits.store, self.job, chosen, public)
            weights = begun.weights
            log.info("job %s starts: %s", self.job.name, begun.ways)
        await self.work.do(self.versions.start, chosen, self.roster.keyframe_bytes, public, weights)
        if self.job.start is not None:
            scores = await self.work.do(judging.central, self.job, self.versions, public, self.merging.test)
            told = Started(commit=begun.commit, accuracy=None if scores is None else scores.ensemble)
            self.ledger.jobs.set_value(self.job.name, STARTED, msgspec.msgpack.encode(told))

    async def _finish(self) -> None:
        await self.tasks.publish_head("finished")
        self.collecting.resumed.set()
        self.tasks.ways = await self.work.do(self.tasks.find_ways, self.roster.taking())
        await self.tasks.publish_steps([step for way in self.tasks.ways.values() for step in way.steps])
        self.collecting.finished = True
        await self._leave()
        await self.tidied()
        await self.tasks.drop_specs()

    async def _leave(self) -> None:
        """Give all devices back, and tell each how the job ended."""
        freed = self.slots.sharing.leave(self.job.name)
        number = self.ledger.rounds.newest_number(self.job.name)
        await self.tasks.tell_end([device for device, _ in self.roster.taking()], number)
        await self.slots.flush(freed)

    def finish(self) -> None:
        """Note that the job has made its last version."""
        self.ledger.jobs.end(self.job.name, "finished", forget=ROUNDS_ONLY)

    def _published(self) -> int:
        return self.versions.newest.number if self.versions.newest else 0

    # --- rounds --------------------------------------------------------------------------------

    async def _round(self, unfinished: RoundRow | None) -> None:
        started = clock.monotonic()
        row = await self.opening.open() if unfinished is None else unfinished
        if unfinished is None:
            said.opened(self.job.name, row.round, len(invited_in(row)))
        if row.state == "open":
            end = await self._collect(row)
            if isinstance(end, deciding.Abandon):
                said.abandoned(self.job.name, row.round, end.reason)
                self.ledger.rounds.abandon(self.job.name, row.round, end.reason)
                self._round_over(row)
                return
            self.ledger.rounds.close(self.job.name, row.round, list(end.update_ids))
            row = self.ledger.rounds.get(self.job.name, row.round)
        if row.state == "closed" and not await self.merging.version(row, started):
            self._round_over(row)
            return
        await self.tasks.publish_newest("running")
        self.ledger.rounds.set_published(self.job.name, row.round)
        self._say_published(row.round)
        self._round_over(row)
        standing = self.opening.standing(set())
        await self.tasks.drop_unneeded([one.way for one in standing if one.way is not None])
        await self.tidied()
        self._tidying = asyncio.create_task(self._tidy(self.tasks.versions_needed(standing)))

    def _say_published(self, number: int) -> None:
        row = self.ledger.rounds.get(self.job.name, number)
        stats = stats_of(row.stats)
        answered = sum(stats.verdicts.values()) if stats.verdicts else len(stats.contributions)
        invited = len(invited_in(row))
        said.published(self.job.name, number, self._published(), (answered, invited), stats)

    async def _tidy(self, needed: AbstractSet[int]) -> None:
        """Commit what is new; let go of frames and old versions; the next round does not wait for it."""
        try:
            await self.beside.do(self.ledger.rounds.prune, self.job.name, KEEP_FRAMES, shortened)
            await self.beside.do(self.commits.publish, self.job.name)
            if await self.beside.do(self.versions.collect, needed):
                keep = self.job.keep
                await self.beside.do(self.commits.collect, self.job.name, keep.newest, keep.every)
        except LiberataiError as error:
            log.warning("job %s: not tidied, the next round tries again: %s", self.job.name, error)

    async def tidied(self) -> None:
        """Wait until what the last round left is let go."""
        if self._tidying is not None:
            await asyncio.wait([self._tidying])
            self._tidying = None

    async def _collect(self, row: RoundRow) -> deciding.Close | deciding.Abandon:
        """Hold a round open until it decides to end."""
        if self.open_round is None or self.open_round.number != row.round:
            await self._begin(row)
        invitations = msgspec.msgpack.decode(row.invited, type=list[Invitation])
        await self.tasks.publish_steps(await self.work.do(self.tasks.steps, invitations))
        return await self.collecting.ended(row.round, invitations)

    async def _begin(self, row: RoundRow) -> None:
        """Let a round of the ledger take updates."""
        invitations = msgspec.msgpack.decode(row.invited, type=list[Invitation])
        # A restart gives the whole deadline again: the coordinator was away, not the devices.
        closes_s = clock.monotonic() + self.job.rounds.deadline_s
        opened = deciding.Round(
            job=self.job.name,
            number=row.round,
            invitations={invitation.device: invitation for invitation in invitations},
            target=self.opening.target(len(invitations)),
            # A link that is only tried again may fail: the round does not depend on it.
            quorum=self.opening.quorum(len(invitations) - len(self.roster.link_tries.open)),
            closes_s=closes_s,
            buffered=self.opening.buffered,
        )
        stored = await self.work.do(self.ledger.updates.senders, self.job.name, row.round)
        answered = {device for device, _ in stored}
        self.slots.sharing.take(self.job.name, opened.invitations.keys() - answered, closes_s)
        if self.opening.buffered:
            self.tasks.ways = {one.device: one.way for one in invitations if one.way is not None}
        else:
            wanted = [(one.device, one.structure) for one in invitations]
            self.tasks.ways = await self.work.do(self.tasks.find_ways, wanted)
        self.collecting.begin(opened, stored)

    def _round_over(self, row: RoundRow) -> None:
        """Forget a round, and give back the devices that it does not wait for any more."""
        self.collecting.over()
        standing = {one.device for one in self.opening.standing(set())}
        invited = msgspec.msgpack.decode(row.invited, type=list[Invitation])
        self.slots.free(self.job.name, [one.device for one in invited if one.device not in standing])
