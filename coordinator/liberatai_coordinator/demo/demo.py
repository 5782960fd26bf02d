"""`liberatai demo`: unlike devices on this machine train one model, and a report shows how it went.

The demo itself is an operator: it sees the coordinator through its API only. It alone has the test set.
"""

import importlib.metadata
import os
import platform
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import DeviceView, EnsembleView, JobView, PlanView, RoundView, newest
from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.demo import digits
from liberatai_coordinator.local import LocalDevice, LocalFleet, wait
from liberatai_coordinator.models.ensembles import Ensemble
from liberatai_coordinator.pictures import report
from liberatai_coordinator.pictures.report import DeviceLine, Report, RoundLine, StructureRow, percent, size
from liberatai_core.aggregator import ensemble as pooling
from liberatai_core.errors import ConfigError, LiberataiError, LinkError, MissingExtraError, TrainingError
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import from_bytes

PROFILES: Final = ("demo-nuc", "demo-jetson-nano", "demo-pi4", "demo-pi-zero-2w")
"""Dealt out in turn, the most capable first."""
TEMPLATES: Final = Path(__file__).parent / "templates"
PROFILES_DIR: Final = TEMPLATES / "profiles"
MAX_ROUNDS: Final = 1000
SHOWN_ROUNDS: Final = 6
GIVE_UP: Final = 2
"""Abandoned rounds in a row: on one machine that is a fault, not bad luck."""
DEFAULT_REPORT: Final = Path("demo-report")
PACKAGES: Final = ("liberatai", "torch", "numpy", "paho-mqtt", "msgspec")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for; see `run`."""

    devices: int
    rounds: int
    seed: int
    broker: str
    report: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """What the demo made up: data, job and devices.

    Attributes:
        text: the job's YAML.
    """

    samples: digits.Samples
    parts: digits.Split
    devices: tuple[LocalDevice, ...]
    job: JobSpec
    text: str

    @property
    def test(self) -> digits.Samples:
        """The digits that only the report sees."""
        return self.samples.pick(self.parts.test)

    @property
    def pooled(self) -> digits.Samples:
        """All private digits in one place: what the devices avoid, and the baseline."""
        return self.samples.pick(np.concatenate(self.parts.devices))


def prepare(options: Options, folder: Path) -> World:
    """Split the digits, write every file and the job's YAML into a folder.

    Raises:
        ConfigError: options that the demo cannot serve.
    """
    faults = []
    if not 1 <= options.rounds <= MAX_ROUNDS:
        faults.append(f"--rounds: must be from 1 to {MAX_ROUNDS} (got {options.rounds})")
    if not 0 <= options.seed < 2**31:
        faults.append(f"--seed: must be from 0 to {2**31 - 1} (got {options.seed})")
    if faults:
        raise ConfigError("demo", faults)
    samples = digits.load()
    parts = digits.split(samples.y, options.devices, options.seed)
    profiles = [PROFILES[place % len(PROFILES)] for place in range(options.devices)]
    names = [f"{profile.removeprefix('demo-')}-{place + 1}" for place, profile in enumerate(profiles)]
    files = digits.write(samples, parts, folder / "data", names)
    text = _job_text(options, folder / "data")
    (folder / "job.yaml").write_text(text, encoding="utf-8")
    return World(
        samples=samples,
        parts=parts,
        devices=tuple(
            LocalDevice(id=name, data=files[name], profile=PROFILES_DIR / f"{profile}.yaml")
            for name, profile in zip(names, profiles, strict=True)
        ),
        job=parse_job(text, "job.yaml"),
        text=text,
    )


# --- the test set ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """What one version reaches on the test set: accuracy by structure and "ensemble"; its structures."""

    accuracy: dict[str, float]
    structures: dict[str, Structure]


class Examiner:
    """Holds the test set, and evaluates versions in a thread of its own so that the run does not wait."""

    def __init__(self, test: digits.Samples, data: DataContract) -> None:
        self._test, self._data = test, data
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="examiner")
        self._results: dict[int, Future[Evaluated]] = {}
        self._client: Client | None = None
        self._pool.submit(_import_torch, data)  # two seconds, while the fleet starts

    def connect(self, socket: Path) -> None:
        """Say where the coordinator answers: a client serves one thread, so this one has its own."""
        self._client = Client(socket)

    def submit(self, model: str, version: int) -> None:
        """Evaluate a version some time soon; saying so twice does nothing more."""
        if version not in self._results:
            self._results[version] = self._pool.submit(self._evaluate, model, version)

    def finished(self) -> dict[int, Evaluated]:
        """Return what is known already, by version; raises what an evaluation raised."""
        return {version: task.result() for version, task in self._results.items() if task.done()}

    def all(self) -> dict[int, Evaluated]:
        """Wait for everything that was submitted, and return it by version."""
        return {version: task.result() for version, task in self._results.items()}

    def centralised(self, structure: Structure, job: JobSpec, pooled: digits.Samples) -> float:
        """Return what this structure reaches when all private data lies in one place, in the same epochs."""
        return self._pool.submit(_centralised, structure, job, pooled, self._test).result()

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _evaluate(self, model: str, version: int) -> Evaluated:
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        if self._client is None:
            raise LinkError("the demo is not connected to its coordinator")
        how = self._client.models.ensemble(model, str(version))
        structures: dict[str, Structure] = {}
        outputs: dict[str, NDArray[np.float32]] = {}
        for name in how.members:
            structures[name], _, content = self._client.models.weights(model, str(version), name)
            outputs[name] = log_probabilities(structures[name], self._data, from_bytes(content), self._test.x)
        accuracy = {name: pooling.accuracy(output, self._test.y) for name, output in outputs.items()}
        accuracy["ensemble"] = pooling.accuracy(_combined(how, outputs), self._test.y)
        return Evaluated(accuracy=accuracy, structures=structures)


def _combined(how: EnsembleView, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the ensemble's log-probabilities: the pool, or the structure that the guard fell back to."""
    ensemble = msgspec.convert(msgspec.structs.asdict(how), Ensemble)
    return ensemble.combine(np.stack([outputs[name] for name in how.members]))


