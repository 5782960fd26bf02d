"""The command line says what it did, in a form for people or for programs, and exits with the right code."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from tests.unit.coordinator.api_kit import (
    DATA,
    JOB,
    STRUCTURE,
    VERSIONS,
    WEIGHTS,
    MemoryOperations,
    next_round,
    served,
    summary,
)

from liberatai_coordinator.cli import app as cli
from liberatai_coordinator.cli.app import main
from liberatai_coordinator.client.views import (
    CentralView,
    ContributionView,
    EnsembleView,
    JobView,
    LocalView,
    RoundState,
    RoundView,
    ScoreView,
    VersionView,
    WorstView,
)
from liberatai_core.weights import digest, to_bytes

SOURCE = [str(path) for path in map(Path, sys.path) if path.is_dir()]


@pytest.fixture
def operations() -> MemoryOperations:
    return MemoryOperations()


@pytest.fixture
def fleet(
    tmp_path: Path, operations: MemoryOperations, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MemoryOperations]:
    monkeypatch.setenv("LIBERATAI_SOCKET", str(tmp_path / "api.sock"))
    with served(operations, tmp_path / "api.sock"):
        yield operations


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def words(text: str) -> list[list[str]]:
    """Cells of plain columns: two blanks or more are between them."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


# --- the tree of commands ------------------------------------------------------------------------


def tree() -> list[tuple[tuple[str, ...], Any]]:
    """Every command and group, with the words that lead to it."""
    found: list[tuple[tuple[str, ...], Any]] = []

    def walk(path: tuple[str, ...], command: Any) -> None:
        found.append((path, command))
        for name, inner in getattr(command, "commands", {}).items():
            walk((*path, name), inner)

    walk((), typer.main.get_command(cli.app))
    return found


def test_the_tree_has_every_command_of_the_design() -> None:
    paths = {" ".join(path) for path, command in tree() if not hasattr(command, "commands")}
    assert paths >= {
        *("serve", "doctor", "demo", "version"),
        *(f"devices {verb}" for verb in ("list", "show", "approve", "quarantine", "release")),
        *(
            f"jobs {verb}"
            for verb in ("create", "list", "show", "watch", "pause", "resume", "abort", "delete")
        ),
        *(f"models {verb}" for verb in ("list", "show", "log", "fit", "pull", "export")),
        "plan show",
    }


@pytest.mark.parametrize(
    ("path", "command"), tree(), ids=lambda value: " ".join(value) or "-" if isinstance(value, tuple) else ""
)
def test_every_command_has_help_and_an_example_that_it_understands(
    path: tuple[str, ...], command: Any
) -> None:
    assert command.help
    assert command.epilog.startswith("Example: liberatai ")
    example = shlex.split(command.epilog.removeprefix("Example: "))
    leads_to = tuple(example[1 : 1 + len(path)])
    assert leads_to == path
    for option in command.params:
        assert option.param_type_name == "argument" or option.help or option.name == "help", option.name
    if not hasattr(command, "commands"):
        command.make_context(path[-1], example[1 + len(path) :])  # raises a usage error if it does not parse


def test_every_list_takes_an_output_format() -> None:
    for path, command in tree():
        if path[-1:] in (("list",), ("log",), ("show",)):
            assert "output" in {option.name for option in command.params}, path


@pytest.mark.parametrize("path", [path for path, _ in tree()], ids=lambda path: " ".join(path) or "-")
def test_every_command_takes_h_for_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "-h"]) == 0
    assert "Example: liberatai" in capsys.readouterr().out


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, liberatai_coordinator.cli.app as c; code = c.main(['--help']);"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'sqlalchemy', 'httpx', 'optuna', 'onnx', 'rich', 'yaml'};"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = run([sys.executable, "-c", script])
    assert done.stderr.strip() == "0 []"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCE), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


# --- lists ---------------------------------------------------------------------------------------


def test_a_list_is_plain_columns_when_piped(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "list"]) == 0
    out = capsys.readouterr().out
    head, camera, gateway = words(out)
    assert head[:3] == ["DEVICE", "STATUS", "STATE"]
    assert "REASON" not in head
    assert camera[:3] == ["camera", "pending", "unknown"]
    assert "64 KiB" in gateway
    assert "\x1b" not in out


