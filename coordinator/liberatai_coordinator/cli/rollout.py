"""`liberatai rollout`: something new for a growing share of the devices, and back if it is not good."""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Final

import typer
from msgspec.structs import replace

from liberatai_coordinator.cli.kit import client_of, group
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    WatchOption,
    ago_text,
    patiently,
    share_text,
    show,
    show_list,
    show_one,
)
from liberatai_coordinator.client.fleet_views import RolloutPartView, RolloutView
from liberatai_coordinator.client.wire import RolloutPlan, RolloutRequest
from liberatai_core.errors import ConfigError

app = group("Rollouts: something new in stages, and back if it is not good.", "liberatai rollout list")
Name = Annotated[str, typer.Argument(help="Name of the rollout.")]
ENDED: Final = frozenset({"finished", "rolled back", "cancelled"})
WATCH_S: Final = 1.0
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>s|m|min|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


@app.command(
    "create",
    epilog="Example: liberatai rollout create --model digits:12 --group strong --stages 1%,10%,50%,100% "
    "--soak 10m --abort-on failed=5%,min=10,accuracy=2%",
)
def rollout_create(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="Name of the rollout [default: after what it brings].", show_default=False)
    ] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Version of a model: NAME, NAME:12 or NAME:tag.")
    ] = "",
    agent: Annotated[str, typer.Option("--agent", help="Release of the agent; needs --bundle.")] = "",
    bundle: Annotated[
        str, typer.Option("--bundle", help="File with the signed release, on the coordinator's machine.")
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SETTING=VALUE or SETTING-; may be repeated.")
    ] = None,
    who: Annotated[str, typer.Option("--group", "-g", help="Devices of this group.")] = "",
    selector: Annotated[
        str, typer.Option("--selector", "-l", help="Devices with these labels or fields.")
    ] = "",
    stages: Annotated[str, typer.Option("--stages", help="Shares of the devices.")] = "1%,10%,50%,100%",
    soak: Annotated[str, typer.Option("--soak", help="How long a stage is watched.")] = "10m",
    abort_on: Annotated[
        str, typer.Option("--abort-on", help="failed=SHARE, min=ANSWERS, accuracy=DROP, least=ACCURACY.")
    ] = "failed=5%,min=10,accuracy=2%",
    pause_after: Annotated[
        str, typer.Option("--pause-after", help="Stages (1,2) after which somebody must say that it goes on.")
    ] = "",
    deadline: Annotated[str, typer.Option("--deadline", help="Who has not answered then is late.")] = "1h",
    output: OutputOption = Output.TABLE,
) -> None:
    """Begin a rollout. Without --group and --selector it is for all approved devices."""
    wanted = RolloutRequest(
        name=name or "rollout",
        model=model,
        agent=agent,
        bundle=bundle,
        settings=settings_of(settings or ()),
        group=who,
        selector=selector,
        plan=plan_of(stages, soak, abort_on, pause_after, deadline),
    )
    with client_of(context) as client:
        if not name:
            taken = {one.name for one in client.rollouts.list()}
            wanted = replace(wanted, name=free_name(model or agent or "settings", taken))
        show_one(client.rollouts.create(wanted), output)


def free_name(brings: str, taken: Collection[str]) -> str:
    """Return a name for a rollout after what it brings: `digits-12`, or `digits-12-2` if that is taken."""
    stem = re.sub(r"[^a-z0-9_-]+", "-", brings.lower()).strip("-")[:24] or "rollout"
    return next(
        found
        for number in itertools.count(1)
        if (found := stem if number == 1 else f"{stem}-{number}") not in taken
    )


