"""Every procedure of the handbook is run, as it stands there, with real programs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from liberatai_core.errors import BY_CODE

ROOT = Path(__file__).parents[2]
HANDBOOK = ROOT / "docs" / "handbook.md"
NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


def can_make_machines(folder: Path) -> bool:
    """Whether this machine lets us have namespaces with folders laid over others."""
    if not all(map(shutil.which, ("unshare", "mount", "ip"))):
        return False
    upper, work = folder / "upper", folder / "work"
    script = f"mount -t tmpfs none {folder} && mkdir {upper} {work} && mount -t overlay overlay -o "
    script += f"lowerdir=/etc,upperdir={upper},workdir={work} /etc && ip link set lo up"
    return subprocess.run([*NAMESPACES, "sh", "-c", script], capture_output=True, check=False).returncode == 0


def test_every_error_code_has_a_remedy() -> None:
    rows = re.findall(r"^\| `(E_[A-Z_]+)` \| (.+) \|$", HANDBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert [code for code, _ in rows] == sorted(BY_CODE)


@pytest.mark.system
@pytest.mark.timeout(900)
def test_the_handbook_can_be_followed(tmp_path: Path) -> None:
    if not can_make_machines(tmp_path):
        pytest.skip("needs root, unshare, overlay mounts and ip (apt install util-linux iproute2)")
    if not (shutil.which("mosquitto") or Path("/usr/sbin/mosquitto").exists()):
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    machine = Path(__file__).with_name("handbook_machine.py")
    command = [*NAMESPACES, sys.executable, str(machine), str(HANDBOOK), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
