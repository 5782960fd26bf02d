"""What a round keeps is shown again, whoever wrote it; a device's contributions come newest first."""

from pathlib import Path

import msgspec

from liberatai_coordinator.jobs.records import (
    MAX_CONTRIBUTIONS,
    Contribution,
    Stats,
    contribution_views,
    round_views,
)
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow
from liberatai_coordinator.views import CentralView, LocalView, ScoreView, WorstView

LOCAL = LocalView(
    version=0,
    all=ScoreView(accuracy=0.5, correct=2, total=4, devices=1),
    profiles={"pi": ScoreView(accuracy=0.5, correct=2, total=4, devices=1)},
    worst=WorstView(accuracy=0.5, devices=1, of=1),
)


def add_round(ledger: Ledger, job: str, number: int, opened_s: float, stats: bytes) -> None:
    invited = msgspec.msgpack.encode([])
    row = RoundRow(job=job, round=number, epoch=ledger.epoch, opened_s=opened_s, invited=invited)
    ledger.open_round(row)
    ledger.close_round(job, number, [])
    ledger.set_aggregated(job, number, f"{job}-{number}", stats)
    ledger.set_published(job, number)


def given(norm: float, device: str = "a") -> bytes:
    return msgspec.msgpack.encode(Stats(contributions={device: Contribution("accepted", norm, 0.5)}))


def test_contributions_of_all_jobs_come_newest_first_and_not_without_end(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    try:
        for job in ("one", "two"):
            ledger.create_job(job, b"{}", ".", 0.0)
        for number in range(1, 31):
            add_round(ledger, "one", number, 100.0 + 2 * number, given(number))
            add_round(ledger, "two", number, 101.0 + 2 * number, given(-number))
        add_round(ledger, "two", 31, 500.0, given(7.0, device="b"))
        found = contribution_views(ledger, "a")
        assert [(one.job, one.round) for one in found[:4]] == [
            ("two", 30),
            ("one", 30),
            ("two", 29),
            ("one", 29),
        ]
        assert [one.norm for one in found[:2]] == [-30.0, 30.0]
        assert len(found) == MAX_CONTRIBUTIONS
        assert [(one.job, one.round) for one in contribution_views(ledger, "b")] == [("two", 31)]
        assert contribution_views(ledger, "nobody") == ()
    finally:
        ledger.close()


def test_figures_are_kept_over_a_restart_and_older_rounds_have_none(tmp_path: Path) -> None:
    central = CentralView(version=1, samples=9, structures={"mlp": 0.5}, ensemble=0.75)
    older = {"seconds": 2.0, "local_correct": 3, "local_total": 4, "rule": "mean"}
    ledger = Ledger.open(tmp_path)
    ledger.create_job("job", b"{}", ".", 0.0)
    add_round(ledger, "job", 1, 1.0, msgspec.msgpack.encode(older))
    add_round(ledger, "job", 2, 2.0, msgspec.msgpack.encode(Stats(local=LOCAL, central=central, use="mlp")))
    ledger.close()
    ledger = Ledger.open(tmp_path)
    try:
        first, second = round_views(ledger, "job")
    finally:
        ledger.close()
    assert (first.seconds, first.local, first.central, first.use) == (2.0, None, None, "")
    assert (second.local, second.central, second.test, second.use) == (LOCAL, central, None, "mlp")
