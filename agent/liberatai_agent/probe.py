"""What can this machine do? Measured, bounded by its container, its profile and its settings.

psutil reports the host even inside a container, so control groups are read too (versions 1 and 2). No
runtime is imported to find out whether it is there.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from liberatai_agent.children.messages import CHILD_ENVIRONMENT
from liberatai_agent.config import AgentConfig
from liberatai_agent.events import Tier
from liberatai_agent.link_meter import NOTHING, Announced
from liberatai_agent.session import CODECS
from liberatai_core import __version__
from liberatai_core.contract.limits import MAX_SAMPLES
from liberatai_core.contract.messages import Capability
from liberatai_core.profile import Profile
from liberatai_core.structure import DataContract

CGROUP_ROOT = Path("/sys/fs/cgroup")
RUNTIMES = ("torch", "onnxruntime")
FULL_MEMORY_BYTES = 330 << 20
"""Torch takes 220 MiB after import; training a LeNet-size model takes about 330 MiB in all."""
DEFAULT_STORAGE_BYTES = 256 << 20
"""For a machine without a profile: no model of an edge device is larger, and no card is filled."""
BENCH_TIMEOUT_S = 120.0
"""A large data file on a slow card; the arithmetic itself takes half a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Limits of the control groups that this process is in; None: no limit.

    Attributes:
        memory_bytes: memory.
        cpus: processors' worth of time.
        processors: how many processors may be used.
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    processors: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured without computing anything.

    Attributes:
        arch: as in profiles: "x86_64", "aarch64", "armv7l".
        cores: processors that this process may use.
        cpus: processors' worth of time, at most `cores`.
        memory_bytes: RAM or the container's limit, whichever is smaller.
        disk_free_bytes: where the state lies.
        runtimes: installed ones of RUNTIMES.
    """

    arch: str
    cores: int
    cpus: float
    memory_bytes: int
    disk_free_bytes: int
    runtimes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the child process found.

    Attributes:
        gflops: float32 matrix product of one thread; None if it could not be measured.
        families: what can be trained.
        samples, data: of the private file.
        fault: why the file cannot be used ("E_DATA: …"), "" if it can.
        warning: what is odd about it.
    """

    gflops: float | None = None
    families: tuple[str, ...] = ()
    samples: int = 0
    data: DataContract | None = None
    fault: str = ""
    warning: str = ""


# --- control groups ----------------------------------------------------------------------------


def group_limits(root: Path = CGROUP_ROOT, own: str | None = None) -> Group:
    """Return the tightest limits on the way from this process's group to the root.

    Args:
        root: where control groups are mounted.
        own: the text of /proc/self/cgroup; read if None.
    """
    text = _text(Path("/proc/self/cgroup")) if own is None else own
    memory: list[int] = []
    cpus: list[float] = []
    processors: list[int] = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",") if controllers else []
        for base in _mounts(root, names):
            for folder in _upwards(base, path):
                memory += _memory(folder)
                cpus += _cpus(folder)
                processors += _processors(folder)
    return Group(
        memory_bytes=min(memory, default=None),
        cpus=min(cpus, default=None),
        processors=min(processors, default=None),
    )


def _mounts(root: Path, controllers: list[str]) -> list[Path]:
    """Return the folders where the hierarchy with these controllers (none: version 2) may be mounted."""
    if not controllers:
        return [root, root / "unified"]
    return [root / name for name in dict.fromkeys((*controllers, ",".join(controllers)))]


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """Yield the group's folder and its parents up to `base` (in a container often `base` alone exists)."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for length in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


# --- machine -----------------------------------------------------------------------------------


def measure(state_dir: Path, group: Group | None = None) -> Machine:
    """Return what can be measured at once."""
    limits = group_limits() if group is None else group
    cores = len(os.sched_getaffinity(0))
    if limits.processors is not None:
        cores = min(cores, limits.processors)
    memory = psutil.virtual_memory().total
    return Machine(
        arch=os.uname().machine,
        cores=max(1, cores),
        cpus=min(cores, limits.cpus) if limits.cpus else float(cores),
        memory_bytes=min(memory, limits.memory_bytes or memory),
        disk_free_bytes=disk_free(state_dir),
        runtimes=tuple(name for name in RUNTIMES if find_spec(name) is not None),
    )


def disk_free(folder: Path) -> int:
    """Return the bytes that may still be written at a folder, or at what will be its parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return psutil.disk_usage(str(folder)).free


