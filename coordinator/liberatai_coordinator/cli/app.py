"""`liberatai`: the operator's command line. Nouns, then verbs; it only asks, the coordinator decides.

Exit codes: 0 ok, 1 failed, 2 usage or settings, 3 partly, 4 not found. Tables are for people and become
plain columns when piped; programs take `-o json`. Everything heavy is imported by the command that needs
it, so that `liberatai --help` is quick.
"""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see above

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import typer

from liberatai_coordinator.cli import models as cli_models
from liberatai_coordinator.cli.accuracy import explained, of_round, percent, show_accuracy
from liberatai_coordinator.cli.kit import (
    FAILED,
    PARTLY,
    Column,
    Output,
    OutputOption,
    clean,
    client_of,
    complain,
    group,
    on_screen,
    plain,
    progress,
    rate_text,
    read_text,
    rich_table,
    show,
    show_one,
    size_text,
    when_text,
)
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import (
    AssignmentView,
    ContributionView,
    DeviceView,
    JobView,
    PlanView,
    RoundView,
    StructureView,
)
from liberatai_core.errors import (
    ConfigError,
    LiberataiError,
    LinkError,
)

if TYPE_CHECKING:
    from liberatai_coordinator.config import CoordinatorConfig

DEFAULT_SOCKET: Final = "/var/lib/liberatai/api.sock"
ENDED: Final = frozenset({"finished", "aborted", "failed"})
MIN_FREE_BYTES: Final = 256 * 1024 * 1024
"""Less than this on the state folder's disk makes `doctor` warn: blobs of a few rounds."""


JobArgument = Annotated[str, typer.Argument(help="Name of the job.")]
DevicesArgument = Annotated[list[str], typer.Argument(help="Names of devices.")]


app = group("Train one model together on devices that differ.", "liberatai devices list")
devices_app = group("Devices of the fleet: who is there, who is let in.", "liberatai devices list")
jobs_app = group("Federated trainings.", "liberatai jobs list")
plan_app = group("Which device gets which variant, and why.", "liberatai plan show")
app.add_typer(devices_app, name="devices")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cli_models.app, name="models")
app.add_typer(plan_app, name="plan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="liberatai")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    except LiberataiError as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    return 0


@app.callback()
def _options(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option("--socket", envvar="LIBERATAI_SOCKET", help="Unix socket of the coordinator.")
    ] = Path(DEFAULT_SOCKET),
) -> None:
    context.obj = socket


# --- programs ------------------------------------------------------------------------------------


@app.command(epilog="Example: liberatai serve --config /etc/liberatai/coordinator.yaml")
def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="Settings of the coordinator (YAML).")],
) -> None:
    """Run the coordinator in the foreground until SIGTERM or SIGINT."""
    settings = _coordinator_config(config)
    from liberatai_coordinator import wiring

    raise typer.Exit(wiring.serve(settings))


