"""`liberatai devices invite`: tokens by which devices join, and who has used which."""

import re
import sys
from typing import Annotated, Final, Literal

import typer

from liberatai_coordinator.cli.kit import client_of
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, dump, show, when_text
from liberatai_coordinator.client.views import InvitationView
from liberatai_coordinator.client.wire import InvitationRequest
from liberatai_core.errors import ConfigError

UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
MAX_TTL_S: Final = 30 * 86_400.0
_TIME = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhd])")


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to those of the group."""
    app.command("invite", epilog="Example: liberatai devices invite --profile pi4 --ttl 1h")(devices_invite)
    app.command("invitations", epilog="Example: liberatai devices invitations")(devices_invitations)


def devices_invite(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Number of tokens, each for one device.")] = 1,
    ttl: Annotated[str, typer.Option(help="How long they may be used: 30m, 1h, 7d.")] = "1h",
    device: Annotated[str, typer.Option(help="Name that the device must take; empty: its host name.")] = "",
    profile: Annotated[str, typer.Option(help="Hardware class that goes into the device's settings.")] = "",
    group: Annotated[str, typer.Option(help="Value of the label `group` that the device gets.")] = "",
    by_hand: Annotated[
        bool, typer.Option("--by-hand", help="An operator compares keys and approves, then it is let in.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make one-time tokens, and print the line to run on each device."""
    approval: Literal["auto", "hand"] = "hand" if by_hand else "auto"
    wanted = InvitationRequest(
        count=count, ttl_s=seconds_of(ttl), device=device, profile=profile, group=group, approval=approval
    )
    with client_of(context) as client:
        made = client.invitations.create(wanted)
    if not output.is_table:
        dump(made, output)
        return
    for one in made:
        print(one.line)
    many = f"each of the {len(made)} lines lets one device" if len(made) > 1 else "this line lets one device"
    until = f"until {when_text(made[0].expires_s)}"
    print(f"liberatai: {many} join {until}; treat it as a password", file=sys.stderr)


def devices_invitations(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List invitations: which are open, and which device has used which."""
    with client_of(context) as client:
        show(client.invitations.list(), _COLUMNS, output)


def seconds_of(text: str) -> float:
    """Return a duration that an operator wrote, in seconds.

    Raises:
        ConfigError: it is none, or longer than an invitation should last.
    """
    found = _TIME.fullmatch(text.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 1 <= seconds <= MAX_TTL_S:
        raise ConfigError("--ttl", [f"{text!r}: write a time like 30m, 1h or 7d, at most 30d"])
    return seconds


_COLUMNS: list[Column[InvitationView]] = [
    Column("CLAIM", lambda row: row.claim),
    Column("STATE", lambda row: row.state),
    Column("DEVICE", lambda row: row.device),
    Column("APPROVAL", lambda row: row.approval),
    Column("UNTIL", lambda row: when_text(row.expires_s)),
    Column("PROFILE", lambda row: row.profile),
    Column("GROUP", lambda row: row.group),
    Column("USED", lambda row: when_text(row.used_s) if row.used_s else "", wide=True),
]
