"""A network of numpy kernels over one flat vector of weights and one of gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.learning.families import layers, network_of
from liberatai_core.learning.kernels.activation import Relu
from liberatai_core.learning.kernels.batch_norm import BatchNorm
from liberatai_core.learning.kernels.convolution import Convolution
from liberatai_core.learning.kernels.dense import Dense
from liberatai_core.learning.kernels.depthwise import Depthwise
from liberatai_core.learning.kernels.group_norm import GroupNorm
from liberatai_core.learning.kernels.layer import Array, Layer
from liberatai_core.learning.kernels.pooling import Flatten, MaxPool, Mean
from liberatai_core.structure import DataContract, Structure, require_length, to_tensors
from liberatai_core.weights import Vector


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Computes with the values of `flat`; gradients arrive in `gradient`, shape (parameters,) both."""

    body: Layer
    flat: Vector
    gradient: Vector

    def forward(self, x: NDArray[np.float32], *, training: bool) -> Array:
        """Return the logits, shape (classes, n), of inputs (n, *input_shape)."""
        last = np.array(x.reshape(len(x), -1).T, np.float32, order="C")
        return self.body.forward(last.reshape(*x.shape[1:], len(x)), training=training)

    def backward(self, d_logits: Array) -> None:
        """Write the gradient of the loss by all weights, given that by the last forward pass's logits."""
        self.body.backward(d_logits, wanted=False)


def network(
    structure: Structure, data: DataContract, weights: Vector, *, to_features: bool = False
) -> Network:
    """Return a network of this structure that holds a copy of these weights.

    Args:
        structure: of a built-in family.
        data: the job's contract.
        weights: shape (parameters,).
        to_features: leave out the last layer.

    Raises:
        StructureError: the weights have another length, or the family is not built in or builds others.
    """
    require_length(weights, structure)
    description = network_of(structure, data)
    if to_features:
        description = layers.without_head(description)
    flat = np.array(weights, np.float32)
    gradient = np.zeros_like(flat)
    body = assembled(description, to_tensors(flat, structure), to_tensors(gradient, structure))
    return Network(body, flat, gradient)


def assembled(
    description: layers.Network, weights: Mapping[str, Array], gradients: Mapping[str, Array]
) -> Layer:
    """Return the layers of a description over these named weights; gradients are written where they lie."""
    return _Maker(weights, gradients).layer("", description.body)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes layers whose weights and gradients are views."""

    weights: Mapping[str, Array]
    gradients: Mapping[str, Array]

    def layer(self, name: str, layer: layers.Layer) -> Layer:
        dot = f"{name}." if name else ""
        match layer:
            case layers.Sequence(inner):
                return Sequence([self.layer(dot + own, one) for own, one in inner])
            case layers.Residual(branch, shortcut, relu):
                return Residual(
                    self.layer(f"{dot}branch", branch),
                    self.layer(f"{dot}shortcut", shortcut) if shortcut.layers else None,
                    Relu(None) if relu else None,
                )
            case layers.Convolution(into, out, _, stride, padding, groups):
                kind: Callable[..., Layer] = Convolution
                if groups > 1:
                    assert groups == into == out  # noqa: S101 - no family has other groups
                    kind = Depthwise
                return kind(self.weights[f"{dot}weight"], self.gradients[f"{dot}weight"], stride, padding)
            case layers.Dense():
                return Dense(
                    self.weights[f"{dot}weight"],
                    self.weights.get(f"{dot}bias"),
                    self.gradients[f"{dot}weight"],
                    self.gradients.get(f"{dot}bias"),
                )
            case layers.Norm(_, kind_of_norm, groups):
                weight, bias = self.weights[f"{dot}weight"], self.weights[f"{dot}bias"]
                d_weight, d_bias = self.gradients[f"{dot}weight"], self.gradients[f"{dot}bias"]
                if kind_of_norm == "group":
                    return GroupNorm(weight, bias, d_weight, d_bias, groups)
                mean, var = self.weights[f"{dot}running_mean"], self.weights[f"{dot}running_var"]
                return BatchNorm(weight, bias, mean, var, d_weight, d_bias)
            case layers.Relu(limit):
                return Relu(limit)
            case layers.MaxPool(side, stride, padding):
                return MaxPool(side, stride, padding)
            case layers.Mean():
                return Mean()
            case layers.Flatten():
                return Flatten()


class Sequence:
    """Layers one after another."""

    def __init__(self, inner: list[Layer]) -> None:
        self._inner = inner
        # The gradient of a first layer's input is of use to nobody, if nothing before it has weights.
        weighted = (Convolution, Depthwise, Dense, GroupNorm, BatchNorm, Residual, Sequence)
        self._first = next((i for i, one in enumerate(inner) if isinstance(one, weighted)), 0)

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        for one in self._inner:
            x = one.forward(x, training=training)
        return x

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        for number in range(len(self._inner) - 1, -1, -1):
            needed = wanted or number > self._first
            dy = self._inner[number].backward(dy, wanted=needed)
            if not needed:
                break
        return dy


class Residual:
    """`branch(x) + shortcut(x)`, then a ReLU or nothing: He et al., CVPR 2016, arXiv:1512.03385."""

    def __init__(self, branch: Layer, shortcut: Layer | None, relu: Relu | None) -> None:
        self._branch, self._shortcut, self._relu = branch, shortcut, relu

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        y = self._branch.forward(x, training=training)
        y += x if self._shortcut is None else self._shortcut.forward(x, training=training)
        return y if self._relu is None else self._relu.forward(y, training=training)

    def backward(self, dy: Array, *, wanted: bool) -> Array:  # noqa: ARG002 - never a network's first layer
        """See `Layer`."""
        if self._relu is not None:
            dy = self._relu.backward(dy, wanted=True)
        straight = dy.copy()
        dx = self._branch.backward(dy, wanted=True)
        dx += straight if self._shortcut is None else self._shortcut.backward(straight, wanted=True)
        return dx
