"""A network of a built-in family as an ONNX file, written without a library: devices have none that could.

Protocol buffers are tagged fields (https://protobuf.dev/programming-guides/encoding); the few messages of
ONNX that are needed here, and their numbers, are those of onnx.proto3, IR version 8. `export.py` writes files
for others, from torch's own graph and checked against it; this one is for onnxruntime in the same process.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from liberatai_core.learning.families import layers, network_of
from liberatai_core.learning.kernels.group_norm import EPSILON
from liberatai_core.structure import DataContract, Structure, to_tensors
from liberatai_core.weights import Vector

INPUT, OUTPUT = "x", "logits"
IR_VERSION, OPSET = 8, 17
_FLOAT, _INT64 = 1, 7
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_INTS = 1, 2, 7

Attribute = int | float | tuple[int, ...]


def onnx_graph(
    structure: Structure, data: DataContract, weights: Vector, *, to_features: bool = False
) -> bytes:
    """Return a file with input "x" (n, *input_shape) and output "logits" (n, classes), any n.

    Args:
        structure: of a built-in family.
        data: the job's contract.
        weights: shape (parameters,).
        to_features: leave out the last layer: the output is what it reads.

    Raises:
        StructureError: no built-in family, or the weights are not of this structure.
    """
    network = network_of(structure, data)
    if to_features:
        network = layers.without_head(network)
    graph = _Graph(to_tensors(weights, structure))
    last, shape = graph.layer("", network.body, INPUT, data.input_shape)
    graph.node("Identity", [last], out=OUTPUT)
    body = b"".join(
        [
            *(_field(1, node) for node in graph.nodes),
            _field(2, b"network"),
            *(_field(5, tensor) for tensor in graph.initializers),
            _field(11, _value(INPUT, data.input_shape)),
            _field(12, _value(OUTPUT, shape)),
        ]
    )
    opset = _field(1, b"") + _number(2, OPSET)
    return _number(1, IR_VERSION) + _field(7, body) + _field(8, opset)


@dataclass(slots=True)
class _Graph:
    """Nodes and constants so far."""

    weights: Mapping[str, NDArray[np.float32]]
    nodes: list[bytes] = field(default_factory=list)
    initializers: list[bytes] = field(default_factory=list)

    def layer(self, name: str, layer: layers.Layer, x: str, shape: layers.Shape) -> tuple[str, layers.Shape]:
        """Add a layer; return the name of its output and the shape of a sample there."""
        dot = f"{name}." if name else ""
        after = layers.output_shape(layer, shape)
        match layer:
            case layers.Sequence(inner):
                for own, one in inner:
                    x, shape = self.layer(dot + own, one, x, shape)
                return x, shape
            case layers.Residual(branch, shortcut, relu):
                y, _ = self.layer(f"{dot}branch", branch, x, shape)
                straight, _ = self.layer(f"{dot}shortcut", shortcut, x, shape)
                total = self.node("Add", [y, straight])
                return (self.node("Relu", [total]) if relu else total), after
            case layers.Convolution(_, _, kernel, stride, padding, groups):
                axes = len(kernel)
                found = self.node(
                    "Conv",
                    [x, self.weight(f"{dot}weight")],
                    kernel_shape=kernel,
                    strides=(stride,) * axes,
                    pads=(padding,) * 2 * axes,
                    group=groups,
                )
            case layers.Dense(bias=bias):
                inputs = [x, self.weight(f"{dot}weight"), *([self.weight(f"{dot}bias")] if bias else [])]
                found = self.node("Gemm", inputs, transB=1)
            case layers.Norm(channels, kind, groups):
                found = self._norm(dot, x, shape, channels, groups if kind == "group" else 0)
            case layers.Relu(limit):
                found = self.node("Relu", [x])
                if limit is not None:
                    found = self.node("Min", [found, self.floats(np.float32(limit))])
            case layers.MaxPool(kernel, stride, padding):
                axes = len(shape) - 1
                found = self.node(
                    "MaxPool",
                    [x],
                    kernel_shape=(kernel,) * axes,
                    strides=(stride,) * axes,
                    pads=(padding,) * 2 * axes,
                )
            case layers.Mean():
                found = self.node("GlobalAveragePool", [x])
            case layers.Flatten():
                found = self.node("Flatten", [x], axis=1)
        return found, after

    def _norm(self, dot: str, x: str, shape: layers.Shape, channels: int, groups: int) -> str:
        weight, bias = self.weights[f"{dot}weight"], self.weights[f"{dot}bias"]
        if not groups:
            statistics = [self.weight(f"{dot}running_mean"), self.weight(f"{dot}running_var")]
            inputs = [x, self.floats(weight), self.floats(bias), *statistics]
            return self.node("BatchNormalization", inputs, epsilon=EPSILON)
        # A group is an instance of one channel; what is learnt is per channel, after it.
        apart = self.node("Reshape", [x, self.integers(0, groups, -1)])
        ones = np.ones(groups, np.float32)
        normed = self.node(
            "InstanceNormalization", [apart, self.floats(ones), self.floats(0 * ones)], epsilon=EPSILON
        )
        back = self.node("Reshape", [normed, self.integers(-1, *shape)])
        sides = (channels, *(1 for _ in shape[1:]))
        scaled = self.node("Mul", [back, self.floats(weight.reshape(sides))])
        return self.node("Add", [scaled, self.floats(bias.reshape(sides))])

    def node(self, operator: str, inputs: Iterable[str], *, out: str = "", **attributes: Attribute) -> str:
        """Add a node; return the name of its output."""
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(
            b"".join(
                [
                    *(_field(1, one.encode()) for one in inputs),
                    _field(2, out.encode()),
                    _field(4, operator.encode()),
                    *(_field(5, _attribute(name, value)) for name, value in attributes.items()),
                ]
            )
        )
        return out

    def weight(self, name: str) -> str:
        """Add a tensor of the structure as a constant; return its name."""
        return self.floats(self.weights[name])

    def floats(self, values: "NDArray[np.float32] | np.float32") -> str:
        """Add a constant of float32 values; return its name."""
        array = np.asarray(values, "<f4")
        return self._constant(_FLOAT, array.shape, array.tobytes())

    def integers(self, *values: int) -> str:
        """Add a constant vector of integers; return its name."""
        return self._constant(_INT64, (len(values),), np.array(values, "<i8").tobytes())

    def _constant(self, kind: int, shape: tuple[int, ...], raw: bytes) -> str:
        name = f"c{len(self.initializers)}"
        dims = b"".join(_number(1, side) for side in shape)
        self.initializers.append(dims + _number(2, kind) + _field(8, name.encode()) + _field(9, raw))
        return name


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    """Return a ValueInfoProto of float32 values: any number of samples of this shape."""
    dims = [_field(2, b"n"), *(_number(1, side) for side in shape)]
    tensor = _number(1, _FLOAT) + _field(2, b"".join(_field(1, dim) for dim in dims))
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _attribute(name: str, value: Attribute) -> bytes:
    head = _field(1, name.encode())
    if isinstance(value, float):
        return head + _key(2, 5) + struct.pack("<f", value) + _number(20, _ATTRIBUTE_FLOAT)
    if isinstance(value, int):
        return head + _number(3, value) + _number(20, _ATTRIBUTE_INT)
    return head + b"".join(_number(8, one) for one in value) + _number(20, _ATTRIBUTE_INTS)


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
