"""Weights of a variant: as layers when they are committed, as one vector when they are read.

The first layer is a whole model (safetensors, or our compressed file); the ones after it are differences. A
commit that changed little against its parent takes the parent's layers and adds one difference, as long as
that is shorter; so it is whole by itself: no other commit is needed to read it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from liberatai_coordinator.repository import tensor_file
from liberatai_coordinator.repository.commits import Commit, Variant
from liberatai_coordinator.repository.descriptors import (
    COMPRESSED,
    DELTA,
    DIFFERENCE,
    FILEPATH,
    TITLE,
    WEIGHT_RAW,
    Descriptor,
    describe,
)
from liberatai_coordinator.repository.store import Layer, Store
from liberatai_core.compressor import artifact, exact_difference
from liberatai_core.errors import DigestError, SchemaError, StructureError
from liberatai_core.sparsifier.top_k import densify
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, digest

FILE: Final = "model.safetensors"
MAX_DIFFERENCES: Final = 16
"""Of one variant; then its weights are stored whole again."""
WORTH: Final = 0.5
"""Differences are taken while all of them together are shorter than this share of the whole."""


def structure_for(tensors: tensor_file.Tensors) -> Structure:
    """Return a structure for tensors of a family that nobody named: they keep names, shapes and order."""
    named = tuple(Tensor(name=name, shape=value.shape) for name, value in tensors.items())
    if any(0 in tensor.shape for tensor in named):
        raise StructureError("an empty tensor")
    return Structure(family=UNNAMED, params={}, tensors=named)


Member = tuple[Structure, Vector]

UNNAMED: Final = "tensors"
"""Stands for the family of a model whose family nobody knows: it cannot be trained, only kept and merged."""


def variant_of(structure: Structure, weights: Vector, **more: object) -> Variant:
    """Return the record of whole weights, the digest of its manifest still open.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    tensor_file.require_finite(weights, structure.id)
    fields: dict[str, object] = {
        "name": structure.id,
        "runtime": "safetensors",
        "bytes": 4 * structure.parameters,
        "sparsity": 1 - float(np.count_nonzero(weights) / weights.size),
        "tier": "full" if structure.family != UNNAMED else "",
        **more,
    }
    return Variant(
        manifest=NONE,
        size=2,
        structure=structure,
        weights=digest(weights).hex(),
        **fields,  # type: ignore[arg-type]
    )


NONE: Final = f"sha256:{'0' * 64}"
"""A digest that is not known yet."""


def layers_for(store: Store, structure: Structure, weights: Vector, parent: Variant | None) -> list[Layer]:
    """Return the layers of whole weights: differences against a parent's where they are shorter.

    Args:
        store: that has the parent.
        structure: of the weights.
        weights: float32, shape (parameters,).
        parent: the same structure in the first parent; None if there is none.
    """
    content = tensor_file.encode(structure, weights, tensor_file.FORMAT)
    notes = {FILEPATH: FILE, TITLE: FILE}
    whole: list[Layer] = [(describe(content, WEIGHT_RAW, notes), content)]
    if parent is None or parent.structure != structure:
        return whole
    before = store.layers(parent)
    if before[0].media_type != WEIGHT_RAW or len(before) > MAX_DIFFERENCES:
        return whole
    if not all(store.layout.has(one.digest) for one in before):
        return whole  # they were let go
    old = read(store, parent)
    if digest(old).hex() == digest(weights).hex():
        return [(one, None) for one in before]
    change = exact_difference.encode(old, weights)
    if len(change) + sum(one.size for one in before[1:]) >= WORTH * len(content):
        return whole
    name = f"change.{len(before)}.bin"
    added = describe(change, DIFFERENCE, {FILEPATH: name, TITLE: name})
    return [*((one, None) for one in before), (added, change)]


def read(store: Store, variant: Variant) -> Vector:
    """Return the weights of a variant, verified.

    Raises:
        StructureError: it has no weights of ours (e.g. an ONNX file).
        NotFoundError, DigestError: a file is missing or damaged, or decodes to other weights.
    """
    if variant.structure is None or not variant.weights:
        raise StructureError(f"{variant.name}: a file of {variant.runtime}, whose weights cannot be read")
    layers = store.layers(variant)
    weights = _decoded(store, layers, variant.structure)
    if [layer.media_type for layer in layers] == [WEIGHT_RAW]:
        return weights  # the blob's digest was checked, and it is nothing but these values
    if digest(weights).hex() != variant.weights:
        raise DigestError(f"{variant.name} decodes to other weights than its record names")
    return weights


def members(store: Store, commit: Commit) -> dict[str, Member]:
    """Return the whole structures of a commit and their weights; compressed forms of them are left out.

    Raises:
        NotFoundError, DigestError: a file is missing or damaged.
    """
    return {
        one.name: (one.structure, read(store, one))
        for one in commit.variants
        if one.structure is not None and one.weights and not one.budget
    }


def _decoded(store: Store, layers: Sequence[Descriptor], structure: Structure) -> Vector:
    if not layers:
        raise SchemaError(f"{structure.id}: no layer")
    weights: Vector | None = None
    for layer in layers:
        content = store.layout.get(layer.digest, limit=layer.size)
        if layer.media_type == WEIGHT_RAW and weights is None:
            weights = tensor_file.flat(content, structure)
        elif layer.media_type == COMPRESSED and weights is None:
            weights = artifact.restore(content, structure)
        elif layer.media_type == DIFFERENCE and weights is not None:
            weights = exact_difference.apply(weights, content)
        elif layer.media_type == DELTA and weights is not None:
            weights = weights + densify(content, structure)
        else:
            raise SchemaError(f"{structure.id}: a layer of {layer.media_type[:80]} in an impossible place")
    if weights is None:
        raise SchemaError(f"{structure.id}: no whole model among its layers")
    return weights
