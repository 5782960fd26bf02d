"""`liberatai models tag`, `branch`, `trust`: names of commits, and whose commits are believed."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.model_store import Ref, load, open_store
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, show
from liberatai_core.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from liberatai_coordinator.repository.signing import Trusted

Delete = Annotated[bool, typer.Option("--delete", help="Take the name away; its commits stay.")]
Force = Annotated[bool, typer.Option("--force", help="Move the name, whatever it named.")]


def tag(
    context: typer.Context,
    ref: Ref,
    name: Annotated[str | None, typer.Argument(help="Name of the tag.")] = None,
    delete: Delete = False,
    force: Force = False,
) -> None:
    """Let a tag name a commit; it stays there. With --delete REF is the tag that goes."""
    _name(context, ref, name, "tag", delete=delete, force=force)


def branch(
    context: typer.Context,
    ref: Ref,
    name: Annotated[str | None, typer.Argument(help="Name of the branch.")] = None,
    delete: Delete = False,
    force: Force = False,
) -> None:
    """Begin a branch at a commit, or move one forward; commits move it further. --delete ends it."""
    _name(context, ref, name, "branch", delete=delete, force=force)


def _name(
    context: typer.Context, ref: str, name: str | None, kind: str, *, delete: bool, force: bool
) -> None:
    from liberatai_coordinator.repository.names import require_tag, short

    store = open_store(context)
    if delete:
        if name is not None:
            raise ConfigError(kind, ["with --delete give MODEL:NAME alone"])
        model, _, old = ref.rpartition(":")
        if not model:
            raise ConfigError(kind, [f"{ref!r}: write MODEL:NAME"])
        store.remove_ref(model, old)
        print(f"{ref}: gone")
        return
    if name is None:
        raise ConfigError(kind, [f"missing: the name of the {kind}"])
    require_tag(name)
    loaded = load(store, ref)
    store.set_ref(loaded.commit.model, name, loaded.digest, kind=kind, force=force)
    print(f"{loaded.commit.model}:{name} {short(loaded.digest)}")


def trust(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Whose key it is.")] = None,
    key: Annotated[str | None, typer.Argument(help="Ed25519 public key, 64 hex digits.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Models that it may sign, e.g. digits or 'lab/*'.")
    ] = None,
    delete: Annotated[str | None, typer.Option("--delete", help="Key that is trusted no more.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Trust a key with models; without arguments list the keys that are trusted, our own first."""
    from liberatai_coordinator.repository import trust as keys

    store = open_store(context, make=True)
    if delete is not None:
        if not keys.distrust(store.folder, delete):
            raise NotFoundError(f"{delete[:64]}: not in the trust file")
        print(f"{delete[:64]}: trusted no more")
        return
    if name is None:
        show(store.trusted(), _KEY_COLUMNS, output)
        return
    if key is None:
        raise ConfigError("trust", ["missing: the key (`liberatai models trust` on their side shows it)"])
    added = keys.trust(store.folder, name, key, tuple(model or ["*"]))
    print(f"{added.name} is trusted with {', '.join(added.models)}")


_KEY_COLUMNS: "list[Column[Trusted]]" = [
    Column("NAME", lambda row: row.name),
    Column("KEY", lambda row: row.key),
    Column("MODELS", lambda row: ", ".join(row.models)),
]
