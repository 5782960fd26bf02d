"""The agent as a process, over a real broker: start without one, status, will, SIGTERM, kill -9, memory."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from liberatai_agent.cli import main
from liberatai_coordinator.brokers.start import start_broker
from liberatai_core.contract.frame import Signer, open_frame
from liberatai_core.contract.messages import State

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
Home = tuple[Path, int]
KEY = Signer.from_seed(b"c" * 32, "test").public_key.hex()
needs_broker = pytest.mark.skipif(
    MOSQUITTO is None, reason="mosquitto is not installed: apt install mosquitto"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(condition: Callable[[], Any], what: str, timeout: float = 120.0) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


@contextlib.contextmanager
def process(
    *command: str, log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    with Path(log or os.devnull).open("ab") as sink:
        started = subprocess.Popen(command, stdout=sink, stderr=sink, env=env)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


@contextlib.contextmanager
def mosquitto(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    assert MOSQUITTO is not None
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    with process(MOSQUITTO, "-c", str(config)) as broker:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        until(answers, "the broker listens")
        yield broker


@pytest.fixture
def home(tmp_path: Path) -> Home:
    np.savez(tmp_path / "data.npz", x=np.ones((8, 4), np.float32), y=[0, 1] * 4)
    port = free_port()
    (tmp_path / "agent.yaml").write_text(
        f"fleet: test\ndevice: dev-a\ncoordinator_key: {KEY}\nbroker: mqtt://127.0.0.1:{port}\n"
        "state_dir: state\ndata: data.npz\nkeepalive_s: 5\n"
    )
    return tmp_path, port


def agent(folder: Path) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    return process(
        sys.executable,
        "-m",
        "liberatai_agent",
        "run",
        "--config",
        str(folder / "agent.yaml"),
        log=folder / "agent.log",
    )


def status(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "state" / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def retained_state(folder: Path, port: int) -> State:
    """Read the agent's retained presence with a client of our own."""
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    heard: list[bytes] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"reader-{time.monotonic_ns()}")
    client.on_message = lambda _client, _data, message: heard.append(bytes(message.payload))
    client.connect("127.0.0.1", port)
    client.subscribe("lai/v1/test/up/dev-a/state", 1)
    client.loop_start()
    try:
        payload = until(lambda: heard, "a retained presence")[-1]
    finally:
        client.disconnect()
        client.loop_stop()
    seed = (folder / "state" / "device.key").read_bytes()
    key = Signer.from_seed(seed, "test").public_key
    message = open_frame(payload, "test", lambda _: key).message
    assert isinstance(message, State)
    return message


@needs_broker
def test_an_agent_starts_without_a_broker_finds_it_and_stops_cleanly(home: Home) -> None:
    folder, port = home
    with agent(folder) as running:
        until(lambda: status(folder).get("last_error", "").startswith("E_LINK"), "the missing broker is told")
        with mosquitto(folder, port):
            until(lambda: status(folder).get("connected"), "the agent is connected")
            until(lambda: status(folder).get("tier"), "the agent has measured its machine")
            found = status(folder)
            assert (found["protocol"], found["tier"], found["samples"]) == ("MQTT 5", "full", 8)
            assert retained_state(folder, port).state == "online"
            # Idle and connected: 40 MiB here, half of it shared libraries. numpy would add 13, torch 200.
            assert psutil.Process(running.pid).memory_info().rss < 46 << 20
            shown = subprocess.run(
                [sys.executable, "-m", "liberatai_agent", "status", "--state-dir", str(folder / "state")],
                capture_output=True,
                text=True,
                check=True,
            )
            assert "connected" in shown.stdout
            running.send_signal(signal.SIGTERM)
            assert running.wait(timeout=60) == 0
            assert retained_state(folder, port).state == "offline"
    assert status(folder)["phase"] == "stopped"
    log = (folder / "agent.log").read_text()
    assert "Traceback" not in log
    assert log.count("no connection to") <= 3, log
    assert log.count("connected to") == 1


@needs_broker
def test_a_killed_agent_is_lost_and_comes_back_with_a_higher_session(home: Home) -> None:
    folder, port = home
    with mosquitto(folder, port):
        with agent(folder) as running:
            until(lambda: status(folder).get("connected"), "the agent is connected")
            running.kill()
            running.wait()
        until(lambda: retained_state(folder, port).state == "lost", "the broker publishes the will")
        with agent(folder) as running:
            until(lambda: status(folder).get("pid") == running.pid, "the new agent reports")
            # It is connected before it says so: first it looks at its machine.
            until(lambda: retained_state(folder, port).state == "online", "the agent says that it is there")
            assert retained_state(folder, port).session == 2


