"""Layers that make maps smaller: the largest of a window, the mean of all positions, all in a row."""

import numpy as np

from liberatai_core.learning.kernels.convolution import taps
from liberatai_core.learning.kernels.layer import Array


class MaxPool:
    """The largest value of each window; of equal ones the first gets the gradient, as in torch.

    Args:
        kernel, stride, padding: as in torch; what lies outside is never the largest.
    """

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        self._kernel, self._stride, self._padding = kernel, stride, padding
        self._x = self._y = np.empty(0, np.float32)

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        outs, found = self._taps(x)
        # The first window that covers all outputs starts them, if there is one.
        y = np.full((len(x), *outs, x.shape[-1]), -np.inf, np.float32)
        for _, out, into in found:
            part = y[(slice(None), *out)]
            np.maximum(part, x[(slice(None), *into)], out=part)
        if training:
            self._x, self._y = x, y
        return y

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        if not wanted:
            return dy
        dx = np.zeros_like(self._x)
        for _, out, into in self._taps(self._x)[1]:
            rest = dy[(slice(None), *out)]
            part = rest * (self._x[(slice(None), *into)] == self._y[(slice(None), *out)])
            dx[(slice(None), *into)] += part
            rest -= part
        return dx

    def _taps(self, x: Array) -> tuple[tuple[int, ...], list]:  # type: ignore[type-arg]
        sides = x.shape[1:-1]
        return taps(sides, (self._kernel,) * len(sides), self._stride, self._padding)


class Mean:
    """The mean over all positions of a map."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()

    def forward(self, x: Array, *, training: bool) -> Array:  # noqa: ARG002 - it computes one thing only
        """See `Layer`."""
        self._shape = x.shape
        y: Array = x.reshape(len(x), -1, x.shape[-1]).mean(axis=1)
        return y.reshape(len(x), *(1 for _ in x.shape[1:-1]), x.shape[-1])

    def backward(self, dy: Array, *, wanted: bool) -> Array:  # noqa: ARG002 - it has no weights
        """See `Layer`."""
        positions = np.prod(self._shape[1:-1])
        return np.broadcast_to(dy / np.float32(positions), self._shape).copy()


class Flatten:
    """All values of a sample in a row: (features, n)."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()

    def forward(self, x: Array, *, training: bool) -> Array:  # noqa: ARG002 - it computes one thing only
        """See `Layer`."""
        self._shape = x.shape
        return x.reshape(-1, x.shape[-1])

    def backward(self, dy: Array, *, wanted: bool) -> Array:  # noqa: ARG002 - it has no weights
        """See `Layer`."""
        return dy.reshape(self._shape)
