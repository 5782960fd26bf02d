"""One job from its plan to its last version: does what `plan`, `round` and `aggregation` decide.

Every step is written to the ledger before the world hears of it, and every step can be done again: after a
crash the runner reads where it was and goes on from there. See `docs/architecture.md`, "After a crash".
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder
from typing import Any, TypeVar

import msgspec
import numpy as np

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Device, Fleet
from liberatai_coordinator.jobs import judging
from liberatai_coordinator.jobs.materials import candidates_of, load_public, load_test, spec_of
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.records import Stats, kept, parts_of, shortened
from liberatai_coordinator.jobs.roster import Roster
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.aggregation import Late
from liberatai_coordinator.models.members import Labelled, Public
from liberatai_coordinator.models.updates import decode_update
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds.catch_up import Path, Way
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import JobRow, RoundRow
from liberatai_core.contract import messages
from liberatai_core.contract.frame import encode_spec
from liberatai_core.contract.messages import (
    BlobRef,
    Cancel,
    Head,
    Step,
    Task,
    Update,
)
from liberatai_core.errors import (
    BusyError,
    DataError,
    DiskError,
    LiberataiError,
)
from liberatai_core.structure import Structure

log = logging.getLogger(__name__)

Result = TypeVar("Result")
MAX_FAILURES = 3
"""Rounds in a row that may fail in the aggregation; then the fault is not one of their updates."""

RECHECK_S = 60.0
"""While no device can take part: links and quotas recover with time, too, not only when a device says so."""

COUNTERS = "counters"
"""Name under which the ledger has `counters` as of a job's newest round."""

MERGED = "merged"
"""Name under which the ledger has what the aggregation of a job's newest round told, with its number."""

JUDGED = ("guard", "ensemble", "use", "rule", "local", "central", "test")
"""What `judging` finds out, also later."""

