"""A machine for tests: a Debian in a container, with systemd really booted in it.

The image is made once by debootstrap and kept below .cache; nothing is fetched from a registry of images. What
is missing here is said in one line, and the tests are skipped.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "system"
MIRROR = "http://deb.debian.org/debian"
PROGRAMS = ("podman", "runc", "conmon", "netavark", "iptables", "debootstrap")
PLACES = ("/usr/lib/podman", "/usr/libexec/podman")
"""Where podman's helpers lie."""
PACKAGES = "python3,systemd,systemd-sysv,dbus,ca-certificates,libfaketime,iproute2"
"""Of the image: what a Debian server has, and a clock that can be set for one service."""
WAIT_S = 180.0


def missing() -> str:
    """Return what keeps the machine from booting here; "" if nothing does."""
    if os.geteuid() != 0:
        return "needs root, for a container with systemd"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *PLACES])
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs {' '.join(lacking)}: see .ci/run" if lacking else ""


needs_machine = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


def until(look: Callable[[], object], what: str, wait_s: float = WAIT_S) -> None:
    """Wait until something is true."""
    end = time.monotonic() + wait_s
    while not look():
        assert time.monotonic() < end, f"still not after {wait_s:.0f} s: {what}"
        time.sleep(0.1)


def podman(*arguments: str, wait_s: float = WAIT_S) -> str:
    """Return what podman prints; its complaint is the assertion's text."""
    run = subprocess.run(
        ["podman", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=wait_s,
        env={**os.environ, "CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))},
    )
    assert run.returncode == 0, f"podman {' '.join(arguments)}: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    return run.stdout


def image() -> str:
    """Return the name of the image; it is made if it is not there (a minute)."""
    digest = hashlib.sha256(f"{PACKAGES} 1".encode()).hexdigest()[:12]
    name = f"localhost/liberatai-system-test:{digest}"
    with contextlib.suppress(AssertionError):
        podman("image", "exists", name)
        return name
    archive = CACHE / f"debian-{digest}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        folder = CACHE / f"debian-{digest}"
        shutil.rmtree(folder, ignore_errors=True)
        make = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder), MIRROR]
        subprocess.run(make, check=True, capture_output=True, timeout=600)
        for kept in (folder / "var/cache/apt/archives").glob("*.deb"):
            kept.unlink()
        part = archive.with_suffix(".part")
        subprocess.run(["tar", "-C", str(folder), "-cf", str(part), "."], check=True, timeout=300)
        part.rename(archive)
        shutil.rmtree(folder)
    podman("import", "--quiet", str(archive), name, wait_s=300)
    return name


class Machine:
    """A booted machine."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def host(self) -> str:
        """The address at which it reaches this host."""
        return podman("inspect", "--format", "{{.NetworkSettings.Gateway}}", self.name).strip()

    def run(self, *command: str, wait_s: float = WAIT_S) -> str:
        """Return what a command prints there."""
        return podman("exec", self.name, *command, wait_s=wait_s)

    def says(self, *command: str) -> str:
        """Return what a command prints there, whether it succeeds or not."""
        return self.run("sh", "-c", '"$@" 2>&1 || true', "sh", *command).strip()

    def put(self, source: Path, target: str) -> None:
        """Copy a file there, as root's and readable by all."""
        podman("cp", str(source), f"{self.name}:{target}.part")
        self.run("sh", "-c", f"chown root: {target}.part; chmod 644 {target}.part; mv {target}.part {target}")

    def show(self, unit: str, key: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).strip()

    def drop_in(self, unit: str, lines: Sequence[str]) -> None:
        """Change a unit until the machine ends; no lines: take the change back."""
        folder = f"/run/systemd/system/{unit}.d"
        text = "\\n".join(lines)
        write = f"mkdir -p {folder}; printf '{text}\\n' >{folder}/test.conf" if lines else f"rm -rf {folder}"
        self.run("sh", "-c", f"{write}; systemctl daemon-reload")

    def journal(self, *options: str) -> str:
        """Return what was logged."""
        return self.run("journalctl", "--no-pager", "--output=cat", *options)


@contextmanager
def booted(name: str, *options: str) -> Iterator[Machine]:
    """Boot a machine; it is gone at the end."""
    name = f"liberatai-{name}-{os.getpid()}"
    kind = ["--systemd=always", "--privileged", "--cgroupns=private", "--memory=2g"]
    podman("run", "--detach", "--name", name, *kind, *options, image(), "/sbin/init")
    machine = Machine(name)
    try:
        until(lambda: machine.says("systemctl", "is-system-running") == "running", "systemd is up")
        yield machine
    finally:
        podman("rm", "--force", "--time=0", name)
