"""The open round of a job: does what `round` decides, and answers devices that lack what they go on from."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.jobs.tasks import Tasks
from liberatai_coordinator.models.updates import Kept
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.rows import RoundRow
from liberatai_core.errors import DataError

ENDS = (deciding.Close, deciding.Abandon)
ANSWERED = (deciding.UpdateStored, deciding.Gone, deciding.Failed)
"""After these a device is free for other jobs."""

TICK_S = 0.5
"""How exactly a deadline is kept; rounds last seconds to days."""


@dataclass(slots=True, kw_only=True)
class Collecting:
    """Holds the rounds of one job open, one after the other.

    Attributes:
        now: the round that is open.
        resumed: set once it is known which round is open, also after a restart. Until then nothing can be
            said about an update: a refusal would throw away what the round is waiting for. In a buffered job
            it is cleared between two rounds: the next one takes what comes late.
        finished: set when the slots hold the way to the finished model.
        decoded: what the check of updates has read; the aggregation need not read it again.
    """

    tasks: Tasks
    buffered: bool
    now: deciding.Round | None = None
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False
    decoded: Kept = field(default_factory=Kept)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _end: deciding.Close | deciding.Abandon | None = None
    _told: set[bytes] = field(default_factory=set)

    def begin(self, opened: deciding.Round, stored: Sequence[tuple[str, bytes]]) -> None:
        """Let a round be open from now on.

        Args:
            opened: the round.
            stored: (device, update id) that the ledger has of it already.
        """
        self._ended.clear()
        self._end = None
        self.now = opened
        for device, update_id in stored:
            event = deciding.UpdateStored(device=device, update_id=update_id, outcome="stored")
            self._note(opened.handle(event))
        # Devices that were gone before are heard of by the fleet; what nobody can answer ends at once.
        self._note(opened.handle(deciding.Tick(now_s=clock.monotonic())))
        self.resumed.set()

    async def ended(
        self, number: int, invitations: Sequence[Invitation]
    ) -> deciding.Close | deciding.Abandon:
        """Tell the devices of the open round, and wait for its end."""
        now = self.now
        if now is None:
            raise DataError("no round is open")
        new = [one for one in invitations if one.update_id not in self._told]
        self._told = {one.update_id for one in invitations}
        # Who has answered before a restart needs no task, only whoever is still waited for.
        await self.tasks.tell(number, [one for one in new if one.device not in now.stored])
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), TICK_S)
            except TimeoutError:
                self._note(now.handle(deciding.Tick(now_s=clock.monotonic())))
        if self._end is None:
            raise DataError("a round ended without a decision")
        return self._end

    def over(self) -> None:
        """Forget the round: its version is there, or it has none."""
        self.now = None
        self.tasks.ways = {}
        self.decoded.clear()

    def decide(self, event: deciding.Event) -> list[deciding.Action]:
        """Let the open round decide about an event; returns what must be done about updates."""
        now, sharing, job = self.now, self.tasks.slots.sharing, self.tasks.job.name
        if now is None:
            return []
        if isinstance(event, deciding.Back) and sharing.holder(event.device) not in (None, job):
            return []  # it serves another job by now, whose task has taken the place of this one's
        if isinstance(event, deciding.UpdateStored) and event.outcome != "conflict":
            self.tasks.note_path(event.device)
        actions = now.handle(event)
        self._note(actions)
        if isinstance(event, ANSWERED):
            self.tasks.slots.free(job, [event.device])
        elif isinstance(event, deciding.Back) and event.device in now.waiting:
            sharing.take(job, [event.device], now.closes_s)
        return [action for action in actions if not isinstance(action, ENDS)]

    def _note(self, actions: Sequence[deciding.Action]) -> None:
        for action in actions:
            if isinstance(action, ENDS):
                if self.buffered:
                    self.resumed.clear()  # what comes now waits for the next round
                self._end = action
                self._ended.set()

    def may_upload(self, device: str, number: int) -> bool:
        """Whether an update of this round would be looked at now."""
        now = self.now
        return now is not None and number in (now.number, now.asked(device))

    # --- devices that do not hold what they go on from -------------------------------------------

    async def base_missing(self, device: str) -> None:
        """Give a device that does not hold what it was told to go on from the whole path, once per task."""
        tasks, now = self.tasks, self.now
        way, again = tasks.ways.get(device), self.finished and device not in tasks.ways
        # What a finished job told it before a restart is not known any more, but that it was asked for is.
        if not again and (way is None or not way.held):
            return
        if (
            self.buffered
            and now is not None
            and now.phase in (deciding.Phase.CLOSED, deciding.Phase.ABANDONED)
        ):
            return  # its set is frozen: the device asks again, and the next round answers
        tasks.from_nothing(device)
        if self.buffered and now is not None:
            self._ask_again(now, device)
        await tasks.publish_steps(tasks.ways[device].steps)
        if now is None:
            await tasks.tell_end([device], tasks.ledger.rounds.newest_number(tasks.job.name))
        elif device in now.invitations and device not in now.stored:
            await tasks.tell(now.number, [now.invitations[device]])

    def _ask_again(self, now: deciding.Round, device: str) -> None:
        """Invite a device that cannot do its task to the newest version instead, in the ledger first."""
        if device not in now.invitations or device in now.stored or device in now.storing:
            return
        (one,) = self.tasks.invite(now.number, [device])
        invitation = self.tasks.lasting(now.number, one, self.tasks.ways[device])
        ledger, job = self.tasks.ledger, self.tasks.job.name
        row: RoundRow = ledger.rounds.get(job, now.number)
        invited = msgspec.msgpack.encode(list((dict(now.invitations) | {device: invitation}).values()))
        ledger.rounds.open(replace(row, epoch=ledger.epoch, invited=invited))
        now.reinvite(invitation)
