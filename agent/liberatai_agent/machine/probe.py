"""What can this machine do? Measured, bounded by its container, its profile and its settings.

psutil reports the host even inside a container, so control groups are read too. What cannot be read stays
unknown. No runtime is imported to find out whether it is there.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil

from liberatai_agent.children import control_groups, start
from liberatai_agent.children.control_groups import Group
from liberatai_agent.config import AgentConfig
from liberatai_agent.events import Tier
from liberatai_agent.exchange.link_estimate import NOTHING, Announced
from liberatai_agent.store.files import replace_quickly
from liberatai_core import __version__, processes
from liberatai_core.contract.limits import MAX_SAMPLES
from liberatai_core.contract.messages import SPARSE_METHODS, Capability
from liberatai_core.profile import HEAD_BYTES, Profile, trainers
from liberatai_core.structure import DataContract

Value = TypeVar("Value")
MODEMS = ("wwan", "wwp", "rmnet", "ppp")
"""How the kernel names network devices of mobile modems."""
RUNTIMES = ("torch", "onnxruntime", "numpy")
DEFAULT_STORAGE_BYTES = 256 << 20
"""For a machine without a profile: no model of an edge device is larger, and no card is filled."""
BENCH_TIMEOUT_S = 120.0
"""A large data file on a slow card; the arithmetic itself takes half a second."""

MAX_ANSWER_BYTES = 1 << 16
"""What the bench says: some hundred bytes, and what a pipe holds."""


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


# --- machine -----------------------------------------------------------------------------------


def measure(state_dir: Path, group: Group | None = None) -> Machine:
    """Return what can be measured at once."""
    limits = control_groups.limits() if group is None else group
    cores = len(os.sched_getaffinity(0))
    if limits.processors is not None:
        cores = min(cores, limits.processors)
    memory = memory_total()
    return Machine(
        arch=os.uname().machine,
        cores=max(1, cores),
        cpus=min(cores, limits.cpus) if limits.cpus else float(cores),
        memory_bytes=min(memory, limits.memory_bytes or memory),
        disk_free_bytes=disk_free(state_dir),
        runtimes=tuple(name for name in RUNTIMES if find_spec(name) is not None),
    )


def known(read: Callable[[], Value]) -> Value | None:
    """Return a value of the machine, None if it cannot be read: /proc may be hidden, sensors lie."""
    try:
        return read()
    except Exception:  # noqa: BLE001 - psutil lets through whatever it meets in /proc and /sys
        return None


def memory_total() -> int:
    """Return the machine's memory in bytes."""
    found = known(lambda: psutil.virtual_memory().total)
    return found if found is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_available() -> int | None:
    """Return the bytes that programs can still get here, in this container if it is one."""
    found = (known(lambda: psutil.virtual_memory().available), control_groups.memory_available())
    return min((value for value in found if value is not None), default=None)


def rss(pid: int | None = None) -> int | None:
    """Return the bytes of memory that a process holds, this one's if no id is given."""
    return known(lambda: psutil.Process(pid).memory_info().rss)


def cpu_percent() -> float | None:
    """Return the load of all processors since the last call, 0 … 100."""
    return known(lambda: float(psutil.cpu_percent(None)))


def disk_free(folder: Path) -> int:
    """Return the bytes that may still be written at a folder, or at what will be its parent."""
    while not known(folder.exists) and folder != folder.parent:
        folder = folder.parent
    return known(lambda: psutil.disk_usage(str(folder)).free) or 0


def temperature_c() -> float | None:
    """Return the hottest sensor, None where there is none."""
    read = getattr(psutil, "sensors_temperatures", dict)
    sensors = known(read) or {}
    values = [entry.current for entries in sensors.values() for entry in entries]
    return max((float(v) for v in values if v is not None and -100 <= v <= 300), default=None)


def battery() -> tuple[float | None, bool]:
    """Return (charge in percent or None, whether it is on mains)."""
    found = known(getattr(psutil, "sensors_battery", lambda: None))
    if found is None:
        return None, True
    return known(lambda: float(found.percent)), found.power_plugged is not False