def temperature_c() -> float | None:
    """Return the hottest sensor, None where there is none."""
    read = getattr(psutil, "sensors_temperatures", None)
    try:
        sensors = read() if read is not None else {}
    except (OSError, RuntimeError, ValueError):
        return None
    values = [entry.current for entries in sensors.values() for entry in entries]
    return max((float(v) for v in values if v is not None and -100 <= v <= 300), default=None)


def battery() -> tuple[float | None, bool]:
    """Return (charge in percent or None, whether it is on mains)."""
    read = getattr(psutil, "sensors_battery", None)
    try:
        found = read() if read is not None else None
    except (OSError, RuntimeError, ValueError):
        found = None
    if found is None:
        return None, True
    return float(found.percent), found.power_plugged is not False


class LoadMeter:
    """Measures how many processors other programs use, between two calls."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def others(self, own: tuple[int, ...]) -> float | None:
        """Return the load by processes other than `own` since the last call; None at the first."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        mine = sum(_cpu_seconds(pid) for pid in own)
        now = time.monotonic()
        last, self._last = self._last, (now, busy - mine)
        if last is None or now - last[0] < 0.1:
            return None
        return max(0.0, (busy - mine - last[1]) / (now - last[0]))


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


# --- bench -------------------------------------------------------------------------------------


def bench(state_dir: Path, data: str | None, *, again: bool = False) -> Bench:
    """Return what the child process finds; kept per boot, version and state of the data file.

    Blocks for about a second. Never raises: what cannot be found out stays unknown.
    """
    cache = state_dir / "bench.json"
    name = _cache_name(data)
    kept = None if again else _read_cache(cache, name)
    found = kept if kept is not None else _run_bench(data)
    if kept is None and found:
        _write_cache(cache, {"for": name, "found": found})
    return _as_bench(found, data)


def _cache_name(data: str | None) -> str:
    boot = _text(Path("/proc/sys/kernel/random/boot_id")).strip()
    return json.dumps([boot, __version__, sys.version, *data_mark(data)])


def data_mark(data: str | None) -> tuple[str, int, int]:
    """Return something that changes when the data file changes."""
    try:
        found = Path(data or "").stat() if data else None
    except OSError:
        found = None
    return (data or "", found.st_mtime_ns if found else 0, found.st_size if found else 0)


def _read_cache(cache: Path, name: str) -> dict[str, Any] | None:
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(kept, dict) and kept.get("for") == name and isinstance(kept.get("found"), dict):
        found: dict[str, Any] = kept["found"]
        return found
    return None


def _write_cache(cache: Path, kept: dict[str, Any]) -> None:
    part = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        part.write_text(json.dumps(kept), encoding="utf-8")
        part.replace(cache)
    except OSError:
        part.unlink(missing_ok=True)


def _run_bench(data: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "liberatai_agent.children.bench", *(("--data", data) if data else ())]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=BENCH_TIMEOUT_S,
            check=False,
            env={**os.environ, **CHILD_ENVIRONMENT},
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_bench(found: dict[str, Any], data: str | None) -> Bench:
    about = found.get("data") or {}
    fault = about.get("fault", "")
    if data and not about:
        fault = f"E_DATA: {data}: could not be looked at (out of memory?)"
    contract = None
    if "input_shape" in about:
        contract = DataContract(input_shape=tuple(about["input_shape"]), classes=about["classes"])
    return Bench(
        gflops=found.get("gflops"),
        families=tuple(found.get("families", ())),
        samples=min(int(about.get("samples", 0)), MAX_SAMPLES),
        data=contract,
        fault=fault,
        warning=about.get("warning", ""),
    )


