"""Depthwise convolutions of images: every channel has a filter of its own.

A row of outputs depends on as many rows of inputs as the kernel is high, through a banded matrix that holds
the filter once per output. Small maps make small matrices, and a product with a dense one of them is several
times as fast as nine shifted sums, which are all memory traffic.
"""

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from liberatai_core.learning.kernels.layer import Array


class Depthwise:
    """Filters of one channel each.

    Args:
        weight: shape (channels, 1, side, side).
        d_weight: gradient, the same shape.
        stride, padding: as in torch.
    """

    def __init__(self, weight: Array, d_weight: Array, stride: int, padding: int) -> None:
        self._side = weight.shape[-1]
        self._weight = weight.reshape(len(weight), -1)
        self._d_weight = d_weight.reshape(len(weight), -1)
        self._stride, self._padding = stride, padding
        self._padded: Array | None = None
        self._width = 0

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        channels, height, width, n = x.shape
        padded = np.zeros((channels, height + 2 * self._padding, width, n), np.float32)
        padded[:, self._padding : self._padding + height] = x
        band = _band(width, self._side, self._stride, self._padding)
        matrices = (self._weight @ band).reshape(channels, 1, -1, self._side * width)
        y: Array = np.matmul(matrices, self._rows(padded))
        self._padded = padded if training else None
        return y

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        padded = self._padded
        assert padded is not None  # noqa: S101 - a forward pass went before
        channels, _, width, _ = padded.shape
        band = _band(width, self._side, self._stride, self._padding)
        rows = self._rows(padded)
        # Per row of outputs a matrix; of its sum only the band counts.
        total = np.matmul(dy, rows.transpose(0, 1, 3, 2)).sum(axis=1)
        np.matmul(total.reshape(channels, -1), band.T, out=self._d_weight)
        if not wanted:
            return dy
        matrices = (self._weight @ band).reshape(channels, 1, -1, self._side * width)
        spread = np.matmul(matrices.transpose(0, 1, 3, 2), dy)
        dx = np.zeros_like(padded)
        outs = dy.shape[1]
        for row in range(self._side):
            part = spread[:, :, row * width : (row + 1) * width]
            dx[:, row : row + (outs - 1) * self._stride + 1 : self._stride] += part
        height = padded.shape[1] - 2 * self._padding
        return dx[:, self._padding : self._padding + height]

    def _rows(self, padded: Array) -> Array:
        """Return what every row of outputs depends on, shape (channels, rows, side * width, n)."""
        channels, height, width, n = padded.shape
        count = (height - self._side) // self._stride + 1
        channel, row, _, value = padded.strides
        return as_strided(
            padded,
            (channels, count, self._side * width, n),
            (channel, row * self._stride, n * value, value),
            writeable=False,
        )


@lru_cache(maxsize=64)
def _band(width: int, side: int, stride: int, padding: int) -> Array:
    """Return where each value of a filter stands in the matrix of a row.

    Shape (side², outputs * side * width): 1 where output o takes input i of kernel row r by that value.
    """
    outs = (width + 2 * padding - side) // stride + 1
    band = np.zeros((side, side, outs, side, width), np.float32)
    for row in range(side):
        for column in range(side):
            for out in range(outs):
                into = out * stride + column - padding
                if 0 <= into < width:
                    band[row, column, out, row, into] = 1
    flat: Array = band.reshape(side * side, -1)
    flat.setflags(write=False)
    return flat
