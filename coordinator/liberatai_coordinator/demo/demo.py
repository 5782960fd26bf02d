"""`liberatai demo`: unlike devices on this machine train one model, and a report shows how it went.

The demo itself is an operator: it sees the coordinator through its API only. It alone has the test set.
"""

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from liberatai_coordinator.client.views import DeviceView, JobView
from liberatai_coordinator.demo.examiner import Examiner
from liberatai_coordinator.demo.outcome import Outcome, report_of
from liberatai_coordinator.demo.screen import Screen, published
from liberatai_coordinator.demo.world import Options, World, prepare
from liberatai_coordinator.local import LocalFleet, wait
from liberatai_coordinator.pictures import report
from liberatai_coordinator.pictures.report import Report, percent, size
from liberatai_core.errors import ConfigError, LiberataiError, TrainingError

GIVE_UP: Final = 2
"""Abandoned rounds in a row: on one machine that is a fault, not bad luck."""
DEFAULT_REPORT: Final = Path("demo-report")


def run(
    *,
    devices: int = 8,
    rounds: int = 12,
    seed: int = 0,
    broker: str = "auto",
    report: Path | None = None,
    keep: bool = False,
    console: Console | None = None,
) -> int:
    """Run the demo and return the exit code: 0 done, 1 failed, 2 wrong options, 130 stopped by Ctrl-C.

    Args:
        devices: agents, 1 … 40.
        rounds: of the job, 1 … 1000.
        seed: of the split, the weights and the training.
        broker: "auto", "mosquitto", "amqtt" or the URL of a broker that runs already.
        report: folder for report.html and report.json; None: ./demo-report.
        keep: leave the folder with all settings, states and logs.
        console: where to show it; None: standard output.
    """
    started_s = time.perf_counter()
    shown = console or Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="liberatai-demo-"))
    options = Options(
        devices=devices, rounds=rounds, seed=seed, broker=broker, report=report or DEFAULT_REPORT
    )
    try:
        _require_folder(options.report)
        with _sigterm_as_interrupt():
            _run(options, folder, shown, started_s, keep=keep)
    except KeyboardInterrupt:
        shown.print("Stopped. Every process of the demo has ended.")
        return 130
    except ConfigError as error:
        for fault in error.faults:
            shown.print(f"[red]error:[/] {escape(error.where)}: {escape(fault)}", soft_wrap=True)
        return 2
    except (LiberataiError, OSError) as error:
        shown.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    finally:
        if keep:
            shown.print(f"Settings, states and logs: {folder}", soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _require_folder(report: Path) -> None:
    if report.exists() and not report.is_dir():
        raise ConfigError("--report", [f"{report} is a file; give a folder"])


def _run(options: Options, folder: Path, console: Console, started_s: float, *, keep: bool) -> None:
    world = prepare(options, folder)
    examiner = Examiner(world.test, world.job.data)
    fleet = LocalFleet(folder, world.devices, broker=options.broker)
    try:
        with fleet:
            _say_what_runs(console, fleet, world, folder if keep else None)
            examiner.connect(fleet.folders.socket)
            job = _watch(console, fleet, world, examiner)
            plan = fleet.client.plan(world.job.name)
            ensemble = fleet.client.models.ensemble(world.job.name)
            versions = sorted(fleet.client.models.log(world.job.name), key=lambda row: row.version)
            protocol = str(fleet.client.health().get("protocol", ""))
        # Stopped: the agents have written their last counters, and the processors are free.
        evaluated = examiner.all()
        last = evaluated[max(evaluated)]
        largest = max(last.structures.values(), key=lambda structure: structure.parameters)
        outcome = Outcome(
            job=job,
            plan=plan,
            protocol=protocol,
            evaluated=evaluated,
            version_ids=tuple(row.id for row in versions),
            ensemble=ensemble,
            largest=largest,
            baseline=examiner.centralised(largest, world.job, world.pooled),
        )
    finally:
        examiner.close()
    summary = report_of(options, world, fleet, outcome, started_s)
    page, record = report.write(summary, options.report)
    _say_what_came_out(console, summary, page, record)


def _say_what_runs(console: Console, fleet: LocalFleet, world: World, kept: Path | None) -> None:
    processes = len(world.devices) + 1 + (fleet.broker is not None)
    lost = fleet.broker_lost
    console.print(
        f"[bold]{len(world.devices)} devices[/], 1 coordinator, broker [bold]{escape(fleet.broker_name)}[/]: "
        f"{processes} processes on this machine.",
        soft_wrap=True,
    )
    console.print(f"Lost with this broker: {escape(lost or 'nothing')}.", style="dim", soft_wrap=True)
    console.print(
        f"Digits: {sum(map(len, world.parts.devices))} private, {len(world.parts.unlabeled)} public without "
        f"labels, {len(world.parts.validation)} with the operator (guard only), {len(world.parts.test)} that "
        "only the report sees.",
        style="dim",
        soft_wrap=True,
    )
    if kept is not None:
        console.print(f"Job: {kept / 'job.yaml'}", style="dim", soft_wrap=True)


def _watch(console: Console, fleet: LocalFleet, world: World, examiner: Examiner) -> JobView:
    """Create the job and show it until it ends."""
    name = world.job.name
    fleet.client.jobs.create(world.text, str(fleet.folders.root / "data"))
    screen = Screen(console)
    with screen:

        def look(job: JobView) -> None:
            for version in range(1, len(published(job)) + 1):
                examiner.submit(name, version)
            devices = fleet.client.devices.list()
            screen.show(job, devices, examiner.finished())
            _require_progress(job, devices)

        job = wait(fleet, name, look)
        screen.show(job, fleet.client.devices.list(), examiner.all())
    return job


def _require_progress(job: JobView, devices: Sequence[DeviceView]) -> None:
    """Raise TrainingError with the devices' reasons when nothing but abandoned rounds follow each other."""
    last = job.rounds[-GIVE_UP:]
    if len(last) == GIVE_UP and all(row.state == "abandoned" for row in last):
        reasons = {f"{device.id}: {device.reason}" for device in devices if device.reason}
        raise TrainingError(f"{GIVE_UP} rounds abandoned: {'; '.join(sorted(reasons)) or last[-1].reason}")


def _say_what_came_out(console: Console, summary: Report, page: Path, record: Path) -> None:
    table = Table(title="On digits that nobody trained on", title_justify="left", box=None, pad_edge=False)
    for title in ("structure", "parameters", "devices", "accuracy"):
        table.add_column(title, justify="left" if title == "structure" else "right", header_style="dim")
    for row in sorted(summary.structures, key=lambda row: -row.parameters):
        table.add_row(row.id, f"{row.parameters:,}", str(row.devices), percent(summary.final[row.id]))
    table.add_row(*(Text(cell, "bold") for cell in ("ensemble", "", "", percent(summary.final["ensemble"]))))
    table.add_row("all data in one place", "", "", percent(summary.final["centralised"]), style="dim")
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"[bold]{summary.ratio:.0f} times less traffic[/] than dense FedAvg: {size(summary.total_bytes)}, "
        f"not {size(summary.dense_bytes)}. {summary.orchestration_s_median:.2f} s in the median round "
        f"besides training and teaching; {summary.seconds_total:.0f} s in all.",
        soft_wrap=True,
    )
    console.print(f"Report: [bold]{escape(str(page))}[/] (figures: {escape(str(record))})", soft_wrap=True)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the demo as Ctrl-C does, so that it stops what it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