# --- capability --------------------------------------------------------------------------------


def tier_of(machine: Machine, memory_bytes: int, data: str | None) -> Tier:
    """Return what the machine can do with this much memory: nothing is trained without data."""
    if data is None:
        return "observe"
    if "torch" in machine.runtimes and memory_bytes >= FULL_MEMORY_BYTES:
        return "full"
    return "head" if "onnxruntime" in machine.runtimes else "observe"


def capability(
    config: AgentConfig,
    profile: Profile | None,
    machine: Machine,
    found: Bench,
    *,
    session: int,
    public_key: bytes,
    link: Announced = NOTHING,
    quota_spent: bool = False,
) -> Capability:
    """Return what the coordinator may count on: the smaller of measured and allowed, everywhere.

    Args:
        config: settings.
        profile: the hardware class, if one is set.
        machine: what was measured of it.
        found: what the child process found.
        session: number of this start.
        public_key: the device's.
        link: what was measured of the link.
        quota_spent: whether the link's quota of today is used up.
    """
    memory = _tightest(
        machine.memory_bytes,
        config.memory_mb * (1 << 20)
        if config.memory_mb is not None
        else (profile.memory_bytes if profile else None),
    )
    cpu_share = _tightest(
        machine.cpus,
        config.cpu_share if config.cpu_share is not None else (profile.cpu_share if profile else None),
    )
    storage = _tightest(
        machine.disk_free_bytes,
        config.storage_kb * 1024
        if config.storage_kb is not None
        else (profile.storage_bytes if profile else DEFAULT_STORAGE_BYTES),
    )
    net, wished = profile.net if profile else None, config.link
    up_promised, down_promised = promised_bits_s(config, profile)
    up, up_measured = _rate(link.up_bits_s, up_promised)
    down, _ = _rate(link.down_bits_s, down_promised)
    metered = wished.metered
    if metered is None:
        metered = wished.quota_bytes is not None or (net is not None and net.metered)
    return Capability(
        device=config.device,
        public_key=public_key,
        session=session,
        agent_version=__version__,
        tier=tier_of(machine, int(memory), config.data),
        profile=profile.id if profile else "",
        arch=machine.arch[:32],
        cores=machine.cores,
        cpu_share=cpu_share,
        memory_bytes=int(memory),
        storage_bytes=int(storage),
        disk_free_bytes=machine.disk_free_bytes,
        gflops=_slower(found.gflops, profile),
        up_bits_s=up,
        down_bits_s=down,
        metered=metered,
        samples=found.samples,
        data=found.data,
        families=found.families[:64],
        runtimes=machine.runtimes,
        codecs=CODECS,
        link_measured=up_measured,
        day_quota_bytes=wished.quota_bytes or 0,
        quota_spent=quota_spent,
    )


def _tightest(measured: float, allowed: float | None) -> float:
    return measured if allowed is None else min(measured, allowed)


def promised_bits_s(config: AgentConfig, profile: Profile | None) -> tuple[float | None, float | None]:
    """Return what settings or profile say of uplink and downlink, bit/s; None where they say nothing."""
    net, wished = profile.net if profile else None, config.link
    up = wished.up_mbit or (net.up_mbit if net else None)
    down = wished.down_mbit or (net.down_mbit if net else None)
    return None if up is None else up * 1e6, None if down is None else down * 1e6


def _rate(measured_bits_s: float | None, allowed: float | None) -> tuple[float | None, bool]:
    """Return the rate that counts, bit/s, and whether it is the measured one."""
    if measured_bits_s is None or (allowed is not None and allowed < measured_bits_s):
        return allowed, False
    return measured_bits_s, True


def _slower(measured: float | None, profile: Profile | None) -> float | None:
    """Return the smaller of measured and profile: a profile on a faster machine simulates its class."""
    if profile is None:
        return measured
    return profile.gflops if measured is None else min(measured, profile.gflops)
