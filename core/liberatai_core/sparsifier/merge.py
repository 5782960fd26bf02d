"""One exact delta in the place of several: what turns the weights of one version into those of another.

A device that was away would otherwise fetch every delta that it missed; coordinates that moved to and fro,
or several times, are then paid for more than once. Published deltas have power-of-two scales
(`top_k.sparsify(power_of_two=True)`), so differences of versions are small integers times one power of two
per tensor, and float32 sums of them are exact in any order.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.sparsifier import codec
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite


def exact_delta(before: Vector, after: Vector, structure: Structure) -> bytes | None:
    """Return the update whose densified difference turns `before` into `after`, bit for bit.

    Args:
        before: float32, shape (parameters,): the weights that a device holds.
        after: float32, shape (parameters,): the weights that it shall hold.
        structure: the named tensors of the flat vector; scales are per tensor.

    Returns:
        The stream, or None where no stream does it: a difference is not a small multiple (1 … 255) of one
        power of two per tensor, or the sum would be rounded.

    Raises:
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a value is NaN or infinite.
    """
    require_length(before, structure)
    require_length(after, structure)
    require_finite(before, "before")
    require_finite(after, "after")
    positions = np.flatnonzero(before != after)
    # Differences of float32 values of about one magnitude are exact in float64.
    difference = after[positions].astype(np.float64) - before[positions]
    levels = np.zeros(positions.size, np.int16)
    counts, scales = [], []
    ends = np.searchsorted(positions, [place.stop for _, place in structure.slices()]).tolist()
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        if start == stop:
            continue
        scale = _unit(difference[start:stop])
        steps = difference[start:stop] / scale
        if np.abs(steps).max() > codec.MAX_LEVELS or not 0 < np.float32(scale) < np.inf:
            return None
        levels[start:stop] = steps
        counts.append(stop - start)
        scales.append(np.float32(scale))
    sparse = codec.Sparse(positions, levels, np.array(counts, np.int64), np.array(scales, np.float32))
    reached = before + np.float32(0)  # as densified zeros leave it: no negative zero
    reached[positions] += sparse.values()
    if not np.array_equal(reached.view(np.uint32), after.view(np.uint32)):
        return None
    return codec.encode(sparse, structure.parameters)


def _unit(values: NDArray[np.float64]) -> float:
    """Return the largest power of two of which all values, none of them zero, are multiples."""
    mantissas, exponents = np.frexp(values)
    integers = np.abs(np.ldexp(mantissas, 53)).astype(np.int64)
    lowest = np.log2((integers & -integers).astype(np.float64)).astype(np.int64)
    return float(np.ldexp(1.0, int((exponents - 53 + lowest).min())))
