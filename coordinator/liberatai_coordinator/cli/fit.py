"""`liberatai models fit`, `pull` and `show`: variants that fit a byte budget, made, chosen and explained."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from liberatai_coordinator.cli.kit import (
    Column,
    Output,
    OutputOption,
    budget_of,
    budget_of_profile,
    clean,
    client_of,
    dump,
    only_structure,
    progress,
    show,
    show_one,
    size_text,
)
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import (
    EnsembleView,
    SizesView,
    TensorView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.pictures import heat_map as heat_maps
from liberatai_coordinator.pictures.fit_report import FitPoint, FitReport
from liberatai_coordinator.store.manifests import MAX_WHY, VariantManifest
from liberatai_core.contract.limits import MAX_TEXT
from liberatai_core.errors import ConfigError, DigestError, DiskError, NotFoundError
from liberatai_core.structure import DataContract, Structure

if TYPE_CHECKING:
    from liberatai_core.learning.dataset import Samples
    from liberatai_core.learning.fitting import OnProgress, Variant
    from liberatai_core.weights import Vector

CLASSES_ACROSS, CLASSES_DOWN = 12, 40
"""Classes that fit a line of 80 characters, and lines that fit a screen."""

LOST = (
    "no --unlabeled: nothing was retrained, and neither divergence nor agreement was measured; importance "
    "comes from the weights alone, which costs accuracy at small budgets"
)

Name = Annotated[str, typer.Argument(help="Name of the model.")]
Ref = Annotated[str, typer.Option("--version", help="Number, tag or latest.")]


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
    name: Name,
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
    version: Ref = "latest",
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
    view = client.version(name, ref)
    chosen = only_structure(view, structure)
    shape, data, content = client.weights(name, str(view.version), chosen)
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
    return client.commit_variant(str(original.view.version), manifest, variant.file)


def _measured(figure: float) -> float | None:
    """Return a figure without the noise below zero that float32 leaves of a divergence; None for NaN."""
    return None if math.isnan(figure) else max(0.0, figure)


def _report(
    original: _Original,
    made: "Sequence[Variant]",
    ids: Sequence[str],
    x_unlabeled: Any,
    samples: "Samples | None",
    *,
    seed: int,
    dry_run: bool,
) -> FitReport:
    from liberatai_core.learning import fitting

    best = {id(one) for one in fitting.pareto(made)}
    float32_bytes = 4 * original.structure.parameters
    named = ids or [""] * len(made)
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
        for one, name in zip(made, named, strict=True)
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


def _show_fit(found: FitReport, output: Output) -> None:
    if output in (Output.JSON, Output.YAML):
        dump(found, output)
        return
    right = (
        "" if found.accuracy is None else f", accuracy {found.accuracy:.2%} on {found.test_samples} samples"
    )
    print(
        f"{found.model} version {found.version}, {found.structure}: {found.parameters} weights, "
        f"{size_text(found.float32_bytes)} as float32{right}"
    )
    if found.lost:
        print(f"{found.lost}.")
    elif found.judged_apart:
        print(f"agreement and divergence: on {found.judged_samples} unlabeled samples that taught nothing")
    else:
        print(
            f"agreement and divergence: on the {found.judged_samples} samples that also taught: they say "
            "little, but there are too few to keep some apart"
        )
    print()
    show(found.points, _POINT_COLUMNS, output)
    print()
    for point in found.points:
        print(f"{point.budget_bytes} bytes: {clean(point.why) or clean(point.method)}")
    if found.dry_run:
        print("dry run: nothing was committed")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


_POINT_COLUMNS: list[Column[FitPoint]] = [
    Column("BUDGET", lambda row: f"{row.budget_bytes} B", right=True),
    Column("FILE", lambda row: f"{row.file_bytes} B", right=True),
    Column("RATIO", lambda row: f"{row.ratio:.1f}x", right=True),
    Column("BITS/WEIGHT", lambda row: f"{row.bits_per_weight:.2f}", right=True),
    Column("DIVERGENCE", lambda row: "-" if row.divergence is None else f"{row.divergence:.4f}", right=True),
    Column("AGREEMENT", lambda row: _share(row.agreement), right=True),
    Column("ACCURACY", lambda row: _share(row.accuracy), right=True),
    Column("PARETO", lambda row: "yes" if row.pareto else "no"),
    Column("METHOD", lambda row: row.method),
    Column("SECONDS", lambda row: f"{row.seconds:.1f}", right=True),
    Column("ID", lambda row: row.id[:12] or "-"),
    Column("STRUCTURE", lambda row: row.structure, wide=True),
]


# --- pull ----------------------------------------------------------------------------------------


def pull(
    context: typer.Context,
    name: Name,
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    budget: Annotated[
        str | None, typer.Option("--budget", help="The best variant whose file is not larger, e.g. 120KB.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="The best variant that this class of hardware can store.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="This variant: the beginning of its id.")
    ] = None,
    structure: Annotated[
        str | None, typer.Option("--structure", help="Only variants made from this structure.")
    ] = None,
    version: Ref = "latest",
    output: OutputOption = Output.TABLE,
) -> None:
    """Write the file of a variant: the one that answers best among those that fit, or one by its id."""
    given = [one for one in (budget, profile, variant) if one is not None]
    if len(given) != 1:
        raise ConfigError("models pull", ["give one of --budget, --profile and --variant"])
    with client_of(context) as client, progress(f"pulling {name}"):
        if variant is not None:
            found = client.variant(name, variant)
        else:
            room = budget_of(budget, "--budget") if budget is not None else budget_of_profile(str(profile))
            found = client.variant(name, _best(client, name, version, room, structure).id)
        file = client.variant_file(found.variant)
    _write_checked(found, file, out)
    if output in (Output.JSON, Output.YAML):
        dump(found, output)
        return
    print(f"{out}: {_variant_line(found.variant)}")


def _best(client: Client, name: str, version: str, budget_bytes: int, structure: str | None) -> VariantView:
    from liberatai_coordinator.client.choice import best_variant

    view = client.version(name, version)
    if structure is not None and structure not in view.digests:
        known = ", ".join(sorted(view.digests))
        raise ConfigError("--structure", [f"{name} version {view.version} has {known}"])
    every = client.variants(name, str(view.version))
    variants = [one for one in every if structure in (None, one.parent_structure)]
    found = best_variant(variants, budget_bytes)
    if found is None:
        have = f"the smallest has {min(one.bytes for one in variants)} bytes" if variants else "there is none"
        raise NotFoundError(
            f"{name} version {view.version}: no variant of at most {budget_bytes} bytes ({have}); make one: "
            f"`liberatai models fit {name} --structure {structure or min(view.digests)} "
            f"--budget {budget_bytes} --unlabeled FILE.npz`"
        )
    rivals = [one for one in variants if one.bytes <= budget_bytes]
    origins = sorted({one.parent_structure for one in rivals})
    if len(origins) > 1 and any(one.accuracy is None for one in rivals):
        fault = (
            f"missing: variants of {' and '.join(origins)} fit, and agreement with unlike originals "
            "cannot be compared; name one, or fit them with --test"
        )
        raise ConfigError("--structure", [fault])
    return found


def _write_checked(found: VariantDetail, file: bytes, out: Path) -> None:
    """Write a file that decodes to the weights that its variant names."""
    from liberatai_core.compressor.artifact import restore
    from liberatai_core.weights import digest

    if digest(restore(file, found.structure)).hex() != found.variant.digest:
        raise DigestError(
            f"variant {found.variant.id[:12]} decodes to other weights than it names: not written"
        )
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_bytes(file)
        part.replace(out)
    except OSError as error:
        raise DiskError(f"{out}: cannot be written ({error.strerror})") from None


def _variant_line(one: VariantView) -> str:
    figures = [
        f"{text} {value:.2%}"
        for text, value in (("accuracy", one.accuracy), ("agreement", one.agreement))
        if value is not None
    ]
    words = [
        f"{one.model} version {one.version}",
        f"variant {one.id[:12]}",
        one.structure,
        f"{one.bytes} bytes",
        clean(one.method),
    ]
    return ", ".join([*words, *figures])


# --- show ----------------------------------------------------------------------------------------


class VersionDetail(VersionView, frozen=True, kw_only=True):
    """A version, how its structures answer together, where the bytes of its files go, and its variants."""

    weights: EnsembleView
    sizes: tuple[SizesView, ...]
    variants: tuple[VariantView, ...]


def show_version(
    context: typer.Context,
    name: Name,
    version: Ref = "latest",
    variant: Annotated[
        str | None, typer.Option("--variant", help="A variant instead: the beginning of its id.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Every tensor by itself, as with -o wide.")
    ] = False,
    heat_map: Annotated[
        Path | None,
        typer.Option("--heat-map", help="Draw the ensemble's weights per class: a file .png or .html."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show one version: its digests, its ensemble, where the bytes of its files go, and its variants."""
    whole = tensors or output is Output.WIDE
    if heat_map is not None:
        if variant is not None:
            raise ConfigError("--heat-map", ["a variant is one structure: it has no ensemble"])
        heat_maps.require(heat_map)
    with client_of(context) as client:
        if variant is not None:
            _show_variant(client.variant(name, variant), output, whole=whole)
            return
        view = client.version(name, version)
        ensemble = client.ensemble(name, str(view.version))
        sizes = tuple(client.sizes(name, str(view.version), one) for one in sorted(view.digests))
        variants = tuple(client.variants(name, str(view.version)))
    if output in (Output.JSON, Output.YAML):
        fields = {field: getattr(view, field) for field in view.__struct_fields__}
        dump(VersionDetail(**fields, weights=ensemble, sizes=sizes, variants=variants), output)
        _draw(ensemble, view, heat_map)
        return
    show_one(view, output)
    _show_weights(ensemble, output, whole=whole)
    for one in sizes:
        deltas = f" and {size_text(one.delta_bytes)} of deltas" if one.delta_bytes else ""
        print()
        print(f"{one.structure}: {one.parameters} weights, keyframe {size_text(one.keyframe_bytes)}{deltas}")
        _show_tensors(one.tensors, one.keyframe_bytes, output, whole=whole)
    if variants:
        print()
        show(variants, _VARIANT_COLUMNS, output)
    _draw(ensemble, view, heat_map)


