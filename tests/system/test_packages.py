"""Packages are the same bytes every time, small enough for a small card, and of the architecture they claim."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.system.conftest import build
from tests.system.machine import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
ASKED_MB = 85
ELF_MACHINES = {"amd64": 62, "arm64": 183}
"""e_machine of x86-64 and aarch64."""


def field(package: Path, name: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "--field", str(package), name], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_two_builds_are_equal_and_small(
    agent_package: Path, tmp_path: Path, said: Callable[[str], None]
) -> None:
    again = build("liberatai-agent", tmp_path / "elsewhere")
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (agent_package, again)]
    assert sums[0] == sums[1]
    size = int(field(agent_package, "Installed-Size")) * 1024 / 1e6
    said(f"liberatai-agent: {size:.1f} MB on disk, {agent_package.stat().st_size / 1e6:.1f} MB to fetch")
    assert size <= ASKED_MB


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_all_machine_code_is_of_the_packages_architecture(
    arch: str, agent_package: Path, tmp_path: Path
) -> None:
    package = agent_package if arch == "amd64" else build("liberatai-agent", tmp_path / "out", arch=arch)
    assert field(package, "Architecture") == arch
    subprocess.run(["dpkg-deb", "--extract", str(package), str(tmp_path / "tree")], check=True)
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file() and not path.is_symlink()]
    heads = [head for head in (path.read_bytes()[:20] for path in files) if head[:4] == b"\x7fELF"]
    assert len(heads) > 20
    assert {int.from_bytes(head[18:20], "little") for head in heads} == {ELF_MACHINES[arch]}
    unit = tmp_path / "tree" / "lib" / "systemd" / "system" / "liberatai-agent.service"
    assert unit.read_bytes() == (ROOT / "deploy" / "systemd" / "liberatai-agent.service").read_bytes()
