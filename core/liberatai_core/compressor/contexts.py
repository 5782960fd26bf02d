"""Choose the tables of a tensor: one for all its weights, or several by the density of rows and columns.

The classes of every axis start as its mean magnitudes on a logarithmic scale and are then improved as in
Lloyd's algorithm: tables from classes, for one axis after the other classes from tables. Costs are integers
in float64, so their sums, and with them the files, are the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.compressor.layout import Bytes, Integers, Tables, codes_of, costs_of

_SMALLEST = 512
"""Weights of a tensor below which classes never pay."""
_LARGE = 1 << 16
"""Weights of a tensor from which finer classes are tried instead of coarser ones."""
_SWEEPS = 3
_EXACT = 8
"""Symbols below this are told apart while classes are sought, larger ones by quarters of an octave."""
_UNIT = float(1 << rans.FRACTION)
_COARSE = ((2, 2, 2), (1, 1, 1), (2, 2, 0), (2, 0, 0), (0, 2, 0))
_FINE = ((2, 2, 2), (3, 3, 2))
_WORTH = 0.998
"""Where classes save less than this, finer ones are not tried."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Tables, and what they cost in bits: the coded symbols, and the tables with their classes."""

    tables: Tables
    coded: float
    head: float


def choose(symbols: NDArray[np.integer], axes: tuple[int, int, int], alphabet: int) -> Chosen:
    """Return the cheapest tables for the symbols of a tensor.

    Args:
        symbols: integers below `alphabet`, shape (n,).
        axes: sizes of the first axis, the second and all others together, n in all.
        alphabet: number of symbols, at least 2.
    """
    best = single(np.bincount(symbols, minlength=alphabet))
    if symbols.size < _SMALLEST:
        return best
    grouped, groups = _grouped(symbols, alphabet)
    cube = grouped.reshape(axes)
    tried = set()
    for wanted in _FINE if symbols.size >= _LARGE else _COARSE:
        widths = tuple(
            min(width, max(side - 1, 0).bit_length()) for width, side in zip(wanted, axes, strict=True)
        )
        if widths in tried or not any(widths):
            continue
        tried.add(widths)
        classes = _classes(cube, groups, widths)
        trial = _with_classes(symbols, alphabet, axes, widths, classes)
        worth = trial.coded + trial.head < _WORTH * (best.coded + best.head)
        if trial.coded + trial.head < best.coded + best.head:
            best = trial
        if symbols.size >= _LARGE and not worth:
            break
    return best


def single(histogram: Integers) -> Chosen:
    """Return one table for all symbols."""
    codes = codes_of(histogram)
    return Chosen(Tables((codes.tobytes(),)), float(costs_of(codes) @ histogram) / _UNIT, 8.0 * codes.size)


def _grouped(symbols: NDArray[np.integer], alphabet: int) -> tuple[Bytes, int]:
    """Return symbols, large ones in groups, and the number of groups."""
    numbers = np.arange(alphabet)
    exponent = np.maximum(np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 3, 0)
    groups = np.where(numbers < _EXACT, numbers, 4 * exponent + (numbers >> exponent))
    groups = np.unique(groups, return_inverse=True)[1].astype(np.uint8)
    of_symbol: Bytes = np.asarray(groups[symbols], np.uint8)
    return of_symbol, int(groups[-1]) + 1


def _classes(cube: Bytes, groups: int, widths: tuple[int, ...]) -> list[Bytes]:
    classes = [_first(cube, axis, width) for axis, width in enumerate(widths)]
    for _ in range(_SWEEPS):
        before = list(classes)
        for axis, width in enumerate(widths):
            if width:
                classes[axis] = _improved(cube, groups, classes, axis, 1 << width)
        if all(np.array_equal(old, new) for old, new in zip(before, classes, strict=True)):
            break
    return classes


def _first(cube: Bytes, axis: int, width: int) -> Bytes:
    """Return classes of equal steps of the logarithm of the mean."""
    sums = cube.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.int64)
    if not width:
        return np.zeros(sums.size, np.uint8)
    logs = rans.log2(8 * sums + 4)
    ordered = np.sort(logs)
    low, high = int(ordered[sums.size // 50]), int(ordered[-1 - sums.size // 50])
    scaled = ((high - logs) << width) // max(high - low + 1, 1)
    classes: Bytes = np.clip(scaled, 0, (1 << width) - 1).astype(np.uint8)
    return classes


def _improved(cube: Bytes, groups: int, classes: list[Bytes], axis: int, count: int) -> Bytes:
    """Return the classes of one axis that cost least with the tables that the present classes give."""
    others = [number for number in range(3) if number != axis]
    first, second = (classes[number] for number in others)
    away = int(first.max()) + int(second.max()) + 1
    around = np.expand_dims(first[:, None].astype(np.intp) + second[None, :], axis)
    places = np.arange(cube.shape[axis], dtype=np.intp)
    keys = (np.expand_dims(places, tuple(others)) * away + around) * groups + cube
    shape = (cube.shape[axis], away, groups)
    histogram = np.bincount(keys.ravel(), minlength=shape[0] * away * groups).reshape(shape)
    of_table = np.zeros((count + away - 1, groups), np.int64)
    for number in range(count):
        of_table[number : number + away] += histogram[classes[axis] == number].sum(axis=0)
    present = of_table.sum(axis=1) > 0
    # An empty table costs what the nearest one does, so that it stays reachable.
    filled = np.flatnonzero(present)
    nearest = filled[np.abs(np.arange(of_table.shape[0])[:, None] - filled).argmin(axis=1)]
    table_costs = costs_of(codes_of(of_table[nearest]))
    by_class = np.stack([table_costs[number : number + away].ravel() for number in range(count)])
    # Integers in float64: sums are the same on every machine.
    costs = histogram.reshape(shape[0], -1).astype(np.float64) @ by_class.T
    best: Bytes = costs.argmin(axis=1).astype(np.uint8)
    return best


def _with_classes(
    symbols: NDArray[np.integer],
    alphabet: int,
    axes: tuple[int, int, int],
    widths: tuple[int, ...],
    classes: list[Bytes],
) -> Chosen:
    total = classes[0][:, None, None] + classes[1][None, :, None] + classes[2][None, None, :]
    buckets = sum((1 << width) - 1 for width in widths) + 1
    keys = np.broadcast_to(total, axes).ravel().astype(np.intp) * alphabet + symbols
    histogram = np.bincount(keys, minlength=buckets * alphabet).reshape(buckets, alphabet)
    used = histogram.sum(axis=1) > 0
    tables = codes_of(histogram[used])
    coded = float((costs_of(tables) * histogram[used]).sum())
    rows = iter(tables)
    codes = [next(rows).tobytes() if there else None for there in used]
    head = 8 + sum(8 if code is None else 8 * len(code) for code in codes)
    head += sum(-(-side * width // 8) * 8 for side, width in zip(axes, widths, strict=True))
    kept = tuple(
        part if width else np.empty(0, np.uint8) for part, width in zip(classes, widths, strict=True)
    )
    return Chosen(Tables(tuple(codes), kept, widths), coded / _UNIT, float(head))
