"""Rectified linear units."""

import numpy as np

from liberatai_core.learning.kernels.layer import Array


class Relu:
    """Cuts off below 0, and above a limit if there is one; overwrites its input.

    Args:
        limit: None for none.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = None if limit is None else np.float32(limit)
        self._y = np.empty(0, np.float32)

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        np.maximum(x, np.float32(0), out=x)
        if self._limit is not None:
            np.minimum(x, self._limit, out=x)
        if training:
            self._y = x
        return x

    def backward(self, dy: Array, *, wanted: bool) -> Array:  # noqa: ARG002 - it has no weights
        """See `Layer`."""
        dy *= self._y > 0
        if self._limit is not None:
            dy *= self._y < self._limit
        return dy
