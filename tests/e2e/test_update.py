"""An agent renews itself from a signed release: a bad one is left by itself, a good one is confirmed."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from liberatai_coordinator.local.files import LocalDevice
from liberatai_coordinator.local.fleet import LocalFleet
from liberatai_core import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = {"liberatai_core": ROOT / "core", "liberatai_agent": ROOT / "agent"}


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def code_of(folder: Path, version: str, break_it: bool) -> Path:
    """This program as the next release; a broken one starts, connects, and ends before it has proved itself."""
    for package, source in PACKAGES.items():
        shutil.copytree(source / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    first = folder / "liberatai_core" / "__init__.py"
    first.write_text(first.read_text().replace(__version__, version))
    if break_it:
        watch = folder / "liberatai_agent" / "machine" / "machine_watch.py"
        text = watch.read_text()
        broken = text.replace(
            "    def look_at_gate(self)", "    def look_at_gate(self): raise RuntimeError\n\n    def _(self)"
        )
        assert broken != text
        watch.write_text(broken)
    return folder


def until(condition: Callable[[], bool], fleet: LocalFleet) -> None:
    ends_s = time.monotonic() + 120
    while not condition():
        fleet.require_alive()
        assert time.monotonic() < ends_s, fleet.logs()
        time.sleep(0.1)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_bad_release_is_left_by_itself_and_a_good_one_stays(tmp_path: Path) -> None:
    key = tmp_path / "release.key"
    public = re.search("[0-9a-f]{64}", run("liberatai_coordinator", "release", "keygen", "--out", key))
    assert public is not None
    bundles = {}
    for number, (version, broken) in enumerate((("9.0.1", True), ("9.0.2", False)), start=1):
        source = code_of(tmp_path / version, version, broken)
        bundles[version] = tmp_path / f"{version}.release"
        options = ("--number", number, "--version", version, "--from", source, "--out", bundles[version])
        run("liberatai_coordinator", "release", "sign", "--key", key, *options)
        shown = run("liberatai_coordinator", "release", "show", bundles[version], "--release-key", public[0])
        assert f"release {version}, number {number}" in shown
    data = tmp_path / "data.npz"
    np.savez(data, x=np.zeros((20, 2), np.float32), y=np.arange(20) % 2)
    with LocalFleet(tmp_path / "fleet", [LocalDevice(id="a", profile=None, data=data)]) as fleet:
        settings = fleet.folders.agent("a") / "agent.yaml"
        wanted = {"release_key": public[0], "patience_s": 60, "beats": 1}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"update": wanted}))
        fleet.restart_agent("a")

        def said() -> str:
            return run("liberatai_agent", "update", "--config", settings).strip()

        def seen() -> tuple[str, str]:
            """Version and state, as the coordinator knows them."""
            device = fleet.client.devices.show("a")
            return device.agent_version, device.state

        until(lambda: seen() == (__version__, "online"), fleet)
        out = run("liberatai_agent", "update", "--config", settings, "--bundle", bundles["9.0.1"])
        assert "waits for its trial" in out
        assert "has been told" in out
        until(lambda: "release 9.0.1 failed, the installed program runs again" in said(), fleet)
        until(lambda: seen() == (__version__, "online"), fleet)
        run("liberatai_agent", "update", "--config", settings, "--bundle", bundles["9.0.2"])
        until(lambda: said() == "release 9.0.2 runs", fleet)
        until(lambda: seen() == ("9.0.2", "online"), fleet)
        current = fleet.folders.agent("a") / "state" / "releases" / "current"
        assert (current / "liberatai_core" / "__init__.py").exists()
        fleet.restart_agent("a")  # and after a crash it is still that one
        until(
            lambda: (
                fleet.status("a").get("version") == "9.0.2" and fleet.status("a").get("connected") is True
            ),
            fleet,
        )