def test_a_wide_list_has_more_columns_and_no_device_can_steer_the_terminal(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "list", "-o", "wide"]) == 0
    out = capsys.readouterr().out
    assert "REASON" in words(out)[0]
    assert "\x1b" not in out
    assert "\N{REPLACEMENT CHARACTER}[31mx" in out


@pytest.mark.parametrize("what", ["devices list", "jobs list"])
def test_json_is_exactly_what_the_api_says(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], what: str, job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    capsys.readouterr()
    assert main([*what.split(), "-o", "json"]) == 0
    expected: Any = {
        "devices list": sorted(fleet.fleet.values(), key=lambda device: device.id),
        "jobs list": [summary(job) for job in fleet.trainings.values()],
    }[what]
    assert json.loads(capsys.readouterr().out) == json.loads(msgspec.json.encode(expected))


def test_yaml_is_the_same_as_json(fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "list", "-o", "yaml"]) == 0
    listed = sorted(fleet.fleet.values(), key=lambda device: device.id)
    assert msgspec.yaml.decode(capsys.readouterr().out) == json.loads(msgspec.json.encode(listed))


def test_on_a_screen_a_list_is_a_table_of_its_own(fleet: MemoryOperations) -> None:
    """In a real terminal (pty): the rows are there, and a name in brackets is no markup."""
    fleet.fleet["camera"] = msgspec.structs.replace(fleet.fleet["camera"], profile="[red]pi")
    screen, side = pty.openpty()
    command = [sys.executable, "-m", "liberatai_coordinator", "devices", "list"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCE), "COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=side, stderr=side, env=variables) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                part = os.read(screen, 65_536)
            except OSError:  # the other side is closed
                break
            shown += part
        assert process.wait() == 0
    os.close(screen)
    assert b"camera" in shown
    assert b"[red]pi" in shown


# --- devices -------------------------------------------------------------------------------------


def test_devices_are_let_in_and_shut_out_by_name(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "approve", "camera"]) == 0
    assert fleet.fleet["camera"].status == "approved"
    assert main(["devices", "quarantine", "camera", "gateway", "--reason", "nonsense"]) == 0
    assert {device.status for device in fleet.fleet.values()} == {"quarantined"}
    assert fleet.fleet["camera"].reason == "nonsense"
    assert main(["devices", "release", "camera"]) == 0
    assert fleet.fleet["camera"].status == "approved"
    assert capsys.readouterr().out.splitlines()[0] == "device camera: approved"


def test_partly_done_is_3_and_not_found_is_4(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "approve", "nobody", "camera"]) == 3
    assert fleet.fleet["camera"].status == "approved"
    assert capsys.readouterr().err == "liberatai: E_NOT_FOUND: device nobody: not known\n"
    assert main(["devices", "approve", "nobody"]) == 4
    assert main(["devices", "show", "nobody"]) == 4
    assert main(["models", "log", "nothing"]) == 4


def test_one_device_is_shown_with_all_its_fields(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "show", "gateway"]) == 0
    shown = dict(line[:2] for line in words(capsys.readouterr().out) if len(line) > 1)
    assert shown["id"] == "gateway"
    assert shown["storage_bytes"] == "64 KiB"
    assert shown["gflops"] == "-"


def test_a_device_shows_its_link_its_quota_and_its_bytes_in_total_and_per_round(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "show", "gateway"]) == 0
    shown = dict(line[:2] for line in words(capsys.readouterr().out) if len(line) > 1)
    assert (shown["up_bits_s"], shown["down_bits_s"]) == ("64 kbit/s", "2.5 Mbit/s")
    assert (shown["link_measured"], shown["metered"]) == ("yes", "yes")
    assert shown["day_quota_bytes"] == "50 MiB"
    assert shown["sent_bytes"] == "4 KiB"
    assert shown["received_bytes"] == "10 KiB"
    assert (shown["updates"], shown["round_sent_bytes"]) == ("2", "2 KiB")
    assert shown["round_received_bytes"] == "5 KiB"
    assert main(["devices", "list", "-o", "wide"]) == 0
    assert "measured, metered, 50 MiB a day" in capsys.readouterr().out


