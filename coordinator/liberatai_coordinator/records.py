"""What the ledger keeps for a job beside its own columns, and how the API shows it."""

import msgspec

from liberatai_coordinator import round as deciding
from liberatai_coordinator.ledger import Ledger, RoundRow
from liberatai_coordinator.views import RoundView


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished round took."""

    seconds: float = 0.0
    train_seconds_max: float = 0.0
    teach_seconds: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    guard: str = ""
    local_correct: int = 0
    local_total: int = 0


def round_views(ledger: Ledger, job: str, now: deciding.Round | None = None) -> tuple[RoundView, ...]:
    """Return a job's rounds; `now` is the one that is open."""
    return tuple(_round_view(ledger, row, now) for row in ledger.rounds(job))


def _round_view(ledger: Ledger, row: RoundRow, now: deciding.Round | None) -> RoundView:
    stats = msgspec.msgpack.decode(row.stats, type=Stats) if row.stats else Stats()
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
        local_accuracy=stats.local_correct / stats.local_total if stats.local_total else None,
    )
