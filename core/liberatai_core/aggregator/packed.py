"""Differences without their zeros; many side by side, and their scalar products without rounding.

A sparse update is merged as what it is, positions and values (`mean`). Rules that compare devices need all
differences at once, at 8 bytes per value that was sent. They pass over blocks of coordinates, so that beside
the packed differences only devices x 2048 values are in memory.

Scalar products come from matrix products, whose order of summation belongs to the library. Here it cannot
matter: within a block every difference is rounded to 21 bits below its largest magnitude, so that products of
2048 coordinates add up without rounding (the idea of `mean`: Demmel & Nguyen, ARITH 2013).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import IndexOrderError, IndexRangeError, StructureError
from liberatai_core.weights import Vector

BLOCK = 1 << 11
"""Coordinates at a time."""
_BITS = 21
"""2 x 21 bits of a product and 11 of 2048 summands are 53: whole numbers that float64 holds."""
_SPARSE = 2
"""A difference with fewer than one value in 2 takes less memory with positions."""

Doubles = NDArray[np.float64]
Positions = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One difference.

    Attributes:
        parameters: its length.
        positions: places of `values`, strictly increasing, int32 or int64; None: all of them, in order.
        values: float32; none of them zero if there are positions.
    """

    parameters: int
    positions: Positions | None
    values: Vector


def entries(parameters: int, positions: NDArray[np.int64], values: Vector) -> Packed:
    """Return the difference with these values at these places, as a decoder gives them.

    Args:
        parameters: length of the difference.
        positions: strictly increasing, shape (k,), int64.
        values: shape (k,), float32.

    Raises:
        StructureError: shapes or types are others.
        IndexOrderError: positions are unsorted or doubled.
        IndexRangeError: a position lies outside the difference.
    """
    if positions.ndim != 1 or positions.dtype != np.int64 or values.dtype != np.float32:
        raise StructureError(f"positions are {positions.dtype} {positions.shape}, values {values.dtype}")
    if positions.shape != values.shape:
        raise StructureError(f"{positions.size} positions for {values.shape} values")
    if not (positions[1:] > positions[:-1]).all():
        raise IndexOrderError("positions are unsorted or doubled")
    if positions.size and (positions[0] < 0 or positions[-1] >= parameters):
        raise IndexRangeError(f"a position lies outside 0 … {parameters - 1}")
    if positions.size == parameters:
        return Packed(parameters, None, values)
    return without_zeros(Packed(parameters, positions, values))


def without_zeros(packed: Packed) -> Packed:
    """Return a difference with positions without the places whose values are zero."""
    if packed.positions is None or packed.values.all():
        return packed
    sent = np.flatnonzero(packed.values)
    return Packed(packed.parameters, packed.positions[sent], packed.values[sent])


def pack(difference: Vector) -> Packed:
    """Return a difference (parameters,) without its zeros, where that saves memory."""
    sent = np.flatnonzero(difference)
    if sent.size * _SPARSE >= difference.size:
        return Packed(difference.size, None, difference)
    return Packed(difference.size, sent.astype(np.int32), difference[sent])


def compact(packed: Packed) -> Packed:
    """Return the same in as little memory as `pack` takes: what is kept longer than it is looked at."""
    if packed.positions is None or packed.values.size * _SPARSE >= packed.parameters:
        return pack(unpack(packed))
    return Packed(packed.parameters, packed.positions.astype(np.int32, copy=False), packed.values)


def scaled(packed: Packed, factor: float) -> Packed:
    """Return the difference times a factor, rounded to float32; what underflows stays in it as a zero."""
    return Packed(packed.parameters, packed.positions, packed.values * np.float32(factor))


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


def norm(difference: Packed | Vector) -> float:
    """Return the Euclidean norm: the same bits however the difference was packed."""
    return float(np.sqrt(np.square(_sent(difference)[1], dtype=np.float64).sum()))


def dot(one: Packed | Vector, other: Vector) -> float:
    """Return the scalar product over what `one` sent, in an order that no library's threads change."""
    places, values = _sent(one)
    return float(np.multiply(values, other[places], dtype=np.float64).sum())


def _sent(difference: Packed | Vector) -> tuple[Positions | slice, Vector]:
    """Return places and values of what is not zero."""
    if isinstance(difference, Packed):
        if difference.positions is not None:
            return difference.positions, difference.values
        difference = difference.values
    places = np.flatnonzero(difference)
    return (slice(None), difference) if places.size == difference.size else (places, difference[places])
