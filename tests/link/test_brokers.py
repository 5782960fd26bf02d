"""Starting and ending brokers for the demo and the tests."""

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.brokers import start as brokers
from liberatai_coordinator.brokers.start import find_mosquitto, start_broker
from liberatai_core.errors import ConfigError, LinkError, NotFoundError

STARTER = """
import sys, time
from pathlib import Path
from liberatai_coordinator.brokers.start import start_broker

broker = start_broker(sys.argv[1], Path(sys.argv[2]), {"coordinator": "coordinator-password"}, "f")
print(broker.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["amqtt", "mosquitto"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    return str(request.param)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_broker_lives_from_start_to_stop(kind: Any, tmp_path: Path, users: dict[str, str]) -> None:
    with start_broker(kind, tmp_path / "new", users, "f") as broker:
        pid, port = broker.pid, broker.port
        assert pid is not None
        assert running(pid)
        assert (broker.kind, broker.url) == (kind, f"mqtt://127.0.0.1:{port}")
        assert broker.version[0].isdigit()
        assert ("3.1.1" in broker.lost) == (kind == "amqtt")
        broker.restart()
        assert broker.port == port
        assert broker.pid not in (None, pid)
        broker.kill()
        assert broker.pid is None
        broker.kill()
        broker.restart()
        pid = broker.pid
    assert broker.pid is None
    assert pid is not None
    assert not running(pid)


def test_a_broker_dies_with_the_process_that_started_it(kind: Any, tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, kind, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert running(pid)
    finally:
        starter.kill()
        starter.wait()
    deadline_s = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not running(pid)


def test_no_password_lies_about(kind: Any, tmp_path: Path, users: dict[str, str]) -> None:
    with start_broker(kind, tmp_path, users, "f"):
        for path in tmp_path.iterdir():
            assert all(word not in path.read_text() for word in users.values()), path
        assert stat.S_IMODE((tmp_path / "passwords").stat().st_mode) == 0o600


def test_a_port_that_is_taken_is_named(kind: Any, tmp_path: Path, users: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LinkError, match=f"{port} is in use"):
            start_broker(kind, tmp_path, users, "f", port=port)


def test_a_broker_that_does_not_start_says_why(tmp_path: Path, users: dict[str, str]) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    broker = start_broker("mosquitto", tmp_path, users, "f")
    broker.stop()
    with (tmp_path / "mosquitto.conf").open("a") as file:
        file.write("nonsense 1\n")
    with pytest.raises(LinkError, match="nonsense"):
        broker.restart()


@pytest.mark.parametrize(
    ("credentials", "fleet"),
    [
        ({"coordinator": "coordinator-password"}, "a/b"),
        ({"coordinator": "coordinator-password"}, "#"),
        ({"coordinator": "coordinator-password", "a/b": "password1"}, "f"),
        ({"coordinator": "coordinator-password", "a:b": "password1"}, "f"),
        ({"coordinator": "short"}, "f"),
        ({"coordinator": "pass\nother:word"}, "f"),
        ({"dev-a": "password1"}, "f"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, credentials: dict[str, str], fleet: str) -> None:
    with pytest.raises(ConfigError):
        start_broker("auto", tmp_path, credentials, fleet)


def test_auto_takes_amqtt_where_mosquitto_is_missing(
    tmp_path: Path, users: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "SBIN", ())
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(NotFoundError, match="apt install mosquitto"):
        start_broker("mosquitto", tmp_path, users, "f")
    with start_broker("auto", tmp_path, users, "f") as broker:
        assert broker.kind == "amqtt"


def test_auto_prefers_mosquitto(tmp_path: Path, users: dict[str, str]) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    with start_broker("auto", tmp_path, users, "f") as broker:
        assert broker.kind == "mosquitto"


def test_mosquitto_keeps_retained_messages_over_a_proper_restart(
    mosquitto_world: Any, tmp_path: Path
) -> None:
    """Only with `persistence`."""
    from asyncio import run

    from liberatai_core.link.link import Received

    mosquitto_world.broker.stop()
    users = {"coordinator": "coordinator-password", "dev-a": "dev-a-password", "dev-b": "dev-b-password"}
    mosquitto_world.broker = start_broker(
        "mosquitto", tmp_path / "kept", users, mosquitto_world.fleet, persistence=True
    )

    async def work() -> None:
        source = await mosquitto_world.peer("coordinator")
        await source.link.publish(mosquitto_world.pub("head"), b"v1", retain=True)
        await source.link.close()
        mosquitto_world.broker.restart()
        device = await mosquitto_world.peer("dev-a", mosquitto_world.pub("#"))
        assert (await device.next(Received)).payload == b"v1"
        await device.link.close()

    run(work())
