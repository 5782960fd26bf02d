"""Streams of updates: numbers and flags, a sparse difference, and a reader of bytes from anywhere."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.cursor import Cursor
from liberatai_core.errors import CodecError, IndexOrderError, IndexRangeError
from liberatai_core.structure import MAX_PARAMETERS
from liberatai_core.weights import Vector

Integers = NDArray[np.int64]

PLAIN = 2
SPARSE = 3
DENSE = 4
MAX_LEVELS = 255
"""8-bit magnitude times 8-bit scale has at most 16 significant bits: exact in float32."""
SIGNS, MAGNITUDES, SEVERAL, IMPLIED = 1, 2, 4, 8
"""Flags of a sparse stream."""
GROUPS_SHIFT = 4


@dataclass(frozen=True, eq=False)
class Sparse:
    """A quantised sparse difference: value i = levels[i] x the scale of the group that i lies in.

    Attributes:
        positions: int64, shape (k,), strictly increasing.
        levels: int16, shape (k,), 1 … 255 in magnitude, signed.
        counts: int64, shape (groups,): non-zeros per group, each at least 1, k together.
        scales: float32, shape (groups,): positive, as `round_scale` returns them.
    """

    positions: Integers
    levels: NDArray[np.int16]
    counts: Integers
    scales: NDArray[np.float32]

    def values(self) -> Vector:
        """Return the float32 values, shape (k,); exact products, unless they overflow to infinity."""
        with np.errstate(over="ignore"):
            return self.levels.astype(np.float32) * np.repeat(self.scales, self.counts)


def check_positions(positions: Integers, parameters: int) -> None:
    """Refuse positions that do not increase or lie outside a structure of `parameters` values.

    Raises:
        CodecError, IndexRangeError, IndexOrderError: see above.
    """
    if not 0 < parameters <= MAX_PARAMETERS:
        raise CodecError(f"sparse update over {parameters} parameters, at most {MAX_PARAMETERS}")
    if positions.size and (positions.min() < 0 or positions.max() >= parameters):
        raise IndexRangeError(f"sparse update: a position lies outside 0 … {parameters - 1}")
    if (np.diff(positions) <= 0).any():
        raise IndexOrderError("sparse update: positions are unsorted or doubled")


class Reader(Cursor):
    """Cursor over a stream; what is missing is refused before anything is allocated."""

    what = "sparse update"

    def floats(self, count: int) -> Vector:
        """Return the next `count` float32 values."""
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)

    def split(self, parts: int, total: int) -> list[int]:
        """Return `parts` numbers, each at least 1, `total` together; the last one is not in the stream."""
        counts = [self.varint() for _ in range(parts - 1)]
        counts.append(total - sum(counts))
        if min(counts) < 1:
            raise CodecError("sparse update: counts do not add up to the non-zeros")
        return counts
