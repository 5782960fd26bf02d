"""The command line: light, helpful, with the promised exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from liberatai_agent.cli import main

GOOD = f"fleet: home\ndevice: dev-a\ncoordinator_key: {'ab' * 32}\nstate_dir: state\n"
HEAVY = ("numpy", "torch", "typer", "rich", "onnxruntime")


def imported(code: str, names: tuple[str, ...]) -> str:
    script = f"import sys\n{code}\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config",
        "session",
        "machine.gate",
        "store.outbox",
        "store.blobs",
        "machine.probe",
        "children.trainer",
        "children.messages",
        "service",
    ],
)
def test_the_supervisor_never_loads_heavy_modules(module: str) -> None:
    assert imported(f"import liberatai_agent.{module}", HEAVY) == "[]"


def test_help_loads_next_to_nothing() -> None:
    light = ("asyncio", "psutil", "yaml", "msgspec", "cryptography", "paho", "sqlite3")
    assert imported("import liberatai_agent.cli", light) == "[]"


def test_the_session_is_pure() -> None:
    loaded = imported("import liberatai_agent.session", ("asyncio", "socket", "threading", "sqlite3", "paho"))
    assert "asyncio" not in loaded
    assert "sqlite3" not in loaded


@pytest.mark.parametrize("command", ["run", "probe", "status", "doctor", "enrol", "version"])
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "example: liberatai-agent" in capsys.readouterr().out


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2


def test_wrong_settings_are_2_with_one_line_per_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("fleet: Home\ndevice: dev-a\n")
    assert main(["run", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("E_CONFIG: ") for line in lines)


def test_missing_settings_and_status_are_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(tmp_path / "absent.yaml")]) == 4
    assert main(["status", "--state-dir", str(tmp_path)]) == 4
    assert capsys.readouterr().err.count("E_NOT_FOUND") == 2


def test_missing_certificate_files_are_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(GOOD + "broker: mqtts://host\nca_file: ca.pem\ncert_file: c.pem\nkey_file: k.pem\n")
    assert main(["run", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("no such file") == 3


def test_probe_prints_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, x=np.zeros((5, 3, 8, 8), np.uint8), y=[0, 1, 2, 1, 0])
    path = tmp_path / "agent.yaml"
    path.write_text(GOOD + "data: d.npz\nprofile: pi4\n")
    assert main(["probe", "--config", str(path), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["input_shape"], found["classes"]) == (5, [3, 8, 8], 3)
    assert found["storage_bytes"] == 16384 * 1024
    assert main(["probe"]) == 0
    assert "tier" in capsys.readouterr().out


def test_status_of_a_dead_agent_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {"running": True, "pid": 2**22 + 1, "connected": True, "phase": "training", "updated_at": 0}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert main(["status", "--state-dir", str(tmp_path), "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["phase"], found["connected"]) == ("dead", False)


def test_enrol_prints_the_same_key_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(GOOD)
    lines = []
    for _ in range(2):
        assert main(["enrol", "--config", str(path)]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert len(lines[0].split(": ")[1].strip()) == 64


def test_doctor_names_what_is_wrong_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than forty mistakes: tests/integration/test_doctor.py."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused for certain
        path = tmp_path / "agent.yaml"
        path.write_text(GOOD + f"data: absent.npz\nbroker: mqtt://127.0.0.1:{taken.getsockname()[1]}\n")
        assert main(["doctor", "--config", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [place for place, line in enumerate(lines) if line.startswith("FAIL")]
    assert [lines[place].split(":")[0] for place in failed] == ["FAIL  data", "FAIL  broker"]
    assert all(lines[place + 1].startswith("      → ") for place in failed)
    assert sum(line.startswith("ok") for line in lines) >= 4
    assert not (tmp_path / "state").exists(), "looking makes nothing"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("liberatai-agent 0.")


LATIN = "fleet: caf\xe9\n".encode("latin-1")


@pytest.mark.parametrize("name", ["agent.yaml", "board.yaml", "password"])
def test_a_file_in_another_encoding_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "board.yaml").write_bytes(LATIN)
    (tmp_path / "password").write_bytes(LATIN if name == "password" else b"secret")
    text = f"fleet: f\ndevice: d\ncoordinator_key: '{'0' * 64}'\nusername: d\npassword_file: password\n"
    text += "profile: ./board.yaml\n" if name == "board.yaml" else ""
    (tmp_path / "agent.yaml").write_bytes(LATIN if name == "agent.yaml" else text.encode())
    assert main(["run", "--config", str(tmp_path / "agent.yaml")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("E_CONFIG: ")
    assert shown.count("\n") == 1
    assert name in shown


@pytest.mark.parametrize("module", ["liberatai_agent", "liberatai_coordinator"])
def test_a_terminal_that_lacks_a_character_gets_a_question_mark(module: str) -> None:
    script = (
        f"import sys; from {module}.{'cli' if module.endswith('agent') else 'cli.app'} import main\n"
        "main(['version']); print('81 \\N{DEGREE SIGN}C \\N{HORIZONTAL ELLIPSIS}')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert done.stdout.endswith(b"81 ?C ?\n")


def test_status_prints_a_file_without_the_client_of_the_broker(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"running": true, "pid": 1, "phase": "idle"}')
    script = (
        "import sys; from liberatai_agent.cli import main; "
        f"main(['status', '--state-dir', {str(tmp_path)!r}]); "
        "print(sorted({'paho', 'psutil', 'asyncio', 'cryptography'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_that_shows_something_has_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "-o", "json"]) == 0
    version = json.loads(capsys.readouterr().out)["version"]
    assert main(["version", "-o", "name"]) == 0
    assert capsys.readouterr().out == f"{version}\n"
