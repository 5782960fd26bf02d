"""`liberatai models fit`: variants that fit a byte budget, made without labels."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from liberatai_coordinator.cli.kit import (
    Model,
    Version,
    budget_of,
    budget_of_profile,
    client_of,
    only_structure,
)
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    clean,
    count_text,
    dump,
    duration_text,
    progress,
    share_text,
    show,
    size_text,
)
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import (
    VariantView,
    VersionView,
)
from liberatai_coordinator.pictures.fit_report import FitPoint, FitReport
from liberatai_coordinator.store.manifests import MAX_WHY, VariantManifest
from liberatai_core.contract.limits import MAX_TEXT
from liberatai_core.errors import ConfigError, DigestError
from liberatai_core.structure import DataContract, Structure

if TYPE_CHECKING:
    from liberatai_core.learning.dataset import Samples
    from liberatai_core.learning.fitting import OnProgress, Variant
    from liberatai_core.weights import Vector

LOST = (
    "no --unlabeled: nothing was retrained, and neither divergence nor agreement was measured; importance "
    "comes from the weights alone, which costs accuracy at small budgets"
)


# --- fit -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Original:
    """What is fitted: one structure of one version."""

    view: VersionView
    structure: Structure
    data: DataContract
    weights: "Vector"


def fit(
    context: typer.Context,
    name: Model,
    budgets: Annotated[
        list[str] | None, typer.Option("--budget", help="Size of the file, e.g. 120KB; may be repeated.")
    ] = None,
    profiles: Annotated[
        list[str] | None,
        typer.Option("--profile", help="What this class of hardware lets a model take; may be repeated."),
    ] = None,
    structure: Annotated[
        str | None, typer.Option("--structure", help="Which one; may be left out if there is only one.")
    ] = None,
    version: Version = "latest",
    unlabeled: Annotated[
        Path | None,
        typer.Option("--unlabeled", help="File (npz) with inputs; labels in it are never looked at."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="Labelled file (npz): measures accuracy, decides nothing.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder for a picture (fit.png) and figures (fit.json).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=1_000_000, help="Steps of retraining per variant.")
    ] = None,
    no_retrain: Annotated[bool, typer.Option("--no-retrain", help="Search only: no retraining.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Of everything random.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Folder where an interrupted fit goes on from [default: that of the socket].",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Commit nothing.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compress a model into byte budgets, without labels, and commit what came out as variants.

    It runs in this process: the coordinator stays free for its devices. The variants are committed when all
    are made; interrupted before, nothing is, and the same command goes on where it stopped.
    """
    wanted = _budgets(budgets, profiles)
    if no_retrain and steps is not None:
        raise ConfigError("--steps", ["goes without --no-retrain only: there is nothing to retrain"])
    if report is not None:
        from liberatai_coordinator.pictures import fit_report

        fit_report.require_parts(report)
    with client_of(context) as client:
        with progress(f"loading {name}"):
            original = _original(client, name, version, structure)
            x_unlabeled, samples = _data(unlabeled, test, original.data)
        made = _fitted(
            original,
            wanted,
            x_unlabeled,
            samples,
            steps=steps,
            retrain=not no_retrain,
            seed=seed,
            cache=(cache or Path(context.obj).absolute().parent) / "fit",
        )
        ids = [] if dry_run else [_commit(client, original, one, seed).id for one in made]
    found = _report(original, made, ids, x_unlabeled, samples, seed=seed, dry_run=dry_run)
    _show_fit(found, output)
    if report is not None:
        for path in fit_report.write(found, report):
            print(f"{path}: written", file=sys.stderr)


def _budgets(sizes: Sequence[str] | None, profiles: Sequence[str] | None) -> list[int]:
    """Return all budgets, in bytes, from large to small."""
    found = {budget_of(text, "--budget") for text in sizes or ()}
    found |= {budget_of_profile(name) for name in profiles or ()}
    if not found:
        raise ConfigError("models fit", ["give --budget or --profile: how large may the file be?"])
    return sorted(found, reverse=True)


