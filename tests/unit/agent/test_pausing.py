"""A pause holds until somebody ends it, or its time; nothing that lies in its place counts as none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liberatai_agent.cli import main
from liberatai_agent.config import AgentConfig, GateSettings, TrainSettings, parse_config
from liberatai_agent.machine import machine_watch, pausing, probe
from liberatai_agent.machine.gate import RUN_S, Gate, Snapshot, decide
from liberatai_agent.machine.pausing import Pause
from liberatai_agent.store.state_folder import StateLock, holder
from liberatai_core.errors import ConfigError


def settings(folder: Path) -> Path:
    path = folder / "agent.yaml"
    path.write_text(f'fleet: f\ndevice: d\ncoordinator_key: "{"0" * 64}"\nstate_dir: state\n')
    (folder / "state").mkdir()
    return path


def test_a_pause_is_asked_for_shown_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    state = tmp_path / "state"
    assert main(["pause", "--config", str(config), "--reason", "we\nmeasure\x1b[31m", "--for", "2h"]) == 0
    found = pausing.paused(state, time.time())
    assert found is not None
    assert found.words.startswith("paused at the device until 20")
    assert found.words.endswith(": we measure [31m")
    assert pausing.paused(state, time.time() + 7201) is None
    assert "not running" in capsys.readouterr().out
    assert main(["resume", "--config", str(config)]) == 0
    assert pausing.paused(state, time.time()) is None
    assert main(["resume", "--config", str(config)]) == 0
    assert "was not paused" in capsys.readouterr().out


@pytest.mark.parametrize("span", ["", "2", "h", "0m", "-1h", "2w", "1h30m", "9" * 9 + "s"])
def test_a_time_that_is_none_is_refused(
    tmp_path: Path, span: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path)
    assert main(["pause", "--config", str(config), f"--for={span}"]) == 2
    assert "write it like" in capsys.readouterr().err
    assert pausing.paused(tmp_path / "state", 0.0) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"until_s": "soon"}', b"\xff" * 9000])
def test_a_file_that_nobody_understands_is_a_pause(tmp_path: Path, content: bytes) -> None:
    (tmp_path / pausing.FILE).write_bytes(content)
    assert pausing.paused(tmp_path, 0.0) == Pause()


def test_a_running_agent_is_told_and_a_dead_one_is_not_looked_for(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    program = "import sys,time; from liberatai_agent.store.state_folder import StateLock; from pathlib import Path\n"
    program += "lock = StateLock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert holder(tmp_path) == process.pid
        process.communicate()
    assert holder(tmp_path) is None
    lock = StateLock(tmp_path)
    lock.close()
    (tmp_path / "lock").write_text(f"{os.getppid()} and more")
    assert holder(tmp_path) is None


# --- what the gate makes of it -------------------------------------------------------------------


def test_a_pause_stops_a_training_at_once_and_an_ending_window_lets_it_finish() -> None:
    rules = GateSettings()
    training = Gate(began_s=0.0)
    for snapshot, stopped in (
        (Snapshot(training=True, paused="paused"), True),
        (Snapshot(training=True, outside="outside"), False),
        (Snapshot(training=True, metered="metered"), False),
    ):
        after = decide(snapshot, rules, training, 1.0)
        assert (after.open, after.resting) == (not stopped, True)
        assert not decide(snapshot, rules, after, RUN_S + 1.0).open
    well = decide(Snapshot(), rules, after, 2.0)
    assert (well.open, well.resting, well.reason) == (True, False, "")


def test_heat_is_no_rest() -> None:
    after = decide(Snapshot(temperature_c=200.0), GateSettings())
    assert (after.open, after.resting) == (False, False)


def test_a_clock_that_was_never_set_is_outside_of_every_window() -> None:
    windows = ("00:00-24:00",)
    assert "clock is not set" in machine_watch.outside(windows, time.gmtime(0.0))
    assert machine_watch.outside((), time.gmtime(0.0)) == ""
    assert machine_watch.outside(windows, time.gmtime(1.8e9)) == ""
    assert (
        machine_watch.outside(("mon",), time.strptime("2026-12-01", "%Y-%m-%d"))
        == "outside of its windows (mon)"
    )


def test_windows_are_checked_with_the_settings(tmp_path: Path) -> None:
    text = f'fleet: f\ndevice: d\ncoordinator_key: "{"0" * 64}"\ntrain: {{windows: ["mon", "noon"]}}\n'
    with pytest.raises(ConfigError, match=r"train.windows: 'noon' is no day"):
        parse_config(text, "agent.yaml", tmp_path)


def test_a_modem_in_use_is_metered_unless_the_settings_say_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "Iface\tDestination\tGateway\tFlags\n"
    routes = tmp_path / "route"
    for text, metered in (
        ("", False),
        (head, False),
        (f"{head}eth0\t00000000\t0101A8C0\t0003\n", False),
        (f"{head}eth0\t0001A8C0\t00000000\t0001\nwwan0\t00000000\t0101A8C0\t0003\n", True),
        (f"{head}ppp0\t0001A8C0\t00000000\t0001\n", False),
    ):
        routes.write_text(text)
        assert probe.uses_modem(routes) is metered
    assert not probe.uses_modem(tmp_path / "absent")
    monkeypatch.setattr(probe, "uses_modem", lambda: True)
    config = AgentConfig(fleet="f", device="d", coordinator_key="0" * 64, state_dir=str(tmp_path))
    assert probe.is_metered(config, None)
    seen = machine_watch.snapshot(config, metered=True)
    assert seen.metered == ""
    strict = AgentConfig(
        fleet="f", device="d", coordinator_key="0" * 64, state_dir=str(tmp_path),
        train=TrainSettings(on_metered=False),
    )  # fmt: skip
    assert "metered" in machine_watch.snapshot(strict, metered=True).metered
