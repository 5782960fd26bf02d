"""Under a real systemd, from the package: the agent renews itself in its sandbox, and nobody restarts it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.test_update import code_of, run
from tests.system.conftest import MOSQUITTO, fleet_host
from tests.system.machine import booted, needs_machine, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    needs_machine,
    pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto"),
]
AGENT = "liberatai-agent.service"
DEVICE = "box-1"
JOB = """
name: after
data: {input_shape: [2], classes: 2}
structures: [{family: mlp, params: {hidden: 16}}]
rounds: {count: 1, min_devices: 1, deadline_s: 120}
"""


def test_a_packaged_agent_leaves_a_bad_release_and_keeps_a_good_one(
    agent_package: Path, tmp_path: Path, said: Callable[[str], None]
) -> None:
    key = tmp_path / "release.key"
    public = re.search("[0-9a-f]{64}", run("liberatai_coordinator", "release", "keygen", "--out", key))
    assert public is not None
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    for number, (version, broken) in enumerate((("9.0.1", True), ("9.0.2", False)), start=1):
        source = code_of(tmp_path / version, version, broken)
        options = ("--number", number, "--version", version, "--from", source)
        run("liberatai_coordinator", "release", "sign", "--key", key, *options, "--out", bundles / version)
    volumes = [f"--volume={agent_package.parent}:/a:ro", f"--volume={bundles}:/bundles:ro"]
    folder = tmp_path / "fleet"
    folder.mkdir()
    with booted("update", *volumes) as machine, fleet_host(folder, machine.host) as fleet:
        machine.run("apt-get", "install", "-qq", "-y", f"/a/{agent_package.name}", wait_s=600)
        x = np.random.default_rng(0).normal(0, 1, (200, 2)).astype(np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(200) % 2)
        machine.put(folder / "data.npz", "/srv/data.npz")
        update = f'{{release_key: "{public[0]}", beats: 3, patience_s: 90}}'
        joining = ("--device", DEVICE, "--data", "/srv/data.npz")
        machine.run("liberatai-agent", "enrol", fleet.invite(DEVICE), *joining)
        until(lambda: fleet.is_online(DEVICE), "the device has joined")
        machine.run("sh", "-c", f"echo 'update: {update}' >> /etc/liberatai/agent.yaml")
        machine.run("systemctl", "restart", AGENT)
        until(lambda: fleet.is_online(DEVICE), "the device is back")
        process = machine.show(AGENT, "MainPID")

        def runs() -> str:
            return fleet.client.devices.show(DEVICE).agent_version

        installed = runs()
        machine.run("liberatai-agent", "update", "--bundle", "/bundles/9.0.1")
        until(lambda: "release 9.0.1 failed" in machine.says("liberatai-agent", "update"), "it went back")
        until(lambda: fleet.is_online(DEVICE) and runs() == installed, "what ran before runs")
        machine.run("liberatai-agent", "update", "--bundle", "/bundles/9.0.2")
        until(lambda: "release 9.0.2 runs" in machine.says("liberatai-agent", "update"), "it is confirmed")
        until(lambda: fleet.is_online(DEVICE) and runs() == "9.0.2", "the new release is online")
        fleet.client.jobs.create(JOB, folder)
        until(lambda: fleet.client.jobs.show("after").state == "finished", "it trains", 300)
        assert machine.show(AGENT, "MainPID") == process  # systemd has started nothing
        assert machine.show(AGENT, "NRestarts") == "0"
        assert "only permitted for main PID" not in machine.journal("-u", AGENT)
        machine.run("systemctl", "restart", AGENT)
        until(lambda: fleet.is_online(DEVICE) and runs() == "9.0.2", "and after a restart it still runs")
        said("self-update under systemd: a bad release left, a good one kept, 0 restarts by systemd")
