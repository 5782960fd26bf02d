"""Batch normalisation: Ioffe & Szegedy, ICML 2015, arXiv:1502.03167."""

import numpy as np

from liberatai_core.learning.kernels.group_norm import EPSILON
from liberatai_core.learning.kernels.layer import Array

MOMENTUM = 0.1
"""Torch's: the share of a new batch in the running statistics."""


class BatchNorm:
    """Normalises channels over the batch, and follows their statistics; overwrites its input.

    One value per channel has no variance: it is normalised with the running statistics, as without training.

    Args:
        weight, bias, running_mean, running_var: shape (channels,); the last two change in training.
        d_weight, d_bias: gradients.
    """

    def __init__(
        self,
        weight: Array,
        bias: Array,
        running_mean: Array,
        running_var: Array,
        d_weight: Array,
        d_bias: Array,
    ) -> None:
        self._weight, self._bias, self._d_weight, self._d_bias = weight, bias, d_weight, d_bias
        self._running_mean, self._running_var = running_mean, running_var
        self._centred: Array = np.empty(0, np.float32)
        self._inverse = self._centred
        self._measured = False

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        rows = x.reshape(len(x), -1)
        count = rows.shape[1]
        self._measured = training and count > 1
        mean: Array = rows.mean(axis=1) if self._measured else self._running_mean
        rows -= mean[:, None]
        variance: Array = self._running_var
        if self._measured:
            variance = np.einsum("cm,cm->c", rows, rows) / np.float32(count)
            self._follow(mean, variance * np.float32(count / (count - 1)))
        inverse = 1 / np.sqrt(variance + np.float32(EPSILON))
        y: Array = rows * (inverse * self._weight)[:, None]
        y += self._bias[:, None]
        if training:
            self._centred, self._inverse = rows, inverse
        return y.reshape(x.shape)

    def _follow(self, mean: Array, variance: Array) -> None:
        for running, new in ((self._running_mean, mean), (self._running_var, variance)):
            np.multiply(running, np.float32(1 - MOMENTUM), out=running)
            np.add(running, np.float32(MOMENTUM) * new, out=running)

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        shape, dy = dy.shape, dy.reshape(self._centred.shape)
        dy.sum(axis=1, out=self._d_bias)
        along = np.einsum("cm,cm->c", dy, self._centred)
        np.multiply(along, self._inverse, out=self._d_weight)
        if not wanted:
            return dy.reshape(shape)
        if self._measured:
            count = np.float32(dy.size // len(dy))
            dy -= (self._d_bias / count)[:, None]
            self._centred *= (along * self._inverse * self._inverse / count)[:, None]
            dy -= self._centred
        dy *= (self._inverse * self._weight)[:, None]
        return dy.reshape(shape)