@app.command(epilog="Example: liberatai demo --devices 8 --rounds 12 --report demo-report")
def demo(
    devices: Annotated[int, typer.Option(min=1, max=40, help="Number of agents, each its own process.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of the job.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    broker: Annotated[str, typer.Option(help="auto, mosquitto, amqtt, or the URL of a broker.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="Folder for the report [default: demo-report].")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the state folders afterwards.")] = False,
) -> None:
    """Train on this machine: a broker, a coordinator, unlike agents, and a report of what they did."""
    from liberatai_coordinator.demo import demo as program

    raise typer.Exit(
        program.run(devices=devices, rounds=rounds, seed=seed, broker=broker, report=report, keep=keep)
    )


@app.command(epilog="Example: liberatai version")
def version() -> None:
    """Show the version of this program and of the protocol it speaks."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from liberatai_core.contract.limits import PROTOCOL_VERSION

    try:
        number = installed("liberatai")
    except PackageNotFoundError:  # run from a source tree
        number = "unknown"
    print(f"liberatai {number} (protocol {PROTOCOL_VERSION}, Python {platform.python_version()})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `doctor`."""

    check: str
    state: Literal["ok", "warn", "fail"]
    text: str


@app.command(epilog="Example: liberatai doctor --config /etc/liberatai/coordinator.yaml")
def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings to check too.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Check this machine, the settings and the running coordinator; exit 1 if something must be fixed."""
    findings = [_check_python(), _check_coordinator_parts(), _check_demo_parts(), _check_broker_program()]
    if config is not None:
        findings += _check_config(config)
    findings.append(_check_socket(context.obj))
    show(findings, _FINDING_COLUMNS, output)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(FAILED)


def _check_python() -> Finding:
    return Finding(check="python", state="ok", text=f"{platform.python_version()} on {platform.machine()}")


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _check_coordinator_parts() -> Finding:
    missing = _missing("torch", "fastapi", "uvicorn", "httpx", "sqlalchemy", "optuna", "safetensors", "onnx")
    if missing:
        text = f"missing {', '.join(missing)}: pip install 'liberatai[coordinator]'"
        return Finding(check="coordinator parts", state="fail", text=text)
    return Finding(check="coordinator parts", state="ok", text="installed")


def _check_demo_parts() -> Finding:
    missing = _missing("amqtt", "sklearn", "matplotlib", "jinja2")
    if missing:
        text = f"missing {', '.join(missing)}: pip install 'liberatai[demo]' (for `liberatai demo` only)"
        return Finding(check="demo parts", state="warn", text=text)
    return Finding(check="demo parts", state="ok", text="installed")


def _check_broker_program() -> Finding:
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which("mosquitto", path=places)
    if found:
        return Finding(check="mosquitto", state="ok", text=found)
    text = "not installed on this machine (apt install mosquitto); fine if the broker runs elsewhere"
    return Finding(check="mosquitto", state="warn", text=text)


def _check_config(path: Path) -> list[Finding]:
    try:
        settings = _coordinator_config(path)
    except ConfigError as error:
        return [
            Finding(check="settings", state="fail", text=f"{error.where}: {fault}") for fault in error.faults
        ]
    return [
        Finding(check="settings", state="ok", text=str(path)),
        _check_state(Path(settings.state_dir)),
        _check_broker(settings.broker),
    ]


def _check_state(folder: Path) -> Finding:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        text = f"{there}: not writable for this user"
        return Finding(check="state folder", state="fail", text=text)
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size_text(free)} free"
    return Finding(check="state folder", state="ok" if free >= MIN_FREE_BYTES else "warn", text=text)


def _check_broker(url: str) -> Finding:
    import socket
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        port = parts.port or {"mqtt": 1883, "mqtts": 8883}.get(parts.scheme)
    except ValueError as error:
        return Finding(check="broker", state="fail", text=f"{url}: {error}")
    if port is None or not parts.hostname:
        return Finding(
            check="broker", state="fail", text=f"{url}: must be mqtt://HOST:PORT or mqtts://HOST:PORT"
        )
    try:
        socket.create_connection((parts.hostname, port), timeout=3).close()
    except OSError as error:
        return Finding(check="broker", state="fail", text=f"{url}: {error}")
    return Finding(check="broker", state="ok", text=f"{url}: takes connections")


def _check_socket(socket: Path) -> Finding:
    try:
        with Client(socket, timeout_s=5) as client:
            health = client.health()
    except LiberataiError as error:
        return Finding(check="coordinator", state="warn", text=str(error))
    text = ", ".join(f"{key} {value}" for key, value in health.items())
    return Finding(check="coordinator", state="ok" if health.get("ok", True) else "fail", text=text)


# --- devices -------------------------------------------------------------------------------------


@devices_app.command("list", epilog="Example: liberatai devices list -o wide")
def devices_list(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List all devices."""
    with client_of(context) as client:
        show(client.devices(), _DEVICE_COLUMNS, output)


@devices_app.command("show", epilog="Example: liberatai devices show gateway-01")
def devices_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the device.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show everything that is known of one device."""
    with client_of(context) as client:
        view = client.device(name)
    if output in (Output.JSON, Output.YAML):
        show_one(view, output)
        return
    if not view.contributions:
        show_one(view, output)
        return
    show_one(
        {name: value for name, value in msgspec.to_builtins(view).items() if name != "contributions"}, output
    )
    print()
    print("what its updates gave, the newest first:")
    show(view.contributions, _CONTRIBUTION_COLUMNS, output)


@devices_app.command("approve", epilog="Example: liberatai devices approve gateway-01 camera-07")
def devices_approve(context: typer.Context, names: DevicesArgument) -> None:
    """Let pending devices in."""
    with client_of(context) as client:
        _each(names, client.approve, "approved")


@devices_app.command(
    "quarantine", epilog="Example: liberatai devices quarantine camera-07 --reason 'sends nonsense'"
)
def devices_quarantine(
    context: typer.Context,
    names: DevicesArgument,
    reason: Annotated[str, typer.Option(help="Why; shown in lists and to the device.")] = "",
) -> None:
    """Shut devices out: what they send is refused until they are released."""
    with client_of(context) as client:
        _each(names, lambda name: client.quarantine(name, reason), "quarantined")


@devices_app.command("release", epilog="Example: liberatai devices release camera-07")
def devices_release(context: typer.Context, names: DevicesArgument) -> None:
    """Let quarantined devices in again."""
    with client_of(context) as client:
        _each(names, client.release, "released")


# --- jobs ----------------------------------------------------------------------------------------


@jobs_app.command("create", epilog="Example: liberatai jobs create -f job.yaml")
def jobs_create(
    context: typer.Context,
    file: Annotated[Path, typer.Option("--file", "-f", help="The job (YAML).")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Create and start a job. Relative paths in the file start from its folder."""
    text = _job_text(file)
    with client_of(context) as client:
        _show_job(client.create_job(text, file.absolute().parent), output)


@jobs_app.command("list", epilog="Example: liberatai jobs list -o json")
def jobs_list(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List all jobs, oldest first."""
    with client_of(context) as client:
        show(client.jobs(), _JOB_COLUMNS, output)


@jobs_app.command("show", epilog="Example: liberatai jobs show digits")
def jobs_show(context: typer.Context, name: JobArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one job: what it decided, its structures, their accuracy, and its rounds."""
    with client_of(context) as client:
        _show_job(client.job(name), output)


@jobs_app.command("watch", epilog="Example: liberatai jobs watch digits")
def jobs_watch(
    context: typer.Context,
    name: JobArgument,
    interval: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Follow a job until it ends; exit 1 if it does not finish."""
    with client_of(context) as client:
        last = _watch_screen(client, name, interval) if on_screen() else _watch_lines(client, name, interval)
    if last.state != "finished":
        raise typer.Exit(FAILED)


@jobs_app.command("pause", epilog="Example: liberatai jobs pause digits")
def jobs_pause(context: typer.Context, name: JobArgument) -> None:
    """Open no further round; the one that is open is finished."""
    with client_of(context) as client:
        print(_job_line(client.pause(name)))


@jobs_app.command("resume", epilog="Example: liberatai jobs resume digits")
def jobs_resume(context: typer.Context, name: JobArgument) -> None:
    """Go on with a paused job."""
    with client_of(context) as client:
        print(_job_line(client.resume(name)))


@jobs_app.command("abort", epilog="Example: liberatai jobs abort digits")
def jobs_abort(context: typer.Context, name: JobArgument) -> None:
    """End a job for good; its versions stay."""
    with client_of(context) as client:
        print(_job_line(client.abort(name)))


def _show_job(job: JobView, output: Output) -> None:
    if output in (Output.JSON, Output.YAML):
        show_one(job, output)
        return
    print(_job_line(job))
    print(_bytes_line(job))
    for line in explained(job):
        print(line)
    if job.structures:
        print()
        show(job.structures, _STRUCTURE_COLUMNS, output)
    show_accuracy(job, output)
    if job.rounds:
        print()
        show(job.rounds, _ROUND_COLUMNS, output)


def _job_line(job: JobView) -> str:
    reason = f" ({clean(job.reason)})" if job.reason else ""
    return f"job {job.name}: {job.state}{reason}, {job.rounds_done} of {job.rounds_total} rounds"


def _bytes_line(job: JobView) -> str:
    told = f"all rounds: {size_text(job.up_bytes)} up, {size_text(job.down_bytes)} down"
    if not job.updates:
        return told
    each = f"{size_text(job.up_bytes / job.updates)} up, {size_text(job.down_bytes / job.updates)} down"
    return f"{told}; per update: {each}"


def _round_line(view: RoundView) -> str:
    reason = f" ({clean(view.reason)})" if view.reason else ""
    return (
        f"round {view.round}: {view.state}{reason}, {view.updates} of {view.invited} updates, "
        f"{view.seconds:.1f} s, {size_text(view.up_bytes)} up, {size_text(view.down_bytes)} down"
        + (f", accuracy {percent(of_round(view))}" if of_round(view) is not None else "")
    )


def _watch_lines(client: Client, name: str, interval_s: float) -> JobView:
    """Print one line per change of state; the numbers of an open round are left to the screen."""
    said: dict[int, str] = {}
    said_job: tuple[str, str] | None = None
    while True:
        job = client.job(name)
        for view in job.rounds:
            if said.get(view.round) != view.state:
                said[view.round] = view.state
                print(_round_line(view), flush=True)
        if said_job != (job.state, job.reason):
            said_job = (job.state, job.reason)
            print(_job_line(job), flush=True)
        if job.state in ENDED:
            return job
        time.sleep(interval_s)


def _watch_screen(client: Client, name: str, interval_s: float) -> JobView:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            job = client.job(name)
            rows = job.rounds[-max(3, live.console.height - 6) :]
            live.update(Group(Text(_job_line(job)), rich_table(rows, plain(_ROUND_COLUMNS))), refresh=True)
            if job.state in ENDED:
                return job
            time.sleep(interval_s)


# --- plan ----------------------------------------------------------------------------------------


@plan_app.command("show", epilog="Example: liberatai plan show -f job.yaml --dry-run")
def plan_show(
    context: typer.Context,
    job: Annotated[
        str | None, typer.Option("--job", help="An existing job; the newest one if left out.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A job that is only described: nothing is created.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say so explicitly: needs -f, and creates nothing.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show which device gets which variant, and why."""
    if job is not None and file is not None:
        raise ConfigError("plan show", ["give --job or --file, not both"])
    if dry_run and file is None:
        raise ConfigError("plan show", ["--dry-run needs --file: the plan of an existing job is in force"])
    text = None if file is None else _job_text(file)
    with client_of(context) as client, progress("planning"):
        plan = client.plan(job, text)
    _show_plan(plan, output)


def _show_plan(plan: PlanView, output: Output) -> None:
    if output in (Output.JSON, Output.YAML):
        show_one(plan, output)
        return
    print(f"plan of {plan.job}{' (dry run: nothing is assigned)' if plan.dry_run else ''}")
    print()
    show(plan.assignments, _ASSIGNMENT_COLUMNS, output)
    print()
    show(plan.structures, _STRUCTURE_COLUMNS, output)


# --- asking ---------------------------------------------------------------------------------------


def _each(names: Sequence[str], act: Callable[[str], object], done: str) -> None:
    """Do something to every name; exit 3 if it worked for some of them only."""
    codes = []
    for name in names:
        try:
            act(name)
            print(f"device {name}: {done}")
        except LinkError:
            raise
        except LiberataiError as error:
            codes.append(complain(error))
    if codes:
        raise typer.Exit(codes[0] if len(codes) == len(names) else PARTLY)


def _job_text(path: Path) -> str:
    """Return a job's YAML, checked here so that the faults name the operator's own file."""
    from liberatai_coordinator.config import parse_job

    text = read_text(path)
    parse_job(text, str(path))
    return text


def _coordinator_config(path: Path) -> "CoordinatorConfig":
    from liberatai_coordinator.config import CoordinatorConfig
    from liberatai_core.settings import parse

    return parse(read_text(path), CoordinatorConfig, str(path)).relative_to(path.absolute().parent)


# --- columns --------------------------------------------------------------------------------------


def _link_words(device: DeviceView) -> str:
    words = ["measured" if device.link_measured else "by profile" if device.up_bits_s else "unknown"]
    if device.metered:
        words.append("metered")
    if device.day_quota_bytes:
        words.append(f"{size_text(device.day_quota_bytes)} a day{', used up' if device.quota_spent else ''}")
    return ", ".join(words)


def _ago(seen_s: float) -> str:
    if not seen_s:
        return "never"
    seconds = max(0.0, time.time() - seen_s)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items()))


_FINDING_COLUMNS: list[Column[Finding]] = [
    Column("CHECK", lambda row: row.check),
    Column("STATE", lambda row: row.state),
    Column("DETAIL", lambda row: row.text),
]
_DEVICE_COLUMNS: list[Column[DeviceView]] = [
    Column("DEVICE", lambda row: row.id),
    Column("STATUS", lambda row: row.status),
    Column("STATE", lambda row: row.state),
    Column("PHASE", lambda row: row.phase),
    Column("PROFILE", lambda row: row.profile),
    Column("TIER", lambda row: row.tier),
    Column("STORAGE", lambda row: size_text(row.storage_bytes), right=True),
    Column("STRUCTURE", lambda row: row.structure),
    Column("JOB", lambda row: f"{row.job}/{row.round}" if row.job else ""),
    Column("SEEN", lambda row: _ago(row.last_seen_s), right=True),
    Column("MEMORY", lambda row: size_text(row.memory_bytes), wide=True, right=True),
    Column("CPU", lambda row: f"{row.cpu_share:g} of {row.cores} {row.arch}", wide=True),
    Column("FORM", lambda row: row.form, wide=True),
    Column("GFLOPS", lambda row: "-" if row.gflops is None else f"{row.gflops:.1f}", wide=True, right=True),
    Column("UPLINK", lambda row: rate_text(row.up_bits_s), wide=True, right=True),
    Column("DOWNLINK", lambda row: rate_text(row.down_bits_s), wide=True, right=True),
    Column("LINK", _link_words, wide=True),
    Column("SAMPLES", lambda row: str(row.samples), wide=True, right=True),
    Column("SENT", lambda row: size_text(row.sent_bytes), wide=True, right=True),
    Column("RECEIVED", lambda row: size_text(row.received_bytes), wide=True, right=True),
    Column("UPDATES", lambda row: str(row.updates), wide=True, right=True),
    Column("VERSION", lambda row: row.agent_version, wide=True),
    Column("REFUSALS", lambda row: _counts(row.refusals), wide=True),
    Column("REASON", lambda row: row.reason, wide=True),
]
_CONTRIBUTION_COLUMNS: list[Column[ContributionView]] = [
    Column("JOB", lambda row: row.job),
    Column("ROUND", lambda row: str(row.round), right=True),
    Column("VERDICT", lambda row: row.verdict),
    Column("NORM", lambda row: f"{row.norm:.4g}", right=True),
    Column("COSINE", lambda row: f"{row.cosine:.3f}", right=True),
]
_JOB_COLUMNS: list[Column[JobView]] = [
    Column("JOB", lambda row: row.name),
    Column("STATE", lambda row: row.state),
    Column("ROUNDS", lambda row: f"{row.rounds_done}/{row.rounds_total}", right=True),
    Column("VERSION", lambda row: str(row.version), right=True),
    Column("STRUCTURES", lambda row: str(len(row.structures)), right=True),
    Column("CREATED", lambda row: when_text(row.created_s)),
    Column("REASON", lambda row: row.reason),
    Column("UP", lambda row: size_text(row.up_bytes), wide=True, right=True),
    Column("DOWN", lambda row: size_text(row.down_bytes), wide=True, right=True),
    Column("REFUSALS", lambda row: _counts(row.refusals), wide=True),
]
_ROUND_COLUMNS: list[Column[RoundView]] = [
    Column("ROUND", lambda row: str(row.round), right=True),
    Column("STATE", lambda row: row.state),
    Column("UPDATES", lambda row: f"{row.updates}/{row.invited}", right=True),
    Column("SECONDS", lambda row: f"{row.seconds:.1f}", right=True),
    Column("UP", lambda row: size_text(row.up_bytes), right=True),
    Column("DOWN", lambda row: size_text(row.down_bytes), right=True),
    Column("ACCURACY", lambda row: percent(of_round(row)), right=True),
    Column("REASON", lambda row: row.reason),
    Column("TRAIN MAX", lambda row: f"{row.train_seconds_max:.1f}", wide=True, right=True),
    Column("TEACH", lambda row: f"{row.teach_seconds:.1f}", wide=True, right=True),
    Column("GUARD", lambda row: row.guard, wide=True),
    Column("MERGED BY", lambda row: row.merged, wide=True),
]
_STRUCTURE_COLUMNS: list[Column[StructureView]] = [
    Column("STRUCTURE", lambda row: row.id),
    Column("FAMILY", lambda row: row.family),
    Column("PARAMETERS", lambda row: str(row.parameters), right=True),
    Column("FLOAT32", lambda row: size_text(4 * row.parameters), right=True),
    Column("KEYFRAME", lambda row: size_text(row.keyframe_bytes), right=True),
    Column("SMALLEST", lambda row: size_text(row.smallest_bytes), right=True),
    Column("DEVICES", lambda row: str(row.devices), right=True),
]
_ASSIGNMENT_COLUMNS: list[Column[AssignmentView]] = [
    Column("DEVICE", lambda row: row.device),
    Column("PROFILE", lambda row: row.profile),
    Column("TIER", lambda row: row.tier),
    Column("STRUCTURE", lambda row: row.structure or "none"),
    Column("VARIANT", lambda row: size_text(row.variant_bytes), right=True),
    Column("BUDGET", lambda row: size_text(row.budget_bytes), right=True),
    Column("DENSITY", lambda row: f"{row.density:.2%}", right=True),
    Column("WHY", lambda row: "; ".join(part for part in (row.why, row.link) if part)),
]
