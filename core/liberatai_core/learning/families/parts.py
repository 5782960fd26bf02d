"""What built-in families share: checked parameters, blocks of a layer with its norm, map sizes."""

from collections.abc import Mapping

from liberatai_core.errors import StructureError
from liberatai_core.learning.families.layers import (
    Convolution,
    Dense,
    Flatten,
    Layer,
    Network,
    Norm,
    NormKind,
    Relu,
    Sequence,
)
from liberatai_core.spelling import meant
from liberatai_core.structure import DataContract, Parameter

MAX_WIDTH = 1024
"""Channels of the first layer: ResNet and VGG use 64; this bounds what a message can make us allocate."""
MAX_HIDDEN = 8192
"""Units of a dense layer: VGG's largest has 4096."""
MAX_LAYERS = 16
"""Dense layers or convolutions per stage: deeper chains need skip connections to train at all (`resnet`)."""
SIDE = 4
"""Feature maps are halved until the shorter side is at most this: small enough for a dense head to keep
positions, which matter on small images (8x8 digits), large enough to survive one more 3x3 kernel."""

STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of tensors that training measures instead of learning (batch normalisation)."""

Layers = dict[str, Layer]
"""Named layers, in order."""


def block(
    suffix: str,
    layer: Convolution | Dense,
    norm: NormKind,
    *,
    name: str = "conv",
    limit: float | None = None,
) -> Layers:
    """Return a layer (without bias), its norm and a ReLU, named `name`, norm and relu plus the suffix."""
    return {**normed(suffix, layer, norm, name=name), f"relu{suffix}": Relu(limit)}


def normed(suffix: str, layer: Convolution | Dense, norm: NormKind, *, name: str = "conv") -> Layers:
    """Return a layer (without bias) and its norm."""
    groups = norm_groups(layer.out) if norm == "group" else 1
    return {f"{name}{suffix}": layer, f"norm{suffix}": Norm(layer.out, norm, groups)}


def dense(into: int, out: int) -> Dense:
    """Return a matrix whose norm has the offset."""
    return Dense(into, out, bias=False)


def square(into: int, out: int, side: int, *, stride: int = 1, groups: int = 1) -> Convolution:
    """Return a convolution of images whose odd kernel keeps the size at stride 1."""
    return Convolution(into, out, (side, side), stride, side // 2, groups)


def sequence(layers: Layers) -> Sequence:
    """Return layers one after another."""
    return Sequence(tuple(layers.items()))


def with_head(layers: Layers, features: int, classes: int, *, he: float = 0.0) -> Network:
    """Return the layers in sequence with a flattening linear head."""
    return dense_head({**layers, "flat": Flatten()}, features, classes, he=he)


def dense_head(layers: Layers, features: int, classes: int, *, he: float = 0.0) -> Network:
    """Return the layers in sequence with a linear head, where they end in a row already."""
    return Network(sequence({**layers, "head": Dense(features, classes)}), he)


def halvings(sides: tuple[int, ...], limit: int) -> list[tuple[int, ...]]:
    """Return the sizes of all stages: halved, rounded down, until the shortest side is at most `limit`."""
    sizes = [sides]
    while min(sizes[-1]) > limit:
        sizes.append(tuple(side // 2 for side in sizes[-1]))
    return sizes


def shape(data: DataContract, rank: int, family: str) -> tuple[int, ...]:
    """Return the shape of a sample, which must have `rank` axes.

    Raises:
        StructureError: it has another number.
    """
    if len(data.input_shape) != rank:
        raise StructureError(f"{family}: takes inputs with {rank} axes, not {data.input_shape}")
    return data.input_shape


def only(params: Mapping[str, Parameter], family: str, allowed: set[str]) -> None:
    """Raise StructureError if there is a parameter that the family does not have."""
    if unknown := sorted(set(params) - allowed):
        hint = meant(unknown[0], allowed)
        raise StructureError(
            f"{family}: unknown parameter {unknown[0]!r}{hint} (known: {', '.join(sorted(allowed))})"
        )


def integer(
    params: Mapping[str, Parameter], family: str, name: str, highest: int, default: int | None = None
) -> int:
    """Return a parameter from 1 to `highest`.

    Raises:
        StructureError: it is something else.
    """
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise StructureError(f"{family}: {name} must be an integer from 1 to {highest}, not {value!r}")
    return value


def one_of(
    params: Mapping[str, Parameter], family: str, name: str, values: tuple[int, ...], default: int
) -> int:
    """Return a parameter that must be one of these integers.

    Raises:
        StructureError: it is something else.
    """
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value not in values:
        raise StructureError(f"{family}: {name} must be one of {', '.join(map(str, values))}, not {value!r}")
    return value


def norm_of(params: Mapping[str, Parameter], family: str) -> NormKind:
    """Return the kind of normalisation, group if nothing is said.

    Raises:
        StructureError: it is neither group nor batch.
    """
    value = params.get("norm", "group")
    if value == "group":
        return "group"
    if value == "batch":
        return "batch"
    raise StructureError(f"{family}: norm must be group or batch, not {value!r}")


def norm_groups(channels: int) -> int:
    """At most 8 groups of at least 4 channels: a group of one value would be normalised to zero."""
    return max(g for g in (8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))
