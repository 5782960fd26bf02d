"""`liberatai models merge`: two commits become one."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.model_store import Ref, author_of, load, open_store
from liberatai_coordinator.cli.tables import Output, OutputOption, clean, dump, progress, share_text
from liberatai_core.errors import ConfigError, StateError

if TYPE_CHECKING:
    from liberatai_coordinator.repository.merge import Floats, Labelled
    from liberatai_core.structure import DataContract


def merge(
    context: typer.Context,
    first: Ref,
    second: Ref,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Labelled samples (npz) that choose the way and judge the merge."),
    ] = None,
    unlabeled: Annotated[
        Path | None,
        typer.Option("--unlabeled", help="Inputs (npz) on which both teach; needed for unlike structures."),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option("--branch", help="Branch that goes to the merge [default: that of the first]."),
    ] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="What is new, in words.")] = "",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of teaching, and of how labels are divided.")
    ] = 0,
    author: Annotated[
        str | None, typer.Option("--author", envvar="LIBERATAI_AUTHOR", help="Who commits.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Merge two commits. If the merge is worse on held-out data than a parent, nothing is named."""
    from liberatai_coordinator.repository import files
    from liberatai_coordinator.repository import merge as merging
    from liberatai_coordinator.repository.names import short

    store = open_store(context)
    one, other = load(store, first), load(store, second)
    if store.is_ancestor(other.digest, one.digest):
        print(f"{first} has {short(other.digest)} in it already")
        return
    if store.is_ancestor(one.digest, other.digest):
        raise StateError(
            f"{second} comes from {first}: nothing to merge; `liberatai models branch {second} NAME`"
        )
    model = one.commit.model
    target = branch or _branch_of(first)
    data = one.commit.data or other.commit.data
    with progress("merging"):
        made = merging.merge(
            store,
            one,
            other,
            held_out=_labelled(held_out, data),
            unlabeled=_inputs(unlabeled, data),
            seed=seed,
        )
    metrics = {f"{sid}_accuracy": value for sid, value in made.accuracy.items() if len(made.accuracy) > 1}
    if made.accuracy:
        metrics["accuracy"] = max(made.accuracy.values())
    lines = [f"{sid}: {how}" for sid, how in made.methods.items()]
    if made.conflict:
        for line in lines:
            print(clean(line), file=sys.stderr)
        raise StateError(f"conflict: the merge is worse on held-out data, nothing is named: {made.conflict}")
    about = files.About(
        model=model,
        message=message or f"merge {short(other.digest)} into {short(one.digest)}\n" + "\n".join(lines),
        author=author_of(author),
        licence=one.commit.licence or other.commit.licence,
        labels=one.commit.labels or other.commit.labels,
        input_range=one.commit.input_range or other.commit.input_range,
        metrics=metrics,
        data=data,
    )
    done = files.commit_all(
        store, made.members, about, [one.digest, other.digest], branch=target, kind="merge", origin=""
    )
    if not output.is_table:
        dump({"commit": done.digest, "methods": dict(made.methods), "accuracy": dict(made.accuracy)}, output)
        return
    print(f"{model}:{target} {short(done.digest)}")
    for line in lines:
        print(clean(line))
    for sid, value in made.accuracy.items():
        print(
            f"{sid}: {share_text(value)} on held-out data; parents {', '.join(map(share_text, made.parents))}"
        )
    if held_out is None:
        print("not judged: give --held-out")


def _branch_of(ref: str) -> str:
    from liberatai_coordinator.repository.names import BRANCH, parse_ref

    wanted = parse_ref(ref)
    return wanted.tag if wanted.tag and not wanted.back else BRANCH


def _labelled(path: Path | None, data: "DataContract | None") -> "Labelled | None":
    if path is None:
        return None
    if data is None:
        raise ConfigError(
            "--held-out", ["nobody said what data the models are for (commit --input, --classes)"]
        )
    from liberatai_core.learning.dataset import load_npz

    samples = load_npz(path, data)
    if samples.y is None:
        raise ConfigError("--held-out", [f"{path}: no labels `y`"])
    return samples.x, samples.y


def _inputs(path: Path | None, data: "DataContract | None") -> "Floats | None":
    if path is None:
        return None
    if data is None:
        raise ConfigError(
            "--unlabeled", ["nobody said what data the models are for (commit --input, --classes)"]
        )
    from liberatai_core.learning.dataset import load_unlabeled

    return load_unlabeled(path, data)