def test_a_job_shows_its_bytes_per_round_in_total_and_per_update(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    assert "all rounds: 0 B up, 0 B down\n" in capsys.readouterr().out
    fleet.look = next_round
    for _ in range(2):
        assert main(["jobs", "show", "digits"]) == 0
    out = capsys.readouterr().out
    assert "all rounds: 1.95 KiB up, 0 B down; per update: 500 B up, 0 B down" in out
    head = next(line for line in words(out) if line[0] == "ROUND")
    assert head[4:6] == ["UP", "DOWN"]


def test_a_plan_explains_the_link_in_words(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["plan", "show", "-f", str(job_file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the largest that fits; link of 64 kbit/s measured: 0.40 % instead of 1.00 %" in out


def test_a_device_shows_what_its_updates_gave_the_newest_first(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tuple(
        ContributionView(job="digits", round=number, verdict=verdict, norm=2.5, cosine=-0.25)
        for number, verdict in ((2, "clipped"), (1, "refused"))
    )
    fleet.fleet["gateway"] = msgspec.structs.replace(fleet.fleet["gateway"], contributions=given)
    assert main(["devices", "show", "gateway"]) == 0
    lines = words(capsys.readouterr().out)
    assert lines[-3:] == [
        ["JOB", "ROUND", "VERDICT", "NORM", "COSINE"],
        ["digits", "2", "clipped", "2.5", "-0.250"],
        ["digits", "1", "refused", "2.5", "-0.250"],
    ]
    assert "contributions" not in [line[0] for line in lines]
    assert main(["devices", "show", "gateway", "-o", "json"]) == 0
    assert [one["round"] for one in json.loads(capsys.readouterr().out)["contributions"]] == [2, 1]


# --- jobs ----------------------------------------------------------------------------------------


def test_a_new_job_says_how_to_follow_it(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    assert capsys.readouterr().out.endswith("follow it: liberatai jobs watch digits\n")
    assert main(["jobs", "create", "-f", str(job_file), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "digits"


def test_a_dry_run_checks_like_create_and_says_in_one_line_how_many_devices_fit(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file), "--dry-run"]) == 0
    line, note = capsys.readouterr().out.splitlines()
    assert line == "job digits: 1 of 1 devices fit (1 mlp-hidden4)"
    assert "nothing was created" in note
    assert not fleet.trainings
    assert main(["jobs", "create", "-f", str(job_file), "--dry-run", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"]
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    capsys.readouterr()
    assert main(["jobs", "create", "-f", str(job_file), "--dry-run"]) == 2
    assert "a job digits exists already" in capsys.readouterr().err


def test_a_plan_in_which_nothing_fits_is_a_failure(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    fleet.fits = False
    assert main(["jobs", "create", "-f", str(job_file), "--dry-run"]) == 1
    assert "0 of 1 devices fit; 1 does not: no usable local data\n" in capsys.readouterr().out
    assert main(["plan", "show", "-f", str(job_file)]) == 1
    assert "0 of 1 devices fit; 1 does not: no usable local data\n" in capsys.readouterr().out


def test_an_ended_job_is_deleted(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    assert main(["jobs", "delete", "digits"]) == 1
    assert "E_STATE" in capsys.readouterr().err
    assert main(["jobs", "abort", "digits"]) == 0
    assert main(["jobs", "delete", "digits"]) == 0
    assert "versions that it made stay" in capsys.readouterr().out
    assert main(["jobs", "delete", "digits"]) == 4


@pytest.mark.parametrize("state", ["open", "closed", "abandoned"])
def test_a_round_without_a_version_shows_no_figures_of_zero(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path, state: str
) -> None:
    def look(job: JobView) -> JobView:
        view = RoundView(round=1, state=msgspec.convert(state, RoundState), invited=1000, updates=0)
        return msgspec.structs.replace(job, rounds=(view,), state="aborted")

    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    fleet.look = look
    capsys.readouterr()
    assert main(["jobs", "watch", "digits"]) == 1
    assert f"round 1: {state}, 0 of 1,000 updates\n" in capsys.readouterr().out
    assert main(["jobs", "show", "digits"]) == 0
    row = words(capsys.readouterr().out)[-1]
    assert row == ["1", state, "0/1000", "-", "-", "-", "-", "-"]


def scored_round(job: JobView) -> JobView:
    """One published round with every figure that there is."""
    told = ScoreView(accuracy=0.75, correct=30, total=40, devices=3)
    local = LocalView(
        version=0,
        all=told,
        structures={"mlp-hidden4": told},
        profiles={"pi\x1b[31m": told},
        worst=WorstView(accuracy=0.5, devices=1, of=2),
        late=1,
    )
    central = CentralView(version=1, samples=33, structures={"mlp-hidden4": 0.8, "cnn": 0.7}, ensemble=0.9)
    view = RoundView(
        round=1,
        state="published",
        invited=3,
        updates=3,
        merged="median: 2 accepted, 1 clipped",
        ensemble="stacking",
        use="cnn",
        guard="cnn is better",
        local=local,
        central=central,
        test=msgspec.structs.replace(central, samples=500, ensemble=0.85),
    )
    return msgspec.structs.replace(job, rounds=(view,))


def test_a_job_shows_who_decided_and_how_well_it_answers(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    assert "ACCURACY OF" not in capsys.readouterr().out
    fleet.look = scored_round
    assert main(["jobs", "show", "digits"]) == 0
    out = capsys.readouterr().out
    assert (
        "round 1 merged by median: 2 accepted, 1 clipped\n"
        "ensemble: stacking; answers: cnn alone\n"
        "guard: cnn is better\n"
    ) in out
    table = out[out.index("local: version") : out.index("ROUND")]
    assert words(table) == [
        [
            (
                "local: version 0 (1 of 3 devices: an older one) on what devices hold out; "
                "central: version 1 on the guard's 33 labels; test: version 1 on 500 labels that decide nothing"
            )
        ],
        ["ACCURACY OF", "NAME", "DEVICES", "HELD OUT", "LOCAL", "CENTRAL", "TEST"],
        ["structure", "cnn", "-", "-", "-", "70.0%", "70.0%"],
        ["structure", "mlp-hidden4", "3", "40", "75.0%", "80.0%", "80.0%"],
        ["ensemble", "-", "-", "-", "-", "90.0%", "85.0%"],
        ["all devices", "-", "3", "40", "75.0%", "-", "-"],
        ["profile", "pi\N{REPLACEMENT CHARACTER}[31m", "3", "40", "75.0%", "-", "-"],
        ["worst 10 %", "-", "1 of 2", "-", "50.0%", "-", "-"],
    ]
    head, row = words(out[out.index("ROUND") :])
    assert row[head.index("ACCURACY")] == "85.0%"
    assert main(["jobs", "show", "digits", "-o", "json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["rounds"]
    assert shown["local"]["worst"] == {"accuracy": 0.5, "devices": 1, "of": 2}
    assert (shown["central"]["ensemble"], shown["test"]["samples"], shown["use"]) == (0.9, 500, "cnn")


def test_columns_that_nothing_was_measured_for_are_left_out(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    def without_devices(job: JobView) -> JobView:
        (view,) = scored_round(job).rounds
        return msgspec.structs.replace(job, rounds=(msgspec.structs.replace(view, local=None, test=None),))

    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    fleet.look = without_devices
    assert main(["jobs", "show", "digits"]) == 0
    lines = words(capsys.readouterr().out)
    head = next(place for place, line in enumerate(lines) if line[0] == "ACCURACY OF")
    assert lines[head] == ["ACCURACY OF", "NAME", "CENTRAL"]
    assert lines[head + 3] == ["ensemble", "-", "90.0%"]


def test_what_a_job_goes_without_is_shown_before_its_first_round(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["jobs", "create", "-f", str(job_file)]) == 0
    fleet.look = lambda job: msgspec.structs.replace(job, lacks=("teach.unlabeled: nothing is learned",))
    assert main(["jobs", "show", "digits"]) == 0
    assert "without teach.unlabeled: nothing is learned\n" in capsys.readouterr().out


def test_a_job_is_created_from_a_file_whose_folder_is_the_base(
    fleet: MemoryOperations,
    capsys: pytest.CaptureFixture[str],
    job_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(job_file.parent)
    assert main(["jobs", "create", "-f", "job.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("job digits: running, 0 of 3 rounds\n")
    assert "mlp-hidden4" in out
    assert fleet.base_dirs == {"digits": str(job_file.parent)}


def test_every_fault_of_a_job_file_is_one_line_with_the_name_of_the_file(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    job_file.write_text(JOB.replace("count: 3", "count: soon").replace("classes: 4", "classes: 1"))
    assert main(["jobs", "create", "-f", str(job_file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"liberatai: E_CONFIG: {job_file}: ") for line in lines)
    assert any("rounds.count: must be a whole number" in line and '(got "soon")' in line for line in lines)
    assert not fleet.trainings


def test_a_file_that_cannot_be_read_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["jobs", "create", "-f", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["serve", "--config", str(tmp_path / "binary")]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_a_job_is_paused_resumed_and_aborted(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    main(["jobs", "create", "-f", str(job_file)])
    capsys.readouterr()
    assert [main(["jobs", verb, "digits"]) for verb in ("pause", "resume", "abort")] == [0, 0, 0]
    states = [line.split()[2].rstrip(",") for line in capsys.readouterr().out.splitlines()]
    assert states == ["paused", "running", "aborted"]
    assert main(["jobs", "resume", "digits"]) == 1
    assert "liberatai: E_STATE: job digits is aborted" in capsys.readouterr().err


def test_watching_prints_one_line_per_round_and_ends_with_the_job(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    main(["jobs", "create", "-f", str(job_file)])
    capsys.readouterr()
    fleet.look = next_round
    assert main(["jobs", "watch", "digits", "--interval", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split(":")[0] for line in rounds] == ["round 1", "round 2", "round 3"]
    assert "published, 2 of 2 updates, 1.5 s, 1000 B up" in rounds[0]
    assert lines[-1] == "job digits: finished, 3 of 3 rounds"
    assert len(lines) == 5


def test_watching_a_job_that_fails_exits_with_1(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    main(["jobs", "create", "-f", str(job_file)])
    fleet.look = lambda job: msgspec.structs.replace(job, state="failed", reason="no device left")
    assert main(["jobs", "watch", "digits"]) == 1
    assert "job digits: failed (no device left)" in capsys.readouterr().out


# --- models and plans ----------------------------------------------------------------------------


def test_a_version_shows_its_weights_per_class_and_draws_them(
    fleet: MemoryOperations,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    weights = [[0.75, 0.25, 1.0, 0.0], [0.25, 0.75, 0.0, 1.0]]

    async def ensemble(model: str, ref: str) -> EnsembleView:
        return EnsembleView(
            method="label_free", members=("cnn", "mlp"), weights=tuple(map(tuple, weights)), use="mlp"
        )

    monkeypatch.setattr(fleet.models, "ensemble", ensemble)
    page, picture = tmp_path / "map.html", tmp_path / "map.png"
    assert main(["models", "show", "digits", "--heat-map", str(page)]) == 0
    shown = capsys.readouterr()
    assert "ensemble: label_free, weights of log-probabilities per structure and class; not used" in shown.out
    lines = words(shown.out)
    place = lines.index(["STRUCTURE", "0", "1", "2", "3"])
    assert lines[place + 1 : place + 3] == [
        ["cnn", "0.75", "0.25", "1.00", "0.00"],
        ["mlp", "0.25", "0.75", "0.00", "1.00"],
    ]
    assert shown.err == f"{page}: written\n"
    assert "digits version 2: ensemble" in page.read_text()
    assert main(["models", "show", "digits", "--heat-map", str(picture), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["weights"] == weights
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("classes", "head"), [(30, ["CLASS", "cnn"]), (300, ["STRUCTURE", "LEAST", "MEAN", "MOST"])]
)
def test_weights_of_many_classes_run_down_or_are_summed_up(
    fleet: MemoryOperations,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    classes: int,
    head: list[str],
) -> None:
    weights = tuple(place / classes for place in range(classes))

    async def ensemble(model: str, ref: str) -> EnsembleView:
        return EnsembleView(method="label_free", members=("cnn",), weights=(weights,))

    monkeypatch.setattr(fleet.models, "ensemble", ensemble)
    assert main(["models", "show", "digits"]) == 0
    assert head in words(capsys.readouterr().out)
    assert main(["models", "show", "digits", "-o", "wide"]) == 0
    lines = words(capsys.readouterr().out)
    place = lines.index(["CLASS", "cnn"])
    assert lines[place + classes] == [str(classes - 1), f"{weights[-1]:.2f}"]


def test_a_heat_map_needs_a_version_and_a_name_that_says_what_it_is(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["models", "show", "digits", "--heat-map", str(tmp_path / "map.gif")]) == 2
    assert "the name must end in .png or .html" in capsys.readouterr().err
    given = ["models", "show", "digits", "--variant", "3f9a", "--heat-map", str(tmp_path / "map.png")]
    assert main(given) == 2
    assert "it has no ensemble" in capsys.readouterr().err
    assert list(tmp_path.glob("map.*")) == []


def test_a_model_is_exported_with_its_digest(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    out = tmp_path / "digits.safetensors"
    assert main(["models", "export", "digits", "--structure", "mlp-hidden4", "--out", str(out)]) == 0
    tensors = safetensors.load(out.read_bytes())
    assert {name: value.shape for name, value in tensors.items()} == {
        tensor.name: tensor.shape for tensor in STRUCTURE.tensors
    }
    assert (tensors["0.weight"].ravel() == WEIGHTS[:8]).all()
    assert digest(WEIGHTS).hex().encode() in out.read_bytes()
    assert capsys.readouterr().out.startswith(f"{out}: digits version 2, mlp-hidden4, ")


def test_int8_needs_inputs_to_calibrate_on_and_other_formats_take_none(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, inputs = str(tmp_path / "x.onnx"), str(tmp_path / "x.npz")
    assert main(["models", "export", "digits", "--format", "onnx-int8", "--out", out]) == 2
    assert "--unlabeled: missing: onnx-int8 is calibrated on inputs" in capsys.readouterr().err
    for exact in ("onnx", "safetensors"):
        given = ["models", "export", "digits", "--format", exact, "--unlabeled", inputs, "--out", out]
        assert main(given) == 2
        assert f"--unlabeled: only onnx-int8 is calibrated, {exact} is exact" in capsys.readouterr().err
    assert list(tmp_path.glob("x.*")) == []


def test_an_int8_export_is_calibrated_on_the_file_and_says_what_it_lost(
    fleet: MemoryOperations,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for needed in ("torch", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    from liberatai_core.learning.families import initial_weights, structure_of

    shape = structure_of("mlp", {"hidden": 4}, DATA)
    weights = initial_weights(shape, DATA, 0)
    row = msgspec.structs.replace(VERSIONS[0], digests={shape.id: digest(weights).hex()})

    async def version(model: str, ref: str) -> VersionView:
        return row

    async def held(model: str, ref: str, structure: str) -> Any:
        return shape, DATA, to_bytes(weights)

    monkeypatch.setattr(fleet.models, "version", version)
    monkeypatch.setattr(fleet.models, "weights", held)
    inputs, out = tmp_path / "in.npz", tmp_path / "m.onnx"
    np.savez(inputs, x=np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    given = ["models", "export", "digits", "--format", "onnx-int8", "--unlabeled", str(inputs)]
    assert main([*given, "--out", str(out)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out}: digits version 2, {shape.id}, ")
    assert re.search(
        r"in float32\); same answer as float32 on [\d.]+% of 10 unlabeled samples, divergence ", line
    )
    assert "ranges come from 20 samples only" in line
    assert b"QuantizeLinear" in out.read_bytes()
    np.savez(inputs, x=np.zeros((40, 3), np.float32))
    assert main([*given, "--out", str(out)]) == 1
    assert "E_DATA" in capsys.readouterr().err


def test_an_ensemble_is_exported_as_one_file_or_the_structure_that_answers_alone(
    fleet: MemoryOperations,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for needed in ("torch", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    from liberatai_core.aggregator.ensemble import Pool, pooled
    from liberatai_core.learning.export import session_of
    from liberatai_core.learning.families import initial_weights, structure_of
    from liberatai_core.learning.training import log_probabilities

    shapes = [structure_of("mlp", {"hidden": hidden}, DATA) for hidden in (4, 8)]
    members = {shape.id: (shape, initial_weights(shape, DATA, 0)) for shape in shapes}
    digests = {sid: digest(weights).hex() for sid, (_, weights) in members.items()}
    row = msgspec.structs.replace(VERSIONS[0], digests=digests)
    weights = np.random.default_rng(1).uniform(0, 1, (2, DATA.classes))
    how = EnsembleView(
        method="label_free", members=tuple(members), weights=tuple(map(tuple, weights.tolist()))
    )

    async def version(model: str, ref: str) -> VersionView:
        return row

    async def held(model: str, ref: str, structure: str) -> Any:
        shape, vector = members[structure]
        return shape, DATA, to_bytes(vector)

    async def ensemble(model: str, ref: str) -> EnsembleView:
        return how

    for name, answer in (("version", version), ("weights", held), ("ensemble", ensemble)):
        monkeypatch.setattr(fleet.models, name, answer)
    out = tmp_path / "m.onnx"
    given = ["models", "export", "digits", "--ensemble", "--out", str(out)]
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    said = np.stack([log_probabilities(shape, DATA, vector, x) for shape, vector in members.values()])
    assert main(given) == 0
    line = f"{out}: digits version 2, ensemble (label_free) of {', '.join(members)}, "
    assert capsys.readouterr().out.startswith(line)
    (found,) = session_of(out.read_bytes()).run(["logits"], {"x": x})
    assert found == pytest.approx(pooled(Pool(weights=weights), said), abs=1e-4)
    assert digests[shapes[1].id].encode() in out.read_bytes()
    how = msgspec.structs.replace(how, use=shapes[1].id)
    assert main(given) == 0
    assert f"the guard fell back to {shapes[1].id}, " in capsys.readouterr().out
    (logits,) = session_of(out.read_bytes()).run(["logits"], {"x": x})
    assert (logits.argmax(1) == said[1].argmax(1)).all()
    out.unlink()
    how = EnsembleView(method="single")
    assert main(given) == 1
    assert "has no ensemble" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--out", "x.safetensors"], "--out must end in .onnx"),
        (["--out", "x.onnx", "--format", "onnx-int8"], "an ONNX file in float32"),
        (["--out", "x.onnx", "--structure", "mlp-hidden4"], "leave --structure out"),
    ],
)
def test_an_ensemble_has_one_format_and_all_structures(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], more: list[str], fault: str
) -> None:
    assert main(["models", "export", "digits", "--ensemble", *more]) == 2
    assert fault in capsys.readouterr().err


def test_the_only_structure_of_a_model_need_not_be_named(fleet: MemoryOperations, tmp_path: Path) -> None:
    assert main(["models", "export", "digits", "--out", str(tmp_path / "x.safetensors")]) == 0
    assert (tmp_path / "x.safetensors").exists()


def test_weights_that_are_not_what_the_version_promises_are_not_written(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    assert main(["models", "export", "digits", "--version", "stable", "--out", str(out)]) == 1
    assert "E_DIGEST" in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_structure_is_not_found_and_the_known_ones_are_named(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["models", "export", "digits", "--structure", "cnn", "--out", str(tmp_path / "x")]) == 4
    assert "no structure 'cnn' (known: mlp-hidden4)" in capsys.readouterr().err


def test_a_version_is_shown_with_its_digests(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "show", "digits", "--version", "1"]) == 0
    out = capsys.readouterr().out
    assert digest(WEIGHTS).hex() in out
    assert "stable" in out


def test_a_plan_explains_itself_and_a_described_job_is_not_created(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], job_file: Path
) -> None:
    assert main(["plan", "show", "-f", str(job_file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan of digits (dry run: nothing is assigned)")
    assert "the largest that fits" in out
    assert not fleet.trainings
    assert main(["plan", "show", "--job", "nothing"]) == 4
    assert main(["plan", "show", "--dry-run"]) == 2
    assert main(["plan", "show", "--job", "digits", "-f", str(job_file)]) == 2


# --- programs ------------------------------------------------------------------------------------


def test_without_a_coordinator_the_error_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "none.sock"
    assert main(["--socket", str(missing), "devices", "approve", "a", "b"]) == 1
    assert capsys.readouterr().err == (
        f"liberatai: E_LINK: no coordinator at {missing}: start one with `liberatai serve` (or give --socket)\n"
    )


@pytest.mark.parametrize("arguments", [["nonsense"], ["jobs", "create"], ["devices", "list", "-o", "xml"]])
def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_the_module_and_the_console_script_exit_with_the_code(tmp_path: Path) -> None:
    done = run(
        [sys.executable, "-m", "liberatai_coordinator", "jobs", "list"], LIBERATAI_SOCKET=str(tmp_path)
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("liberatai: E_LINK: ")
    script = "import sys; from liberatai_coordinator.cli.app import main; sys.argv[1:] = ['version']; sys.exit(main())"
    done = run([sys.executable, "-c", script])
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"liberatai \S+ \(protocol 1, Python [\d.]+\S*\)\n", done.stdout)


def test_doctor_finds_what_is_wrong_with_settings_and_broker(
    fleet: MemoryOperations, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = tmp_path / "coordinator.yaml"
    settings.write_text(f"fleet: home\nbroker: mqtt://127.0.0.1:1\nstate_dir: {tmp_path / 'state'}\n")
    assert main(["doctor", "--config", str(settings), "-o", "json"]) == 1
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["settings"]["state"] == "ok"
    assert found["state_dir"]["state"] == "ok"
    assert found["coordinator"]["state"] == "ok"
    assert "epoch 3" in found["coordinator"]["text"]
    assert found["broker"]["state"] == "fail"
    assert "refused" in found["broker"]["text"]
    assert found["broker"]["remedy"]
    settings.write_text("fleet: Home!\nbrokr: x\n")
    assert main(["doctor", "--config", str(settings)]) == 1
    out = capsys.readouterr().out
    assert "fleet: " in out
    assert "brokr: unknown key" in out


def answering(seen: list[tuple[Any, ...]], code: int) -> Callable[..., int]:
    """Return a program that notes what it is given and exits with `code`."""

    def program(*arguments: Any, **options: Any) -> int:
        seen.append((*arguments, options) if options else arguments)
        return code

    return program


def test_serve_passes_the_settings_on_and_returns_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []
    wiring = ModuleType("liberatai_coordinator.wiring")
    wiring.serve = answering(seen, 7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liberatai_coordinator.wiring", wiring)
    monkeypatch.setattr("liberatai_coordinator.wiring", wiring, raising=False)
    settings = tmp_path / "coordinator.yaml"
    settings.write_text("fleet: home\n")
    assert main(["serve", "--config", str(settings)]) == 7
    assert seen[0][0].fleet == "home"


def test_demo_passes_its_options_on_and_returns_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []
    demo = ModuleType("liberatai_coordinator.demo.demo")
    demo.run = answering(seen, 3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liberatai_coordinator.demo.demo", demo)
    monkeypatch.setattr("liberatai_coordinator.demo.demo", demo, raising=False)
    assert main(["demo", "--devices", "4", "--rounds", "2", "--report", str(tmp_path), "--keep"]) == 3
    options = {"devices": 4, "rounds": 2, "seed": 0, "broker": "auto", "report": tmp_path, "keep": True}
    assert seen == [(options,)]
    assert main(["demo", "--devices", "0"]) == 2
