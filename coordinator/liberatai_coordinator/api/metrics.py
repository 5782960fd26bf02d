"""What the coordinator counts, in the form that Prometheus reads.

Everything is looked up when it is asked for: nothing counts on the way of a message. Names follow the rules
of Prometheus: base units, `_total` for what only grows. Series per device end at 1000 devices, because a
scrape of more is slow for both sides; sums are always there.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import JobSummary
from liberatai_coordinator.fleet.devices import Device

MAX_DEVICES: Final = 1000
"""With more there are no series per device."""
MAX_JOBS: Final = 200
"""The newest ones have series of their own."""
DEVICE_STATES: Final = ("online", "draining", "offline", "lost", "unknown")
DEVICE_STATUSES: Final = ("pending", "approved", "quarantined")
JOB_STATES: Final = ("waiting", "running", "paused", "finished", "aborted", "failed")
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The coordinator in one moment: taken on the event loop, written out beside it.

    Attributes:
        fleet: its name.
        epoch: of the coordinator.
        connected: whether there is a broker.
        faults: what speaks against serving, in words.
        started_s: Unix seconds of its start.
        ready: devices that may be asked.
        devices: all of them; values, which nobody changes.
        refusals: code -> number, of all devices.
        jobs: the newest last.
        state_dir: where its state lies.
    """

    fleet: str
    epoch: int
    connected: bool
    faults: tuple[str, ...]
    started_s: float
    ready: int
    devices: tuple[Device, ...]
    refusals: dict[str, int]
    jobs: Sequence[JobSummary]
    state_dir: Path


async def seen(operations: Operations) -> Seen:
    """Return the coordinator as it is now."""
    service = operations.service
    jobs = await operations.jobs.list()
    refusals: Counter[str] = Counter()
    for counts in service.ledger.refusals.all().values():
        refusals.update(counts)
    return Seen(
        fleet=service.config.fleet,
        epoch=service.ledger.epoch,
        connected=bool(service.connected),
        faults=operations.faults(),
        started_s=service.started_s,
        ready=len(service.fleet.ready_names),
        devices=tuple(service.fleet.devices.values()),
        refusals=dict(refusals),
        jobs=jobs,
        state_dir=Path(service.config.state_dir),
    )


async def exposed(operations: Operations) -> bytes:
    """Return all metrics as text; the loop goes on while it is written."""
    return await asyncio.to_thread(text, await seen(operations))


