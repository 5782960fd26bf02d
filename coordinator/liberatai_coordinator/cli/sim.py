"""`liberatai sim`: fleets that are not there."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.kit import FAILED, group
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, dump, show
from liberatai_core.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from liberatai_coordinator.sim.record import Record
    from liberatai_coordinator.sim.scenario import Scenario

app = group(
    "Simulate a fleet on this machine.", "liberatai sim up -f fleet.yaml --job job.yaml --data digits.npz"
)


class Backend(StrEnum):
    """Where the devices are."""

    VIRTUAL = "virtual"
    PROCESS = "process"
    CONTAINER = "container"


class Engine(StrEnum):
    """What runs containers."""

    PODMAN = "podman"
    DOCKER = "docker"


class What(StrEnum):
    """What can be done to a simulation that runs."""

    CRASH = "crash"
    CUT = "cut"
    ASLEEP = "asleep"
    BROKER = "broker"
    COORDINATOR = "coordinator"


BEGINS = {What.BROKER: "broker stops", What.COORDINATOR: "coordinator stops"}

Folder = Annotated[Path, typer.Option("--dir", help="Folder of the simulation.")]
DEFAULT = Path("liberatai-sim")


@app.command(epilog="Example: liberatai sim up -f fleet.yaml --job job.yaml --data digits.npz")
def up(
    fleet: Annotated[Path, typer.Option("--fleet", "-f", help="Which devices there are (YAML).")],
    job: Annotated[Path, typer.Option("--job", help="What they train (YAML).")],
    data: Annotated[Path | None, typer.Option("--data", help="Samples of all devices (.npz).")] = None,
    split: Annotated[str, typer.Option("--split", help="even, dirichlet:ALPHA or natural.")] = "even",
    test: Annotated[
        Path | None, typer.Option("--test", help="Samples for the report [default: a tenth of --data].")
    ] = None,
    backend: Annotated[Backend | None, typer.Option("--backend", help="Where the devices are.")] = None,
    scenario: Annotated[str | None, typer.Option("--scenario", help="What happens to them.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of everything random.")] = None,
    broker: Annotated[str, typer.Option("--broker", help="auto, mosquitto or amqtt.")] = "auto",
    image: Annotated[
        str, typer.Option("--image", help="Of containers; host: this machine's own files (podman, root).")
    ] = "liberatai-agent",
    engine: Annotated[
        Engine | None, typer.Option("--engine", help="Of containers [default: the one that is there].")
    ] = None,
    folder: Folder = DEFAULT,
    output: OutputOption = Output.TABLE,
) -> None:
    """Simulate one job from its first round to its report; other commands may speak to it meanwhile."""
    from liberatai_coordinator.sim import report, up

    wanted = up.Wanted(
        fleet=fleet,
        job=job,
        data=data,
        how=split,
        test=test,
        folder=folder,
        backend=None if backend is None else backend.value,
        scenario=scenario,
        seed=seed,
        broker=broker,
        image=image,
        engine=None if engine is None else engine.value,
    )
    said = [-1]

    def on_round(ended: int, of: int) -> None:
        if ended != said[0]:
            said[0] = ended
            print(f"round {ended} of {of}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)

    record = up.run(wanted, lambda line: print(line, file=sys.stderr), on_round)
    page = report.write(record, folder)
    _say(record, page, output)
    if record.state != "finished":
        raise typer.Exit(FAILED)


@app.command(epilog="Example: liberatai sim status -o json")
def status(folder: Folder = DEFAULT, output: OutputOption = Output.TABLE) -> None:
    """Show how the simulation stands, or how the last one in the folder ended."""
    from liberatai_coordinator.sim import control, report

    try:
        found = control.ask(folder, "status")
    except NotFoundError:
        _say(report.read(folder), folder / report.PAGE, output)
        return
    if output.is_table:
        for name, value in found.items():
            text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:<9} {text}")
    else:
        dump(found, output)


@app.command(epilog="Example: liberatai sim scale pi4=20 pi-zero-2w=0")
def scale(
    counts: Annotated[list[str], typer.Argument(help="PROFILE=COUNT, one or more.", show_default=False)],
    folder: Folder = DEFAULT,
) -> None:
    """Let more or fewer devices of a profile run (process backend)."""
    from liberatai_coordinator.sim import control

    asked = []
    for one in counts:
        profile, _, count = one.partition("=")
        if not (profile and count.isdecimal()):
            raise ConfigError("scale", [f"write PROFILE=COUNT, as in pi4=20 (got {one!r})"])
        asked.append((profile, int(count)))
    for profile, number in asked:
        started, stopped = control.ask(folder, "scale", profile=profile, count=number)
        print(f"{profile}: {started} started, {stopped} stopped")


@app.command(epilog="Example: liberatai sim fault crash pi4-0001 --for 10")
def fault(
    what: Annotated[What, typer.Argument(help="What happens.")],
    device: Annotated[str, typer.Argument(help="To which device; not for broker and coordinator.")] = "",
    for_s: Annotated[float, typer.Option("--for", min=0.1, max=86_400, help="Seconds until it is over.")] = 5,
    folder: Folder = DEFAULT,
) -> None:
    """Let something go wrong in a simulation that runs (process backend)."""
    from liberatai_coordinator.sim import control

    whole = what in BEGINS
    if whole == bool(device):
        raise ConfigError(
            "fault", [f"{what.value} {'takes no device' if whole else 'needs a device: pi4-0001'}"]
        )
    control.ask(folder, "fault", what=BEGINS.get(what, what.value), device=device, for_s=for_s)
    print(f"{what.value} {device}".strip() + f" for {for_s:g} s")


@app.command(epilog="Example: liberatai sim report --dir liberatai-sim")
def report(folder: Folder = DEFAULT) -> None:
    """Make the page of the last simulation anew, from its record."""
    from liberatai_coordinator.sim import report as page

    print(page.write(page.read(folder), folder))


@app.command(epilog="Example: liberatai sim down")
def down(folder: Folder = DEFAULT) -> None:
    """Stop the simulation that runs in the folder (process backend)."""
    from liberatai_coordinator.sim import control

    control.ask(folder, "down")
    print("stopping")


@app.command(epilog="Example: liberatai sim scenarios")
def scenarios(output: OutputOption = Output.TABLE) -> None:
    """List the scenarios that come with LiberatAI."""
    from liberatai_coordinator.sim.scenario import load_scenario, scenario_names

    show([load_scenario(name) for name in scenario_names()], SCENARIOS, output)


def _say(record: "Record", page: Path, output: Output) -> None:
    from liberatai_core.units import duration_text, size_text

    if not output.is_table:
        facts = {
            name: getattr(record, name)
            for name in (
                "state",
                "scenario",
                "backend",
                "job_s",
                "wall_s",
                "updates",
                "lost",
                "up_bytes",
                "down_bytes",
            )
        }
        print(json.dumps(facts | {"report": str(page)}))
        return
    last = {one.profile: one.figure for one in record.points}
    figures = ", ".join(
        f"{name} {figure:.1%}" if record.figure == "accuracy" else f"{name} {figure:.4f}"
        for name, figure in sorted(last.items())
    )
    print(
        f"job       {record.job} {record.state}, {len(record.rounds)} rounds, {duration_text(record.job_s)}"
    )
    if record.reason:
        print(f"reason    {record.reason}")
    print(f"updates   {record.updates:,} receipted, {record.lost} lost; {len(record.faults)} faults")
    print(f"links     {size_text(record.up_bytes)} up, {size_text(record.down_bytes)} down")
    if figures:
        print(f"{record.figure:<9} {figures}")
    print(f"report    {page}")


SCENARIOS: "tuple[Column[Scenario], ...]" = (
    Column("SCENARIO", lambda row: row.name),
    Column("DESCRIPTION", lambda row: row.description),
)