TICK_S = 0.5
"""How exactly a deadline is kept; rounds last seconds to days."""


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs one job.

    Attributes:
        roster: its devices.
        open_round: the round that is open now.
        running: cleared while an operator pauses the job.
        resumed: set once it is known which round is open, also after a restart. Until then nothing can be
            said about an update: a refusal would throw away what the round is waiting for. In a buffered job
            it is cleared between two rounds: the next one takes what comes late.
        fleet_changed: set when a device came, went or changed.
        counters: of every device's socket as its last update told them, (sent, received), for all jobs.
        public: the coordinator's own data.
        test: (inputs, labels) that decide nothing.
        paths: what devices surely hold: the files of the last update of theirs that was stored.
        ways: in the open round, or at the end: what every device was told to fetch.
        waits: why no round opens, in words; empty while one is open.
        finished: set when the slots hold the way to the finished model.
    """

    job: JobSpec
    row: JobRow
    ledger: Ledger
    versions: Versions
    publisher: Publisher
    fleet: Fleet
    coordinator: str
    roster: Roster = field(init=False)
    open_round: deciding.Round | None = None
    running: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    fleet_changed: asyncio.Event = field(default_factory=asyncio.Event)
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    public: Public = field(default_factory=Public)
    test: Labelled | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    ways: dict[str, Way] = field(default_factory=dict)
    waits: str = ""
    finished: bool = False
    _structures: dict[str, Structure] = field(default_factory=dict)
    _specs: dict[str, BlobRef] = field(default_factory=dict)
    _working: "asyncio.Future[Any] | None" = None
    _failures: int = 0
    _at_broker: set[str] = field(default_factory=set)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _end: deciding.Close | deciding.Abandon | None = None
    _told: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.roster = Roster(job=self.job, ledger=self.ledger, fleet=self.fleet, published=self._published)

    # --- the life of a job ---------------------------------------------------------------------

    async def run(self) -> None:
        """Run to the end, from wherever the ledger says the job stands.

        Raises:
            LiberataiError: the job cannot go on; the ledger still has everything.
        """
        self.public = await self._long(load_public, self.job, Folder(self.row.base_dir))
        self.test = await self._long(load_test, self.job, Folder(self.row.base_dir))
        candidates, self._structures = await self._long(candidates_of, self.job)
        self.roster.candidates = {candidate.id: candidate for candidate in candidates}
        stored = self.ledger.updates.paths(self.job.name)
        self.paths = {device: _decode_path(path) for device, path in stored.items()}
        await self._restore_or_start()
        rows = self.ledger.rounds.all(self.job.name)
        self.roster.recall_rounds(rows)
        if not self._buffered and (not rows or rows[-1].state != "open"):
            self.resumed.set()
        if rows and rows[-1].state in {"open", "closed", "aggregated"}:
            await self._round(rows[-1])
        while self._published() < self.job.rounds.count:
            await self.running.wait()
            await self._round(None)
        await self._finish()

    async def recall(self) -> None:
        """Read a finished job back, so that `base_missing` can answer for it."""
        self.roster.recall()
        await self._long(self.versions.restore, self.ledger.versions.get(self.job.name))
        self.finished = True
        self.resumed.set()

    async def stop(self, state: str) -> None:
        """Take every task slot of this job away (aborted, or failed), and end the round under way.

        Its updates were receipted, so they are listed as abandoned (promise P1).
        """
        await self.settled()
        self.open_round = None
        self.resumed.set()
        newest = self.versions.newest
        for row in self.ledger.rounds.all(self.job.name):
            if row.state == "closed" and newest is not None and newest.round == row.round:
                self.ledger.rounds.set_aggregated(self.job.name, row.round, newest.id)
            elif row.state in {"open", "closed"}:
                self.ledger.rounds.abandon(self.job.name, row.round, f"job {state}")
        self.ways = {}
        await self._clear_slots()
        if self.versions.newest is not None:
            await self._publish_head("aborted")

    async def settled(self) -> None:
        """Wait for work in a thread that a cancelled task has left behind: it cannot be stopped."""
        if self._working is not None:
            await asyncio.wait([self._working])

    async def _long(self, work: Callable[..., Result], *args: Any) -> Result:
        """Run long work in a thread; `settled` waits for it even if this task is cancelled."""
        working = asyncio.ensure_future(asyncio.to_thread(work, *args))
        self._working = working
        return await asyncio.shield(working)

    def _published(self) -> int:
        return self.versions.newest.number if self.versions.newest else 0

    async def _restore_or_start(self) -> None:
        newest = self.ledger.versions.all(self.job.name)
        self.roster.recall()
        if newest:
            row = max(newest, key=lambda version: version.number)
            await self._long(self.versions.restore, row)
            await self._publish_chains()
            await self._publish_head("running")
            return
        await self._wait_for_devices(self.job.rounds.min_devices)
        self.roster.make()
        chosen = {sid: self._structures[sid] for sid in self.roster.keyframe_bytes}
        await self._long(self.versions.start, chosen, self.roster.keyframe_bytes, self.public)
        await self._publish_chains()
        await self._publish_head("running")

    async def _wait_for_devices(self, wanted: int) -> None:
        while (there := self._able()) < wanted:
            self._say_waiting(self.roster.waiting(there))
            self.fleet_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.fleet_changed.wait(), RECHECK_S)
        self.waits = ""

    def _able(self) -> int:
        if not self.roster.keyframe_bytes:
            return self.roster.able()
        self.roster.assign_newcomers()
        return len(self.roster.ready(self._published() + 1))

    # --- versions ------------------------------------------------------------------------------

    async def _publish_chains(self) -> None:
        """Let the newest version stand at the broker: tasks' specs, keyframes and what leads from them."""
        for sid, member in self.versions.now.members.items():
            spec = encode_spec(spec_of(self.job, member.structure))
            self._specs[sid] = await self.publisher.add_blob(spec)
        await self._publish_steps([step for chain in self.versions.now.chains.values() for step in chain])

    async def _publish_steps(self, steps: Iterable[Step]) -> None:
        """Publish files that somebody needs, once for all devices."""
        names = {step.blob.blob for step in steps}
        new = sorted(name for name in names if name not in self.publisher.blobs)
        contents = [self.versions.content(name) for name in new]
        self._at_broker |= names
        await asyncio.gather(*(self.publisher.add_blob(content) for content in contents))

    async def _publish_head(self, state: str) -> None:
        now = self.versions.now
        head = Head(
            job=self.job.name,
            epoch=self.ledger.epoch,
            version=now.number,
            state=msgspec.convert(state, messages.HeadState),
            chains=now.chains,
        )
        await self.publisher.retain(self.publisher.topics.head(self.job.name), head)

    # --- rounds --------------------------------------------------------------------------------

    async def _round(self, unfinished: RoundRow | None) -> None:
        started = time.monotonic()
        if unfinished is None:
            row, invitations = await self._open()
        else:
            row = unfinished
            invitations = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
        if row.state == "open":
            end = await self._collect(row, invitations)
            if isinstance(end, deciding.Abandon):
                log.warning("round %d of %s abandoned: %s", row.round, self.job.name, end.reason)
                self.ledger.rounds.abandon(self.job.name, row.round, end.reason)
                self._round_over()
                return
            self.ledger.rounds.close(self.job.name, row.round, list(end.update_ids))
            row = self.ledger.rounds.get(self.job.name, row.round)
        if row.state == "closed" and self.versions.now.round == row.round:
            # The crash came between the version and its note in the round: it must not count twice.
            stored = await self._long(self.ledger.updates.of_round, self.job.name, row.round)
            updates = [decode_update(update.frame) for update in stored]
            self._count_bytes(updates)
            self._note_stats(row.round, await self._judged(updates), self.versions.now.id)
        elif row.state == "closed":
            try:
                await self._aggregate(row.round, started)
            except (DiskError, BusyError):
                raise
            except LiberataiError as error:
                # One poisoned round must not end the job: its updates are listed, and the next one opens.
                log.error("round %d of %s: %s %s", row.round, self.job.name, error.code, error)  # noqa: TRY400
                self._failures += 1
                if self._failures >= MAX_FAILURES:
                    raise
                self.ledger.rounds.abandon(self.job.name, row.round, f"{error.code}: {error}")
                self._round_over()
                return
            self._failures = 0
        await self._publish_chains()
        await self._publish_head("running")
        self.ledger.rounds.set_published(self.job.name, row.round)
        await self._long(self.ledger.rounds.prune, self.job.name, 2, shortened)
        self._round_over()
        wanted = {step.blob.blob for chain in self.versions.now.chains.values() for step in chain}
        ways = [one.way for one in self._standing(set()) if one.way is not None]
        wanted |= {step.blob.blob for way in ways for step in way.steps}
        await self.publisher.drop_blobs(self._at_broker - wanted)
        self._at_broker = wanted

    def _round_over(self) -> None:
        self.open_round = None
        self.ways = {}

    @property
    def _buffered(self) -> bool:
        return self.job.rounds.mode == "buffered"

    async def _open(self) -> tuple[RoundRow, list[deciding.Invitation]]:
        await self._wait_for_devices(self.job.rounds.min_devices)
        number = max((row.round for row in self.ledger.rounds.all(self.job.name)), default=0) + 1
        chosen, standing = await self._participants(number)
        invitations = self._invite(number, chosen)
        if self._buffered:
            invitations = [*standing, *await self._with_ways(number, invitations)]
        row = RoundRow(
            job=self.job.name,
            round=number,
            epoch=self.ledger.epoch,
            state="open",
            opened_s=time.time(),
            invited=msgspec.msgpack.encode(invitations),
        )
        self.ledger.rounds.open(row)
        self.roster.note_invited(row)
        return row, invitations

    async def _participants(self, number: int) -> tuple[list[Device], list[deciding.Invitation]]:
        """Return whom this round invites, and in a buffered job the invitations that still stand."""
        while True:
            self.roster.assign_newcomers()
            ready = self.roster.ready(number)
            standing = self._standing({device.id for device in ready})
            busy = {one.device for one in standing}
            ready = [device for device in ready if device.id not in busy]
            if ready or standing:
                break
            self._say_waiting(self.roster.waiting())
            self.fleet_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.fleet_changed.wait(), RECHECK_S)
        self.waits = ""
        rounds = self.job.rounds
        if self._buffered:
            wanted = max(0, min(len(ready), (rounds.target or len(ready) + len(busy)) - len(busy)))
        else:
            wanted = deciding.invited(len(ready), rounds.target, rounds.overselect)
        if rounds.select != "random":
            await self._long(self.roster.remember, number)
        return self.roster.choose(number, ready, wanted), standing

    def _standing(self, ready: set[str]) -> list[deciding.Invitation]:
        return self.roster.standing(self.versions.now.number, ready) if self._buffered else []

    def _say_waiting(self, words: str) -> None:
        if words != self.waits:
            log.warning("job %s %s", self.job.name, words)
        self.waits = words

    async def _with_ways(
        self, number: int, invitations: list[deciding.Invitation]
    ) -> list[deciding.Invitation]:
        """Return invitations that can stand over: with the version, and what the device was told to fetch."""
        ways = await self._long(self._ways, [(one.device, one.structure) for one in invitations])
        return [self._lasting(number, one, ways[one.device]) for one in invitations]

    def _lasting(self, number: int, invitation: deciding.Invitation, way: Way) -> deciding.Invitation:
        return msgspec.structs.replace(
            invitation, round=number, version=self.versions.now.number, opened_s=time.time(), way=way
        )

    def _target(self, invited: int) -> int:
        if self._buffered:
            hostile = 0.0 if self.job.aggregate.rule == "mean" else self.job.aggregate.hostile
            return deciding.buffer_size(
                self.job.rounds.buffer, invited, hostile, len(self.versions.now.members)
            )
        return min(invited, self.job.rounds.target or invited)

    def _quorum(self, invited: int) -> int:
        if self._buffered:
            return 1  # the deadline ends the wait for more, never what has come
        return max(1, int(np.ceil(self._target(max(invited, 1)) * self.job.rounds.quorum)))

    def _invite(self, number: int, devices: list[Device]) -> list[deciding.Invitation]:
        chains = self.versions.now.chains
        found = []
        for device in devices:
            structure = self.roster.assigned[device.id].structure
            base = chains[structure][-1].digest
            name = messages.update_id(device.id, self.job.name, number, base)
            found.append(
                deciding.Invitation(device=device.id, structure=structure, base=base, update_id=name)
            )
        return found

    async def _collect(
        self, row: RoundRow, invitations: list[deciding.Invitation]
    ) -> deciding.Close | deciding.Abandon:
        """Hold a round open until it decides to end."""
        # A restart gives the whole deadline again: the coordinator was away, not the devices.
        self.open_round = deciding.Round(
            job=self.job.name,
            number=row.round,
            invitations={invitation.device: invitation for invitation in invitations},
            target=self._target(len(invitations)),
            # A link that is only tried again may fail: the round does not depend on it.
            quorum=self._quorum(len(invitations) - len(self.roster.trying)),
            closes_s=time.monotonic() + self.job.rounds.deadline_s,
            buffered=self._buffered,
        )
        self._ended.clear()
        for update in self.ledger.updates.of_round(self.job.name, row.round):
            stored = deciding.UpdateStored(device=update.device, update_id=update.update_id, outcome="stored")
            for action in self.open_round.handle(stored):
                self._note_end(action)
        if self._buffered:
            self.ways = {one.device: one.way for one in invitations if one.way is not None}
        else:
            self.ways = await self._long(self._ways, [(one.device, one.structure) for one in invitations])
        self.resumed.set()
        await self._publish_steps(await self._long(self._steps, invitations))
        new = [one for one in invitations if one.update_id not in self._told]
        self._told = {one.update_id for one in invitations}
        await asyncio.gather(*(self._publish_task(row.round, invitation) for invitation in new))
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), TICK_S)
            except TimeoutError:
                for action in self.open_round.handle(deciding.Tick(now_s=time.monotonic())):
                    self._note_end(action)
        if self._end is None:
            raise DataError("a round ended without a decision")
        return self._end

    def _steps(self, invitations: Sequence[deciding.Invitation]) -> list[Step]:
        """Return the files that these devices fetch.

        After a restart a way that was told before may name files that no longer lead to the newest version.
        Where they cannot be made again, what stands at the broker must do; a device that lacks them will be
        asked anew.
        """
        found: list[Step] = []
        for one in invitations:
            way = self.ways.get(one.device)
            if way is None:
                continue
            older = [step for step in way.steps if step.blob.blob not in self.publisher.blobs]
            if not self._buffered or not older or self.versions.recall(one.structure, way):
                found += way.steps
        return found

    def _note_end(self, action: deciding.Action) -> None:
        if isinstance(action, deciding.Close | deciding.Abandon):
            if self._buffered:
                self.resumed.clear()  # what comes now waits for the next round
            self._end = action
            self._ended.set()

    def decide(self, event: deciding.Event) -> list[deciding.Action]:
        """Let the open round decide about an event; returns what the service must do."""
        if self.open_round is None:
            return []
        if isinstance(event, deciding.UpdateStored) and event.outcome != "conflict":
            self._note_path(event.device)
        actions = self.open_round.handle(event)
        for action in actions:
            self._note_end(action)
        return [action for action in actions if not isinstance(action, deciding.Close | deciding.Abandon)]

    def _ways(self, wanted: Sequence[tuple[str, str]]) -> dict[str, Way]:
        """Return how each of these (device, structure) gets to the newest version."""
        return {
            device: self.versions.way(sid, self.paths.get(device, ()), self.roster.room(device))
            for device, sid in wanted
        }

    def path_after(self, device: str) -> bytes:
        """Return what the ledger notes with an update of the open round: what its device holds now."""
        way = self.ways.get(device)
        return b"" if way is None else msgspec.msgpack.encode(way.path)

    def _note_path(self, device: str) -> None:
        """Its update was made from the newest weights: the device holds what leads there."""
        if device in self.ways:
            self.paths[device] = self.ways[device].path

    async def base_missing(self, device: str) -> None:
        """Give a device that does not hold what it was told to go on from the whole path, once per task."""
        way, again = self.ways.get(device), self.finished and device not in self.ways
        # What a finished job told it before a restart is not known any more, but that it was asked for is.
        if not again and (way is None or not way.held):
            return
        now = self.open_round
        if (
            self._buffered
            and now is not None
            and now.phase in (deciding.Phase.CLOSED, deciding.Phase.ABANDONED)
        ):
            return  # its set is frozen: the device asks again, and the next round answers
        self.paths.pop(device, None)
        with contextlib.suppress(DiskError, BusyError):
            # Read again after a restart, it costs the device another question.
            self.ledger.updates.forget_path(self.job.name, device)
        self.ways[device] = self.versions.way(self.roster.assigned[device].structure, (), 0)
        if self._buffered and self.open_round is not None:
            self._ask_again(self.open_round, device)
        await self._publish_steps(self.ways[device].steps)
        if self.open_round is None:
            await self._publish_cancel(device, self.ways[device])
        elif device in self.open_round.invitations and device not in self.open_round.stored:
            await self._publish_task(self.open_round.number, self.open_round.invitations[device])

    def _ask_again(self, now: deciding.Round, device: str) -> None:
        """Invite a device that cannot do its task to the newest version instead, in the ledger first."""
        known = self.fleet.devices.get(device)
        if known is None or device not in now.invitations or device in now.stored or device in now.storing:
            return
        (one,) = self._invite(now.number, [known])
        invitations = dict(now.invitations) | {
            device: self._lasting(now.number, one, self.ways[device]),
        }
        row = self.ledger.rounds.get(self.job.name, now.number)
        invited = msgspec.msgpack.encode(list(invitations.values()))
        self.ledger.rounds.open(replace(row, epoch=self.ledger.epoch, invited=invited))
        now.invitations = invitations

    def may_upload(self, device: str, number: int) -> bool:
        """Whether an update of this round would be looked at now."""
        now = self.open_round
        return now is not None and number in (now.number, now.asked(device))

    async def _publish_task(self, number: int, invitation: deciding.Invitation) -> None:
        way = self.ways[invitation.device]
        task = Task(
            task_id=invitation.update_id,
            epoch=self.ledger.epoch,
            coordinator=self.coordinator,
            device=invitation.device,
            job=self.job.name,
            round=invitation.round or number,
            spec=self._specs[invitation.structure],
            density=self.roster.task_density(invitation.device, way.size_bytes),
            held=way.held,
            steps=way.steps,
        )
        await self.publisher.retain(self.publisher.topics.down(invitation.device, "task"), task)

    async def _aggregate(self, number: int, started: float) -> None:
        now = self.versions.now
        stored = await self._long(self.ledger.updates.of_round, self.job.name, number)
        updates = [decode_update(update.frame) for update in stored]
        advanced = await self._long(
            aggregation.advance,
            self.job,
            now.number + 1,
            now.members,
            updates,
            self.public,
            self._late(number),
        )
        up, down = self._count_bytes(updates)
        told = Stats(
            train_seconds_max=max(update.train_seconds for update in updates),
            teach_seconds=advanced.teach_seconds,
            up_bytes=up,
            down_bytes=down,
            frozen=dict(advanced.frozen),
            untaught=dict(advanced.untaught),
            contributions=kept(advanced.contributions),
        )
        # First, for after a crash it cannot be found out again: the version is there, the way to it is gone.
        self.ledger.jobs.set_value(self.job.name, MERGED, msgspec.msgpack.encode((number, told)))
        made = await self._long(
            self.versions.commit,
            advanced,
            number,
            [update.update_id for update in updates],
            self.roster.tightest(),
            self.roster.keyframe_bytes,
            self.public,
        )
        self._note_stats(number, await self._judged(updates), made, started)

    def _note_stats(self, number: int, judged: Stats, made: str, started: float | None = None) -> None:
        """Note in the ledger that a round made a version, with what is known of both."""
        stored = self.ledger.jobs.value(self.job.name, MERGED)
        round_, told = msgspec.msgpack.decode(stored, type=tuple[int, Stats]) if stored else (0, Stats())
        if round_ == number:
            judged = msgspec.structs.replace(
                told,
                **{name: getattr(judged, name) for name in JUDGED},
                seconds=0.0 if started is None else time.monotonic() - started,
            )
        self.ledger.rounds.set_aggregated(self.job.name, number, made, *parts_of(judged))
        self.ledger.jobs.set_value(self.job.name, COUNTERS, msgspec.msgpack.encode(self.counters))

    async def _judged(self, updates: Sequence[Update]) -> Stats:
        return await self._long(
            judging.judged, self.job, self.versions, self.fleet, updates, self.public, self.test
        )

    def _late(self, number: int) -> Late | None:
        """Return how late the updates of a buffered job are, by what the ledger says of invitations."""
        if not self._buffered:
            return None
        row = self.ledger.rounds.get(self.job.name, number)
        invited = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
        return Late(
            staleness={one.update_id: self.versions.now.number - one.version for one in invited},
            devices=Counter(one.structure for one in invited),
        )

    def _count_bytes(self, updates: Sequence[Update]) -> tuple[int, int]:
        """Return the bytes that these devices' sockets carried since their last update of any job."""
        up = down = 0
        for update in updates:
            sent, received = self.counters.get(update.device, (0, 0))
            if update.sent_bytes < sent or update.received_bytes < received:
                sent = received = 0  # the agent started anew and counts from zero
            up += update.sent_bytes - sent
            down += update.received_bytes - received
            self.counters[update.device] = (update.sent_bytes, update.received_bytes)
        return up, down

    async def _finish(self) -> None:
        await self._publish_head("finished")
        self.resumed.set()
        self.ways = await self._long(self._ways, self.roster.taking())
        await self._publish_steps([step for way in self.ways.values() for step in way.steps])
        self.finished = True
        await self._clear_slots()

    async def _clear_slots(self) -> None:
        taking = self.roster.taking()
        await asyncio.gather(*(self._publish_cancel(device, self.ways.get(device)) for device, _ in taking))
        await self.publisher.drop_blobs({spec.blob for spec in self._specs.values()})

    async def _publish_cancel(self, device: str, way: Way | None) -> None:
        """Take a device's slot; with a way, it leads to the finished model."""
        cancel = Cancel(
            device=device,
            epoch=self.ledger.epoch,
            coordinator=self.coordinator,
            job=self.job.name,
            round=max((row.round for row in self.ledger.rounds.all(self.job.name)), default=0),
            held=b"" if way is None else way.held,
            final=() if way is None else way.steps,
        )
        await self.publisher.retain(self.publisher.topics.down(device, "task"), cancel)


def _decode_path(path: bytes) -> Path:
    """Return a path of the ledger; one of another release is worth nothing: the device fetches anew."""
    try:
        return msgspec.msgpack.decode(path, type=Path)
    except msgspec.MsgspecError:
        return ()
