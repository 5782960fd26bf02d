"""`liberatai shadow`: what devices shall be like, and what they are like."""

from typing import Annotated

import typer

from liberatai_coordinator.cli.device_verbs import Group, Selector, each, meant
from liberatai_coordinator.cli.kit import client_of, complete_device, group
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, show, show_one
from liberatai_coordinator.client.fleet_views import ShadowView
from liberatai_core.errors import ConfigError

app = group("Shadows: what devices shall be like, and what they are like.", "liberatai shadow get gateway-01")
Name = Annotated[str, typer.Argument(help="Name of the device.", autocompletion=complete_device)]


@app.command("get", epilog="Example: liberatai shadow get gateway-01")
def shadow_get(context: typer.Context, name: Name, output: OutputOption = Output.TABLE) -> None:
    """Show what a device shall be like, and what it is like by its own word."""
    with client_of(context) as client:
        show_one(client.shadows.show(name), output)


@app.command("set", epilog="Example: liberatai shadow set gateway-01 telemetry_s=300 max_temp_c=70 pause-")
def shadow_set(
    context: typer.Context,
    changes: Annotated[
        list[str],
        typer.Argument(help="Names of devices, then SETTING=VALUE; SETTING- leaves it to the device."),
    ],
    selector: Selector = "",
    group: Group = "",
) -> None:
    """Wish settings of devices. They may be tighter than the device's own, never looser."""
    names = [word for word in changes if "=" not in word and not word.endswith("-")]
    settings: dict[str, bool | float | None] = {}
    for word in changes:
        if "=" in word:
            name, _, value = word.partition("=")
            settings[name] = _value(name, value)
        elif word.endswith("-"):
            settings[word[:-1]] = None
    if not settings:
        raise ConfigError("settings", ["none: write SETTING=VALUE, or SETTING- to leave it to the device"])
    with client_of(context) as client:
        each(
            meant(client, names, selector, group), lambda one: client.shadows.change(one, settings), "wished"
        )


@app.command("diff", epilog="Example: liberatai shadow diff -l site=hall")
def shadow_diff(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Names of devices.")] = None,
    selector: Selector = "",
    group: Group = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what devices are not like, although they shall be; exit 1 if there is anything."""
    with client_of(context) as client:
        shadows = [client.shadows.show(name) for name in meant(client, names, selector, group)]
    differing = [one for one in shadows if one.differs]
    show(differing, SHADOW_COLUMNS, output)
    raise typer.Exit(1 if differing else 0)


def _value(name: str, text: str) -> bool | float:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        raise ConfigError("settings", [f"{name}={text}: neither a number nor true or false"]) from None


def _pairs(one: ShadowView) -> str:
    told = dict(one.reported) | {"model": one.model_reported, "agent": one.agent_reported}
    wished = dict(one.desired) | {"model": one.model, "agent": one.agent}
    return ", ".join(f"{name}: {told.get(name, '-')} → {wished.get(name, '-')}" for name in one.differs)


SHADOW_COLUMNS: list[Column[ShadowView]] = [
    Column("DEVICE", lambda row: row.device),
    Column("STATE", lambda row: row.state),
    Column("DIFFERS", _pairs, note=True),
    Column("LIMITED", lambda row: ", ".join(row.limited), note=True),
    Column("WHY", lambda row: f"{row.code}: {row.text}" if row.code else row.text, note=True),
]
