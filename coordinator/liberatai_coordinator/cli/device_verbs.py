"""What the commands of `liberatai devices` do to devices: by name, by selector or by group."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import PARTLY, USAGE, client_of, complain, complete_device
from liberatai_coordinator.cli.tables import clean, duration_text
from liberatai_coordinator.client.client import Client
from liberatai_core.errors import ConfigError, LiberataiError, LinkError, NotFoundError

Names = Annotated[list[str] | None, typer.Argument(help="Names of devices.", autocompletion=complete_device)]
Selector = Annotated[
    str, typer.Option("--selector", "-l", help="Devices with these labels or fields: site=hall,tier!=full.")
]
Group = Annotated[str, typer.Option("--group", "-g", help="Devices of this group.")]
Why = Annotated[str, typer.Option("--reason", help="Why; shown by `devices show` and in events.")]
KeyOption = Annotated[
    str, typer.Option("--key", help="Beginning of the key's fingerprint, as the device shows it.")
]


def each(names: Sequence[str], act: Callable[[str], object], done: str = "") -> None:
    """Do something to every name; exit 3 if it worked for some of them only.

    Args:
        names: of devices.
        act: does it; where it returns a text, that is said.
        done: what is said otherwise.
    """
    codes = []
    for name in names:
        try:
            told = act(name)
            print(f"device {name}: {done or told}")
        except LinkError:
            raise
        except LiberataiError as error:
            codes.append(complain(error))
    if codes:
        raise typer.Exit(codes[0] if len(codes) == len(names) else PARTLY)


def meant(client: Client, names: Sequence[str] | None, selector: str, group: str) -> list[str]:
    """Return the devices that an operator means.

    Raises:
        ConfigError: none was named, or both ways were used. NotFoundError: the selector fits nobody.
    """
    if bool(names) == bool(selector or group):
        raise ConfigError("devices", ["name devices, or choose them with --selector or --group"])
    if names:
        return list(names)
    found = [device.id for device in client.devices.list(selector, "", group)]
    if not found:
        raise NotFoundError(f"no device fits {selector or group}")
    return found


def add_to(app: typer.Typer) -> None:
    """Add the commands to `liberatai devices`."""
    for command, example in (
        (reject, "reject camera-99 --reason 'nobody knows it'"),
        (label, "label gateway-01 site=hall floor-"),
        (drain, "drain -l site=hall --reason 'new fans'"),
        (resume, "resume -l site=hall"),
        (decommission, "decommission camera-07 --reason stolen"),
        (ping, "ping gateway-01"),
        (probe, "probe gateway-01"),
        (logs, "logs gateway-01 -n 50"),
        (rekey, "rekey gateway-01 --key 3f9a-12c4-77b0-e51d"),
    ):
        app.command(command.__name__, epilog=f"Example: liberatai devices {example}")(command)


def reject(context: typer.Context, names: Names = None, reason: Why = "") -> None:
    """Send pending devices away; their keys are refused for good."""
    with client_of(context) as client:
        each(meant(client, names, "", ""), lambda name: client.devices.reject(name, reason), "rejected")


def label(
    context: typer.Context,
    changes: Annotated[
        list[str], typer.Argument(help="Names of devices, then NAME=VALUE; NAME- takes a label away.")
    ],
    selector: Selector = "",
    group: Group = "",
) -> None:
    """Give devices labels, or take them away."""
    names = [word for word in changes if "=" not in word and not word.endswith("-")]
    labels: dict[str, str | None] = {}
    for word in changes:
        if "=" in word:
            name, _, value = word.partition("=")
            labels[name] = value
        elif word.endswith("-"):
            labels[word[:-1]] = None
    if not labels:
        raise ConfigError("label", ["no label: write NAME=VALUE, or NAME- to take one away"])
    with client_of(context) as client:
        each(
            meant(client, names, selector, group), lambda name: client.devices.label(name, labels), "labelled"
        )


def drain(
    context: typer.Context, names: Names = None, selector: Selector = "", group: Group = "", reason: Why = ""
) -> None:
    """Give devices no new task; what they work on is finished and counts."""
    with client_of(context) as client:
        each(
            meant(client, names, selector, group), lambda name: client.devices.drain(name, reason), "drained"
        )


def resume(context: typer.Context, names: Names = None, selector: Selector = "", group: Group = "") -> None:
    """Let drained devices work again."""
    with client_of(context) as client:
        each(meant(client, names, selector, group), client.devices.resume, "works again")


def decommission(context: typer.Context, names: Names = None, reason: Why = "") -> None:
    """Remove devices for good: stolen, broken, sold. Their keys and certificates are refused."""
    with client_of(context) as client:
        each(
            meant(client, names, "", ""),
            lambda name: client.devices.decommission(name, reason),
            "decommissioned",
        )


def ping(context: typer.Context, names: Names = None, selector: Selector = "", group: Group = "") -> None:
    """Ask devices whether they are there, and how long an answer takes."""
    with client_of(context) as client:
        each(
            meant(client, names, selector, group),
            lambda name: f"answers after {duration_text(client.devices.ping(name).seconds)}",
        )


def probe(context: typer.Context, names: Names = None, selector: Selector = "", group: Group = "") -> None:
    """Let devices look at their machines again, and tell what is new."""
    with client_of(context) as client:
        each(meant(client, names, selector, group), client.devices.probe, "looked again")


def logs(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the device.", autocompletion=complete_device)],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=200, help="How many of the newest.")] = 50,
) -> None:
    """Show the newest lines of a device's log, without words about its data."""
    with client_of(context) as client:
        for line in client.devices.logs(name, lines).lines:
            print(clean(line))


def rekey(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the device.", autocompletion=complete_device)],
    key: KeyOption = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Let a device in that was set up anew (new card): take the key that asks for its name."""
    with client_of(context) as client:
        if not key and not yes:
            knocks = client.devices.show(name).knocks
            if knocks and not _agreed(f"device {name} knocks with key {knocks}: is that what it shows?"):
                raise typer.Exit(USAGE)
        each([name], lambda one: client.devices.rekey(one, key), "has its new key")


def _agreed(question: str) -> bool:
    with contextlib.suppress(typer.Abort):
        return typer.confirm(question)
    return False
