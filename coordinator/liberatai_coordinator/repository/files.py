"""A file that was read becomes a commit; a commit becomes files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.commits import Commit, Kind, Variant
from liberatai_coordinator.repository.descriptors import FILEPATH, TITLE, WEIGHT_RAW, describe
from liberatai_coordinator.repository.imports import Imported
from liberatai_coordinator.repository.store import Layer, Loaded, Store, now_s
from liberatai_core.errors import StructureError
from liberatai_core.learning.families import structure_of
from liberatai_core.structure import DataContract, Parameter, Structure, from_tensors
from liberatai_core.weights import Vector

ONNX_FILE: Final = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a person says of a model that they commit.

    Attributes:
        family, params, data: what the weights are of; None: kept as named tensors, which cannot be trained.
    """

    model: str
    message: str = ""
    author: str = ""
    licence: str = ""
    labels: tuple[str, ...] = ()
    input_range: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: DataContract | None = None
    family: str | None = None
    params: Mapping[str, Parameter] = field(default_factory=dict)


def commit_file(
    store: Store,
    loaded: Imported,
    about: About,
    parents: Sequence[str],
    *,
    branch: str | None,
    kind: Kind = "import",
    origin: str = "",
) -> Loaded:
    """Commit what is in a file.

    Raises:
        StructureError: the tensors are not those that the family builds for this data.
        NonFiniteError, StateError, DiskError: see `Store.write`.
    """
    if loaded.kind == "onnx":
        variant, layers = _onnx(loaded)
        return store.write(
            draft_of(about, parents, [variant], kind=kind, origin=origin),
            {variant.name: layers},
            branch=branch,
        )
    structure = _structure(loaded, about)
    weights = from_tensors(loaded.tensors, structure)
    return commit_weights(store, structure, weights, about, parents, branch=branch, kind=kind, origin=origin)


def commit_weights(
    store: Store,
    structure: Structure,
    weights: Vector,
    about: About,
    parents: Sequence[str],
    *,
    branch: str | None,
    kind: Kind,
    origin: str = "",
) -> Loaded:
    """Commit the weights of one structure."""
    return commit_all(
        store, {structure.id: (structure, weights)}, about, parents, branch=branch, kind=kind, origin=origin
    )


def commit_all(
    store: Store,
    members: Mapping[str, tuple[Structure, Vector]],
    about: About,
    parents: Sequence[str],
    *,
    branch: str | None,
    kind: Kind,
    origin: str = "",
) -> Loaded:
    """Commit the weights of several structures, each as a difference where its parent has one like it."""
    before = store.read(parents[0]).commit if parents else None
    variants: list[Variant] = []
    layers: dict[str, list[Layer]] = {}
    for structure, weights in members.values():
        variants.append(tensors.variant_of(structure, weights))
        old = before.variant(structure.id) if before else None
        layers[structure.id] = tensors.layers_for(store, structure, weights, old)
    draft = draft_of(about, parents, variants, kind=kind, origin=origin)
    return store.write(draft, layers, branch=branch)


def draft_of(
    about: About, parents: Sequence[str], variants: Sequence[Variant], *, kind: Kind, origin: str = ""
) -> Commit:
    """Return a commit whose variants have no manifests yet."""
    return Commit(
        model=about.model,
        kind=kind,
        parents=tuple(parents),
        author=about.author,
        time=now_s(),
        message=about.message,
        metrics=dict(about.metrics),
        data=about.data,
        labels=about.labels,
        input_range=about.input_range,
        licence=about.licence,
        origin=origin[:512],
        variants=tuple(variants),
    )


def _structure(loaded: Imported, about: About) -> Structure:
    if about.family is None or about.data is None:
        return tensors.structure_for(loaded.tensors)
    structure = structure_of(about.family, about.params, about.data)
    wanted = {tensor.name for tensor in structure.tensors}
    foreign = sorted(loaded.tensors.keys() - wanted)
    if foreign:
        raise StructureError(
            f"{structure.id} has no tensor {foreign[0][:80]!r} (nor {len(foreign) - 1} others)"
        )
    return structure


def _onnx(loaded: Imported) -> tuple[Variant, list[Layer]]:
    content = loaded.content
    notes = {FILEPATH: ONNX_FILE, TITLE: ONNX_FILE}
    variant = Variant(
        name="onnx", manifest=tensors.NONE, size=2, runtime="onnx", bytes=len(content), tier="observe"
    )
    return variant, [(describe(content, WEIGHT_RAW, notes), content)]
