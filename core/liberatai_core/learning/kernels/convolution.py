"""Convolutions over one or two axes, as one matrix product over gathered windows.

Chellapilla et al., "High Performance Convolutional Neural Networks for Document Processing", IWFHR 2006.
"""

from itertools import product
from typing import Any

import numpy as np

from liberatai_core.learning.kernels.layer import Array

Slices = tuple[slice, ...]
ALL: Any = slice(None)


def taps(
    sides: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: int
) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], Slices, Slices]]]:
    """Return the output's sides, and for each place in the kernel which outputs meet which inputs there.

    Args:
        sides: of the input map.
        kernel: sides of the window.
        stride: between two windows.
        padding: zeros around the map; they are no inputs, so fewer outputs meet one there.

    Returns:
        (sides, [(place in the kernel, slices of the output, slices of the input), …]).
    """
    outs = tuple((side + 2 * padding - k) // stride + 1 for side, k in zip(sides, kernel, strict=True))
    found = []
    for place in product(*(range(k) for k in kernel)):
        out, into = [], []
        for at, side, count in zip(place, sides, outs, strict=True):
            first = max(0, -((at - padding) // stride))
            last = min(count, (side - 1 - at + padding) // stride + 1)
            last = max(first, last)
            start = first * stride + at - padding
            out.append(slice(first, last))
            into.append(
                slice(start, start + (last - first - 1) * stride + 1 if last > first else start, stride)
            )
        found.append((place, tuple(out), tuple(into)))
    return outs, found


class Convolution:
    """Every filter sees all channels.

    Args:
        weight: shape (out, into, *kernel).
        d_weight: gradient, the same shape.
        stride, padding: as in torch.
    """

    def __init__(self, weight: Array, d_weight: Array, stride: int, padding: int) -> None:
        self._kernel = weight.shape[2:]
        self._stride, self._padding = stride, padding
        self._weight = weight.reshape(len(weight), -1)
        self._d_weight = d_weight.reshape(len(weight), -1)
        self._columns: Array = np.empty(0, np.float32)
        self._shape: tuple[int, ...] = ()
        self._pointwise = stride == 1 and padding == 0 and set(self._kernel) == {1}

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        outs, found = taps(x.shape[1:-1], self._kernel, self._stride, self._padding)
        if self._pointwise:
            columns = x
        else:
            shape = (len(x), *self._kernel, *outs, x.shape[-1])
            if self._columns.shape != shape:
                # Windows over the border keep these zeros: nothing else is ever written there.
                self._columns = np.zeros(shape, np.float32)
            columns = self._columns
            for place, out, into in found:
                columns[(ALL, *place, *out)] = x[(ALL, *into)]
        self._shape = x.shape
        y = self._weight @ columns.reshape(self._weight.shape[1], -1)
        if not training:
            self._columns = np.empty(0, np.float32)
        elif self._pointwise:
            self._columns = x
        return y.reshape(len(y), *outs, x.shape[-1])

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        rows = dy.reshape(len(dy), -1)
        columns = self._columns.reshape(self._weight.shape[1], -1)
        np.matmul(rows, columns.T, out=self._d_weight)
        if not wanted:
            return dy
        products = self._weight.T @ rows
        if self._pointwise:
            return products.reshape(self._shape)
        outs, found = taps(self._shape[1:-1], self._kernel, self._stride, self._padding)
        spread: Array = products.reshape(self._shape[0], *self._kernel, *outs, self._shape[-1])
        dx = np.zeros(self._shape, np.float32)
        for place, out, into in found:
            dx[(ALL, *into)] += spread[(ALL, *place, *out)]
        return dx
