"""`liberatai models list`, `log`, `diff`: what is in the repository, and how it came there."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from liberatai_coordinator.cli.model_store import Ref, complete_ref, load, open_store
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    WatchOption,
    clean,
    count_text,
    progress,
    share_text,
    show,
    show_list,
    size_text,
    when_text,
)

if TYPE_CHECKING:
    from liberatai_coordinator.repository.history import Entry
    from liberatai_coordinator.repository.store import Named, Store


class CommitView(msgspec.Struct, frozen=True, kw_only=True):
    """One commit, as lists show it."""

    commit: str
    model: str
    kind: str
    names: tuple[str, ...]
    parents: tuple[str, ...]
    version: int | None
    round: int
    updates: int
    bytes: int
    variants: int
    accuracy: float | None
    author: str
    created_s: int
    message: str


def models_list(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Only this model.", autocompletion=complete_ref)] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List the tags and branches of every model, and the commits that they name."""

    def look() -> Sequence[CommitView]:
        store = open_store(context)
        names = store.names(model)
        return [
            _view(store.entry(one.digest), (f"{one.model}:{one.tag}",))
            for one in sorted(names, key=lambda one: (one.model, one.kind == "tag", one.tag))
        ]

    show_list(look, _NAME_COLUMNS, output, watch=watch)


def log(
    context: typer.Context,
    ref: Ref,
    graph: Annotated[bool, typer.Option("--graph", help="Draw which commit comes from which.")] = False,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, help="At most so many, the newest ones.")
    ] = 100,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List a commit and everything that it comes from, newest first."""
    limit = None if every else number
    if graph and output.is_table:
        store = open_store(context)
        for line in islice(_graph(store, store.find(ref)), limit):
            print(clean(line))
        return

    def look() -> Sequence[CommitView]:
        store = open_store(context)
        names = _names(store.names())
        found = islice(store.log([store.find(ref)]), limit)
        return [_view(entry, tuple(names.get(entry.digest, ()))) for entry in found]

    show_list(look, _LOG_COLUMNS, output, watch=watch)


def _names(names: Sequence["Named"]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in names:
        found.setdefault(one.digest, []).append(f"{one.model}:{one.tag}")
    return found


def _view(entry: "Entry", names: tuple[str, ...]) -> CommitView:
    return CommitView(
        commit=entry.digest,
        model=entry.model,
        kind=entry.kind,
        names=names,
        parents=entry.parents,
        version=entry.number,
        round=entry.round,
        updates=entry.updates,
        bytes=entry.bytes,
        variants=entry.variants,
        accuracy=entry.metrics.get("accuracy"),
        author=entry.author,
        created_s=entry.time,
        message=entry.message,
    )


def _graph(store: "Store", start: str) -> Iterator[str]:
    """Yield the lines of a drawing: a lane per line of descent, `*` for a commit, newest first."""
    from liberatai_coordinator.repository.names import short

    names = _names(store.names())
    lanes: list[str] = [start]
    for entry in store.log([start]):
        if entry.digest not in lanes:
            lanes.append(entry.digest)
        place = lanes.index(entry.digest)
        marks = ["*" if number == place else "|" for number in range(len(lanes))]
        told = ", ".join(names.get(entry.digest, ()))
        what = entry.message or entry.kind
        accuracy = entry.metrics.get("accuracy")
        figure = "" if accuracy is None else f" {share_text(accuracy)}"
        yield f"{' '.join(marks)} {short(entry.digest)}{f' ({told})' if told else ''} {what}{figure}"
        first, others = entry.parents[:1], entry.parents[1:]
        before = len(lanes)
        if first and first[0] not in lanes[:place] + lanes[place + 1 :]:
            lanes[place] = first[0]
        else:
            joined = lanes.index(first[0]) if first else None
            del lanes[place]
            if place < before - 1 or joined is not None:
                yield " ".join("|" if number < place else "/" for number in range(before)).rstrip()
        added = [parent for parent in others if parent not in lanes]
        if added:
            lanes += added
            yield " ".join(["|"] * (len(lanes) - len(added)) + ["\\"] * len(added))


def diff(
    context: typer.Context,
    first: Ref,
    second: Ref,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="File (npz) of inputs on which both are asked.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare two commits: how far every tensor moved, figures, bytes, and answers to the same samples."""
    from liberatai_coordinator.repository.compare import compare

    store = open_store(context)
    with progress("comparing"):
        found = compare(store, load(store, first), load(store, second), samples)
    if not output.is_table:
        show([found], [], output)
        return
    show(found.tensors, _DIFF_COLUMNS, output)
    for line in found.lines():
        print(line)


_NAME_COLUMNS: list[Column[CommitView]] = [
    Column("NAME", lambda row: ", ".join(row.names)),
    Column("COMMIT", lambda row: _short(row.commit)),
    Column("KIND", lambda row: row.kind),
    Column("VERSION", lambda row: "" if row.version is None else str(row.version), right=True),
    Column("SIZE", lambda row: size_text(row.bytes), right=True),
    Column("ACCURACY", lambda row: share_text(row.accuracy) if row.accuracy is not None else "", right=True),
    Column("CREATED", lambda row: when_text(row.created_s)),
    Column("AUTHOR", lambda row: row.author, wide=True),
    Column("MESSAGE", lambda row: row.message, note=True),
]
_LOG_COLUMNS: list[Column[CommitView]] = [
    Column("COMMIT", lambda row: _short(row.commit)),
    Column("KIND", lambda row: row.kind),
    Column("VERSION", lambda row: "" if row.version is None else str(row.version), right=True),
    Column("UPDATES", lambda row: count_text(row.updates) if row.updates else "", right=True),
    Column("SIZE", lambda row: size_text(row.bytes), right=True),
    Column("ACCURACY", lambda row: share_text(row.accuracy) if row.accuracy is not None else "", right=True),
    Column("CREATED", lambda row: when_text(row.created_s)),
    Column("NAMES", lambda row: ", ".join(row.names)),
    Column("AUTHOR", lambda row: row.author, wide=True),
    Column("PARENTS", lambda row: " ".join(map(_short, row.parents)), wide=True),
    Column("MESSAGE", lambda row: row.message, note=True),
]


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


if TYPE_CHECKING:
    from liberatai_coordinator.repository.compare import TensorDiff

_DIFF_COLUMNS: "list[Column[TensorDiff]]" = [
    Column("TENSOR", lambda row: f"{row.variant}/{row.tensor}"),
    Column("VALUES", lambda row: count_text(row.values), right=True),
    Column("CHANGED", lambda row: share_text(row.changed / max(row.values, 1)), right=True),
    Column("NORM", lambda row: f"{row.norm:.4g}", right=True),
    Column("MOVED", lambda row: f"{row.moved:.4g}", right=True),
    Column("SHARE", lambda row: share_text(row.moved / row.norm) if row.norm else "-", right=True),
]
