"""`liberatai models verify` and `gc`: is everything whole, and what may go."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
from typing import Annotated

import typer

from liberatai_coordinator.cli.model_store import complete_ref, open_store
from liberatai_coordinator.cli.tables import clean, progress, size_text
from liberatai_core.errors import ConfigError

FAILED = 1


def verify(
    context: typer.Context,
    ref: Annotated[
        str | None, typer.Argument(help="Commit [default: all that has a name].", autocompletion=complete_ref)
    ] = None,
) -> None:
    """Read every file of commits and of what they come from: digests, records, signatures."""
    from liberatai_coordinator.repository import care

    store = open_store(context)
    starts = [store.find(ref)] if ref else sorted({one.digest for one in store.names()})
    faults: dict[str, str] = {}
    checked = 0
    with progress("reading"):
        for start in starts:
            faults |= {str(fault): fault.code for fault in care.verify(store, start)}
            checked += 1
    for text, code in faults.items():
        print(f"liberatai: {code}: {clean(text)}", file=sys.stderr)
    if faults:
        raise typer.Exit(FAILED)
    print(f"{checked} names and all that they come from: whole")


def gc(
    context: typer.Context,
    newest: Annotated[
        int | None,
        typer.Option("--newest", min=1, help="Keep the files of so many newest commits of every model."),
    ] = None,
    every: Annotated[int, typer.Option("--every", min=0, help="And of every so many-th version.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what nothing names. With --newest old commits lose their files; what has a name never does."""
    from liberatai_coordinator.repository import care
    from liberatai_coordinator.repository.names import short

    if newest is None and every:
        raise ConfigError("--every", ["only with --newest: without it no commit loses its files"])
    store = open_store(context)
    with progress("collecting"):
        going, freed = care.gc(
            store,
            lambda entry, age: (
                newest is None
                or age < newest
                or bool(every and entry.number is not None and entry.number % every == 0)
            ),
            dry_run=dry_run,
        )
    for digest in going:
        print(f"{short(digest)}: its files {'would go' if dry_run else 'are gone'}; what it was stays known")
    print(f"{size_text(freed)} {'would be freed' if dry_run else 'freed'}")
