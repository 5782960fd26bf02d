"""The command line of podman or docker: what a device's container is given, and what becomes of it.

Both take the same words. Nothing here talks to a daemon's API, and nothing is pulled: an image is there, or
`HOST` is taken, which runs this machine's own files under an overlay that forgets what is written (podman).
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from liberatai_core.errors import ConfigError, LinkError, NotFoundError

HOST: Final = "host"
"""Instead of an image: the files of this machine."""
ENGINES: Final = ("podman", "docker")
TIMEOUT_S: Final = 60.0
SETTINGS: Final = ("CONTAINER", "DOCKER_", "REGISTRY_", "STORAGE_")
"""How the names of variables begin that the programs read."""
PIDS: Final = 128
"""Processes and threads in one container: an agent, its trainer and their threads need about thirty."""
USER: Final = 10_001
"""Owner of a device's files in an image; nobody on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a device has.

    Attributes:
        memory_bytes: of all its processes together, swap included.
        cpus: processors' worth of time.
        pids: processes and threads.
    """

    memory_bytes: int
    cpus: float
    pids: int = PIDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The limits that a container has, read inside it; 0: it has none."""

    memory_bytes: int
    cpus: float
    pids: int


@dataclass(frozen=True, slots=True)
class Engine:
    """One of the two programs.

    Attributes:
        program: its path.
        image: that devices run; `HOST`: this machine's own files.
    """

    program: str
    image: str

    @property
    def is_podman(self) -> bool:
        """Whether it is podman."""
        return Path(self.program).name == "podman"

    def environment(self) -> dict[str, str]:
        """Return what the program's own settings are in this process's environment."""
        return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}

    def run_command(
        self, name: str, limits: Limits, mounts: Mapping[Path, str], command: Sequence[str], user: int
    ) -> list[str]:
        """Return the command line that runs a container in the foreground.

        It has no capability, cannot gain any, cannot write but where it is allowed to, and shares the
        network of this machine: each device's link is shaped by its proxy on loopback.

        Args:
            name: of the container.
            limits: what it gets.
            mounts: folders and files by their path here, which is their path there; "ro" or "rw". The first
                one is the device's own.
            command: what runs in it; in an image its program is known.
            user: number of the user that runs it; its group is root's.
        """
        words = [self.program, "run", "--rm", "--name", name, "--network", "host", "--log-driver", "none"]
        words += ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        words += ["--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes)]
        words += ["--cpus", f"{limits.cpus:g}", "--pids-limit", str(limits.pids)]
        words += ["--user", f"{user}:0", "--no-healthcheck"]
        if self.image == HOST:  # what runs may itself lie below /tmp: nothing is put over it
            words += ["--env", f"TMPDIR={next(iter(mounts))}"]
        else:
            copied = ",notmpcopyup" if self.is_podman else ""
            words += ["--tmpfs", f"/tmp:rw,size=16m{copied}"]  # noqa: S108 - theirs
        for key in ("OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=PASSIVE", "ORT_DISABLE_TELEMETRY=1"):
            words += ["--env", key]
        for path, how in mounts.items():
            words += ["--volume", f"{path}:{path}:{how}"]
        if self.is_podman:
            words.append("--read-only-tmpfs=false")  # else /run and /var/tmp could be written
        words += ["--rootfs", "/:O"] if self.image == HOST else [self.image]
        return [*words, *command]

    def require_image(self) -> None:
        """Raise unless the image is here.

        Raises:
            NotFoundError: it is not; the text says how to build it.
            ConfigError: docker cannot run this machine's files.
        """
        if self.image == HOST:
            if not self.is_podman or os.geteuid() != 0:
                raise ConfigError("image", ["host: needs podman and root; build an image: deploy/images.sh"])
            return
        if _call(self.program, "image", "inspect", self.image).returncode:
            raise NotFoundError(
                f"no image {self.image}: build it by deploy/images.sh, or say --image host (podman, root)"
            )

    def kill(self, name: str, how: str = "KILL") -> None:
        """Send a signal to a container; without effect if there is none."""
        _call(self.program, "kill", "--signal", how, name)

    def remove(self, name: str) -> None:
        """Let a container be gone, whatever it does."""
        _call(self.program, "rm", "--force", "--time", "0", name)

    def is_running(self, name: str) -> bool:
        """Whether a container runs."""
        told = _call(self.program, "inspect", "--format", "{{json .State.Running}}", name)
        return told.returncode == 0 and json.loads(told.stdout) is True

    def seen(self, name: str) -> Seen:
        """Return a container's limits as a process inside it reads them.

        Raises:
            LinkError: it does not run.
        """
        told = _call(self.program, "exec", name, "grep", "-s", ".", *CONTROL_FILES)
        if not told.stdout.strip():
            raise LinkError(f"container {name}: its limits cannot be read: {told.stderr.strip()[-200:]}")
        return parse_limits(told.stdout)


CONTROL_FILES: Final = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/pids.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
    "/sys/fs/cgroup/pids/pids.max",
)
"""Of the second and of the first version of control groups."""
UNLIMITED_BYTES: Final = 1 << 60


def parse_limits(text: str) -> Seen:
    """Return the limits in what `grep . CONTROL_FILES` prints: a path, a colon, and what stands in it.

    Raises:
        LinkError: one is missing.
    """
    found: dict[str, list[int]] = {}
    try:
        for line in text.splitlines():
            path, _, words = line.partition(":")
            found[path.rpartition("/")[2]] = [-1 if word == "max" else int(word) for word in words.split()]
        memory = found.get("memory.max", found.get("memory.limit_in_bytes", []))[0]
        quota, period = found.get("cpu.max") or (found["cpu.cfs_quota_us"] + found["cpu.cfs_period_us"])
        pids = found["pids.max"][0]
    except (KeyError, IndexError, ValueError):
        raise LinkError(f"limits of a container: {' '.join(text.split())[:120]!r} lacks one") from None
    return Seen(
        memory_bytes=0 if memory < 0 or memory >= UNLIMITED_BYTES else memory,
        cpus=0.0 if quota < 0 else quota / period,
        pids=max(0, pids),
    )


def find_engine(image: str, program: str | None = None) -> Engine:
    """Return podman or docker, the first that is installed.

    Args:
        image: that devices run, or `HOST`.
        program: one of the two by name; None: either.

    Raises:
        NotFoundError: it is not installed.
    """
    for name in (program,) if program else ENGINES:
        found = shutil.which(name)
        if found is not None:
            return Engine(found, image)
    raise NotFoundError(f"{program or 'podman or docker'} is not installed: take backend: process")


def _call(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"{' '.join(command[:3])}: {error}") from None