def _draw(ensemble: EnsembleView, view: VersionView, path: Path | None) -> None:
    if path is not None:
        with progress("drawing"):
            heat_maps.write(ensemble, f"{view.model} version {view.version}: ensemble", path)
        print(f"{path}: written", file=sys.stderr)


_Weights = tuple[str, Sequence[float]]
"""A line of a table of weights: its name, its numbers."""


def _show_weights(ensemble: EnsembleView, output: Output, *, whole: bool) -> None:
    """Write the ensemble's weights: classes across if they fit, else down, else how they spread."""
    if not ensemble.weights:
        return
    classes = len(ensemble.weights[0])
    print()
    print(f"ensemble: {clean(heat_maps.sentence(ensemble))}")
    members = list(zip(ensemble.members, ensemble.weights, strict=True))
    if classes <= CLASSES_ACROSS:
        across: list[Column[_Weights]] = [
            Column("STRUCTURE", lambda row: row[0]),
            *(_weight_column(str(number), number) for number in range(classes)),
        ]
        show(members, across, output)
    elif whole or classes <= CLASSES_DOWN:
        down = [(str(number), [row[number] for _, row in members]) for number in range(classes)]
        columns: list[Column[_Weights]] = [
            Column("CLASS", lambda row: row[0], right=True),
            *(_weight_column(sid, place) for place, (sid, _) in enumerate(members)),
        ]
        show(down, columns, output)
    else:
        show([(sid, (min(row), fmean(row), max(row))) for sid, row in members], _SPREAD_COLUMNS, output)
        print(f"{classes} classes: --tensors or -o wide lists them")