def _centralised(structure: Structure, job: JobSpec, pooled: digits.Samples, test: digits.Samples) -> float:
    from liberatai_core.learning.families import initial_weights  # noqa: PLC0415 - imports torch
    from liberatai_core.learning.training import (  # noqa: PLC0415 - imports torch
        TrainSettings,
        log_probabilities,
        train,
    )

    given = {name: getattr(job.training, name) for name in TrainSettings.__struct_fields__}
    settings = TrainSettings(**(given | {"epochs": job.training.epochs * job.rounds.count}))
    start = initial_weights(structure, job.data, job.seed)
    trained = train(structure, job.data, start, pooled.x, pooled.y, settings, job.seed)
    return pooling.accuracy(log_probabilities(structure, job.data, trained.weights, test.x), test.y)


def _import_torch(data: DataContract) -> None:
    """Let torch be imported where it is needed first: by building the smallest model."""
    from liberatai_core.learning.families import structure_of  # noqa: PLC0415 - imports torch

    structure_of("mlp", {"hidden": 1}, data)


# --- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a finished run left behind.

    Attributes:
        protocol: what coordinator and broker spoke.
        evaluated: by version, 1 …
        version_ids: of the model, oldest first.
        ensemble: of the newest version.
        largest: the structure that the baseline was trained with.
        baseline: its accuracy with all data in one place.
    """

    job: JobView
    plan: PlanView
    protocol: str
    evaluated: Mapping[int, Evaluated]
    version_ids: tuple[str, ...]
    ensemble: EnsembleView
    largest: Structure
    baseline: float


def _run(options: Options, folder: Path, console: Console, started_s: float, *, keep: bool) -> None:
    world = prepare(options, folder)
    examiner = Examiner(world.test, world.job.data)
    fleet = LocalFleet(folder, world.devices, broker=options.broker)
    try:
        with fleet:
            _say_what_runs(console, fleet, world, folder if keep else None)
            examiner.connect(fleet.socket)
            job = _watch(console, fleet, world, examiner)
            plan = fleet.client.plan(world.job.name)
            ensemble = fleet.client.models.ensemble(world.job.name)
            versions = sorted(fleet.client.models.log(world.job.name), key=lambda row: row.version)
            protocol = fleet.protocol
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
    made = _report(options, world, fleet, outcome, started_s)
    page, record = report.write(made, options.report)
    _say_what_came_out(console, made, page, record)


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
    fleet.client.jobs.create(world.text, str(fleet.folder / "data"))
    screen = Screen(console, world)
    with screen:

        def look(job: JobView) -> None:
            for version in range(1, len(_published(job)) + 1):
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


def _published(job: JobView) -> list[RoundView]:
    """Return the rounds that made a version, in order: the n-th made version n."""
    return [row for row in job.rounds if row.state == "published"]


# --- the screen ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Screen:
    """A live picture on a terminal, one line per round elsewhere."""

    console: Console
    world: World
    _live: Live | None = None
    _said: int = 0
    _told: set[str] = field(default_factory=set)
    _started_s: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, job: JobView, devices: Sequence[DeviceView], evaluated: Mapping[int, Evaluated]) -> None:
        """Show the newest state."""
        if self._live is not None:
            self._live.update(self._picture(job, devices, evaluated))
            return
        published = _published(job)
        while self._said < len(published) and self._said + 1 in evaluated:
            row = published[self._said]
            self._said += 1
            self.console.print(_line(row, job.rounds_total, evaluated[self._said]), soft_wrap=True)
        for trouble in _troubles(job, devices):
            if trouble not in self._told:
                self._told.add(trouble)
                self.console.print(escape(trouble), style="yellow", soft_wrap=True)

    def _picture(
        self, job: JobView, devices: Sequence[DeviceView], evaluated: Mapping[int, Evaluated]
    ) -> Group:
        published = _published(job)
        carried = sum(row.up_bytes + row.down_bytes for row in published)
        seconds = time.perf_counter() - self._started_s
        head = Text.assemble(
            ("LiberatAI demo  ", "bold"),
            f"round {min(len(published) + 1, job.rounds_total)} of {job.rounds_total}, {job.state}   ",
            (f"{seconds:.0f} s   {size(carried)} on the wire", "dim"),
        )
        troubles = [Text(trouble, "yellow") for trouble in _troubles(job, devices)[-3:]]
        return Group(head, _device_table(devices), _round_table(published, evaluated), *troubles)


def _troubles(job: JobView, devices: Sequence[DeviceView]) -> list[str]:
    """Return what went wrong, one line each."""
    failed = [f"{d.id} failed in round {d.round}: {d.reason}" for d in devices if d.phase == "failed"]
    return failed + [f"round {r.round} abandoned: {r.reason}" for r in job.rounds if r.state == "abandoned"]


def _device_table(devices: Sequence[DeviceView]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("device", "structure", "doing", "samples"):
        table.add_column(title, justify="right" if title == "samples" else "left", header_style="dim")
    for device in devices:
        doing = device.phase or device.state
        style = {"training": "green", "failed": "red", "lost": "red"}.get(doing, "dim")
        table.add_row(device.id, device.structure or "-", Text(doing, style), str(device.samples))
    return table


def _round_table(published: Sequence[RoundView], evaluated: Mapping[int, Evaluated]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = sorted({name for found in evaluated.values() for name in found.accuracy} - {"ensemble"})
    for title in ("round", "s", "carried", *names, "ensemble"):  # fits 80 columns
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)
    first = max(0, len(published) - SHOWN_ROUNDS)
    for version, row in enumerate(published[first:], start=first + 1):
        accuracy = evaluated[version].accuracy if version in evaluated else {}
        shown = [percent(accuracy[name]) if name in accuracy else "…" for name in (*names, "ensemble")]
        table.add_row(
            str(row.round),
            f"{row.seconds:.1f}",
            size(row.up_bytes + row.down_bytes),
            *shown[:-1],
            Text(shown[-1], "bold"),
        )
    return table


def _line(row: RoundView, total: int, evaluated: Evaluated) -> str:
    members = ", ".join(
        f"{name} {percent(share)}" for name, share in sorted(evaluated.accuracy.items()) if name != "ensemble"
    )
    return (
        f"round {row.round:>2}/{total}  {row.seconds:4.1f} s  {row.updates}/{row.invited} updates  "
        f"up {size(row.up_bytes)}  down {size(row.down_bytes)}  "
        f"ensemble {percent(evaluated.accuracy['ensemble'])}  ({members})"
    )


# --- the result ------------------------------------------------------------------------------------


def _report(options: Options, world: World, fleet: LocalFleet, outcome: Outcome, started_s: float) -> Report:
    published = _published(outcome.job)
    evaluated = outcome.evaluated
    final = evaluated[max(evaluated)]
    parameters = {name: structure.parameters for name, structure in final.structures.items()}
    devices = _device_rows(world, fleet, outcome.plan)
    members = [share for name, share in final.accuracy.items() if name != "ensemble"]
    overhead = [row.seconds - row.train_seconds_max - row.teach_seconds for row in published]
    return Report(
        broker=fleet.broker_name,
        broker_lost=fleet.broker_lost,
        protocol=outcome.protocol,
        seed=options.seed,
        devices=devices,
        rounds=tuple(
            RoundLine(
                round=row.round,
                seconds=round(row.seconds, 4),
                train_seconds_max=round(row.train_seconds_max, 4),
                teach_seconds=round(row.teach_seconds, 4),
                up_bytes=row.up_bytes,
                down_bytes=row.down_bytes,
                accuracy=evaluated[version].accuracy,
                updates=row.updates,
                invited=row.invited,
            )
            for version, row in enumerate(published, start=1)
        ),
        dense_bytes=dense_bytes([parameters.get(device.structure, 0) for device in devices], len(published)),
        total_bytes=sum(device.sent_bytes + device.received_bytes for device in devices),
        final={
            **final.accuracy,
            "best_member": max(members),
            "centralised": outcome.baseline,
        },
        orchestration_s_per_round=round(statistics.fmean(overhead), 4),
        orchestration_s_median=round(statistics.median(overhead), 4),
        versions=_software(),
        local=newest(outcome.job.rounds)[0],
        ensemble=outcome.ensemble,
        merged=published[-1].merged,
        structures=tuple(
            StructureRow(
                id=name,
                family=structure.family,
                parameters=structure.parameters,
                devices=sum(device.structure == name for device in devices),
            )
            for name, structure in final.structures.items()
        ),
        model=world.job.name,
        model_versions=outcome.version_ids,
        test_samples=len(world.parts.test),
        validation_samples=len(world.parts.validation),
        unlabeled_samples=len(world.parts.unlabeled),
        alpha=digits.ALPHA,
        baseline_epochs=world.job.training.epochs * world.job.rounds.count,
        baseline_structure=outcome.largest.id,
        seconds_total=round(time.perf_counter() - started_s, 2),
        machine=f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} processors",
    )


def dense_bytes(parameters: Sequence[int], rounds: int) -> int:
    """Return what float32 FedAvg would carry: every parameter to and from every device in every round.

    Args:
        parameters: of each device's structure.
        rounds: number of rounds.
    """
    return rounds * sum(2 * 4 * count for count in parameters)


def _device_rows(world: World, fleet: LocalFleet, plan: PlanView) -> tuple[DeviceLine, ...]:
    assigned = {row.device: row for row in plan.assignments}
    rows = []
    for device, own in zip(world.devices, world.parts.devices, strict=True):
        row, status = assigned[device.id], fleet.status(device.id)
        rows.append(
            DeviceLine(
                id=device.id,
                profile=row.profile,
                tier=row.tier,
                structure=row.structure,
                variant_bytes=row.variant_bytes,
                budget_bytes=row.budget_bytes,
                why=row.why,
                samples=len(own),
                class_counts=tuple(
                    int(n) for n in np.bincount(world.samples.y[own], minlength=world.job.data.classes)
                ),
                sent_bytes=int(status.get("sent_bytes", 0)),
                received_bytes=int(status.get("received_bytes", 0)),
            )
        )
    return tuple(rows)


def _say_what_came_out(console: Console, made: Report, page: Path, record: Path) -> None:
    table = Table(title="On digits that nobody trained on", title_justify="left", box=None, pad_edge=False)
    for title in ("structure", "parameters", "devices", "accuracy"):
        table.add_column(title, justify="left" if title == "structure" else "right", header_style="dim")
    for row in sorted(made.structures, key=lambda row: -row.parameters):
        table.add_row(row.id, f"{row.parameters:,}", str(row.devices), percent(made.final[row.id]))
    table.add_row(*(Text(cell, "bold") for cell in ("ensemble", "", "", percent(made.final["ensemble"]))))
    table.add_row("all data in one place", "", "", percent(made.final["centralised"]), style="dim")
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"[bold]{made.ratio:.0f} times less traffic[/] than dense FedAvg: {size(made.total_bytes)}, "
        f"not {size(made.dense_bytes)}. {made.orchestration_s_median:.2f} s in the median round besides "
        f"training and teaching; {made.seconds_total:.0f} s in all.",
        soft_wrap=True,
    )
    console.print(f"Report: [bold]{escape(str(page))}[/] (figures: {escape(str(record))})", soft_wrap=True)


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _job_text(options: Options, data: Path) -> str:
    try:
        import jinja2  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise MissingExtraError("the demo needs jinja2: pip install 'liberatai[demo]'") from error
    environment = jinja2.Environment(  # noqa: S701 - YAML, not HTML; every value is a number or our own path
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined
    )
    return environment.get_template("demo_job.yaml.j2").render(
        devices=options.devices,
        rounds=options.rounds,
        seed=options.seed,
        unlabeled=data / "unlabeled.npz",
        validation=data / "validation.npz",
    )


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