class LoadMeter:
    """Measures how many processors other programs use, between two calls."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def others(self, own: tuple[int, ...]) -> float | None:
        """Return the load by other processes than `own` since the last call; None: unknown, or the first.

        In a container it is the container's load. Children that ended and were waited for belong to `own`:
        what a training took must not look like somebody else's work once it is over.
        """
        busy = known(_busy_seconds)
        if busy is None:
            self._last = None
            return None
        other, now = busy - sum(_cpu_seconds(pid) for pid in own), time.monotonic()
        last, self._last = self._last, (now, other)
        if last is None or now - last[0] < 0.1:
            return None
        return max(0.0, (other - last[1]) / (now - last[0]))


def _busy_seconds() -> float:
    inside = control_groups.cpu_seconds()
    if inside is not None:
        return inside
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _cpu_seconds(pid: int) -> float:
    times = known(lambda: psutil.Process(pid).cpu_times())
    if times is None:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


# --- bench -------------------------------------------------------------------------------------


def bench(state_dir: Path, data: str | None, *, again: bool = False) -> Bench:
    """Return what the child process finds; kept per boot, version and state of the data file.

    Blocks for about a second. Never raises: what cannot be found out stays unknown.
    """
    kept = None if again else kept_bench(state_dir, data)
    return asyncio.run(new_bench(state_dir, data)) if kept is None else kept


def kept_bench(state_dir: Path, data: str | None) -> Bench | None:
    """Return what an earlier look found, None if it says nothing about now."""
    found = _read_cache(state_dir / "bench.json", _cache_name(data))
    return None if found is None else _as_bench(found, data)


async def new_bench(state_dir: Path, data: str | None) -> Bench:
    """Return what the child process finds now, and keep it. It is killed when this is cancelled."""
    name = _cache_name(data)
    found = await _run_bench(state_dir, data)
    if found:
        _write_cache(state_dir / "bench.json", {"for": name, "found": found})
    return _as_bench(found, data)


async def look_at_data(data: str) -> Bench:
    """Return what a file of data holds, or its fault; nothing is kept, and nothing measured."""
    return _as_bench(await _run_bench(None, data, "--no-arithmetic"), data)


def _cache_name(data: str | None) -> str:
    boot = known(lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")) or ""
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
    with contextlib.suppress(OSError):
        replace_quickly(cache, json.dumps(kept).encode())


async def _run_bench(state_dir: Path | None, data: str | None, *options: str) -> dict[str, Any]:
    """Return what the child process says on a pipe of its own; what it prints goes to the log."""
    source, sink = os.pipe()
    folder = start.fresh_folder(state_dir if state_dir and known(state_dir.is_dir) else None, "bench")
    given = () if data is None else ("--data", str(Path.cwd() / data))
    ours = ("--answer", str(sink), "--parent", str(os.getpid()))
    command = processes.command("liberatai_agent.children.bench", *options, *ours, *given)
    try:
        await _run_to_its_end(command, sink, folder)
        os.set_blocking(source, False)
        found = json.loads(os.read(source, MAX_ANSWER_BYTES))
    except (OSError, ValueError):
        return {}
    finally:
        os.close(source)
        os.close(sink)
    return found if isinstance(found, dict) else {}


async def _run_to_its_end(command: list[str], sink: int, folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=start.LOG,
        pass_fds=(sink,),
        cwd=folder,
        env=start.environment(folder),
    )
    try:
        async with asyncio.timeout(BENCH_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        return
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


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
    if trainers(machine.runtimes, memory_bytes):
        return "full"
    light = {"onnxruntime", "numpy"} & set(machine.runtimes)
    return "head" if light and memory_bytes >= HEAD_BYTES else "observe"


def is_metered(config: AgentConfig, profile: Profile | None) -> bool:
    """Whether traffic costs money: by the settings, else by a quota, the profile, or a modem in use."""
    if config.link.metered is not None:
        return config.link.metered
    by_profile = profile is not None and profile.net is not None and profile.net.metered
    return config.link.quota_bytes is not None or by_profile or uses_modem()


def uses_modem(routes: Path = Path("/proc/net/route")) -> bool:
    """Whether the default route goes through a mobile modem, by the kernel's names of those."""
    with contextlib.suppress(OSError):
        lines = routes.read_text(encoding="ascii", errors="replace").splitlines()[1:]
        fields = [line.split() for line in lines]
        return any(len(f) > 1 and f[1] == "00000000" and f[0].startswith(MODEMS) for f in fields)
    return False


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
    held_bytes: int = 0,
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
        held_bytes: what files of models take now: they make room for the next ones.
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
    reserve = int((config.gate.min_free_disk_mb or 0) * (1 << 20))
    storage = _tightest(
        max(0, machine.disk_free_bytes + held_bytes - reserve),
        config.storage_kb * 1024
        if config.storage_kb is not None
        else (profile.storage_bytes if profile else DEFAULT_STORAGE_BYTES),
    )
    up_promised, down_promised = promised_bits_s(config, profile)
    up, up_measured = _rate(link.up_bits_s, up_promised)
    down, _ = _rate(link.down_bits_s, down_promised)
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
        metered=is_metered(config, profile),
        samples=found.samples,
        data=found.data,
        families=found.families[:64],
        runtimes=machine.runtimes,
        codecs=SPARSE_METHODS,
        link_measured=up_measured,
        day_quota_bytes=config.link.quota_bytes or 0,
        quota_spent=quota_spent,
        telemetry_s=config.telemetry_s,
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
