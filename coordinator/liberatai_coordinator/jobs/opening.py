"""How a round opens: whom it invites, among devices that other jobs may want, too; or why it must wait."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from liberatai_coordinator import clock
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs.roster import Roster
from liberatai_coordinator.jobs.sharing import Claim, Grant, Sharing
from liberatai_coordinator.jobs.tasks import Tasks
from liberatai_coordinator.jobs.work import Work
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds import round as deciding
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow

log = logging.getLogger(__name__)

RECHECK_S = 60.0
"""While no device can take part: links and quotas recover with time, too, not only when a device says so."""


@dataclass(slots=True, kw_only=True)
class Opening:
    """Opens the rounds of one job.

    Attributes:
        running: cleared while an operator pauses the job.
        fleet_changed: set when a device came, went, changed or became free.
        waits: why no round opens, in words; empty while one is open.
    """

    job: JobSpec
    ledger: Ledger
    versions: Versions
    fleet: Fleet
    roster: Roster
    tasks: Tasks
    sharing: Sharing
    work: Work
    running: asyncio.Event
    fleet_changed: asyncio.Event = field(default_factory=asyncio.Event)
    waits: str = ""

    @property
    def buffered(self) -> bool:
        """Whether late updates count in a later version."""
        return self.job.rounds.mode == "buffered"

    async def wait_for_devices(self) -> None:
        """Wait until as many devices are there as the job wants before it starts, and can train in it."""
        while (
            there := await self.work.do(self.roster.able, self.fleet.ready())
        ) < self.job.rounds.min_devices:
            await self._wait(self.roster.waiting(there))
        self.waits = ""

    async def _wait(self, words: str) -> None:
        """Say why no round opens, and wait until something has changed."""
        if words != self.waits:
            log.warning("job %s %s", self.job.name, words)
        self.waits = words
        self.fleet_changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.fleet_changed.wait(), RECHECK_S)

    async def open(self) -> RoundRow:
        """Open the next round in the ledger, as soon as it can have its devices."""
        number = self.ledger.rounds.newest_number(self.job.name) + 1
        chosen, standing = await self._participants(number)
        invitations = self.tasks.invite(number, chosen)
        if self.buffered:
            invitations = [*standing, *await self._with_ways(number, invitations)]
        row = RoundRow(
            job=self.job.name,
            round=number,
            epoch=self.ledger.epoch,
            state="open",
            opened_s=clock.wall(),
            invited=msgspec.msgpack.encode(invitations),
        )
        self.ledger.rounds.open(row)
        self.roster.note_invited(row)
        return row

    async def _participants(self, number: int) -> tuple[list[str], list[Invitation]]:
        """Return whom this round invites, and in a buffered job the invitations that still stand."""
        rounds = self.job.rounds
        while True:
            if not self.running.is_set():
                self.sharing.leave(self.job.name)
                await self.running.wait()
            self.roster.assign_newcomers()
            able = {device.id: device for device in self.roster.ready(number)}
            standing = self.standing(set(able))
            busy = {one.device for one in standing}
            # What stands over no more may be asked anew, by this job or another one.
            self.sharing.give_back(self.job.name, able.keys() - busy)
            claim = Claim(
                job=self.job.name,
                devices=frozenset(able.keys() - busy),
                least=1 if standing else rounds.min_devices,
                share=self.job.share,
                hold_s=rounds.deadline_s,
            )
            granted = self.sharing.ask(claim, clock.monotonic())
            if isinstance(granted, Grant) or standing:
                break
            await self._wait(self._reason(granted.behind, len(able)))
        self.waits = ""
        free, most = (granted.devices, granted.most) if isinstance(granted, Grant) else (frozenset[str](), 0)
        if self.buffered:
            wanted = max(0, (rounds.target or len(free) + len(busy)) - len(busy))
        else:
            wanted = deciding.invited(len(free), rounds.target, rounds.overselect)
        if rounds.select != "random":
            await self.work.do(self.roster.remember, number)
        ready = [able[name] for name in sorted(free)]
        chosen = [device.id for device in self.roster.choose(number, ready, min(wanted, most))]
        self.sharing.take(self.job.name, chosen, clock.monotonic() + rounds.deadline_s)
        return chosen, standing

    def standing(self, ready: set[str]) -> list[Invitation]:
        """Return the invitations of a buffered job that still stand; `ready`: who could take another task."""
        return self.roster.standing(self.versions.now.number, ready) if self.buffered else []

    def _reason(self, behind: Sequence[str], able: int) -> str:
        if able < self.job.rounds.min_devices or not behind:
            return self.roster.waiting(able)
        return f"waits: devices serve {', '.join(behind)} first"

    async def _with_ways(self, number: int, invitations: list[Invitation]) -> list[Invitation]:
        """Return invitations that can stand over: with the version, and what the device was told to fetch."""
        ways = await self.work.do(self.tasks.find_ways, [(one.device, one.structure) for one in invitations])
        return [self.tasks.lasting(number, one, ways[one.device]) for one in invitations]

    def target(self, invited: int) -> int:
        """Return how many updates are enough to close a round."""
        if self.buffered:
            hostile = 0.0 if self.job.aggregate.rule == "mean" else self.job.aggregate.hostile
            return deciding.buffer_size(
                self.job.rounds.buffer, invited, hostile, len(self.versions.now.members)
            )
        return min(invited, self.job.rounds.target or invited)

    def quorum(self, invited: int) -> int:
        """Return how few updates still make a version."""
        if self.buffered:
            return 1  # the deadline ends the wait for more, never what has come
        return max(1, int(np.ceil(self.target(max(invited, 1)) * self.job.rounds.quorum)))
