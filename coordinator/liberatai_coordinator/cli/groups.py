"""`liberatai groups`: questions about devices that have a name."""

from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import client_of, group
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    WatchOption,
    count_text,
    show_list,
    show_one,
    when_text,
)
from liberatai_coordinator.client.fleet_views import GroupView

app = group("Groups of devices: questions that have a name.", "liberatai groups list")
Name = Annotated[str, typer.Argument(help="Name of the group.")]


@app.command(
    "create", epilog="Example: liberatai groups create strong --query 'ram_mb >= 2000 and tier == \"full\"'"
)
def groups_create(
    context: typer.Context,
    name: Name,
    query: Annotated[
        str, typer.Option("--query", "-q", help="Question that is true of its devices.", show_default=False)
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a question about devices a name; who belongs to the group is found out whenever it is used."""
    with client_of(context) as client:
        show_one(client.groups.create(name, query), output)


@app.command("list", epilog="Example: liberatai groups list")
def groups_list(
    context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """List all groups and how many devices they have now."""
    with client_of(context) as client:
        show_list(client.groups.list, GROUP_COLUMNS, output, watch=watch)


@app.command("show", epilog="Example: liberatai groups show strong")
def groups_show(context: typer.Context, name: Name, output: OutputOption = Output.TABLE) -> None:
    """Show a group and the devices that it has now."""
    with client_of(context) as client:
        show_one(client.groups.show(name), output)


@app.command("delete", epilog="Example: liberatai groups delete strong")
def groups_delete(context: typer.Context, name: Name) -> None:
    """Forget a group; its devices stay."""
    with client_of(context) as client:
        client.groups.delete(name)
    print(f"group {name}: deleted")


GROUP_COLUMNS: list[Column[GroupView]] = [
    Column("GROUP", lambda row: row.name),
    Column("DEVICES", lambda row: count_text(row.count), right=True),
    Column("QUERY", lambda row: row.query, note=True),
    Column("CREATED", lambda row: when_text(row.created_s), wide=True),
]
