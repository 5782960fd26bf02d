"""What the coordinator does with the mean difference: the server's step.

- plain: FedAvg, McMahan et al., AISTATS 2017, arXiv:1602.05629: w + rate * d
- FedAvgM: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", 2019, arXiv:1909.06335:
  heavy ball
- FedAdam: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295 (no bias correction,
  as in the paper's Algorithm 2)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from liberatai_core.errors import StructureError
from liberatai_core.weights import Vector, require_finite


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """Moments of the differences, shape (parameters,), float32; empty where the rule needs none."""

    first: Vector
    second: Vector


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """Two pure functions.

    Attributes:
        init: number of parameters -> state.
        step: (state, weights, mean difference) -> (state, new weights).
    """

    init: Callable[[int], ServerState]
    step: Callable[[ServerState, Vector, Vector], tuple[ServerState, Vector]]


_NONE = np.zeros(0, dtype=np.float32)


def plain(rate: float = 1.0) -> ServerOptimizer:
    """Add the mean difference, times `rate`."""

    def init(_parameters: int) -> ServerState:
        return ServerState(_NONE, _NONE)

    def step(state: ServerState, weights: Vector, difference: Vector) -> tuple[ServerState, Vector]:
        _require_pair(weights, difference)
        return state, weights + np.float32(rate) * difference

    return ServerOptimizer(init, step)


def fedavgm(rate: float = 1.0, momentum: float = 0.9) -> ServerOptimizer:
    """Add the momentum of the mean differences, times `rate`."""

    def init(parameters: int) -> ServerState:
        return ServerState(np.zeros(parameters, dtype=np.float32), _NONE)

    def step(state: ServerState, weights: Vector, difference: Vector) -> tuple[ServerState, Vector]:
        _require_pair(weights, difference)
        _require_pair(weights, state.first)
        first = np.float32(momentum) * state.first + difference
        return ServerState(first, _NONE), weights + np.float32(rate) * first

    return ServerOptimizer(init, step)


def fedadam(
    rate: float = 1e-2, decay_1: float = 0.9, decay_2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """Scale every coordinate by the size of its past differences; `tau` bounds the scale of quiet ones."""

    def init(parameters: int) -> ServerState:
        # The paper starts v at tau^2 at least: a first tiny difference must not make a huge step.
        return ServerState(
            np.zeros(parameters, dtype=np.float32), np.full(parameters, tau**2, dtype=np.float32)
        )

    def step(state: ServerState, weights: Vector, difference: Vector) -> tuple[ServerState, Vector]:
        _require_pair(weights, difference)
        _require_pair(weights, state.first)
        first = np.float32(decay_1) * state.first + np.float32(1 - decay_1) * difference
        second = np.float32(decay_2) * state.second + np.float32(1 - decay_2) * difference**2
        moved = weights + np.float32(rate) * first / (np.sqrt(second) + np.float32(tau))
        return ServerState(first, second), moved.astype(np.float32)

    return ServerOptimizer(init, step)


SERVER_OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "mean": plain,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
}


def _require_pair(weights: Vector, difference: Vector) -> None:
    if weights.shape != difference.shape:
        raise StructureError(f"difference or moment of shape {difference.shape}, wanted {weights.shape}")
    require_finite(difference, "mean difference")