def _weight_column(title: str, place: int) -> Column[_Weights]:
    return Column(title, lambda row: f"{row[1][place]:.2f}", right=True)


def _show_variant(found: VariantDetail, output: Output, *, whole: bool) -> None:
    if output in (Output.JSON, Output.YAML):
        dump(found, output)
        return
    show_one(found.variant, output)
    print()
    _show_tensors(found.tensors, found.variant.bytes, output, whole=whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One line of where a file's bytes go."""

    name: str
    shape: str
    kind: str
    tensors: int
    weights: int
    size_bytes: int
    distinct: int
    share: float


def _parts(tensors: Sequence[TensorView], file_bytes: int, *, whole: bool) -> list[_Part]:
    """Return one line per tensor or per kind of coding; the file's header is a kind too."""
    named = [(one.name, one.kind, [one]) for one in tensors]
    if not whole:
        ranked = sorted(tensors, key=lambda one: one.kind)
        groups = [(kind, list(members)) for kind, members in groupby(ranked, key=lambda one: one.kind)]
        named = [(_how_many(members), kind, members) for kind, members in groups]
        named.sort(key=lambda row: -sum(one.bytes for one in row[2]))
    return [
        _Part(
            name=name,
            shape="x".join(map(str, members[0].shape)) if whole else "",
            kind=kind,
            tensors=len(members),
            weights=sum(one.weights for one in members),
            size_bytes=sum(one.bytes for one in members),
            distinct=max(one.distinct for one in members),
            share=sum(one.bytes for one in members) / file_bytes,
        )
        for name, kind, members in named
    ]


def _how_many(members: Sequence[TensorView]) -> str:
    return members[0].name if len(members) == 1 else f"{len(members)} tensors"


def _show_tensors(tensors: Sequence[TensorView], file_bytes: int, output: Output, *, whole: bool) -> None:
    """Write where the bytes of one file go."""
    columns = [one for one in _PART_COLUMNS if whole or one.title not in ("SHAPE", "DISTINCT")]
    show(_parts(tensors, file_bytes, whole=whole), columns, output)


def _optional(row: _Part, text: Callable[[_Part], str]) -> str:
    return text(row) if row.weights else "-"


_PART_COLUMNS: list[Column[_Part]] = [
    Column("TENSOR", lambda row: row.name),
    Column("SHAPE", lambda row: row.shape),
    Column("WEIGHTS", lambda row: _optional(row, lambda one: str(one.weights)), right=True),
    Column("KIND", lambda row: row.kind),
    Column("BYTES", lambda row: str(row.size_bytes), right=True),
    Column(
        "BITS/WEIGHT",
        lambda row: _optional(row, lambda one: f"{8 * one.size_bytes / one.weights:.2f}"),
        right=True,
    ),
    Column("DISTINCT", lambda row: _optional(row, lambda one: str(one.distinct)), right=True),
    Column("SHARE", lambda row: f"{row.share:.1%}", right=True),
]
_SPREAD_COLUMNS: list[Column[_Weights]] = [
    Column("STRUCTURE", lambda row: row[0]),
    _weight_column("LEAST", 0),
    _weight_column("MEAN", 1),
    _weight_column("MOST", 2),
]
_VARIANT_COLUMNS: list[Column[VariantView]] = [
    Column("VARIANT", lambda row: row.id[:12]),
    Column("STRUCTURE", lambda row: row.structure),
    Column("FILE", lambda row: f"{row.bytes} B", right=True),
    Column("BUDGET", lambda row: f"{row.budget_bytes} B", right=True),
    Column("BITS/WEIGHT", lambda row: f"{8 * row.bytes / row.parameters:.2f}", right=True),
    Column("DIVERGENCE", lambda row: "-" if row.divergence is None else f"{row.divergence:.4f}", right=True),
    Column("AGREEMENT", lambda row: _share(row.agreement), right=True),
    Column("ACCURACY", lambda row: _share(row.accuracy), right=True),
    Column("METHOD", lambda row: row.method),
    Column("FROM", lambda row: row.parent_structure, wide=True),
    Column("WHY", lambda row: row.why, wide=True),
]
