"""What a network is made of, as values: families describe theirs, each runtime computes with the description.

Names and shapes of tensors, multiply-adds and memory follow from it without any framework, so a device that
has numpy alone knows them, too. Shapes are of one sample, without the batch axis, channel first.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from liberatai_core.errors import StructureError
from liberatai_core.structure import Tensor

Shape = tuple[int, ...]
NormKind = Literal["group", "batch"]


@dataclass(frozen=True, slots=True)
class Convolution:
    """Over one or two axes, without bias: `out` filters of shape (into / groups, *kernel)."""

    into: int
    out: int
    kernel: Shape
    stride: int = 1
    padding: int = 0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix (out, into), with or without bias."""

    into: int
    out: int
    bias: bool = True


@dataclass(frozen=True, slots=True)
class Norm:
    """Group or batch normalisation with a scale and an offset per channel; groups are of equal size."""

    channels: int
    kind: NormKind
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Relu:
    """Cut off below 0, and above `limit` if there is one."""

    limit: float | None = None


@dataclass(frozen=True, slots=True)
class MaxPool:
    """The largest value of windows of one side length."""

    kernel: int = 2
    stride: int = 2
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over all positions; they keep one each."""


@dataclass(frozen=True, slots=True)
class Flatten:
    """All values of a sample in a row."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Layers one after another, each with its name; empty: the identity."""

    layers: "tuple[tuple[str, Layer], ...]" = ()


@dataclass(frozen=True, slots=True)
class Residual:
    """`branch(x) + shortcut(x)`, cut off below 0 if `relu`; the branch's last norm starts at scale 0."""

    branch: Sequence
    shortcut: Sequence
    relu: bool


Layer = Convolution | Dense | Norm | Relu | MaxPool | Mean | Flatten | Sequence | Residual


@dataclass(frozen=True, slots=True)
class Network:
    """What a family makes of its parameters.

    Attributes:
        body: the layers; the last one gives the logits.
        he: convolutions start normal, with deviation he * sqrt(2 / fan-in); 0: as torch starts them.
    """

    body: Sequence
    he: float = 0.0


def without_head(network: Network) -> Network:
    """Return all layers of a network but the last one, which gives the logits."""
    return Network(Sequence(network.body.layers[:-1]), network.he)


def tensors_of(network: Network) -> tuple[Tensor, ...]:
    """Return names and shapes in the order of the flat vector: per layer as torch's `state_dict` has them."""
    return tuple(Tensor(name=name, shape=shape) for name, shape in _tensors("", network.body))


def _tensors(name: str, layer: Layer) -> Iterator[tuple[str, Shape]]:
    dot = f"{name}." if name else ""
    match layer:
        case Sequence(layers):
            for own, inner in layers:
                yield from _tensors(dot + own, inner)
        case Residual(branch, shortcut):
            yield from _tensors(f"{dot}branch", branch)
            yield from _tensors(f"{dot}shortcut", shortcut)
        case Convolution(into, out, kernel, groups=groups):
            yield f"{dot}weight", (out, into // groups, *kernel)
        case Dense(into, out, bias):
            yield f"{dot}weight", (out, into)
            if bias:
                yield f"{dot}bias", (out,)
        case Norm(channels, kind):
            parts = ("weight", "bias", *(("running_mean", "running_var") if kind == "batch" else ()))
            for part in parts:
                yield f"{dot}{part}", (channels,)


def steps(layer: Layer, shape: Shape) -> Iterator[tuple[Layer, Shape]]:
    """Yield every layer that computes with the shape of its output, in order; residual blocks add one."""
    match layer:
        case Sequence(layers):
            for _, inner in layers:
                yield from steps(inner, shape)
                shape = output_shape(inner, shape)
        case Residual(branch, shortcut):
            yield from steps(branch, shape)
            yield from steps(shortcut, shape)
            yield layer, output_shape(layer, shape)
        case _:
            yield layer, output_shape(layer, shape)


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """Return the shape of a layer's output for an input of this shape.

    Raises:
        StructureError: the layer does not take such an input.
    """
    match layer:
        case Sequence(layers):
            for _, inner in layers:
                shape = output_shape(inner, shape)
            return shape
        case Residual(branch):
            return output_shape(branch, shape)
        case Convolution(into, out, kernel, stride, padding):
            if len(shape) != 1 + len(kernel) or shape[0] != into:
                raise StructureError(f"a convolution of {into} channels cannot take {shape}")
            return (out, *_windows(shape[1:], kernel, stride, padding))
        case MaxPool(kernel, stride, padding):
            sides = shape[1:]
            return (shape[0], *_windows(sides, (kernel,) * len(sides), stride, padding))
        case Dense(into, out):
            if shape != (into,):
                raise StructureError(f"a dense layer of {into} inputs cannot take {shape}")
            return (out,)
        case Mean():
            return (shape[0], *(1 for _ in shape[1:]))
        case Flatten():
            return (math.prod(shape),)
        case _:
            return shape


def _windows(sides: Shape, kernel: Shape, stride: int, padding: int) -> Shape:
    found = tuple(
        (side + 2 * padding - window) // stride + 1 for side, window in zip(sides, kernel, strict=True)
    )
    if min(found) < 1:
        raise StructureError(f"inputs of {sides} positions are too small for this network")
    return found


def macs(layer: Layer, output: Shape) -> int:
    """Return the multiply-adds of one layer whose output has this shape; 0 for all but the two that weigh."""
    match layer:
        case Convolution(into, _, kernel, groups=groups):
            return math.prod(output) * (into // groups) * math.prod(kernel)
        case Dense(into):
            return math.prod(output) * into
        case _:
            return 0