def test_a_second_agent_on_the_same_folder_says_so_and_fails(home: Home) -> None:
    folder, _ = home
    with agent(folder) as running:
        until(lambda: status(folder).get("pid") == running.pid, "the agent runs")
        second = subprocess.run(
            [sys.executable, "-m", "liberatai_agent", "run", "--config", str(folder / "agent.yaml")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith("E_LOCKED: ")


def test_systemd_is_told_that_the_agent_is_ready_and_alive(home: Home) -> None:
    folder, _ = home
    address = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address)
        supervisor.settimeout(30)
        with process(
            sys.executable,
            "-m",
            "liberatai_agent",
            "run",
            "--config",
            str(folder / "agent.yaml"),
            env={**os.environ, "NOTIFY_SOCKET": address},
        ) as running:
            heard: list[bytes] = []
            while heard.count(b"WATCHDOG=1") < 2:
                heard.append(supervisor.recv(1000))
            running.terminate()
            while heard[-1] != b"STOPPING=1":
                heard.append(supervisor.recv(1000))
            assert running.wait(timeout=60) == 0
    states = [one for one in heard if not one.startswith(b"STATUS=")]
    assert states[:2] == [b"READY=1", b"WATCHDOG=1"]
    assert b"STATUS=no broker" in heard[0], "what `systemctl status` prints"
    assert Path(folder / "state" / "status.json").exists()


@needs_broker
def test_a_damaged_state_is_set_aside_and_the_agent_is_online_again_by_itself(home: Home) -> None:
    folder, port = home
    with mosquitto(folder, port):
        with agent(folder) as running:
            until(lambda: status(folder).get("connected"), "the agent is connected")
            key = status(folder)["public_key"]
            running.kill()
        state = folder / "state"
        for path in (state / "outbox.db", state / "device.key", state / "traffic.json", state / "bench.json"):
            path.write_bytes(b"\xff" * 5000)
        (state / "outbox.db-wal").unlink(missing_ok=True)
        with agent(folder) as running:
            until(lambda: status(folder).get("pid") == running.pid, "the agent reports")
            until(lambda: status(folder).get("connected") and status(folder)["samples"], "it is connected")
            assert status(folder)["public_key"] == key
            assert status(folder)["session"] == 2
            assert retained_state(folder, port).state == "online"
    assert (state / "outbox.db.damaged").exists()
    assert "E_DAMAGED" in (folder / "agent.log").read_text()


def test_an_agent_that_is_looking_at_its_data_ends_at_once(home: Home) -> None:
    folder, _ = home
    with agent(folder) as running:
        until(lambda: (folder / "state" / "children" / "bench").is_dir(), "the look has begun")
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 0
    assert status(folder)["phase"] == "stopped"
    assert not (folder / "state" / "bench.json").exists(), "it was not waited for"


@needs_broker
@pytest.mark.parametrize("known_as", ["dev-a", "gateway-01"])
def test_doctor_says_what_the_broker_refuses(
    tmp_path: Path, known_as: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list of rights knows the device under the name of its user."""
    users = {"coordinator": "coordinator-password", "dev-a": "device-password"}
    broker = start_broker("mosquitto", tmp_path / "broker", users, "test")
    (tmp_path / "password").write_text("device-password\n")
    path = tmp_path / "agent.yaml"
    path.write_text(
        f"fleet: test\ndevice: {known_as}\ncoordinator_key: {KEY}\nbroker: {broker.url}\n"
        "state_dir: state\nusername: dev-a\npassword_file: password\n"
    )
    (tmp_path / "state").mkdir()
    told = ["E_BROKER: the broker refuses messages to x: Not authorized"] if known_as != "dev-a" else []
    (tmp_path / "state" / "status.json").write_text(json.dumps({"broker_refuses": told}))
    try:
        main(["doctor", "--config", str(path)])
    finally:
        broker.stop()
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if line.startswith("FAIL  rights")]
    assert any(line.startswith("ok") and "lets" in line and "(MQTT 5)" in line for line in lines)
    assert len(refused) == (0 if known_as == "dev-a" else 2)
    assert all("Not authorized" in line for line in refused)
