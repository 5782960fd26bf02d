"""`liberatai models push` and `fetch`: the repository and any OCI registry."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from liberatai_coordinator.cli.model_store import Ref, author_of, open_store
from liberatai_coordinator.cli.tables import size_text
from liberatai_core.errors import ConfigError

Where = Annotated[str, typer.Argument(help="REGISTRY/NAME:TAG, e.g. registry.example.org/lab/digits:v1.")]
Plain = Annotated[bool, typer.Option("--plain-http", help="http instead of https, for a registry nearby.")]
SHOWN_S = 0.2


def push(
    context: typer.Context,
    ref: Ref,
    where: Where,
    plain: Plain = False,
    force: Annotated[bool, typer.Option("--force", help="Move the tag there, whatever it names.")] = False,
) -> None:
    """Bring a commit, its signatures and what it comes from to a registry; a cut push goes on."""
    from liberatai_coordinator.repository.names import parse_place, short
    from liberatai_coordinator.repository.remote import transfer
    from liberatai_coordinator.repository.remote.registry import Registry

    place = parse_place(where)
    if place.digest:
        raise ConfigError("push", ["a push goes to a tag, not to a digest"])
    store = open_store(context)
    with Registry(place.host, place.name, plain=plain or None) as registry, shown() as progress:
        done = transfer.push(store, store.find(ref), place, registry, force=force, progress=progress)
    print(
        f"{place} {short(done.digest)}: {done.commits} commits, {done.blobs} files, "
        f"{size_text(done.sent_bytes)} sent"
    )


def fetch(
    context: typer.Context,
    where: Where,
    model: Annotated[
        str | None, typer.Option("--model", help="Name here of what is no commit of LiberatAI.")
    ] = None,
    plain: Plain = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a tag that went back, and let the name here follow.")
    ] = False,
) -> None:
    """Bring a commit, or a model of somebody else, here from a registry: verified, or not at all."""
    from liberatai_coordinator.repository.names import parse_place, require_model, short
    from liberatai_coordinator.repository.remote import transfer
    from liberatai_coordinator.repository.remote.registry import Registry

    place = parse_place(where)
    if model is not None:
        require_model(model)
    store = open_store(context, make=True)
    with Registry(place.host, place.name, plain=plain or None) as registry, shown() as progress:
        done = transfer.fetch(
            store, place, registry, model=model, author=author_of(None), force=force, progress=progress
        )
    digest = done.loaded.digest
    print(f"{done.name or done.loaded.commit.model} {short(digest)}: {done.commits} commits are new")
    if done.imported:
        print("no commit of LiberatAI: imported and signed with the key of this repository")
    if done.shallow:
        print("part of its history is not at the registry any more")
    if not done.name:
        here = f"{done.loaded.commit.model}:{place.tag}"
        print(f"{here} here is not part of it: `liberatai models merge {here} {short(digest)}`")


@contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a transfer is, on a screen only."""
    last = 0.0

    def told(what: str, done: int, whole: int) -> None:
        nonlocal last
        if not sys.stderr.isatty() or (time.monotonic() - last < SHOWN_S and done < whole):
            return
        last = time.monotonic()
        share = done / max(whole, 1)
        print(
            f"\r\x1b[K{what}: {size_text(done)} of {size_text(whole)} ({share:.0%})", end="", file=sys.stderr
        )

    try:
        yield told
    finally:
        if last:
            print("\r\x1b[K", end="", file=sys.stderr)
