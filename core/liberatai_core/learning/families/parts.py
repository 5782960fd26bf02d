"""What built-in families share: checked parameters, blocks of a layer with its norm, map sizes."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from liberatai_core.errors import StructureError
from liberatai_core.spelling import meant
from liberatai_core.structure import DataContract, Parameter

if TYPE_CHECKING:
    import torch

MAX_WIDTH = 1024
"""Channels of the first layer: ResNet and VGG use 64; this bounds what a message can make us allocate."""
MAX_HIDDEN = 8192
"""Units of a dense layer: VGG's largest has 4096."""
MAX_LAYERS = 16
"""Dense layers or convolutions per stage: deeper chains need skip connections to train at all (`resnet`)."""
SIDE = 4
"""Feature maps are halved until the shorter side is at most this: small enough for a dense head to keep
positions, which matter on small images (8x8 digits), large enough to survive one more 3x3 kernel."""

Norm = Literal["group", "batch"]

STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of tensors that training measures instead of learning (batch normalisation)."""


def block(
    suffix: str, layer: "torch.nn.Module", channels: int, norm: Norm, *, name: str = "conv"
) -> "OrderedDict[str, torch.nn.Module]":
    """Return a layer (without bias), its norm and a ReLU, named `name`, norm and relu plus the suffix."""
    from torch import nn

    layers = normed(suffix, layer, channels, norm, name=name)
    layers[f"relu{suffix}"] = nn.ReLU()
    return layers


def normed(
    suffix: str, layer: "torch.nn.Module", channels: int, norm: Norm, *, name: str = "conv"
) -> "OrderedDict[str, torch.nn.Module]":
    """Return a layer (without bias) and its norm."""
    from torch import nn

    if norm == "group":
        return OrderedDict(
            [(f"{name}{suffix}", layer), (f"norm{suffix}", nn.GroupNorm(_groups(channels), channels))]
        )
    from liberatai_core.learning.families import modules

    kind = modules.BatchNorm2d if isinstance(layer, nn.Conv2d) else modules.BatchNorm1d
    return OrderedDict([(f"{name}{suffix}", layer), (f"norm{suffix}", kind(channels))])


def with_head(layers: "OrderedDict[str, torch.nn.Module]", features: int, classes: int) -> "torch.nn.Module":
    """Return the layers in sequence with a flattening linear head."""
    from torch import nn

    layers["flat"] = nn.Flatten()
    layers["head"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def start_as_he(module: "torch.nn.Module", factor: float = 1.0) -> "torch.nn.Module":
    """Draw all convolutions anew: normal, deviation factor * sqrt(2 / fan-in); return the module.

    He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852.
    """
    from torch import nn

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:  # there it has no values
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data.mul_(factor)
    return module


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


def norm_of(params: Mapping[str, Parameter], family: str) -> Norm:
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


def _groups(channels: int) -> int:
    """At most 8 groups of at least 4 channels: a group of one value would be normalised to zero."""
    return max(g for g in (8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))
