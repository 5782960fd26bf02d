"""A coordinator goes on elsewhere from its backup, with one command; the one that was backed up is shut out."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from liberatai_coordinator.client.client import Client
from liberatai_coordinator.local.files import LocalDevice
from liberatai_coordinator.local.fleet import LocalFleet
from liberatai_core.errors import LiberataiError

ROUNDS = 5
DEVICES = ("a", "b")


def ring(path: Path, seed: int, count: int = 200) -> Path:
    """Points in a plane, and whether they lie within a circle."""
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    np.savez(path, x=x, y=(np.hypot(*x.T) < 0.7).astype(np.int64))
    return path


def job(folder: Path) -> str:
    ring(folder / "labels.npz", seed=9)
    return f"""
name: rings
data: {{input_shape: [2], classes: 2}}
structures: [{{family: mlp, params: {{hidden: 8}}}}]
rounds: {{count: {ROUNDS}, min_devices: 2, deadline_s: 120}}
sparsify: {{up_density: 0.5, down_density: 0.5}}
aggregate: {{validation: labels.npz}}
"""


def liberatai(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "liberatai_coordinator", *map(str, arguments)]


def rounds_done(client: Client) -> int:
    return sum(row.state == "published" for row in client.jobs.show("rings").rounds)


def wait(done: "object", process: "subprocess.Popen[str] | None" = None) -> None:
    ends_s = time.monotonic() + 120
    while True:
        try:
            if done():  # type: ignore[operator]
                return
        except LiberataiError:
            pass
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < ends_s
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_job_goes_on_elsewhere_by_one_command_and_the_old_coordinator_stops(tmp_path: Path) -> None:
    work = tmp_path / "jobs"
    work.mkdir()
    text = job(work)
    devices = [
        LocalDevice(id=name, profile=None, data=ring(tmp_path / f"{name}.npz", seed))
        for seed, name in enumerate(DEVICES)
    ]
    there = tmp_path / "there"
    backup = tmp_path / "backup.tar"
    with LocalFleet(tmp_path / "here", devices) as here:
        here.client.jobs.create(text, work)
        wait(lambda: rounds_done(here.client) >= 1)
        here.kill_agent("b")  # the job waits for it while the backup is taken
        settings = here.folders.coordinator / "coordinator.yaml"
        made = subprocess.run(
            liberatai("backup", "create", backup, "--config", settings),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        assert "1 jobs under way" in made.stdout
        here.restart_agent("b")
        wait(lambda: here.client.jobs.show("rings").state == "finished")  # what the backup knows nothing of
        (work / "labels.npz").unlink()  # the other machine has nothing but the backup
        command = liberatai("backup", "restore", backup, "--into", there, "--serve")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                client = Client(there / "state" / "api.sock")
                wait(lambda: client.jobs.show("rings").state == "finished", process)
                finished = client.jobs.show("rings")
                assert rounds_done(client) == ROUNDS
                assert {device.id for device in client.devices.list() if device.status == "approved"} == {
                    *DEVICES
                }
                # the old one ran all the time: it has ended by itself, and does not start again
                old = here._coordinator_process
                wait(lambda: old.pid is None)
                assert "E_REPLACED" in old.tail()
                again = subprocess.run(
                    liberatai("serve", "--config", settings),
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                assert again.returncode == 78
                assert len(again.stderr.strip().splitlines()) == 1
                assert "--take-over" in again.stderr
            finally:
                process.terminate()
                process.wait(30)
    assert finished.reason == ""
    assert backup.stat().st_mode & 0o077 == 0