def _original(client: Client, name: str, ref: str, structure: str | None) -> _Original:
    view = client.models.version(name, ref)
    chosen = only_structure(view, structure)
    shape, data, content = client.models.weights(name, str(view.version), chosen)
    from liberatai_core.weights import digest, from_bytes

    vector = from_bytes(content)
    if digest(vector).hex() != view.digests[chosen]:
        raise DigestError(f"{name} version {view.version}: {chosen} does not have its digest; nothing fitted")
    return _Original(view=view, structure=shape, data=data, weights=vector)


def _data(unlabeled: Path | None, test: Path | None, data: DataContract) -> "tuple[Any, Samples | None]":
    from liberatai_core.learning.dataset import load_labelled, load_unlabeled

    x = None if unlabeled is None else load_unlabeled(unlabeled, data, keep_test=False)
    samples = None if test is None else load_labelled(test, data)
    same = unlabeled is not None and test is not None and unlabeled.resolve() == test.resolve()
    if same and samples is not None and (samples.test is None or not samples.test.any()):
        fault = "the same file as --unlabeled, and it marks no samples as test: what teaches cannot test"
        raise ConfigError("--test", [fault])
    return x, samples


def _test_part(samples: "Samples | None") -> Any:
    """Return (inputs, labels) of a test file: the part that it marks as test samples, or all of it."""
    if samples is None or samples.y is None:
        return None
    if samples.test is None or not samples.test.any():
        return samples.x, samples.y
    return samples.x[samples.test], samples.y[samples.test]


def _fitted(
    original: _Original,
    budgets: list[int],
    x_unlabeled: Any,
    samples: "Samples | None",
    *,
    steps: int | None,
    retrain: bool,
    seed: int,
    cache: Path,
) -> "list[Variant]":
    from liberatai_core.learning import fitting

    settings = fitting.FitSettings(retrain=retrain)
    if steps is not None:
        settings = msgspec.structs.replace(settings, steps=steps)
    with _fit_progress() as told:
        return fitting.fit(
            original.structure,
            original.data,
            original.weights,
            budgets,
            x_unlabeled,
            settings,
            seed,
            test=_test_part(samples),
            on_progress=told,
            cache=cache,
        )


