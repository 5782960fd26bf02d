"""Whatever happens to a device's service, it comes back by itself: nobody types anything on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.system.conftest import MOSQUITTO, FleetHost, fleet_host
from tests.system.machine import Machine, booted, needs_machine, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    needs_machine,
    pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto"),
]
AGENT = "liberatai-agent.service"
STATE = "/var/lib/liberatai-agent"
CLOCK = "/run/liberatai-test-clock"
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
DEVICE = "box-1"


@dataclass
class Device:
    """A machine that has joined a fleet and can train."""

    machine: Machine
    fleet: FleetHost

    @property
    def pid(self) -> str:
        return self.machine.show(AGENT, "MainPID")

    @property
    def restarts(self) -> int:
        return int(self.machine.show(AGENT, "NRestarts"))

    def kill(self, signal: str) -> None:
        self.machine.run("sh", "-c", f"kill -{signal} {self.pid}")

    def is_back(self) -> bool:
        return self.machine.show(AGENT, "ActiveState") == "active" and self.fleet.is_online(DEVICE)

    def trains(self, job: str) -> None:
        """Let the device take part in a round of a new job."""
        text = (
            f"name: {job}\ndata: {{input_shape: [2], classes: 2}}\n"
            "structures: [{family: mlp, params: {hidden: 16}}]\n"
            "rounds: {count: 1, min_devices: 1, deadline_s: 60}\n"
        )
        self.fleet.client.jobs.create(text, self.fleet.folder)

    def has_trained(self, job: str) -> bool:
        return self.fleet.client.jobs.show(job).state == "finished"


@pytest.fixture(scope="module")
def device(
    agent_package: Path, train_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("fleet")
    volumes = [
        f"--volume={path.parent}:/{place}:ro" for path, place in ((agent_package, "a"), (train_package, "t"))
    ]
    with booted("recovery", *volumes) as machine, fleet_host(folder, machine.host) as fleet:
        # A small card of its own for the state, a clock that can be set, less patience than a day's.
        machine.run("sh", "-c", f"mkdir {STATE}; mount -t tmpfs -o size=64M none {STATE}; echo +0 >{CLOCK}")
        machine.drop_in(
            AGENT,
            [
                "[Service]",
                "WatchdogSec=6s",
                f"Environment=LD_PRELOAD={FAKETIME} FAKETIME_TIMESTAMP_FILE={CLOCK} FAKETIME_NO_CACHE=1",
                "Environment=DONT_FAKE_MONOTONIC=1",
            ],
        )
        packages = [f"/a/{agent_package.name}", f"/t/{train_package.name}"]
        machine.run("apt-get", "install", "-qq", "-y", *packages, wait_s=600)
        random = np.random.default_rng(0)
        y = np.arange(200) % 2
        np.savez(folder / "data.npz", x=random.normal(0, 1, (200, 2)).astype(np.float32) + y[:, None], y=y)
        machine.put(folder / "data.npz", "/srv/data.npz")
        machine.run("liberatai-agent", "enrol", fleet.invite(DEVICE), "--data", "/srv/data.npz")
        more = "keepalive_s: 5\\ngate: {min_free_disk_mb: 8}"
        machine.run("sh", "-c", f"printf '{more}\\n' >>/etc/liberatai/agent.yaml")
        machine.run("systemctl", "restart", AGENT)
        device = Device(machine, fleet)
        until(device.is_back, "the device has joined")
        yield device


def test_killed(device: Device) -> None:
    before, restarts = device.pid, device.restarts
    device.kill("KILL")
    until(lambda: device.restarts > restarts and device.is_back(), "it was started again")
    assert device.pid != before


def test_hung(device: Device) -> None:
    before, restarts = device.pid, device.restarts
    device.kill("STOP")
    until(lambda: device.restarts > restarts and device.is_back(), "its watchdog ended it")
    assert "Watchdog timeout" in device.machine.journal("-u", AGENT)
    assert device.pid != before


def test_out_of_memory_in_a_training(device: Device) -> None:
    """The kernel kills the training, and nothing else: the agent says why, and trains when there is memory."""
    before = device.pid
    device.machine.drop_in("liberatai-trainer@.service", ["[Service]", "MemoryMax=100M"])
    try:
        device.trains("hungry")
        until(lambda: "E_MEMORY" in device.machine.journal("-u", AGENT), "the agent says that memory ran out")
    finally:
        device.machine.drop_in("liberatai-trainer@.service", [])
    said = device.machine.journal("-u", "liberatai-trainer@*")
    assert "oom-kill" in said or "status=9/KILL" in said, "systemd knows the reason with control groups 2"
    assert device.pid == before
    until(lambda: device.has_trained("hungry"), "it trained after all", 400)
    assert device.pid == before
    assert device.is_back()


def test_disk_full(device: Device) -> None:
    restarts = device.restarts
    device.machine.says("dd", "if=/dev/zero", f"of={STATE}/full", "bs=1M")
    device.kill("KILL")
    until(lambda: device.restarts > restarts, "it was started again, on a full disk")
    device.trains("later")
    device.machine.run("rm", f"{STATE}/full")
    until(device.is_back, "it is back")
    until(lambda: device.has_trained("later"), "it trains", 400)


def test_broker_gone(device: Device) -> None:
    before = device.pid
    device.fleet.stop_broker()
    until(lambda: "no broker" in device.machine.show(AGENT, "StatusText"), "the agent noticed")
    device.fleet.start_broker()
    until(device.is_back, "it is back")
    assert device.pid == before


@pytest.mark.parametrize("years", ["-10y", "+10y"])
def test_clock_ten_years_off(device: Device, years: str) -> None:
    before = device.pid
    device.machine.run("sh", "-c", f"echo {years} >{CLOCK}")
    name = "past" if years[0] == "-" else "future"
    device.trains(name)
    until(lambda: device.has_trained(name), "it trains at that time")
    device.machine.run("sh", "-c", f"echo +0 >{CLOCK}")
    device.trains(f"{name}-over")
    until(lambda: device.has_trained(f"{name}-over"), "it trains when the clock is set right")
    assert device.pid == before
    assert device.is_back()
