"""Lists are readable at every width: names are whole, lines fit, and nothing that matters is hidden."""

from collections.abc import Iterator

import msgspec
import pytest

from liberatai_coordinator.cli import tables
from liberatai_coordinator.cli.devices import DEVICE_COLUMNS
from liberatai_coordinator.cli.job_text import ROUND_COLUMNS
from liberatai_coordinator.cli.jobs import JOB_COLUMNS
from liberatai_coordinator.cli.plan import ASSIGNMENT_COLUMNS
from liberatai_coordinator.cli.tables import Column, Output, patiently, rendered, show, show_one
from liberatai_coordinator.client.views import AssignmentView, DeviceView, JobSummary, RoundView
from liberatai_core.errors import LinkError

NAMES = [f"{place}-{'warehouse-camera-of-the-north-gate-' * 2}"[:40] for place in ("a", "b", "c")]
DEVICES = [
    DeviceView(
        id=name,
        status="approved",
        state="online",
        phase="training",
        profile="raspberry-pi-4",
        tier="full",
        storage_bytes=1 << 20,
        structure="cnn-width16",
        job="digits",
        round=12,
        last_seen_s=1.7e9,
        samples=12_345,
        reason="runs on battery: 18 %, training waits for 30 %" if name == NAMES[1] else "",
    )
    for name in NAMES
]


def lines_of(found: list[str]) -> list[str]:
    return [line for row in found for line in row.split("\n")]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_names_of_forty_characters_are_whole_at_every_width(width: int) -> None:
    assert all(len(name) == 40 for name in NAMES)
    lines = lines_of(rendered(DEVICES, DEVICE_COLUMNS, width=width))
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[1:]] == NAMES
    head = lines[0].split()
    assert head[:4] == ["DEVICE", "STATUS", "STATE", "PHASE"]
    assert ("STRUCTURE" in head) == (width > 80)


@pytest.mark.parametrize("wide", [True, False])
def test_the_key_to_compare_has_a_column_only_while_a_device_waits(wide: bool) -> None:
    waits = msgspec.structs.replace(DEVICES[0], status="pending", key="41b0-0453")
    assert "KEY" not in rendered(DEVICES, DEVICE_COLUMNS, wide=wide)[0].split()
    found = rendered([waits, *DEVICES[1:]], DEVICE_COLUMNS, wide=wide)
    assert "KEY" in found[0].split()
    assert "key 41b0-0453" in found[1]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_wide_runs_past_the_edge_in_one_line_with_every_column(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "screen_width", lambda: width)
    show(DEVICES, DEVICE_COLUMNS, Output.WIDE)
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == NAMES
    assert all((column.title in head.split()) == (not column.rare) for column in DEVICE_COLUMNS)
    assert len(head) > width
    assert "training waits for 30 %" in rows[1]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_names_that_leave_no_room_have_a_line_of_their_own(width: int) -> None:
    long = [msgspec.structs.replace(DEVICES[0], id="n" * (width - 5))]
    lines = lines_of(rendered(long, DEVICE_COLUMNS, width=width))
    assert lines[0] == "DEVICE"
    assert lines[2] == "n" * (width - 5)
    assert lines[1].split()[:3] == ["STATUS", "STATE", "PHASE"]
    assert lines[3].startswith("  approved  online")
    assert max(map(len, lines)) <= width


def test_a_remark_that_does_not_fit_stands_below_its_row() -> None:
    why = "the largest structure whose files fit 64 KiB; link of 64 kbit/s measured: 0.40 % instead of 1.00 %"
    rows = [
        AssignmentView(
            device=name,
            profile="gateway",
            tier="full",
            structure="mlp-hidden4",
            variant_bytes=900,
            budget_bytes=65_536,
            density=0.05,
            why=why,
        )
        for name in NAMES[:2]
    ]
    lines = lines_of(rendered(rows, ASSIGNMENT_COLUMNS, width=80))
    assert "WHY" not in lines[0]
    assert lines[1].startswith(NAMES[0])
    assert " ".join(" ".join(lines[2:4]).split()) == why
    assert all(line.startswith("    ") for line in lines[2:4])
    assert max(map(len, lines)) <= 80
    assert why in lines_of(rendered(rows, ASSIGNMENT_COLUMNS, width=None))[1]


def test_what_is_empty_is_left_out_before_what_is_not() -> None:
    rows = [msgspec.structs.replace(one, phase="", profile="", structure="") for one in DEVICES]
    head = rendered(rows, DEVICE_COLUMNS, width=90)[0].split()
    assert "PHASE" not in head
    assert head[:4] == ["DEVICE", "STATUS", "STATE", "SEEN"]


