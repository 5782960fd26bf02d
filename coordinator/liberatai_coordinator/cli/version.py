"""`liberatai models show`: one version, how its structures answer together, and where its bytes go."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import Model, Version, client_of
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    clean,
    count_text,
    dump,
    progress,
    share_text,
    show,
    show_one,
    size_text,
)
from liberatai_coordinator.client.views import (
    EnsembleView,
    SizesView,
    TensorView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.pictures import heat_map as heat_maps
from liberatai_core.errors import ConfigError

CLASSES_ACROSS, CLASSES_DOWN = 12, 40
"""Classes that fit a line of 80 characters, and lines that fit a screen."""


class VersionDetail(VersionView, frozen=True, kw_only=True):
    """A version, how its structures answer together, where the bytes of its files go, and its variants."""

    weights: EnsembleView
    sizes: tuple[SizesView, ...]
    variants: tuple[VariantView, ...]


def show_version(
    context: typer.Context,
    name: Model,
    version: Version = "latest",
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
            _show_variant(client.variants.show(name, variant), output, whole=whole)
            return
        view = client.models.version(name, version)
        ensemble = client.models.ensemble(name, str(view.version))
        sizes = tuple(client.models.sizes(name, str(view.version), one) for one in sorted(view.digests))
        variants = tuple(client.variants.list(name, str(view.version)))
    if output is Output.NAME:
        show_one({"name": f"{view.model} {view.version}"}, output)
        return
    if not output.is_table:
        fields = {field: getattr(view, field) for field in view.__struct_fields__}
        dump(VersionDetail(**fields, weights=ensemble, sizes=sizes, variants=variants), output)
        _draw(ensemble, view, heat_map)
        return
    show_one(view, output)
    _show_weights(ensemble, output, whole=whole)
    for one in sizes:
        files = f"keyframe {size_text(one.keyframe_bytes)}"
        if one.delta_bytes:
            files += f" and {size_text(one.delta_bytes)} of deltas"
        print()
        print(f"{one.structure}: {count_text(one.parameters)} weights, {files}")
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


def _show_variant(detail: VariantDetail, output: Output, *, whole: bool) -> None:
    if output is Output.NAME:
        show_one(detail.variant, output)
        return
    if not output.is_table:
        dump(detail, output)
        return
    show_one(detail.variant, output)
    print()
    _show_tensors(detail.tensors, detail.variant.bytes, output, whole=whole)


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
    Column("WEIGHTS", lambda row: _optional(row, lambda one: count_text(one.weights)), right=True),
    Column("KIND", lambda row: row.kind),
    Column("BYTES", lambda row: count_text(row.size_bytes), right=True),
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
    Column("FILE", lambda row: f"{count_text(row.bytes)} B", right=True),
    Column("BUDGET", lambda row: f"{count_text(row.budget_bytes)} B", right=True),
    Column("BITS/WEIGHT", lambda row: f"{8 * row.bytes / row.parameters:.2f}", right=True),
    Column("DIVERGENCE", lambda row: "-" if row.divergence is None else f"{row.divergence:.4f}", right=True),
    Column("AGREEMENT", lambda row: share_text(row.agreement), right=True),
    Column("ACCURACY", lambda row: share_text(row.accuracy), right=True),
    Column("METHOD", lambda row: row.method, note=True),
    Column("FROM", lambda row: row.parent_structure, wide=True),
    Column("WHY", lambda row: row.why, wide=True, note=True),
]
