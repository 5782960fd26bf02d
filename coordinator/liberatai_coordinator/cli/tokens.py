"""`liberatai tokens`: who may use the API from another machine."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import msgspec
import typer

from liberatai_coordinator.cli.kit import client_of, group
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    ago_text,
    show,
    show_one,
    when_text,
)
from liberatai_coordinator.client.fleet_views import Role, TokenView
from liberatai_core.errors import ConfigError

app = group("Tokens: who may use the API from another machine.", "liberatai tokens list")
Name = Annotated[str, typer.Argument(help="Name of the token.")]


@app.command("create", epilog="Example: liberatai tokens create anna --role operator --ttl 90d")
def tokens_create(
    context: typer.Context,
    name: Name,
    role: Annotated[str, typer.Option("--role", help="viewer, operator or admin.")] = "viewer",
    ttl: Annotated[
        str, typer.Option("--ttl", help="How long it is worth something: 12h, 90d; 0: for ever.")
    ] = "90d",
    out: Annotated[
        Path | None, typer.Option("--out", help="New file for it, which its owner alone can read.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a token; it is shown this once, or written into a file."""
    found = re.fullmatch(r"(\d+)([hd])|0", ttl)
    if role not in ("viewer", "operator", "admin") or found is None:
        raise ConfigError("tokens", ["--role is viewer, operator or admin; --ttl like 12h, 90d or 0"])
    ttl_s = 0.0 if ttl == "0" else float(found[1]) * {"h": 3600.0, "d": 86_400.0}[found[2]]
    with client_of(context) as client:
        if out is None:
            show_one(client.tokens.create(name, msgspec.convert(role, Role), ttl_s), output)
            return
        with _new_file(out) as file:  # first: a token that cannot be kept is not made
            made = client.tokens.create(name, msgspec.convert(role, Role), ttl_s)
            file.write(made.token + "\n")
    until = f", until {when_text(made.expires_at)}" if made.expires_at else ""
    print(f"{out}: token {name}, {role}{until}")


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Give a file that its owner alone can read; it is removed if what fills it fails."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError("--out", [f"{path}: {error.strerror}"]) from None
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@app.command("list", epilog="Example: liberatai tokens list")
def tokens_list(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List all tokens, without what they are."""
    with client_of(context) as client:
        show(client.tokens.list(), TOKEN_COLUMNS, output)


@app.command("revoke", epilog="Example: liberatai tokens revoke anna")
def tokens_revoke(context: typer.Context, name: Name) -> None:
    """Let a token be worth nothing from now on."""
    with client_of(context) as client:
        client.tokens.revoke(name)
    print(f"token {name}: revoked")


TOKEN_COLUMNS: list[Column[TokenView]] = [
    Column("TOKEN", lambda row: row.name),
    Column("ROLE", lambda row: row.role),
    Column("ENDS", lambda row: when_text(row.expires_at) if row.expires_at else "never"),
    Column("USED", lambda row: ago_text(row.used_at), right=True),
    Column("CREATED", lambda row: when_text(row.created_s), wide=True),
]
