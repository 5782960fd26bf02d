"""Nearest neighbour mixing: every difference becomes the mean of its n - f nearest ones.

Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023,
arXiv:2302.01772; to be followed by a coordinate-wise rule. It also cures what sparse updates do to such
rules: a coordinate that one honest device sent stands in most of the mixtures, and is no extreme any more.
"""

import math

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_BITS = 36
"""Of a value within a block of coordinates: sums of up to 2^17 devices are whole numbers below 2^53."""


def neighbours(products: Doubles, f: int) -> NDArray[np.bool_]:
    """Return who is in whose mixture, shape (devices, devices): row i has n - f ones, i itself among them.

    Args:
        products: scalar products of all pairs of differences, shape (devices, devices).
        f: devices that every mixture leaves out; of equally distant ones those that come last.
    """
    squares = np.diag(products)
    distances = squares[:, None] + squares[None, :] - 2 * products
    np.fill_diagonal(distances, -np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : len(products) - f]
    found = np.zeros(products.shape, dtype=np.bool_)
    np.put_along_axis(found, nearest, values=True, axis=1)
    return found


def mixed(values: Doubles, near: NDArray[np.bool_]) -> Doubles:
    """Return the mixtures of a block, shape (devices, coordinates): the same bits in any order of summation.

    Args:
        values: (devices, coordinates).
        near: result of `neighbours`.
    """
    exponent = math.frexp(float(np.abs(values).max()))[1] - _BITS
    whole = np.rint(np.ldexp(values, -exponent))
    sums: Doubles = np.ldexp(near.astype(np.float64) @ whole, exponent)
    return np.asarray(sums / near.sum(axis=1, keepdims=True))
