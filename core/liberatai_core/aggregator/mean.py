"""The weighted mean of differences inside one structure.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg),
AISTATS 2017, arXiv:1602.05629. With a cover (nested members, head only) every coordinate is divided by the
weight of those that cover it: Diao et al., "HeteroFL", ICLR 2021, arXiv:2010.01264.

Two rules for a coordinate that only some devices sent, in `RULES`: `mean` counts it as zero for the others,
`mean_over_senders` divides by the weight of those that sent it (both are readings of Thonglek et al.,
ICFEC 2022, which leaves it open).

Sums are exact: every summand is cut at fixed powers of two, and the pieces of one power add up in float64
without rounding (Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013). So the same
updates give the same bytes in any order, and partial sums of shards can be merged.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DuplicateError, SchemaError, StructureError, TooLargeError
from liberatai_core.weights import Vector, require_finite

MAX_SAMPLES = 10_000
"""Most that one update counts for: sample counts are a device's own word, and must not buy the model."""

_LARGEST_CAP = 1 << 29
"""29 bits times the 24 of a float32 are 53: the product is exact in float64."""
MAX_UPDATES = 1 << 20
"""Most updates in one sum: 2^20 pieces below 2^32 stay below 2^53, where float64 counts without rounding."""
_PIECE = 32
"""Bits of a piece; with at most 10 000 samples a summand has 38 significant bits, so 2 or 3 pieces."""
_BLOCK = 1 << 14
"""Values cut at a time: the buffers stay in the processor's cache."""
_DENSE = 8
"""With more than one value in 8, passing over the zeros is faster than gathering and scattering."""

Cover = NDArray[np.bool_]
"""Which coordinates an update speaks about, shape (parameters,)."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Exact weighted sum so far.

    Attributes:
        parameters: length of the vectors.
        pieces: by exponent e: sum of the pieces that are multiples of 2^e, shape (parameters,), float64; the
            sum of weight * difference is their sum. About three arrays occur; float32 allows at most ten.
        weights: sum of weights, shape (parameters,), or (1,) while every update covered everything.
        updates: number of updates in it.
    """

    parameters: int
    pieces: Mapping[int, Doubles]
    weights: Doubles
    updates: int = 0

    @property
    def values(self) -> Doubles:
        """The sum as float64, shape (parameters,), rounded the same way whatever the order was."""
        total = np.zeros(self.parameters)
        for exponent in sorted(self.pieces, reverse=True):
            total += self.pieces[exponent]
        return total


