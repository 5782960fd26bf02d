"""What is common to all systems: processes, memory, and what their notes say of rounds."""

import json
import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

CALM = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "ORT_DISABLE_TELEMETRY": "1",
}
DAY_S = 86_400


@dataclass(kw_only=True)
class Found:
    """What a run of a system shows; None: not measured.

    Attributes:
        accuracy: after each round, on test samples that decide nothing.
        round_s, training_s: of every round, whole and its longest local training.
        up, down: bytes of all devices while the job ran.
        idle_rss_mb, idle_pss_mb: of all processes of one device while no job runs.
        idle_bytes_day: of one device.
        packages, installed_mb: on a device, without pip and setuptools.
        wall_s: from the submission to the end.
        killed_s: by how much a round took longer in which one device was killed (SIGKILL).
        server_killed_same: whether a server that was killed in the middle of a round led to the same weights.
        notes: what else is to be said.
    """

    accuracy: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    training_s: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0
    idle_rss_mb: float | None = None
    idle_pss_mb: float | None = None
    idle_bytes_day: float | None = None
    packages: int | None = None
    installed_mb: float | None = None
    wall_s: float | None = None
    killed_s: float | None = None
    server_killed_same: bool | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def orchestration_s(self) -> float:
        """The median of what rounds take beside training; the first one, in which things start, left out."""
        rest = [whole - own for whole, own in zip(self.round_s, self.training_s, strict=True)]
        return statistics.median(rest[1:] or rest)


class Processes:
    """Children of this benchmark; use it in a `with` statement: all of them end with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for name in list(self._children):
            self.kill(name, signal.SIGTERM)

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path) -> int:
        """Start a process in a group of its own; its output goes to NAME.log."""
        with (self._folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, **CALM, **env},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children[name] = child
        return child.pid

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process and all that it started."""
        child = self._children.pop(name)
        both = [child.pid, *(one.pid for one in _below(child.pid))]
        for pid in both:
            _signal(pid, how)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pid in both:
            _signal(pid, signal.SIGKILL)

    def pid(self, name: str) -> int:
        """Return the process."""
        return self._children[name].pid

    def tail(self, name: str) -> str:
        """Return the end of a log."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _signal(pid: int, how: signal.Signals) -> None:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return


def memory_mb(pids: Iterable[int]) -> tuple[float, float]:
    """Return resident and proportional memory of these processes and all that they started, MB."""
    rss = pss = 0
    for pid in pids:
        for one in [psutil.Process(pid), *_below(pid)]:
            try:
                full = one.memory_full_info()
            except psutil.Error:
                continue
            rss, pss = rss + full.rss, pss + full.pss
    return rss / 1e6, pss / 1e6


def installed(python: Path, only: Sequence[str] | None = None) -> tuple[int, float]:
    """Return packages of an environment and their MB, without pip and setuptools.

    Args:
        python: of the environment.
        only: names of packages to count; None: all.
    """
    code = """
import importlib.metadata as m, json, os, re, sys
only = json.loads(sys.argv[1])
seen, size = set(), 0
for one in m.distributions():
    name = re.sub("[-_.]+", "-", one.metadata["Name"]).lower()
    if name in seen or name in ("pip", "setuptools", "wheel") or (only is not None and name not in only):
        continue
    seen.add(name)
    size += sum(os.path.getsize(p) for f in one.files or () if os.path.isfile(p := f.locate()))
print(json.dumps([len(seen), size / 1e6]))
"""
    told = subprocess.run(
        [python, "-c", code, json.dumps(only)], capture_output=True, text=True, check=True, timeout=120
    )
    packages, size = json.loads(told.stdout)
    return int(packages), round(float(size), 1)


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return what a system's processes noted."""
    path = folder / "notes.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def rounds_of(found: list[dict[str, Any]], count: int) -> tuple[list[float], list[float], list[float]]:
    """Return accuracy, seconds and longest training of rounds 1 … count from notes.

    A round is from the end of the one before to its own: from the test of its weights to the next.
    """
    ends = {one["round"]: one for one in found if one["what"] == "round"}
    began = min(one["began"] for one in found if one["what"] == "train")
    accuracy, whole, own = [], [], []
    for number in range(1, count + 1):
        if number not in ends:
            break
        before = ends[number - 1]["ended"] if number - 1 in ends else began
        trained = [
            one["ended"] - one["began"] for one in found if one["what"] == "train" and one["round"] == number
        ]
        accuracy.append(ends[number]["accuracy"])
        whole.append(ends[number]["ended"] - before)
        own.append(max(trained, default=0.0))
    return accuracy, whole, own


def wait(until: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """Return what `until` returns once that is true.

    Raises:
        TimeoutError: it is not true in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if found := until():
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def listening(port: int) -> bool:
    """Return whether somebody listens on a port of this machine."""
    with socket.socket() as some:
        return some.connect_ex(("127.0.0.1", port)) == 0
