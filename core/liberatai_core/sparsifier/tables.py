"""Probability tables of a sparse stream, the same at both ends: classes of numbers, laws, runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.sparsifier.stream import MAX_LEVELS, Integers
from liberatai_core.structure import MAX_PARAMETERS

MAX_RUNS = 32
"""Gap tables of one stream: bounds the decoder's memory (4 MiB) and the encoder's search."""
SHAPES = (2, 3, 4, 6, 8, 12, 20, 40)
"""Tails of the Lomax laws, in eighths; the last one is nearly geometric."""
GEOMETRIC = len(SHAPES)
EXPLICIT = GEOMETRIC + 1
NEVER = 255
"""Share code of a class that does not occur."""
_ROW = 32
"""Symbols per lane where lanes are free: few enough rows for a fast decoder, lanes for all sizes."""
LONGEST = 1024
"""Symbols per lane where lanes cost 3 bytes: below 1 % of what is in them."""
_LANES = 1 << 14
"""Lanes at most while rows are short: more would not fit a cache."""
EXACT = 16
"""Classes below this are single numbers and have no raw bits."""
_TABLES = 512
"""Tables and laws that are kept: 4 KiB each at most."""
NEAR = 8
"""Gap classes 0, 1 ... 7 and the rest have sign statistics of their own."""


# --- classes of gaps and magnitudes ----------------------------------------------------------------


def classes_of(numbers: NDArray[np.signedinteger]) -> NDArray[np.uint8]:
    """Return classes: the number itself below 16, then eight to the octave."""
    classes: NDArray[np.uint8] = np.minimum(numbers, EXACT).astype(np.uint8)
    far = np.flatnonzero(numbers >= EXACT)
    large = numbers[far].astype(np.int64)
    exponent = np.frexp(large.astype(np.float64))[1].astype(np.int64) - 4
    classes[far] = 8 * exponent + (large >> exponent)
    return classes


def class_of(number: int) -> int:
    """Return the class of one number."""
    exponent = max(number.bit_length() - 4, 0)
    return 8 * exponent + (number >> exponent)


CLASSES = class_of(MAX_PARAMETERS - 1) + 1


@lru_cache(1)
def class_widths() -> Integers:
    """Return the raw bits that follow each class, and one class more."""
    return np.maximum(np.arange(CLASSES + 1) // 8 - 1, 0)


@lru_cache(1)
def class_edges() -> Integers:
    """Return the smallest number of each class, and of one class more."""
    number, exponent = np.arange(CLASSES + 1), class_widths()
    return (number - 8 * exponent) << exponent


def rests(
    numbers: NDArray[np.signedinteger], classes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return values and widths of the raw bits behind the classes, without the empty ones."""
    far = np.flatnonzero(classes >= EXACT)
    classes = classes[far]
    return (numbers[far] - class_edges()[classes]).astype(np.uint32), class_widths()[classes].astype(np.uint8)


# --- tables ----------------------------------------------------------------------------------------

IMPLIED_LAW = b"\xff"
"""In a plan: the geometric law that follows from the density; it is not in the stream."""


@lru_cache(_TABLES)
def shares_of(law: bytes) -> Integers:
    """Return the weight of every class, sum about 2^30, from the two bytes of a parametric table."""
    shape, scale = law
    if shape == GEOMETRIC:
        # 2^(4 - scale / 8) with 34 fractional bits.
        rate = int(rans.exp2_negative(np.array([scale << rans.FRACTION - 3]))[0]) << 8
        return _geometric(rate)
    # c = 2^(scale / 8 - 4) with 8 fractional bits: 2^(29 + eighths), shifted.
    wide = int(rans.exp2_negative(np.array([(8 - scale % 8) << rans.FRACTION - 3]))[0])
    c = (wide << 6) >> 31 - scale // 8
    ratios = rans.log2((class_edges() << 8) + c) - int(rans.log2(np.array([c]))[0])
    survival = rans.exp2_negative(ratios * SHAPES[shape] >> 3)
    weights: Integers = np.maximum(survival[:-1] - survival[1:], 0)
    return weights


def _geometric(rate: int) -> Integers:
    """Return weights of a geometric law: -log2 of the ratio with 34 fractional bits."""
    gaps = np.minimum(class_edges(), (40 << 34) // max(rate, 1) + 1)
    survival = rans.exp2_negative(gaps * rate >> 34 - rans.FRACTION)
    weights: Integers = np.maximum(survival[:-1] - survival[1:], 0)
    return weights


def implied(count: int, parameters: int) -> Integers:
    """Return weights for `count` non-zeros that lie anywhere among `parameters`."""
    if count == parameters:
        return _geometric(16 << 34)
    rate = rans.log2(np.array([parameters])) - rans.log2(np.array([parameters - count]))
    return _geometric(max(int(rate[0]), 1) << 34 - rans.FRACTION)


def weights_of(law: bytes) -> Integers:
    """Return the weights of the classes from the bytes of a table."""
    if law[0] == EXPLICIT:
        codes = np.frombuffer(law[2:], np.uint8).astype(np.int64)
        weights = rans.exp2_negative(codes << rans.FRACTION - 3)
        return np.where(codes == NEVER, 0, weights)
    return shares_of(law)


def _with_signs(weights: Integers, changes: Sequence[int]) -> Integers:
    """Return weights of (class, does the sign change?), interleaved."""
    share = np.full(weights.size, changes[2], np.int64)
    share[:NEAR], share[:1] = changes[1], changes[0]
    return np.stack([weights * (256 - share), weights * share], axis=1).ravel()


@dataclass(frozen=True)
class Plan:
    """Gap tables: runs of `counts` non-zeros with their laws; `changes` are empty if signs are raw."""

    counts: list[int]
    laws: list[bytes]
    changes: list[tuple[int, ...]]
    signs: bool


def coded_by(plan: Plan, magnitude_table: bytes | None, parameters: int, count: int) -> rans.Coded:
    """Return tables and runs of symbols: gaps, then magnitudes. Both ends."""
    classes = class_of(parameters - 1) + 1
    tables = [
        _implied_table(parameters, count, changes) if law == IMPLIED_LAW else _table(law, classes, changes)
        for law, changes in zip(plan.laws, plan.changes, strict=True)
    ]
    counts, owners = list(plan.counts), list(range(len(tables)))
    if magnitude_table is not None:
        owners.append(len(tables))
        counts.append(count)
        tables.append(_table(magnitude_table, class_of(MAX_LEVELS - 1) + 1, ()))
    return rans.Coded(tables, counts, owners)


# Updates of one round are much alike: most of their tables are the same.
@lru_cache(_TABLES)
def _table(law: bytes, classes: int, changes: tuple[int, ...]) -> Integers:
    """Return the frequencies of a table of the stream; `changes` are empty if signs are raw."""
    return _frequencies(weights_of(law)[:classes], changes)


@lru_cache(_TABLES)
def _implied_table(parameters: int, count: int, changes: tuple[int, ...]) -> Integers:
    """Return the frequencies of the table that follows from the density."""
    return _frequencies(implied(count, parameters)[: class_of(parameters - 1) + 1], changes)


def _frequencies(weights: Integers, changes: tuple[int, ...]) -> Integers:
    frequencies = rans.normalise(_with_signs(weights, changes) if changes else weights)
    frequencies.setflags(write=False)
    return frequencies


def free_lanes(symbols: int, raw_bits: int) -> int:
    """Return the lanes that raw bits pay for, as many as are of use."""
    lanes = min(-(-symbols // _ROW), raw_bits // rans.STATE_BITS, max(_LANES, -(-symbols // LONGEST)))
    return max(lanes, 1)
