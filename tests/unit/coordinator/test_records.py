"""What a round keeps is shown again, whoever wrote it; a device's contributions come newest first."""

from dataclasses import replace
from pathlib import Path

import msgspec

from liberatai_coordinator.jobs.records import (
    MAX_CONTRIBUTIONS,
    Contribution,
    Stats,
    invited_in,
    newest_contributions,
    parts_of,
    shortened,
    stats_of,
)
from liberatai_coordinator.models.evaluation import CentralScores, LocalScores, Score, WorstTenth
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import RoundRow

LOCAL = LocalScores(
    version=0,
    all=Score(accuracy=0.5, correct=2, total=4, devices=1),
    profiles={"pi": Score(accuracy=0.5, correct=2, total=4, devices=1)},
    worst=WorstTenth(accuracy=0.5, devices=1, of=1),
)


def add_round(
    ledger: Ledger, job: str, number: int, opened_s: float, stats: bytes, details: bytes = b""
) -> None:
    invited = msgspec.msgpack.encode([])
    row = RoundRow(job=job, round=number, epoch=ledger.epoch, opened_s=opened_s, invited=invited)
    ledger.rounds.open(row)
    ledger.rounds.close(job, number, [])
    ledger.rounds.set_aggregated(job, number, f"{job}-{number}", stats, details)
    ledger.rounds.set_published(job, number)


def given(norm: float, device: str = "a") -> bytes:
    return msgspec.msgpack.encode(Stats(contributions={device: Contribution("accepted", norm, 0.5)}))


def test_contributions_of_all_jobs_come_newest_first_and_not_without_end(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    try:
        for job in ("one", "two"):
            ledger.jobs.create(job, b"{}", ".", 0.0)
        for number in range(1, 31):
            add_round(ledger, "one", number, 100.0 + 2 * number, given(number))
            add_round(ledger, "two", number, 101.0 + 2 * number, given(-number))
        add_round(ledger, "two", 31, 500.0, given(7.0, device="b"))
        found = newest_contributions(ledger, "a")
        assert [one[:2] for one in found[:4]] == [
            ("two", 30),
            ("one", 30),
            ("two", 29),
            ("one", 29),
        ]
        assert [one.norm for _, _, one in found[:2]] == [-30.0, 30.0]
        assert len(found) == MAX_CONTRIBUTIONS
        assert [one[:2] for one in newest_contributions(ledger, "b")] == [("two", 31)]
        assert newest_contributions(ledger, "nobody") == []
    finally:
        ledger.close()


def test_figures_are_kept_over_a_restart_and_older_rounds_have_none(tmp_path: Path) -> None:
    central = CentralScores(version=1, samples=9, structures={"mlp": 0.5}, ensemble=0.75)
    older = {"seconds": 2.0, "local_correct": 3, "local_total": 4, "rule": "mean"}
    ledger = Ledger.open(tmp_path)
    ledger.jobs.create("job", b"{}", ".", 0.0)
    add_round(ledger, "job", 1, 1.0, msgspec.msgpack.encode(older))
    add_round(ledger, "job", 2, 2.0, msgspec.msgpack.encode(Stats(local=LOCAL, central=central, use="mlp")))
    ledger.close()
    ledger = Ledger.open(tmp_path)
    try:
        first, second = (stats_of(row.stats) for row in ledger.rounds.all("job"))
    finally:
        ledger.close()
    assert (first.seconds, first.local, first.central, first.use) == (2.0, None, None, "")
    assert (second.local, second.central, second.test, second.use) == (LOCAL, central, None, "mlp")


def test_a_round_that_an_older_release_kept_reads_the_same_and_is_written_the_same() -> None:
    """The bytes are those of the release whose records were the API's views."""
    stored = bytes.fromhex(
        "8fa77365636f6e6473cb0000000000000000b1747261696e5f7365636f6e64735f6d6178cb0000000000000000"
        "ad74656163685f7365636f6e6473cb0000000000000000a875705f627974657300aa646f776e5f627974657300"
        "a56775617264a0a472756c65a0a8656e73656d626c65a0a3757365a36d6c70a666726f7a656e80a8756e746175"
        "67687480ad636f6e747269627574696f6e7381a16193a86163636570746564cb3ff8000000000000cb3fe00000"
        "00000000a56c6f63616c86a776657273696f6e00a3616c6c84a86163637572616379cb3fe0000000000000a763"
        "6f727265637402a5746f74616c04a76465766963657301aa7374727563747572657380a870726f66696c657381"
        "a2706984a86163637572616379cb3fe0000000000000a7636f727265637402a5746f74616c04a7646576696365"
        "7301a5776f72737483a86163637572616379cb3fe0000000000000a76465766963657301a26f6601a46c617465"
        "00a763656e7472616c84a776657273696f6e01a773616d706c657309aa7374727563747572657381a36d6c70cb"
        "3fe0000000000000a8656e73656d626c65cb3fe8000000000000a474657374c0"
    )
    stats = Stats(
        local=LOCAL,
        central=CentralScores(version=1, samples=9, structures={"mlp": 0.5}, ensemble=0.75),
        use="mlp",
        contributions={"a": Contribution("accepted", 1.5, 0.5)},
    )
    assert msgspec.msgpack.decode(stored, type=Stats) == stats
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats)) == msgspec.msgpack.decode(stored)


def test_contributions_lie_apart_from_what_a_list_of_rounds_shows(tmp_path: Path) -> None:
    names = [f"device-{number}" for number in range(1000)]
    contributions = {
        name: Contribution("accepted" if number % 10 else "clipped", 0.25 * number, -0.5)
        for number, name in enumerate(names)
    }
    stats = Stats(rule="norm_clip", use="mlp", contributions=contributions, frozen={"cnn": "too few"})
    short, details = parts_of(stats)
    assert len(short) < 400
    assert len(details) < 32_000
    assert (
        stats_of(short).merged == stats.merged == "norm_clip: 900 accepted, 100 clipped; cnn frozen: too few"
    )
    ledger = Ledger.open(tmp_path)
    try:
        ledger.jobs.create("job", b"{}", ".", 0.0)
        add_round(ledger, "job", 1, 1.0, short, details)
        assert newest_contributions(ledger, "device-20") == [("job", 1, contributions["device-20"])]
        assert newest_contributions(ledger, "nobody") == []
    finally:
        ledger.close()
    assert parts_of(Stats(use="mlp")) == (msgspec.msgpack.encode(Stats(use="mlp")), b"")


def test_a_round_that_is_long_over_knows_whom_it_asked_itself() -> None:
    def invitation(device: str, number: int) -> Invitation:
        base = b"b" * 16
        return Invitation(device=device, structure="mlp", base=base, update_id=b"u" * 16, round=number)

    for number in (0, 7):  # of a job with deadlines, and of a buffered one
        row = RoundRow(
            job="job",
            round=7,
            epoch=1,
            opened_s=1.0,
            invited=msgspec.msgpack.encode(
                [invitation("a", number), invitation("b", number), *[invitation("c", 5)] * bool(number)]
            ),
        )
        short = replace(row, invited=shortened(row.invited))
        assert [one.device for one in invited_in(short)] == ["a", "b"]
        assert {one.device for one in invited_in(row)} == {"a", "b"}
        assert len(short.invited) < len(row.invited)
    assert shortened(msgspec.msgpack.encode([])) == msgspec.msgpack.encode([])
