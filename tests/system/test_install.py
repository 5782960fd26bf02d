"""A fresh Debian with systemd: install, join, online; and gone without a trace."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.system.conftest import MOSQUITTO, fleet_host, seconds_since
from tests.system.machine import Machine, booted, needs_machine, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    needs_machine,
    pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto"),
]
PLACES = ("/opt", "/etc", "/usr", "/lib", "/var/lib", "/run")
OTHERS = ("/var/lib/dpkg/", "/var/lib/apt/", "/run/", "/etc/ld.so.cache", "/var/lib/systemd/")
"""What the package manager and systemd note for themselves."""


def test_a_fresh_device_is_online_after_two_commands_and_leaves_nothing_behind(
    agent_package: Path, tmp_path: Path, said: Callable[[str], None]
) -> None:
    with booted("install", f"--volume={agent_package.parent}:/packages:ro") as machine:
        before = files(machine)
        with fleet_host(tmp_path, machine.host) as fleet:
            token = fleet.invite("box-1")
            start = time.monotonic()
            machine.run("apt-get", "install", "-qq", "-y", f"/packages/{agent_package.name}")
            installed_s = seconds_since(start)
            said(machine.run("liberatai-agent", "enrol", token))
            until(lambda: fleet.is_online("box-1"), "the device is online")
            online_s = seconds_since(start)
            said(f"commands: 2; installed after {installed_s:.1f} s, online after {online_s:.1f} s")
            assert machine.show("liberatai-agent.service", "StatusText").startswith("connected")
            assert machine.show("liberatai-agent.service", "User") == "liberatai-agent"
            machine.run("apt-get", "remove", "-qq", "-y", "liberatai-agent")
            until(lambda: not fleet.is_online("box-1"), "it said goodbye")
        left = files(machine) - before
        assert left, "settings, keys and state stay until they are purged"
        kept = ("/etc/liberatai", "/var/lib/liberatai-agent")
        assert {path for path in left if not path.startswith(kept)} == set()
        machine.run("apt-get", "purge", "-qq", "-y", "liberatai-agent")
        assert files(machine) == before
        assert "liberatai" not in machine.run("cat", "/etc/passwd", "/etc/group")
        assert "liberatai" not in machine.run("systemctl", "list-units", "--all", "--full")


def files(machine: Machine) -> set[str]:
    """Return all that lies where a package may leave something."""
    found = machine.says("find", *PLACES, "-xdev").splitlines()
    return {path for path in found if not path.startswith(OTHERS) and not path.endswith("-")}
