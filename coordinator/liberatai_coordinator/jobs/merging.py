"""How a closed round becomes a version: once, whatever crashed in between."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs import judging
from liberatai_coordinator.jobs.records import Stats, kept, parts_of
from liberatai_coordinator.jobs.roster import Roster, tightest
from liberatai_coordinator.jobs.work import Work
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.aggregation import Late
from liberatai_coordinator.models.members import Labelled, Public
from liberatai_coordinator.models.updates import Decoded, decode_update
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow
from liberatai_core.contract.messages import Update
from liberatai_core.errors import BusyError, DiskError, LiberataiError

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Rounds in a row that may fail in the aggregation; then the fault is not one of their updates."""

COUNTERS = "counters"
"""Name under which the ledger has `counters` as of a job's newest round."""

MERGED = "merged"
"""Name under which the ledger has what the aggregation of a job's newest round told, with its number."""

JUDGED = ("guard", "ensemble", "use", "rule", "local", "central", "test")
"""What `judging` finds out, also later."""


@dataclass(slots=True, kw_only=True)
class Merging:
    """Makes the versions of one job.

    Attributes:
        decoded: what the check of updates has read.
        counters: of every device's socket as its last update told them, (sent, received), for all jobs.
        public: the coordinator's own data.
        test: (inputs, labels) that decide nothing.
    """

    job: JobSpec
    ledger: Ledger
    versions: Versions
    fleet: Fleet
    roster: Roster
    work: Work
    counters: dict[str, tuple[int, int]]
    decoded: Mapping[bytes, Decoded]
    public: Public = field(default_factory=Public)
    test: Labelled | None = None
    _failures: int = 0

    async def version(self, row: RoundRow, started: float) -> bool:
        """Let a closed round make its version; False: it could not, and is abandoned.

        One poisoned round must not end the job: its updates are listed, and the next one opens.

        Raises:
            LiberataiError: it failed too often in a row, or the disk refuses.
        """
        if self.versions.now.round == row.round:
            # The crash came between the version and its note in the round: it must not count twice.
            stored = await self.work.do(self.ledger.updates.of_round, self.job.name, row.round)
            updates = [decode_update(update.frame) for update in stored]
            _, _, counters = _carried(self.counters, updates)
            self._note_stats(row.round, await self._judged(updates), self.versions.now.id, counters)
            return True
        try:
            await self._aggregate(row.round, started)
        except (DiskError, BusyError):
            raise
        except Exception as error:
            told = _told(error)
            unknown = not isinstance(error, LiberataiError)
            log.error("round %d of %s: %s", row.round, self.job.name, told, exc_info=unknown)  # noqa: TRY400
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise
            self.ledger.rounds.abandon(self.job.name, row.round, told)
            return False
        self._failures = 0
        return True

    async def _aggregate(self, number: int, started: float) -> None:
        now = self.versions.now
        stored = await self.work.do(self.ledger.updates.of_round, self.job.name, number)
        updates = [decode_update(update.frame) for update in stored]
        advanced = await self.work.do(
            aggregation.advance,
            self.job,
            now.number + 1,
            now.members,
            updates,
            self.public,
            self._late(number),
            self.decoded,
        )
        up, down, counters = _carried(self.counters, updates)
        told = Stats(
            train_seconds_max=max(update.train_seconds for update in updates),
            teach_seconds=advanced.teach_seconds,
            up_bytes=up,
            down_bytes=down,
            frozen=dict(advanced.frozen),
            untaught=dict(advanced.untaught),
            teachers=advanced.teachers or msgspec.UNSET,
            contributions=kept(advanced.contributions),
        )
        # First, for after a crash it cannot be found out again: the version is there, the way to it is gone.
        self.ledger.jobs.set_value(self.job.name, MERGED, msgspec.msgpack.encode((number, told)))
        made = await self.work.do(
            self.versions.commit,
            advanced,
            number,
            [update.update_id for update in updates],
            tightest(self.roster.assigned.values()),
            self.roster.keyframe_bytes,
            self.public,
        )
        self._note_stats(number, await self._judged(updates), made, counters, started)

    def _note_stats(
        self,
        number: int,
        judged: Stats,
        made: str,
        counters: Mapping[str, tuple[int, int]],
        started: float | None = None,
    ) -> None:
        """Note in the ledger that a round made a version, with what is known of both."""
        stored = self.ledger.jobs.value(self.job.name, MERGED)
        round_, told = msgspec.msgpack.decode(stored, type=tuple[int, Stats]) if stored else (0, Stats())
        if round_ == number:
            judged = msgspec.structs.replace(
                told,
                **{name: getattr(judged, name) for name in JUDGED},
                seconds=0.0 if started is None else clock.monotonic() - started,
            )
        # If the disk refuses, the round is counted from the same counters again.
        known = msgspec.msgpack.encode({**self.counters, **counters})
        self.ledger.rounds.set_aggregated(
            self.job.name, number, made, *parts_of(judged), values={COUNTERS: known}
        )
        self.counters |= counters

    async def _judged(self, updates: Sequence[Update]) -> Stats:
        return await self.work.do(
            judging.judged, self.job, self.versions, self.fleet, updates, self.public, self.test
        )

    def _late(self, number: int) -> Late | None:
        """Return how late the updates of a buffered job are, by what the ledger says of invitations."""
        if self.job.rounds.mode != "buffered":
            return None
        row = self.ledger.rounds.get(self.job.name, number)
        invited = msgspec.msgpack.decode(row.invited, type=list[Invitation])
        return Late(
            staleness={one.update_id: self.versions.now.number - one.version for one in invited},
            devices=Counter(one.structure for one in invited),
        )


def _told(error: Exception) -> str:
    if isinstance(error, LiberataiError):
        return f"{error.code}: {error}"
    return f"E_INTERNAL: {type(error).__name__}: {error}"


def _carried(
    before: Mapping[str, tuple[int, int]], updates: Sequence[Update]
) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Return the bytes that sockets carried since their devices' last update, and the new counters."""
    up = down = 0
    counters = {}
    for update in updates:
        sent, received = before.get(update.device, (0, 0))
        if update.sent_bytes < sent or update.received_bytes < received:
            sent = received = 0  # the agent started anew and counts from zero
        up += update.sent_bytes - sent
        down += update.received_bytes - received
        counters[update.device] = (update.sent_bytes, update.received_bytes)
    return up, down, counters
