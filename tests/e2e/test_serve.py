"""`liberatai serve` as a process: without a broker, twice on one folder, with faulty settings."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from liberatai_coordinator.client.client import Client
from liberatai_core.errors import LiberataiError


def settings(folder: Path, port: int) -> Path:
    path = folder / "coordinator.yaml"
    path.write_text(
        f"fleet: test\nbroker: mqtt://127.0.0.1:{port}\nstate_dir: state\nenrolment: approve\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "liberatai_coordinator", "serve", "--config", str(path)]


@contextmanager
def serving(path: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    environment = {**os.environ, **more}
    with subprocess.Popen(command(path), stderr=subprocess.PIPE, text=True, env=environment) as process:
        client = Client(path.parent / "state" / "api.sock")
        try:
            ends = time.monotonic() + 60
            while True:
                try:
                    client.health()
                    break
                except LiberataiError:
                    assert process.poll() is None, process.communicate()[1]
                    assert time.monotonic() < ends
                    time.sleep(0.05)
            yield process, client
        finally:
            process.terminate()
            process.wait(20)


def test_a_coordinator_without_a_broker_answers_and_says_so(tmp_path: Path, closed_port: int) -> None:
    with serving(settings(tmp_path, closed_port)) as (process, client):
        health = client.health()
        assert health["protocol"] == ""
        assert len(health["public_key"]) == 64
        assert client.jobs.list() == ()
        process.terminate()
        assert process.wait(20) == 0
        said = process.communicate()[1]
        assert health["public_key"] in said
        assert "Traceback" not in said


def test_a_second_coordinator_on_one_folder_is_refused(tmp_path: Path, closed_port: int) -> None:
    path = settings(tmp_path, closed_port)
    with serving(path) as (process, client):
        second = subprocess.run(command(path), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1
        assert "E_LOCKED" in second.stderr
        assert str(process.pid) in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert client.health()["epoch"] == 1


def test_faulty_settings_are_all_told_and_the_exit_code_is_2(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.yaml"
    path.write_text("fleet: NO!\nenrolment: maybe\nbrokr: x\n", encoding="utf-8")
    run = subprocess.run(command(path), capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    for key in ("fleet", "enrolment", "brokr"):
        assert f"{key}: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_service_manager_hears_that_it_is_ready_alive_and_stopping(
    tmp_path: Path, closed_port: int
) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        with serving(settings(tmp_path, closed_port), NOTIFY_SOCKET=address, WATCHDOG_USEC="400000") as (
            process,
            client,
        ):
            assert manager.recv(1000) == b"READY=1"
            assert client.health()["protocol"] == "", "who is told so can ask at once"
            for _ in range(2):
                alive, status = manager.recv(1000).split(b"\n")
                assert (alive, status[:7]) == (b"WATCHDOG=1", b"STATUS=")
            assert b"no broker" in status
            process.terminate()
            heard = b""
            while heard != b"STOPPING=1":
                heard = manager.recv(1000)
            assert process.wait(60) == 0


def test_who_watches_hears_whether_it_lives_and_why_it_is_not_ready(tmp_path: Path, closed_port: int) -> None:
    path = settings(tmp_path, closed_port)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    path.write_text(path.read_text(encoding="utf-8") + f"metrics: {address}\n", encoding="utf-8")
    with serving(path), httpx.Client(base_url=f"http://{address}") as watcher:
        alive = watcher.get("/healthz")
        assert (alive.status_code, alive.text) == (200, "ok\n")
        ready = watcher.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "no broker: nothing is heard of any device\n")
        counted = watcher.get("/metrics")
        assert counted.status_code == 200
        assert "\nliberatai_broker_connected 0.0\n" in counted.text
        assert watcher.get("/v1/devices").status_code == 404, "the API stays on its socket"
