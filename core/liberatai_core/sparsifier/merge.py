"""One exact difference in the place of several: what turns the weights of one version into those of another.

A device that was away would otherwise fetch every delta that it missed; coordinates that moved to and fro,
or several times, are then paid for more than once. Published deltas have power-of-two scales
(`top_k.sparsify(power_of_two=True)`), so differences of versions are integers times one power of two per
tensor, and float32 sums of them are exact in any order.

Steps shrink while a job converges, so these integers grow. A stream has levels up to 255; the few
coordinates that moved farther pay twice: a coarse stream leads near, the last one the rest of the way.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.sparsifier import codec
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

MAX_STREAMS = 3
"""Together they span 24 bits, which is all that a float32 sum has."""
_COARSER = 256
"""Units of one stream are so many of the next one: just beyond its largest level."""
_SMALLEST = 2.0**-126
"""Smaller float32 values are not normal, and no scale of a stream."""


def exact_deltas(before: Vector, after: Vector, structure: Structure) -> tuple[bytes, ...] | None:
    """Return updates that turn `before` into `after`, bit for bit, if they are added in this order.

    Args:
        before: float32, shape (parameters,): the weights that a device holds.
        after: float32, shape (parameters,): the weights that it shall hold.
        structure: the named tensors of the flat vector; scales are per tensor.

    Returns:
        One stream, or up to MAX_STREAMS, coarse ones first; None where no streams do it: a difference is no
        multiple below 2^24 of one power of two per tensor, or a sum would be rounded.

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
    ends = np.searchsorted(positions, [place.stop for _, place in structure.slices()])
    counts = np.diff(ends, prepend=0)
    units = np.array([_unit(part) for part in np.split(difference, ends[:-1])])
    steps = difference / np.repeat(units, counts)
    layers: list[codec.Sparse] = []
    while steps.any() or not layers:
        if len(layers) == MAX_STREAMS:
            return None
        carry = np.where(np.abs(steps) > codec.MAX_LEVELS, np.rint(steps / _COARSER), 0.0)
        scales = units * float(_COARSER ** len(layers))
        layer = _layer(positions, steps - _COARSER * carry, counts, scales)
        if layer is None:
            return None
        layers.insert(0, layer)
        steps = carry
    reached = before + np.float32(0)  # as densified zeros leave it: no negative zero
    for layer in layers:
        reached[layer.positions] += layer.values()
    if not np.array_equal(reached.view(np.uint32), after.view(np.uint32)):
        return None
    return tuple(codec.encode(layer, structure.parameters) for layer in layers)


def _layer(
    positions: NDArray[np.int64],
    levels: NDArray[np.float64],
    counts: NDArray[np.int64],
    scales: NDArray[np.float64],
) -> codec.Sparse | None:
    """Return the levels that are not zero; None if a scale that they need is no normal float32."""
    sent = levels != 0
    tensors = np.repeat(np.arange(counts.size), counts)[sent]
    used, numbers = np.unique(tensors, return_counts=True)
    if (scales[used] < _SMALLEST).any() or (scales[used] > np.finfo(np.float32).max / _COARSER).any():
        return None
    return codec.Sparse(
        positions[sent],
        levels[sent].astype(np.int16),
        numbers.astype(np.int64),
        scales[used].astype(np.float32),
    )


def _unit(values: NDArray[np.float64]) -> float:
    """Return the largest power of two of which all values, none of them zero, are multiples; 1 for none."""
    if not values.size:
        return 1.0
    mantissas, exponents = np.frexp(values)
    integers = np.abs(np.ldexp(mantissas, 53)).astype(np.int64)
    lowest = np.log2((integers & -integers).astype(np.float64)).astype(np.int64)
    return float(np.ldexp(1.0, int((exponents - 53 + lowest).min())))
