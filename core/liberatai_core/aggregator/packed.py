"""Many differences side by side: 8 bytes per value that was sent, and their scalar products without rounding.

Rules that compare devices need all differences at once. Sparse ones stay sparse; a rule passes over blocks of
coordinates, so that beside the packed differences only devices x 2048 values are in memory.

Scalar products come from matrix products, whose order of summation belongs to the library. Here it cannot
matter: within a block every difference is rounded to 21 bits below its largest magnitude, so that products of
2048 coordinates add up without rounding (the idea of `mean`: Demmel & Nguyen, ARITH 2013).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.weights import Vector

BLOCK = 1 << 11
"""Coordinates at a time."""
_BITS = 21
"""2 x 21 bits of a product and 11 of 2048 summands are 53: whole numbers that float64 holds."""
_SPARSE = 2
"""A difference with fewer than one value in 2 takes less memory with positions."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One difference.

    Attributes:
        parameters: its length.
        positions: sorted places of `values`, int32; None: all of them, in order.
        values: float32.
    """

    parameters: int
    positions: NDArray[np.int32] | None
    values: Vector


def pack(difference: Vector) -> Packed:
    """Return a difference (parameters,) without its zeros, where that saves memory."""
    sent = np.flatnonzero(difference)
    if sent.size * _SPARSE >= difference.size:
        return Packed(difference.size, None, difference)
    return Packed(difference.size, sent.astype(np.int32), difference[sent])


def unpack(packed: Packed) -> Vector:
    """Return the difference, shape (parameters,)."""
    if packed.positions is None:
        return packed.values
    dense = np.zeros(packed.parameters, dtype=np.float32)
    dense[packed.positions] = packed.values
    return dense


def blocks(differences: Sequence[Packed]) -> Iterator[tuple[slice, Doubles]]:
    """Yield places and values (devices, coordinates) of a block at a time; float64, zero where not sent."""
    parameters = differences[0].parameters
    edges = [*range(0, parameters, BLOCK), parameters]
    cuts = [
        np.array(edges) if one.positions is None else np.searchsorted(one.positions, edges)
        for one in differences
    ]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        block = np.zeros((len(differences), stop - start))
        for row, one, cut in zip(block, differences, cuts, strict=True):
            part = slice(cut[number], cut[number + 1])
            if one.positions is None:
                row[:] = one.values[part]
            else:
                row[one.positions[part] - start] = one.values[part]
        yield slice(start, stop), block


def gram(differences: Sequence[Packed]) -> Doubles:
    """Return the scalar products of all pairs, shape (devices, devices): the same bits on every machine."""
    total = np.zeros((len(differences), len(differences)))
    for _, block in blocks(differences):
        used = block.any(axis=0)
        if not used.any():
            continue
        dense = block[:, used]
        exponents = np.frexp(np.abs(dense).max(axis=1))[1].astype(np.int64) - _BITS
        whole = np.rint(np.ldexp(dense, -exponents[:, None]))
        total += np.ldexp(whole @ whole.T, exponents[:, None] + exponents[None, :])
    return total


def norm(difference: Vector) -> float:
    """Return the Euclidean norm."""
    return float(np.sqrt(np.square(difference, dtype=np.float64).sum()))


def dot(one: Vector, other: Vector) -> float:
    """Return the scalar product, summed in an order that does not depend on a library's threads."""
    return float(np.multiply(one, other, dtype=np.float64).sum())
