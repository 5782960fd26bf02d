"""Who gets a device that several jobs want. Pure: time is an argument.

A device serves one job at a time, from its invitation to its answer. A job *claims* devices when it is about
to open a round, *takes* what it is granted, and gives every device back when it has answered, failed, or the
round is over.

- A job takes at most its share of the devices that other jobs want, too: jobs run side by side, and a slow
  one holds its own devices only.
- It takes more if the others could not open a round with what is left: jobs that need all devices take turns.
- The job that waits longest goes first, and devices that it waits for are kept for it.
- Who comes later may use kept devices for a round that must be over before they are needed (backfilling:
  Lifka, "The ANL/IBM SP Scheduling System", 1995).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a job needs to open its next round.

    Attributes:
        devices: that could take part, busy ones as well.
        least: devices without which no round opens.
        share: weight of the job, relative to the others'.
        hold_s: how long a round may last.
    """

    job: str
    devices: frozenset[str]
    least: int
    share: float
    hold_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Devices that a job may choose from, and how many of them it may take."""

    devices: frozenset[str]
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """No round now: these jobs hold, or wait longer for, what it needs."""

    behind: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Hold:
    job: str
    until_s: float


@dataclass(slots=True)
class Sharing:
    """The devices of all running jobs.

    Attributes:
        on_change: called when devices became free or a job left: who waits may ask again.
    """

    on_change: Callable[[], None] = lambda: None
    _claims: dict[str, Claim] = field(default_factory=dict)
    _since: dict[str, tuple[float, int]] = field(default_factory=dict)
    _asked: int = 0
    _holds: dict[str, _Hold] = field(default_factory=dict)
    _last: dict[str, str] = field(default_factory=dict)

    def ask(self, claim: Claim, now_s: float) -> Grant | Wait:
        """Return what a job may take now; one that must wait asks again after `on_change`."""
        self._claims[claim.job] = claim
        free = {device for device in claim.devices if device not in self._holds}
        kept, first = self._kept(claim, free, now_s)
        usable = free - kept
        others = [other for other in self._claims.values() if _side_by_side(claim, other)]
        contested = {device for device in usable if any(device in other.devices for other in others)}
        most = len(usable) - len(contested) + min(len(contested), _allowed(claim, others))
        if min(most, len(usable)) >= max(1, claim.least):
            return Grant(devices=frozenset(usable), most=most)
        self._asked += 1
        self._since.setdefault(claim.job, (now_s, self._asked))
        holders = Counter(self._holds[device].job for device in claim.devices if device in self._holds)
        holders.pop(claim.job, None)
        return Wait(behind=tuple(dict.fromkeys([*first, *sorted(holders)])))

    def take(self, job: str, devices: Iterable[str], until_s: float) -> None:
        """Let a job have devices until it gives them back; `until_s`: the end of its round at the latest."""
        self._since.pop(job, None)
        for device in devices:
            self._holds[device] = _Hold(job, until_s)
            self._last[device] = job

    def give_back(self, job: str, devices: Iterable[str]) -> list[str]:
        """Take devices back that a job does not need any more; returns those that it had."""
        freed = [device for device in devices if self.holder(device) == job]
        for device in freed:
            del self._holds[device]
        if freed:
            self.on_change()
        return freed

    def leave(self, job: str) -> list[str]:
        """Forget a job that is over, or waits for an operator; returns the devices that it had."""
        self._claims.pop(job, None)
        self._since.pop(job, None)
        freed = self.give_back(job, [device for device, hold in self._holds.items() if hold.job == job])
        self.on_change()
        return freed

    def holder(self, device: str) -> str | None:
        """Return the job that has a device now."""
        hold = self._holds.get(device)
        return None if hold is None else hold.job

    def served_last(self, device: str) -> str | None:
        """Return the job whose files a device holds: the last one that had it since the start."""
        return self._last.get(device)

    def _kept(self, claim: Claim, free: Collection[str], now_s: float) -> tuple[set[str], list[str]]:
        """Return free devices that are kept for jobs that wait longer, and these jobs, the longest first."""
        mine = self._since.get(claim.job, (math.inf, 0))
        older = sorted(
            (since, job) for job, since in self._since.items() if since < mine and job in self._claims
        )
        kept: set[str] = set()
        first = []
        for _, job in older:
            waiting = self._claims[job]
            wanted = {device for device in free if device in waiting.devices} - kept
            if wanted and now_s + claim.hold_s > self._opens_s(waiting, now_s):
                kept |= wanted
                first.append(job)
        return kept, first

    def _opens_s(self, waiting: Claim, now_s: float) -> float:
        """Return when a waiting job has enough devices at the latest."""
        ends = sorted(
            self._holds[device].until_s if device in self._holds else now_s for device in waiting.devices
        )
        return ends[waiting.least - 1] if len(ends) >= waiting.least > 0 else math.inf


def _side_by_side(claim: Claim, other: Claim) -> bool:
    """Whether two jobs want the same devices and can both have a round at once."""
    if other.job == claim.job or claim.devices.isdisjoint(other.devices):
        return False
    return len(claim.devices | other.devices) >= max(1, claim.least) + max(1, other.least)


def _allowed(claim: Claim, others: Collection[Claim]) -> int:
    """Return how many devices a job may take of those that others want, too: never so few that none opens."""
    fair = 0.0
    shares: Mapping[str, float] = {other.job: other.share for other in others}
    for device in claim.devices:
        rivals = sum(shares[other.job] for other in others if device in other.devices)
        if rivals:
            fair += claim.share / (claim.share + rivals)
    # Rounding up would let the first one take the device that the last one needs.
    return max(1, claim.least, math.floor(fair + 1e-9))