def text(what: Seen) -> bytes:
    """Return what was seen in Prometheus' text form, with what the process itself takes."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Once(what))
    return generate_latest(registry)


class _Once(Collector):
    """Gives what was seen in one moment."""

    def __init__(self, what: Seen) -> None:
        self._what = what

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from _coordinator(self._what)
        yield from _devices(self._what.devices, self._what.ready)
        yield from _jobs(self._what.jobs)
        yield _by_label("refusals", "Messages that were refused.", "code", self._what.refusals, counts=True)
        if len(self._what.devices) <= MAX_DEVICES:
            yield from _each_device(self._what.devices)


def _coordinator(what: Seen) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        "liberatai_build_info", "The program and its fleet; always 1.", labels=("version", "fleet")
    )
    build.add_metric((_version(), what.fleet), 1)
    yield build
    yield _gauge("start_time_seconds", "When the coordinator started, in Unix seconds.", what.started_s)
    yield _gauge("epoch", "Generation of the coordinator; grows with every start.", what.epoch)
    yield _gauge("broker_connected", "Whether the coordinator is connected to its broker.", what.connected)
    yield _gauge("ready", "Whether nothing speaks against serving devices.", not what.faults)
    ledger = [what.state_dir / name for name in ("ledger.db", "ledger.db-wal")]
    yield _gauge("ledger_bytes", "Size of the ledger on disk, with its log.", sum(map(_size, ledger)))
    try:
        disk = shutil.disk_usage(what.state_dir)
    except OSError:
        return  # the ledger's own complaints are in the log
    yield _gauge("disk_free_bytes", "Free space where the state lies.", disk.free)
    yield _gauge("disk_size_bytes", "Size of the disk where the state lies.", disk.total)


def _devices(devices: Sequence[Device], ready: int) -> Iterator[Metric]:
    states = Counter[str](device.state for device in devices)
    statuses = Counter[str](device.status for device in devices)
    phases = Counter[str](
        device.report.phase for device in devices if device.online and device.report is not None
    )
    yield _by_label(
        "devices", "Devices by what they are believed to be.", "state", _all(DEVICE_STATES, states)
    )
    yield _by_label(
        "devices_by_status",
        "Devices by what operators said of them.",
        "status",
        _all(DEVICE_STATUSES, statuses),
    )
    yield _by_label("devices_by_phase", "Devices that are online, by what they do.", "phase", phases)
    yield _gauge("devices_ready", "Devices that may be given a task.", ready)
    moved = CounterMetricFamily(
        "liberatai_device_traffic_bytes",
        "Bytes that all devices' connections moved, by their own word.",
        labels=("direction",),
    )
    moved.add_metric(("sent",), sum(device.traffic.sent_bytes for device in devices))
    moved.add_metric(("received",), sum(device.traffic.received_bytes for device in devices))
    yield moved
    yield _counter("updates", "Updates that were stored.", sum(device.updates for device in devices))
    yield _gauge("devices_cloned", "Keys that two machines seem to use.", sum(d.cloned for d in devices))


def _jobs(jobs: Sequence[JobSummary]) -> Iterator[Metric]:
    states = Counter[str](job.state for job in jobs)
    yield _by_label("jobs", "Jobs by state.", "state", _all(JOB_STATES, states))
    done = GaugeMetricFamily("liberatai_job_rounds_done", "Rounds that made a version.", labels=("job",))
    total = GaugeMetricFamily("liberatai_job_rounds", "Rounds that the job shall have.", labels=("job",))
    waits = GaugeMetricFamily(
        "liberatai_job_waits", "Whether a job that runs opens no round; its reason says why.", labels=("job",)
    )
    newest = GaugeMetricFamily("liberatai_job_version", "Newest version of the job's model.", labels=("job",))
    for job in jobs[-MAX_JOBS:]:
        done.add_metric((job.name,), job.rounds_done)
        total.add_metric((job.name,), job.rounds_total)
        waits.add_metric((job.name,), job.state in ("waiting", "running") and bool(job.reason))
        newest.add_metric((job.name,), job.version)
    yield from (done, total, waits, newest)


def _each_device(devices: Sequence[Device]) -> Iterator[Metric]:
    online = GaugeMetricFamily("liberatai_device_online", "Whether it is there.", labels=("device",))
    last = GaugeMetricFamily(
        "liberatai_device_last_seen_seconds", "Its last sign of life, in Unix seconds.", labels=("device",)
    )
    updates = CounterMetricFamily(
        "liberatai_device_updates", "Updates of it that were stored.", labels=("device",)
    )
    for device in devices:
        online.add_metric((device.id,), device.online)
        last.add_metric((device.id,), device.last_seen_s)
        updates.add_metric((device.id,), device.updates)
    yield from (online, last, updates)


# --- parts -------------------------------------------------------------------------------------------


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"liberatai_{name}", words, value=float(value))


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"liberatai_{name}", words, value=float(value))


def _by_label(name: str, words: str, label: str, values: dict[str, int], *, counts: bool = False) -> Metric:
    kind = CounterMetricFamily if counts else GaugeMetricFamily
    found = kind(f"liberatai_{name}", words, labels=(label,))
    for key, value in sorted(values.items()):
        found.add_metric((key,), value)
    return found


def _all(names: Sequence[str], found: "Counter[str]") -> dict[str, int]:
    """Return every name with its number: a series that comes and goes breaks alerts."""
    return {**dict.fromkeys(names, 0), **found}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _version() -> str:
    try:
        return version("liberatai")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