@app.command("list", epilog="Example: liberatai rollout list")
def rollout_list(
    context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """List all rollouts, the oldest first."""
    with client_of(context) as client:
        show_list(client.rollouts.list, ROLLOUT_COLUMNS, output, watch=watch)


@app.command("show", epilog="Example: liberatai rollout show r12")
def rollout_show(context: typer.Context, name: Name, output: OutputOption = Output.TABLE) -> None:
    """Show one rollout and its devices."""
    with client_of(context) as client:
        view = client.rollouts.show(name)
    if not output.is_table:
        show_one(view, output)
        return
    show([view], ROLLOUT_COLUMNS, output)
    if view.parts:
        print()
        show(view.parts, _PART_COLUMNS, output)


@app.command("watch", epilog="Example: liberatai rollout watch r12")
def rollout_watch(context: typer.Context, name: Name) -> None:
    """Say every change of a rollout until it ends; exit 1 if it did not finish."""
    said = ""
    with client_of(context) as client:
        for view in patiently(lambda: client.rollouts.show(name), every_s=WATCH_S):
            line = line_of(view)
            if line != said:
                print(line, flush=True)
                said = line
            if view.state in ENDED:
                raise typer.Exit(0 if view.state == "finished" else 1)


@app.command("pause", epilog="Example: liberatai rollout pause r12")
def rollout_pause(context: typer.Context, name: Name) -> None:
    """Stop a rollout where it is."""
    with client_of(context) as client:
        print(line_of(client.rollouts.pause(name)))


@app.command("resume", epilog="Example: liberatai rollout resume r12")
def rollout_resume(context: typer.Context, name: Name) -> None:
    """Let a paused rollout go on."""
    with client_of(context) as client:
        print(line_of(client.rollouts.resume(name)))


@app.command("cancel", epilog="Example: liberatai rollout cancel r12")
def rollout_cancel(context: typer.Context, name: Name) -> None:
    """End a rollout; who has the new keeps it."""
    with client_of(context) as client:
        print(line_of(client.rollouts.cancel(name)))


@app.command("rollback", epilog="Example: liberatai rollout rollback r12 --reason 'people complain'")
def rollout_rollback(
    context: typer.Context,
    name: Name,
    reason: Annotated[str, typer.Option("--reason", help="Why; shown in lists and noted.")] = "",
) -> None:
    """Let everybody have what was before."""
    with client_of(context) as client:
        print(line_of(client.rollouts.rollback(name, reason)))


def plan_of(stages: str, soak: str, abort_on: str, pause_after: str, deadline: str) -> RolloutPlan:
    """Return how a rollout goes on, as an operator wrote it.

    Raises:
        ConfigError: with the fault.
    """
    rules = {"failed": 0.05, "min": 10.0, "accuracy": 0.02}
    for part in filter(None, abort_on.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in ("failed", "min", "accuracy", "least"):
            raise ConfigError("--abort-on", [f"{name}: only failed, min, accuracy and least"])
        if name == "accuracy" and value == "off":
            rules.pop("accuracy", None)
        else:
            rules[name] = _number("--abort-on", value)
    try:
        pauses = tuple(int(part) for part in pause_after.split(",") if part.strip())
    except ValueError:
        raise ConfigError("--pause-after", [f"{pause_after}: numbers of stages, like 1,2"]) from None
    return RolloutPlan(
        stages=tuple(_number("--stages", part) for part in stages.split(",")),
        soak_s=_seconds("--soak", soak),
        failed_share=rules["failed"],
        failed_min=int(rules["min"]),
        accuracy_drop=rules.get("accuracy"),
        accuracy_least=rules.get("least"),
        pause_after=pauses,
        deadline_s=_seconds("--deadline", deadline),
    )


def settings_of(words: Sequence[str]) -> dict[str, bool | float | None]:
    """Return settings as an operator wrote them: SETTING=VALUE, or SETTING- to leave it to the device."""
    found: dict[str, bool | float | None] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign and word.endswith("-"):
            found[word[:-1]] = None
        elif value in ("true", "false"):
            found[name] = value == "true"
        else:
            found[name] = _number("--set", value)
    return found


def _number(where: str, text: str) -> float:
    try:
        return float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise ConfigError(where, [f"{text!r} is no number; write 5% or 0.05"]) from None


def _seconds(where: str, text: str) -> float:
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(where, [f"{text!r} is no duration; write 30s, 10m, 1h or 2d"])
    return float(found["number"]) * _SECONDS[found["unit"]]


def line_of(view: RolloutView) -> str:
    """Return where a rollout stands in one line."""
    stage = (
        f"stage {view.stage} of {len(view.stages)} ({view.stages[min(view.stage, len(view.stages)) - 1]:.0%})"
    )
    parts = [f"{view.name}: {view.state}", "" if view.state in ENDED else stage, counts_of(view), view.reason]
    return " · ".join(part for part in parts if part)


def counts_of(view: RolloutView) -> str:
    """Return how many devices stand where."""
    return ", ".join(f"{count} {state}" for state, count in sorted(view.counts.items()))


ROLLOUT_COLUMNS: list[Column[RolloutView]] = [
    Column("ROLLOUT", lambda row: row.name),
    Column("STATE", lambda row: row.state),
    Column("WHAT", lambda row: row.what),
    Column("STAGE", lambda row: f"{row.stage}/{len(row.stages)}"),
    Column("DEVICES", counts_of),
    Column("ACCURACY", lambda row: "" if row.accuracy is None else share_text(row.accuracy), right=True),
    Column("BEFORE", lambda row: "" if row.accuracy_before is None else share_text(row.accuracy_before)),
    Column("FOR", lambda row: row.who, wide=True),
    Column("SINCE", lambda row: ago_text(row.since_s), right=True, wide=True),
    Column("REASON", lambda row: row.reason, note=True),
]
_PART_COLUMNS: list[Column[RolloutPartView]] = [
    Column("DEVICE", lambda row: row.device),
    Column("STATE", lambda row: row.state),
    Column("STAGE", lambda row: str(row.stage), right=True),
    Column(
        "RIGHT", lambda row: "" if row.evaluation is None else f"{row.evaluation[0]} of {row.evaluation[1]}"
    ),
    Column("BEFORE", lambda row: "" if row.before is None else f"{row.before[0]} of {row.before[1]}"),
    Column("SINCE", lambda row: ago_text(row.since_s), right=True, wide=True),
    Column("REASON", lambda row: row.reason, note=True),
]
