"""`liberatai events` and `liberatai audit`: what happened, and who changed what."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Final, TypeVar

import typer

from liberatai_coordinator.cli.kit import client_of, group
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    dump,
    patiently,
    rendered,
    show,
    when_text,
)
from liberatai_coordinator.client.fleet_views import AuditView, EventView

FOLLOW_S: Final = 1.0
"""Between two questions for what is new."""

events = group("What happened in the fleet; alone: `tail`.", "liberatai events tail", alone=True)
audit = group("What operators changed; alone: `tail`.", "liberatai audit tail", alone=True)

Count = Annotated[int, typer.Option("--last", "-n", min=1, max=1000, help="How many of the newest.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")]
Entry = TypeVar("Entry", EventView, AuditView)


@events.command("tail", epilog="Example: liberatai events tail --follow")
def events_tail(
    context: typer.Context,
    device: Annotated[str, typer.Option("--device", "-d", help="Of this device only.")] = "",
    last: Count = 20,
    follow: Follow = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the newest events of the fleet, the newest last."""
    with client_of(context) as client:
        found = client.events.last(last, device)
        if not follow:
            show(found, EVENT_COLUMNS, output)
            return
        _follow(found, lambda number: client.events.after(number, device), EVENT_COLUMNS, output)


@audit.command("tail", epilog="Example: liberatai audit tail -n 50")
def audit_tail(
    context: typer.Context, last: Count = 20, follow: Follow = False, output: OutputOption = Output.TABLE
) -> None:
    """Show the newest changes that were asked for, and by whom; the newest last."""
    with client_of(context) as client:
        found = client.audit.last(last)
        if not follow:
            show(found, AUDIT_COLUMNS, output)
            return
        _follow(found, client.audit.after, AUDIT_COLUMNS, output)


@events.callback()
def _events(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        events_tail(context)


@audit.callback()
def _audit(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        audit_tail(context)


def _follow(
    found: Sequence[Entry],
    newer: Callable[[int], Sequence[Entry]],
    columns: Sequence[Column[Entry]],
    output: Output,
) -> None:
    """Write entries as they come, one a line; over restarts of the coordinator too."""
    seen = [found[-1].number if found else 0]
    _write(found, columns, output)
    for more in patiently(lambda: newer(seen[0]), every_s=FOLLOW_S):
        _write(more, columns, output)
        seen[0] = more[-1].number if more else seen[0]


def _write(entries: Sequence[Entry], columns: Sequence[Column[Entry]], output: Output) -> None:
    for entry in entries:
        if output.is_table:
            print(rendered([entry], columns, wide=True)[1])
        else:
            dump(entry, output)
    sys.stdout.flush()


EVENT_COLUMNS: list[Column[EventView]] = [
    Column("NUMBER", lambda row: str(row.number), right=True),
    Column("TIME", lambda row: when_text(row.at_s)),
    Column("DEVICE", lambda row: row.device),
    Column("EVENT", lambda row: row.name),
    Column("CODE", lambda row: row.code),
    Column("TEXT", lambda row: row.text, note=True),
]
AUDIT_COLUMNS: list[Column[AuditView]] = [
    Column("NUMBER", lambda row: str(row.number), right=True),
    Column("TIME", lambda row: when_text(row.at_s)),
    Column("WHO", lambda row: row.actor),
    Column("DID", lambda row: row.action),
    Column("TO", lambda row: row.target),
    Column("OUTCOME", lambda row: row.code or "done"),
    Column("ROLE", lambda row: row.role, wide=True),
    Column("DETAIL", lambda row: row.detail, note=True),
]
