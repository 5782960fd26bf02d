"""Dense layers."""

import numpy as np

from liberatai_core.learning.kernels.layer import Array


class Dense:
    """`W x + b`; weights are views, gradients are written into views.

    Args:
        weight: shape (out, into).
        bias: shape (out,), or None.
        d_weight, d_bias: gradients of the same shapes.
    """

    def __init__(self, weight: Array, bias: Array | None, d_weight: Array, d_bias: Array | None) -> None:
        self._weight, self._bias, self._d_weight, self._d_bias = weight, bias, d_weight, d_bias
        self._x: Array | None = None

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`; x has shape (into, n)."""
        self._x = x if training else None
        y: Array = self._weight @ x
        if self._bias is not None:
            y += self._bias[:, None]
        return y

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        assert self._x is not None  # noqa: S101 - a forward pass went before
        np.matmul(dy, self._x.T, out=self._d_weight)
        if self._d_bias is not None:
            dy.sum(axis=1, out=self._d_bias)
        return self._weight.T @ dy if wanted else dy