@contextmanager
def _fit_progress() -> "Iterator[OnProgress | None]":
    """Draw one bar per kind of work, on a screen only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        known: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(clean(what), total=total)
            bars.update(known[what], completed=done, total=total)

        yield told


def _commit(client: Client, original: _Original, variant: "Variant", seed: int) -> VariantView:
    from liberatai_core.compressor.artifact import restore
    from liberatai_core.weights import digest

    manifest = VariantManifest(
        model=original.view.model,
        parent=original.view.id,
        parent_structure=original.structure.id,
        structure=variant.structure,
        data=original.data,
        file=hashlib.sha256(variant.file).hexdigest(),
        size=len(variant.file),
        digest=digest(restore(variant.file, variant.structure)).hex(),
        budget_bytes=variant.budget_bytes,
        method=variant.method[:MAX_TEXT],
        why=variant.why[:MAX_WHY],
        divergence=_measured(variant.divergence),
        agreement=_measured(variant.agreement),
        accuracy=variant.accuracy,
        seed=seed,
    )
    return client.variants.commit(str(original.view.version), manifest, variant.file)


def _measured(figure: float) -> float | None:
    """Return a figure without the noise below zero that float32 leaves of a divergence; None for NaN."""
    return None if math.isnan(figure) else max(0.0, figure)


def _report(
    original: _Original,
    variants: "Sequence[Variant]",
    ids: Sequence[str],
    x_unlabeled: Any,
    samples: "Samples | None",
    *,
    seed: int,
    dry_run: bool,
) -> FitReport:
    from liberatai_core.learning import fitting

    best = {id(one) for one in fitting.pareto(variants)}
    float32_bytes = 4 * original.structure.parameters
    named = ids or [""] * len(variants)
    points = [
        FitPoint(
            budget_bytes=one.budget_bytes,
            file_bytes=len(one.file),
            ratio=float32_bytes / len(one.file),
            bits_per_weight=8 * len(one.file) / one.structure.parameters,
            divergence=_measured(one.divergence),
            agreement=_measured(one.agreement),
            accuracy=one.accuracy,
            structure=one.structure.id,
            smaller=one.structure != original.structure,
            method=one.method,
            why=one.why,
            seconds=one.seconds,
            pareto=id(one) in best,
            id=name,
        )
        for one, name in zip(variants, named, strict=True)
    ]
    labelled = _test_part(samples)
    measured = None
    if labelled is not None:
        measured = fitting.accuracy(original.structure, original.data, original.weights, *labelled)
    samples_given = 0 if x_unlabeled is None else len(x_unlabeled)
    return FitReport(
        model=original.view.model,
        version=original.view.version,
        parent=original.view.id,
        structure=original.structure.id,
        parameters=original.structure.parameters,
        float32_bytes=float32_bytes,
        seed=seed,
        unlabeled_samples=samples_given,
        judged_samples=fitting.judging(samples_given) or samples_given,
        judged_apart=fitting.judging(samples_given) > 0,
        test_samples=0 if labelled is None else len(labelled[0]),
        accuracy=measured,
        dry_run=dry_run,
        points=tuple(sorted(points, key=lambda point: point.file_bytes)),
        lost=LOST if x_unlabeled is None else "",
    )


def _show_fit(report: FitReport, output: Output) -> None:
    if output is Output.NAME:
        show([point for point in report.points if point.id], [Column("ID", lambda row: row.id)], output)
        return
    if not output.is_table:
        dump(report, output)
        return
    right = (
        ""
        if report.accuracy is None
        else f", accuracy {report.accuracy:.2%} on {report.test_samples} samples"
    )
    print(
        f"{report.model} version {report.version}, {report.structure}: "
        f"{count_text(report.parameters)} weights, {size_text(report.float32_bytes)} as float32{right}"
    )
    if report.lost:
        print(f"{report.lost}.")
    elif report.judged_apart:
        print(f"agreement and divergence: on {report.judged_samples} unlabeled samples that taught nothing")
    else:
        print(
            f"agreement and divergence: on the {report.judged_samples} samples that also taught: they say "
            "little, but there are too few to keep some apart"
        )
    print()
    show(report.points, _POINT_COLUMNS, output)
    print()
    for point in report.points:
        print(f"{point.budget_bytes} bytes: {clean(point.why) or clean(point.method)}")
    if report.dry_run:
        print("dry run: nothing was committed")


_POINT_COLUMNS: list[Column[FitPoint]] = [
    Column("BUDGET", lambda row: f"{count_text(row.budget_bytes)} B", right=True),
    Column("FILE", lambda row: f"{count_text(row.file_bytes)} B", right=True),
    Column("RATIO", lambda row: f"{row.ratio:.1f}x", right=True),
    Column("BITS/WEIGHT", lambda row: f"{row.bits_per_weight:.2f}", right=True),
    Column("DIVERGENCE", lambda row: "-" if row.divergence is None else f"{row.divergence:.4f}", right=True),
    Column("AGREEMENT", lambda row: share_text(row.agreement), right=True),
    Column("ACCURACY", lambda row: share_text(row.accuracy), right=True),
    Column("PARETO", lambda row: "yes" if row.pareto else "no"),
    Column("METHOD", lambda row: row.method, note=True),
    Column("TIME", lambda row: duration_text(row.seconds), right=True),
    Column("ID", lambda row: row.id[:12] or "-"),
    Column("STRUCTURE", lambda row: row.structure, wide=True),
]
