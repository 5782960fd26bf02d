"""What the ledger keeps for a job beside its own columns, and how the API shows it."""

from collections import Counter
from collections.abc import Mapping

import msgspec

from liberatai_coordinator import round as deciding
from liberatai_coordinator.ledger import Ledger, RoundRow
from liberatai_coordinator.views import ContributionView, RoundView
from liberatai_core.aggregator import rules


class Contribution(msgspec.Struct, frozen=True, array_like=True):
    """`aggregator.rules.Contribution` of one device; some 30 bytes."""

    verdict: str
    norm: float
    cosine: float


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished round took, and how it was merged.

    Attributes:
        rule: by which updates were merged.
        frozen: per structure that merged nothing, why.
        contributions: per device.
    """

    seconds: float = 0.0
    train_seconds_max: float = 0.0
    teach_seconds: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    guard: str = ""
    local_correct: int = 0
    local_total: int = 0
    rule: str = ""
    frozen: dict[str, str] = {}
    contributions: dict[str, Contribution] = {}

    @property
    def merged(self) -> str:
        """How the round was merged, in words."""
        if not self.rule:
            return ""
        counts = Counter(one.verdict for one in self.contributions.values())
        told = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        return "; ".join(
            [f"{self.rule}: {told}", *(f"{sid} frozen: {why}" for sid, why in self.frozen.items())]
        )


def kept(contributions: Mapping[str, rules.Contribution]) -> dict[str, Contribution]:
    """Return what the ledger keeps of contributions, by device: seven digits, as float32 has."""
    return {
        device: Contribution(one.verdict, float(f"{one.norm:.7g}"), round(one.cosine, 6))
        for device, one in sorted(contributions.items())
    }


def contribution_view(ledger: Ledger, device: str) -> ContributionView | None:
    """Return what a device's newest merged update gave; None: none of its updates was merged yet."""
    newest: tuple[float, ContributionView] | None = None
    for job in ledger.jobs():
        for row in reversed(ledger.rounds(job.name)):
            given = _stats(row).contributions.get(device)
            if given is None:
                continue
            view = ContributionView(
                job=job.name, round=row.round, verdict=given.verdict, norm=given.norm, cosine=given.cosine
            )
            if newest is None or row.opened_s > newest[0]:
                newest = row.opened_s, view
            break
    return None if newest is None else newest[1]


def _stats(row: RoundRow) -> Stats:
    return msgspec.msgpack.decode(row.stats, type=Stats) if row.stats else Stats()


def round_views(ledger: Ledger, job: str, now: deciding.Round | None = None) -> tuple[RoundView, ...]:
    """Return a job's rounds; `now` is the one that is open."""
    return tuple(_round_view(ledger, row, now) for row in ledger.rounds(job))


def _round_view(ledger: Ledger, row: RoundRow, now: deciding.Round | None) -> RoundView:
    stats = _stats(row)
    invited = msgspec.msgpack.decode(row.invited, type=list[deciding.Invitation])
    is_open = now is not None and now.number == row.round
    updates = len(now.stored) if now is not None and is_open else len(ledger.update_ids(row.job, row.round))
    return RoundView(
        round=row.round,
        state=row.state,
        invited=len(invited),
        updates=updates,
        seconds=stats.seconds,
        train_seconds_max=stats.train_seconds_max,
        teach_seconds=stats.teach_seconds,
        up_bytes=stats.up_bytes,
        down_bytes=stats.down_bytes,
        reason=row.reason,
        guard=stats.guard,
        merged=stats.merged,
        local_accuracy=stats.local_correct / stats.local_total if stats.local_total else None,
    )