def test_the_key_to_compare_stands_below_a_device_that_waits() -> None:
    key = "49fc-9861-9bd0-76bf-8b93-5949-9e37-b674"
    rows = [msgspec.structs.replace(DEVICES[0], status="pending", key=key), DEVICES[2]]
    lines = lines_of(rendered(rows, DEVICE_COLUMNS, width=80))
    assert lines[2] == f"    key {key}"
    assert max(map(len, lines)) <= 80


def test_every_list_fits_eighty_columns() -> None:
    jobs = [
        JobSummary(
            name="n" * 40,
            state="waiting",
            rounds_done=0,
            rounds_total=100,
            created_s=1.7e9,
            reason="2 of 5 devices that it needs are online: gateway-01 and camera-07 wait with it",
        )
    ]
    rounds = [
        RoundView(
            round=12,
            state="published",
            invited=1000,
            updates=987,
            seconds=84,
            up_bytes=65_536_000,
            down_bytes=1 << 30,
            reason="cnn-width16 frozen: 2 updates, median needs 3",
        )
    ]
    shown = [
        (rendered(jobs, JOB_COLUMNS, width=80), jobs[0].reason),
        (rendered(rounds, ROUND_COLUMNS, width=80), rounds[0].reason),
    ]
    for found, reason in shown:
        lines = lines_of(found)
        assert max(map(len, lines)) <= 80
        assert reason in " ".join(" ".join(lines).split())


def test_an_empty_list_still_says_what_would_stand_there() -> None:
    (head,) = rendered([], DEVICE_COLUMNS, width=80)
    assert head.startswith("DEVICE  STATUS")


def test_a_device_cannot_steer_the_terminal_and_widths_are_those_of_what_is_shown() -> None:
    rows = ["\x1b[31mred", "plain"]
    columns: list[Column[str]] = [Column("NAME", str), Column("LENGTH", lambda row: str(len(row)))]
    head, red, plain = rendered(rows, columns)
    assert "\x1b" not in red
    assert red.index("8") == plain.index("5") == head.index("LENGTH")


def test_ten_thousand_rows_are_drawn_at_once() -> None:
    rows = [msgspec.structs.replace(DEVICES[0], id=f"camera-{n:05d}") for n in range(10_000)]
    assert len(rendered(rows, DEVICE_COLUMNS, width=80)) == 10_001


def test_names_alone_are_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(DEVICES, DEVICE_COLUMNS, Output.NAME)
    assert capsys.readouterr().out.splitlines() == NAMES
    show_one(DEVICES[0], Output.NAME)
    assert capsys.readouterr().out == f"{NAMES[0]}\n"


def test_a_record_is_wrapped_beside_its_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "screen_width", lambda: 80)
    show_one({"name": "x", "why": "a word " * 40}, Output.TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line[:6].isspace() and line[6] != " " for line in lines[2:])


# --- following -----------------------------------------------------------------------------------


def test_what_is_watched_is_written_when_it_changes_and_a_restart_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "WATCH_S", 0.0)
    monkeypatch.setattr(tables._Drawn, "lines", None)
    gone = LinkError("no coordinator at api.sock")
    answers: Iterator[object] = iter([["a"], ["a"], gone, gone, ["a", "b"], KeyboardInterrupt()])

    def look() -> list[str]:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, list)
        return answer

    with pytest.raises(KeyboardInterrupt):
        tables.show_list(look, [Column("NAME", str)], Output.TABLE, watch=True)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["NAME", "a", "NAME", "a", "b"]
    assert shown.err == "liberatai: E_LINK: no coordinator at api.sock; waiting for it\n"


def test_a_coordinator_that_never_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> None:
        raise LinkError("no coordinator at typo.sock")

    with pytest.raises(LinkError):
        next(patiently(look, every_s=0.0))


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PATIENCE_S", -1.0)
    answers: Iterator[int | LinkError] = iter([1, LinkError("gone")])

    def look() -> int:
        answer = next(answers)
        if isinstance(answer, LinkError):
            raise answer
        return answer

    looks = patiently(look, every_s=0.0)
    assert next(looks) == 1
    with pytest.raises(LinkError):
        next(looks)


def test_what_takes_long_says_so_in_a_pipe_and_what_is_quick_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tables.progress("exporting digits"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tables, "QUIET_S", 0.0)
    with tables.progress("exporting digits"):
        said = ""
        while "exporting" not in said:
            said += capsys.readouterr().err
    assert said == "exporting digits …\n"
    assert capsys.readouterr().err.startswith("exporting digits: ")
