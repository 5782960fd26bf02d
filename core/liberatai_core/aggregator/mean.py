"""The weighted mean of differences inside one structure.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg),
AISTATS 2017, arXiv:1602.05629. With a cover (nested members, head only) every coordinate is divided by the
weight of those that cover it: Diao et al., "HeteroFL", ICLR 2021, arXiv:2010.01264.

Sums are float64 and taken in one fixed order, so the same updates give the same bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DuplicateError, SchemaError, StructureError
from liberatai_core.weights import Vector, require_finite

MAX_SAMPLES = 10_000
"""Most that one update counts for: sample counts are a device's own word, and must not buy the model."""

Cover = NDArray[np.bool_]
"""Which coordinates an update speaks about, shape (parameters,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Weighted sum so far.

    Attributes:
        values: sum of weight * difference, shape (parameters,), float64.
        weights: sum of weights, shape (parameters,), or (1,) while every update covered everything.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Aggregator:
    """Three pure functions.

    Attributes:
        init: number of parameters -> empty state.
        add: (state, difference, samples, cover or None for all) -> state.
        finish: state -> mean difference, float32; zero where nothing was covered.
    """

    init: Callable[[int], Sum]
    add: Callable[[Sum, Vector, int, Cover | None], Sum]
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
    """Return the mean with weight min(samples, cap)."""
    if cap < 1:
        raise ValueError(f"cap must be at least 1, not {cap}")

    def init(parameters: int) -> Sum:
        return Sum(np.zeros(parameters), np.zeros(1))

    def add(state: Sum, difference: Vector, samples: int, cover: Cover | None = None) -> Sum:
        if difference.shape != state.values.shape:
            raise StructureError(f"update of shape {difference.shape}, wanted {state.values.shape}")
        if samples < 1:
            raise SchemaError(f"update counts {samples} samples, at least 1 is needed")
        require_finite(difference, "update")
        weight = float(min(samples, cap))
        if cover is None:
            return Sum(state.values + weight * difference.astype(np.float64), state.weights + weight)
        if cover.shape != difference.shape or cover.dtype != np.bool_:
            raise StructureError(f"cover is {cover.dtype} {cover.shape}, wanted bool {difference.shape}")
        masked = np.where(cover, difference, 0).astype(np.float64)
        return Sum(state.values + weight * masked, state.weights + weight * cover)

    def finish(state: Sum) -> Vector:
        weights = np.broadcast_to(state.weights, state.values.shape)
        result = np.zeros(state.values.shape)
        np.divide(state.values, weights, out=result, where=weights > 0)
        return result.astype(np.float32)

    return Aggregator(init, add, finish)


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
