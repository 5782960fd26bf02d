"""Group normalisation: Wu & He, ECCV 2018, arXiv:1803.08494."""

import numpy as np

from liberatai_core.learning.kernels.layer import Array

EPSILON = 1e-5
"""Torch's."""


class GroupNorm:
    """Normalises each sample's groups of channels; overwrites its input.

    Args:
        weight, bias: scale and offset, shape (channels,).
        d_weight, d_bias: gradients.
        groups: of equal size.
    """

    def __init__(self, weight: Array, bias: Array, d_weight: Array, d_bias: Array, groups: int) -> None:
        self._weight, self._bias, self._d_weight, self._d_bias = weight, bias, d_weight, d_bias
        self._groups = groups
        self._centred: Array = np.empty(0, np.float32)
        self._inverse = self._centred

    def forward(self, x: Array, *, training: bool) -> Array:
        """See `Layer`."""
        grouped = x.reshape(self._groups, -1, x.shape[-1])
        grouped -= grouped.mean(axis=1, keepdims=True)
        square = np.einsum("gkn,gkn->gn", grouped, grouped)
        inverse = 1 / np.sqrt(square / np.float32(grouped.shape[1]) + np.float32(EPSILON))
        centred = x.reshape(len(x), -1, x.shape[-1])
        scale = self._per_channel(inverse) * self._weight[:, None]
        y = centred * scale[:, None]
        y += self._bias[:, None, None]
        if training:
            self._centred, self._inverse = centred, inverse
        return y.reshape(x.shape)

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """See `Layer`."""
        centred, inverse, count = self._centred, self._inverse, self._centred.size // self._inverse.size
        shape, dy = dy.shape, dy.reshape(centred.shape)
        plain = dy.sum(axis=1)
        along = np.einsum("csn,csn->cn", dy, centred) * self._per_channel(inverse)
        plain.sum(axis=1, out=self._d_bias)
        along.sum(axis=1, out=self._d_weight)
        if not wanted:
            return dy.reshape(shape)
        weight = self._weight[:, None]
        mean = self._per_group(plain * weight) / np.float32(count)
        slope = self._per_group(along * weight) / np.float32(count)
        dy *= (self._per_channel(inverse) * weight)[:, None]
        centred *= self._per_channel(inverse * inverse * slope)[:, None]
        dy -= centred
        dy -= self._per_channel(inverse * mean)[:, None]
        return dy.reshape(shape)

    def _per_channel(self, values: Array) -> Array:
        return np.repeat(values, len(self._weight) // self._groups, axis=0)

    def _per_group(self, values: Array) -> Array:
        total: Array = values.reshape(self._groups, -1, values.shape[-1]).sum(axis=1)
        return total
