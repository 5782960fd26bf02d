"""The shipped systemd units say what the handbook promises, and systemd itself finds them tight."""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest

from liberatai_agent.cli import main
from liberatai_agent.machine import units

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = ["liberatai-agent.service", "liberatai-coordinator.service", "liberatai-trainer@.service"]
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


def settings(name: str) -> dict[str, list[str]]:
    """Return key -> values of a unit."""
    found = defaultdict(list)
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


def test_units_have_no_comment_behind_a_value() -> None:
    """systemd takes it for a part of the value."""
    for path in filter(Path.is_file, UNITS.rglob("*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or "#" not in line, f"{path.name}: {line}"


@pytest.mark.parametrize("name", ["liberatai-agent.service", "liberatai-coordinator.service"])
def test_a_program_that_ends_or_hangs_is_started_again_for_ever(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["WatchdogSec"]
    assert unit["LoadCredential"]


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_calls_home_and_only_what_runs_torch_may_write_code(name: str) -> None:
    unit = settings(name)
    assert any("ORT_DISABLE_TELEMETRY=1" in value for value in unit["Environment"])
    assert unit["MemoryDenyWriteExecute"] == ["yes" if name == "liberatai-agent.service" else "no"]


def test_a_training_has_no_network_and_is_last_in_line() -> None:
    unit = settings("liberatai-trainer@.service")
    assert unit["PrivateNetwork"] == ["yes"]
    assert unit["Slice"] == ["liberatai-training.slice"]
    assert settings("liberatai-training.slice")["CPUWeight"] == ["idle"]


@needs_systemd
@pytest.mark.parametrize(
    ("name", "tenths"),
    [
        ("liberatai-agent.service", 11),
        ("liberatai-coordinator.service", 12),
        ("liberatai-trainer@.service", 3),
    ],
)
def test_systemd_rates_the_exposure_of_a_service(name: str, tenths: int, tmp_path: Path) -> None:
    shutil.copy(UNITS / name, tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={tenths}", str(tmp_path / name)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr


@needs_systemd
def test_systemd_knows_every_key_and_value(tmp_path: Path) -> None:
    """Programs and users are not on this machine: what is said of those is no matter."""
    for path in UNITS.glob("liberatai*"):
        if path.suffix != ".conf":
            text = path.read_text(encoding="utf-8")
            (tmp_path / path.name).write_text(re.sub(r"/opt/liberatai/bin/\S+", "/bin/true", text))
    units = [str(path) for path in tmp_path.iterdir()]
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = [line for line in run.stderr.splitlines() if str(tmp_path) in line or "liberatai" in line]
    assert not said


def test_an_installation_elsewhere_gets_the_same_units_with_its_own_programs() -> None:
    found = units.files(units.shipped_units(), PurePosixPath("/srv/env/bin"))
    assert {Path(path).name for path in found} == {*units.UNITS, "liberatai-agent.conf"}
    text = "".join(found.values())
    assert "ExecStart=/srv/env/bin/liberatai-agent run" in text
    assert "ExecStart=/srv/env/bin/python3 -P" in text
    assert units.SHIPPED_BIN not in text


def test_what_services_cannot_see_is_refused_by_name() -> None:
    assert units.hidden_from_services(PurePosixPath("/home/ann/.local/bin")) == "/home"
    assert units.hidden_from_services(PurePosixPath("/root/.local/bin")) == "/root"
    assert units.hidden_from_services(PurePosixPath("/opt/liberatai/bin")) == ""
    assert units.hidden_from_services(PurePosixPath("/homes/env/bin")) == ""


@pytest.mark.parametrize("command", [["install", "--systemd"], ["uninstall", "--purge"]])
def test_without_systemd_or_root_one_line_says_what_to_do(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if Path("/run/systemd/system").is_dir() and os.geteuid() == 0:
        pytest.skip("here it would really be done")
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("E_STATE: ")
    assert len(said.splitlines()) == 1
