"""What the control groups (versions 1 and 2) that trainings run in allow and use.

They are those of this process, or, where a service manager starts the trainings, the group that it names
(LIBERATAI_TRAINING_GROUP). psutil reports the host even inside a container.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
TRAINING = "LIBERATAI_TRAINING_GROUP"
"""Environment variable: path of the control group of the trainings; set by the unit of the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Limits of the control groups that trainings run in; None: no limit.

    Attributes:
        memory_bytes: memory.
        cpus: processors' worth of time.
        processors: how many processors may be used.
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    processors: int | None = None


# --- what is allowed -----------------------------------------------------------------------------


def limits(root: Path = ROOT, own: str | None = None) -> Group:
    """Return the tightest limits on the way from the group of the trainings to the root.

    Args:
        root: where control groups are mounted.
        own: the text of /proc/self/cgroup; read if None.
    """
    memory: list[int] = []
    cpus: list[float] = []
    processors: list[int] = []
    for folder in _folders(root, own):
        memory += _memory(folder)
        cpus += _cpus(folder)
        processors += _processors(folder)
    return Group(
        memory_bytes=min(memory, default=None),
        cpus=min(cpus, default=None),
        processors=min(processors, default=None),
    )


def _folders(root: Path, own: str | None) -> Iterator[Path]:
    """Yield the folders of all groups that trainings are in, and those of their parents."""
    named = os.environ.get(TRAINING, "")
    for line in (_text(OWN) if own is None else own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = named or path
        for base in _mounts(root, controllers.split(",") if controllers else []):
            yield from _upwards(base, path)


def _mounts(root: Path, controllers: list[str]) -> list[Path]:
    """Return the folders where the hierarchy with these controllers (none: version 2) may be mounted."""
    if not controllers:
        return [root, root / "unified"]
    return [root / name for name in dict.fromkeys((*controllers, ",".join(controllers)))]


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """Yield the group's folder and its parents up to `base` (in a container often `base` alone exists)."""
    parts = _parts(path)
    for length in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]


def _memory(folder: Path) -> list[int]:
    found = (_text(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes"))
    return [int(text) for text in found if text.isdigit() and int(text) > 0]


def _cpus(folder: Path) -> list[float]:
    words = _text(folder / "cpu.max").split()
    if len(words) != 2:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if all(word.isdigit() and int(word) > 0 for word in words):
        return [int(words[0]) / int(words[1])]
    return []


def _processors(folder: Path) -> list[int]:
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        count = 0
        for part in _text(folder / name).strip().split(","):
            first, _, last = part.partition("-")
            if first.isdigit() and (last.isdigit() or not last):
                count += int(last or first) - int(first) + 1
        if count > 0:
            return [count]
    return []


# --- what is used --------------------------------------------------------------------------------


def memory_available(root: Path = ROOT, own: str | None = None) -> int | None:
    """Return the bytes that are left below the tightest limit, None without limits.

    What the kernel holds of files that nobody uses is left: it gives that back when memory is needed.
    """
    left = []
    for folder in _folders(root, own):
        used = [_text(folder / name).strip() for name in ("memory.current", "memory.usage_in_bytes")]
        names = ("inactive_file", "total_inactive_file")
        spare = [value for name in names if (value := _field(folder / "memory.stat", name)) is not None]
        for limit, now in zip(_memory(folder), filter(str.isdigit, used), strict=False):
            left.append(max(0, limit - int(now) + max(spare, default=0)))
    return min(left, default=None)


def cpu_seconds(root: Path = ROOT, own: str | None = None) -> float | None:
    """Return the processor time that everything in this container has used, None outside of one.

    The machine's own root has no limits of its own; what is mounted in a container has, or its path is not
    there.
    """
    if (root / "cpu.max").exists():
        found = _field(root / "cpu.stat", "usage_usec")
        return None if found is None else found / 1e6
    for line in (_text(OWN) if own is None else own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "cpuacct" in controllers.split(","):
            for base in _mounts(root, controllers.split(",")):
                inside = base.is_dir() and not base.joinpath(*_parts(path)).is_dir()
                used = _text(base / "cpuacct.usage").strip()
                if inside and used.isdigit():
                    return int(used) / 1e9
    return None


def out_of_memory_kills(root: Path = ROOT, own: str | None = None) -> int:
    """Return how often the kernel killed a process for memory, here and (where it tells) on the machine."""
    counts = [_field(Path("/proc/vmstat"), "oom_kill") or 0] if own is None else []
    for folder in _folders(root, own):
        counts += [_field(folder / name, "oom_kill") or 0 for name in ("memory.events", "memory.oom_control")]
    return sum(counts)


# --- a group for a child ---------------------------------------------------------------------------

AGENT = "agent"
"""The group that the agent moves to: one with limits for groups below it may not have processes itself."""
DELEGATED = ("user.delegate", "trusted.delegate")
"""Marks of systemd on a group that a service may divide (`Delegate=yes`)."""
MAX_PROCESSES = 64


def group_for_child(name: str, root: Path = ROOT, own: str | None = None) -> Path | None:
    """Return an empty group below this process's own, None unless that one was delegated to it.

    Version 2 only. The agent itself moves to a group beside it.
    """
    text = _text(OWN) if own is None else own
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), None)
    if path is None:
        return None
    folder = root.joinpath(*_parts(path))
    if folder.name == AGENT:
        folder = folder.parent
    if not _delegated(folder):
        return None
    try:
        (folder / AGENT).mkdir(exist_ok=True)
        (folder / AGENT / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        (folder / "cgroup.subtree_control").write_text("+memory +pids", encoding="ascii")
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "pids.max").write_text(str(MAX_PROCESSES), encoding="ascii")
        (folder / name / "memory.oom.group").write_text("1", encoding="ascii")
    except OSError:
        return None
    return folder / name


def _delegated(folder: Path) -> bool:
    for mark in DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, mark) == b"1":
                return True
    return False


def put_into(group: Path, pid: int) -> None:
    """Move a process into a group; without effect if it has ended."""
    with contextlib.suppress(OSError):
        (group / "cgroup.procs").write_text(str(pid), encoding="ascii")


def limit_memory(group: Path, size_bytes: int) -> None:
    """Bound the memory of a group, files that it reads included: those are given back when it is short."""
    with contextlib.suppress(OSError):
        (group / "memory.max").write_text(str(size_bytes), encoding="ascii")


def _field(path: Path, name: str) -> int | None:
    """Return the number behind a name in a file of lines "name number"."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
