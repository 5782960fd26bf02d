"""Values of a model file that may change with its indices as they are: for retraining, and for statistics."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor.artifact import write
from liberatai_core.compressor.layout import (
    CODEBOOK,
    CONSTANT,
    DRAWN,
    FULL,
    GRID,
    HALF,
    MAX_ENTRIES,
    MAX_LEVEL,
    Coding,
    Indices,
    book_of,
    record,
)
from liberatai_core.compressor.reading import read
from liberatai_core.structure import Structure, Tensor, require_length
from liberatai_core.weights import Vector, require_finite


@dataclass(frozen=True, eq=False)
class Cells:
    """Which weights of a file share one value, and which values may change without changing its size.

    weight = value of its cell x factor, in float32.

    Attributes:
        of_weight: int32, shape (parameters,); -1: the weight is fixed (fine grids, drawn tensors).
        count: number of cells.
        pinned: bool, shape (count,): the cell's value is zero and has to stay.
        factor: float32, shape (parameters,): scale of the weight's channel, 1 where there are none.
    """

    of_weight: NDArray[np.int32]
    count: int
    pinned: NDArray[np.bool_]
    factor: Vector


VERBATIM_HEAD = 4
"""Bytes of a tensor that stands value by value, beside its values."""


def cells_of(artifact: bytes, structure: Structure) -> Cells:
    """Return which weights of a file share a value: what training with frozen indices may move.

    A packed grid (small tensors) has a cell for every weight: `recentred` rounds to a new grid of the same
    width.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    of_weight = np.full(structure.parameters, -1, np.int32)
    factor = np.ones(structure.parameters, np.float32)
    pinned: list[bool] = []
    count = 0
    for coding, (tensor, place) in zip(read(artifact, structure), structure.slices(), strict=True):
        own, zero = _own_cells(coding, tensor.size)
        if own is None:
            continue
        of_weight[place] = own + count
        count += len(zero)
        pinned += zero
        coding.scale_channels(factor[place])
    return Cells(of_weight, count, np.array(pinned, np.bool_), factor)


def _own_cells(coding: Coding, size: int) -> tuple[Indices | None, list[bool]]:
    """Return cells of one tensor, and which of them are pinned; None: its weights are fixed."""
    if coding.kind == CONSTANT:
        return np.zeros(size, np.int32), [False]
    if coding.values is not None or _packed_grid(coding):
        return np.arange(size, dtype=np.int32), [False] * size
    if coding.kind == DRAWN or coding.raw_bits or coding.count > MAX_ENTRIES:
        return None, []
    values = coding.looked_up(np.arange(coding.count))
    return coding.indices, [bool(value == 0) for value in values]


def _packed_grid(coding: Coding) -> bool:
    return coding.kind == GRID and coding.raw_bits > 0


def recentred(artifact: bytes, structure: Structure, weights: Vector) -> bytes:
    """Return a file with the same indices and other values, those of `weights`.

    Entries of codebooks become float16 times a power of two; packed grids are rounded to a grid of the same
    width: neither grows. Grids with tables become codebooks, which adds two bytes per level, and one more
    per level beyond the 16 nearest to zero; files for retraining have none.

    Args:
        artifact: the file.
        structure: its named tensors.
        weights: float32, shape (parameters,); constant on every cell of `cells_of` for the file, times
            its factors, to 1e-4 of the tensor's largest weight.

    Raises:
        ValueError: weights of one cell differ, a pinned one is not zero, or a fixed one changed.
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        CodecError, TooLargeError, BombError: as for `restore`.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    codings = [
        _moved(coding, weights[place], tensor)
        for coding, (tensor, place) in zip(read(artifact, structure), structure.slices(), strict=True)
    ]
    return write(codings, structure)


def verbatim_bytes(structure: Structure, names: AbstractSet[str]) -> int:
    """Return at most what `verbatim` adds to a file."""
    return sum(2 * tensor.size + VERBATIM_HEAD for tensor in structure.tensors if tensor.name in names)


def verbatim(artifact: bytes, structure: Structure, weights: Vector, names: AbstractSet[str]) -> bytes:
    """Return a file in which these tensors stand value by value, as float16; the others stay as they are.

    Values that float16 cannot hold make their tensor float32, which may take more than `verbatim_bytes`.

    Args:
        artifact: the file.
        structure: its named tensors.
        weights: float32, shape (parameters,), of which only those of `names` are looked at.
        names: of tensors.

    Raises:
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        CodecError, TooLargeError, BombError: as for `restore`.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    codings = read(artifact, structure)
    for number, (tensor, place) in enumerate(structure.slices()):
        if tensor.name in names:
            values = weights[place]
            fits = float(np.abs(values).max()) <= float(np.finfo(np.float16).max)
            half = Coding(HALF, values=values.astype(np.float16)) if fits else None
            codings[number] = half or Coding(FULL, values=values.copy())
    return write(codings, structure)


def _moved(coding: Coding, weights: Vector, tensor: Tensor) -> Coding:
    before = coding.weights(tensor.size)
    if np.array_equal(before, weights):
        return coding
    if coding.values is not None:
        exact = weights if coding.kind == FULL else weights.astype(np.float16)
        return replace(coding, values=exact)
    if _packed_grid(coding):
        return _regridded(coding, weights)
    own, pinned = _own_cells(coding, tensor.size)
    if own is None:
        raise ValueError(f"{tensor.name}: its coding has no cells, so its weights cannot change")
    counts = np.bincount(own, minlength=len(pinned))
    factor = np.ones(tensor.size, np.float32)
    coding.scale_channels(factor)
    # Rows with large factors know the value best.
    power = np.bincount(own, factor.astype(np.float64) ** 2, len(pinned))
    sums = np.bincount(own, factor.astype(np.float64) * weights, len(pinned))
    values = sums / np.where(counts > 0, power, 1)
    if coding.kind != CONSTANT:
        values = np.where(counts > 0, values, coding.looked_up(np.arange(coding.count)))
    values[pinned] = 0.0
    if np.abs(values[own] * factor - weights).max() > 1e-4 * np.abs(weights).max():
        raise ValueError(f"{tensor.name}: weights of one cell differ, or a zero moved")
    if coding.kind == CONSTANT:
        return replace(coding, scale=np.float32(values[0]))
    scale, entries = book_of(values)
    return replace(coding, kind=CODEBOOK, scale=scale, entries=entries, low=0, levels=0)


def _regridded(coding: Coding, weights: Vector) -> Coding:
    """Return a packed grid of the same width and record size around other weights."""
    low, high = float(weights.min()), float(weights.max())
    size = len(record(coding))
    top = max(abs(low), abs(high), float(np.finfo(np.float32).tiny))
    step = max((high - low) / max(coding.levels - 2, 1), 2 * top / MAX_LEVEL)
    while True:
        exact = np.float32(step)
        first, last = round(low / float(exact)), round(high / float(exact))
        moved = replace(coding, scale=exact, low=first)
        if last - first < coding.levels and len(record(moved)) <= size:
            break
        step *= 1.01
    indices = np.rint(weights / np.float64(exact)).astype(np.int64) - first
    return replace(moved, indices=indices)