@dataclass(frozen=True, slots=True)
class Aggregator:
    """Four pure functions.

    Attributes:
        init: number of parameters -> empty state.
        add: (state, difference, samples, cover or None for all) -> state.
        merge: (state, state) -> state of the updates of both, which must not share one.
        finish: state -> mean difference, float32; zero where nothing was covered.
    """

    init: Callable[[int], Sum]
    add: Callable[[Sum, Vector, int, Cover | None], Sum]
    merge: Callable[[Sum, Sum], Sum]
    finish: Callable[[Sum], Vector]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One device's decoded update.

    Attributes:
        id: unique name; fixes the order of summation.
        difference: shape (parameters,), float32.
        samples: number of samples it was trained on, at least 1.
        cover: see `Cover`; None for all.
    """

    id: str
    difference: Vector
    samples: int
    cover: Cover | None = None


def mean(cap: int = MAX_SAMPLES) -> Aggregator:
    """Return the mean with weight min(samples, cap); what an update did not send counts as zero."""
    if not 1 <= cap <= _LARGEST_CAP:
        raise ValueError(f"cap must be 1 … {_LARGEST_CAP}, not {cap}")

    def init(parameters: int) -> Sum:
        return Sum(parameters, {}, np.zeros(1))

    def add(state: Sum, difference: Vector, samples: int, cover: Cover | None = None) -> Sum:
        if difference.shape != (state.parameters,):
            raise StructureError(f"update of shape {difference.shape}, wanted ({state.parameters},)")
        if samples < 1:
            raise SchemaError(f"update counts {samples} samples, at least 1 is needed")
        require_finite(difference, "update")
        updates = _more(state.updates, 1)
        weight = float(min(samples, cap))
        if cover is None:
            pieces = _added(state.pieces, weight, difference)
            return Sum(state.parameters, pieces, state.weights + weight, updates)
        if cover.shape != difference.shape or cover.dtype != np.bool_:
            raise StructureError(f"cover is {cover.dtype} {cover.shape}, wanted bool {difference.shape}")
        pieces = _added(state.pieces, weight, np.where(cover, difference, np.float32(0)))
        return Sum(state.parameters, pieces, state.weights + weight * cover, updates)

    return Aggregator(init, add, merge, _finish)


def mean_over_senders(cap: int = MAX_SAMPLES) -> Aggregator:
    """Return the mean over those that sent a coordinate, with weight min(samples, cap).

    An update speaks about its non-zero coordinates: no sparse method sends a zero.
    """
    every = mean(cap)

    def add(state: Sum, difference: Vector, samples: int, cover: Cover | None = None) -> Sum:
        if cover is not None and cover.shape != difference.shape:
            raise StructureError(f"cover of shape {cover.shape}, wanted {difference.shape}")
        sent = difference != 0
        return every.add(state, difference, samples, sent if cover is None else sent & cover)

    return Aggregator(every.init, add, every.merge, every.finish)


RULES: dict[str, Callable[[int], Aggregator]] = {"mean": mean, "mean_over_senders": mean_over_senders}
"""By name, as a sparse method names the rule that it needs."""


def merge(one: Sum, other: Sum) -> Sum:
    """Return the sum of two disjoint sets of updates; exact, so the shards' order does not matter.

    Raises:
        StructureError: the sums have different lengths.
        TooLargeError: together they hold more than `MAX_UPDATES` updates.
    """
    if one.parameters != other.parameters:
        raise StructureError(f"sums over {one.parameters} and {other.parameters} parameters")
    pieces = dict(one.pieces)
    for exponent, piece in other.pieces.items():
        pieces[exponent] = pieces[exponent] + piece if exponent in pieces else piece
    updates = _more(one.updates, other.updates)
    return Sum(one.parameters, pieces, one.weights + other.weights, updates)


def _finish(state: Sum) -> Vector:
    result = state.values
    weights = np.broadcast_to(state.weights, result.shape)
    np.divide(result, weights, out=result, where=weights > 0)
    return result.astype(np.float32)


def _more(updates: int, added: int) -> int:
    if updates + added > MAX_UPDATES:
        raise TooLargeError(f"{updates + added} updates in one sum, at most {MAX_UPDATES}")
    return updates + added


def _added(pieces: Mapping[int, Doubles], weight: float, difference: Vector) -> dict[int, Doubles]:
    """Return copies of the pieces with weight * difference added to them.

    Every step is exact: a product of at most 29 + 24 bits, scalings by powers of two, and subtractions that
    leave what lies below the cut.
    """
    result = {exponent: piece.copy() for exponent, piece in pieces.items()}
    for places in _blocks(difference):
        rest = difference[places] * np.float64(weight)
        exponent = math.frexp(float(np.abs(rest).max()))[1] // _PIECE * _PIECE
        while rest.any():
            unit = math.ldexp(1.0, exponent)
            piece = rest / unit
            np.rint(piece, out=piece)
            piece *= unit
            if exponent not in result:
                result[exponent] = np.zeros(difference.size)
            result[exponent][places] += piece
            rest -= piece
            exponent -= _PIECE
    return result


def _blocks(difference: Vector) -> Iterator[slice | NDArray[np.int64]]:
    """Yield the places of all values that are not zero, some thousands at a time."""
    sent = np.flatnonzero(difference)
    if sent.size * _DENSE > difference.size:
        for start in range(0, difference.size, _BLOCK):
            yield slice(start, start + _BLOCK)
        return
    for start in range(0, sent.size, _BLOCK):
        yield sent[start : start + _BLOCK]


def aggregate(aggregator: Aggregator, parameters: int, updates: Iterable[Update]) -> Vector:
    """Return the mean difference of a set of updates; byte-identical whatever their order.

    Raises:
        DuplicateError: two updates have one id.
        StructureError: an update has another length.
        NonFiniteError: an update contains NaN or infinity.
        SchemaError: an update counts no sample.
    """
    state, last = aggregator.init(parameters), None
    for update in sorted(updates, key=lambda update: update.id):
        if update.id == last:
            raise DuplicateError(f"update {update.id} is there twice")
        state, last = aggregator.add(state, update.difference, update.samples, update.cover), update.id
    return aggregator.finish(state)
