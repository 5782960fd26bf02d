"""A linear head in one round: sums of features from every device, one system of equations at the coordinator.

W = (sum of A_k + strength * I)^-1 sum of B_k with A_k = F_k' F_k and B_k = F_k' Y_k of a device's features
F_k (with a column of ones) and one-hot labels Y_k. It is the ridge regression of all samples together,
exactly, for any split of them and in any order; a device is taken out again by subtracting its sums. The idea
is that of Fed3R (Fani et al., ICML 2024, arXiv:2402.10664) and AFL (He et al., CVPR 2025, arXiv:2405.16240).

Sums of few samples say much about them: A of a single sample is that sample's features. So a device with
fewer than `LEAST` samples has no sums to give.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DataError, NonFiniteError

Doubles = NDArray[np.float64]
LEAST = 16
"""Samples behind sums, at least."""
STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""Of the penalty, per sample: what `best` tries."""


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What a device tells of its samples: sums over all of them.

    Attributes:
        gram: F'F, float64, symmetric, shape (features + 1, features + 1); the last feature is 1.
        moments: F'Y, float64, shape (features + 1, classes).
        samples: behind both.
    """

    gram: Doubles
    moments: Doubles
    samples: int

    def __add__(self, other: "Sums") -> "Sums":
        return _joined(self, other, 1)

    def __sub__(self, other: "Sums") -> "Sums":
        return _joined(self, other, -1)


def _joined(one: Sums, other: Sums, sign: int) -> Sums:
    if one.moments.shape != other.moments.shape:
        raise DataError(f"sums of shape {other.moments.shape}, wanted {one.moments.shape}")
    return Sums(
        one.gram + sign * other.gram, one.moments + sign * other.moments, one.samples + sign * other.samples
    )


def sums(features: NDArray[np.float32], y: NDArray[np.int64], classes: int, *, least: int = LEAST) -> Sums:
    """Return the sums of a device's samples.

    Args:
        features: shape (n, features).
        y: labels 0 … classes-1, shape (n,).
        classes: number of them.
        least: samples, at least.

    Raises:
        DataError: too few samples, or labels that do not fit.
        NonFiniteError: a feature is not finite.
    """
    if len(y) < least:
        raise DataError(f"{len(y)} samples: sums of fewer than {least} would say too much about each")
    if y.shape != features.shape[:1] or int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(
            f"labels of shape {y.shape}, wanted 0 … {classes - 1} for {features.shape[:1]} samples"
        )
    if not np.isfinite(features).all():
        raise NonFiniteError("features: not finite")
    extended = np.concatenate([features, np.ones((len(y), 1), np.float32)], axis=1).astype(np.float64)
    target = np.zeros((len(y), classes))
    target[np.arange(len(y)), y] = 1
    return Sums(extended.T @ extended, extended.T @ target, len(y))


def total(parts: Iterable[Sums]) -> Sums:
    """Return the sums of all devices together.

    Raises:
        DataError: there are none, or they do not fit together.
    """
    every = list(parts)
    if not every:
        raise DataError("no sums: no device has given any")
    return reduce(_joined_positive, every)


def _joined_positive(one: Sums, other: Sums) -> Sums:
    return one + other


def solved(given: Sums, strength: float) -> tuple[Doubles, Doubles]:
    """Return the head's weights, shape (classes, features), and biases, shape (classes,).

    Args:
        given: of all devices.
        strength: of the penalty on the weights, per sample; the biases have none.

    Raises:
        DataError: the system has no one solution: features depend on each other and the penalty is too small.
        NonFiniteError: a sum is not finite.
    """
    if not (np.isfinite(given.gram).all() and np.isfinite(given.moments).all()):
        raise NonFiniteError("sums: not finite")
    size = len(given.gram) - 1
    penalty = np.full(size + 1, strength * given.samples)
    penalty[-1] = 0.0
    matrix = given.gram + np.diag(penalty)
    # Of unlike sizes, features would make a system that is worse to solve than it is.
    scale = 1 / np.sqrt(np.maximum(np.diag(matrix), np.finfo(float).tiny))
    scaled = matrix * scale * scale[:, None]
    try:
        lower = np.linalg.cholesky(scaled)
    except np.linalg.LinAlgError:
        lower = np.zeros((0, 0))
    if not lower.size or np.linalg.cond(lower) ** 2 > 1 / np.finfo(float).eps:
        raise DataError(
            f"features depend on each other ({size} of {given.samples} samples): a penalty of more than"
            f" {strength:g} is needed"
        )
    half = np.linalg.solve(lower, given.moments * scale[:, None])
    found: Doubles = np.linalg.solve(lower.T, half) * scale[:, None]
    return np.ascontiguousarray(found[:-1].T), found[-1]


def best(
    given: Sums,
    features: NDArray[np.float32],
    y: NDArray[np.int64],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[float, Doubles, Doubles]:
    """Return (strength, weights, biases) that are right on most labelled samples; of equals the strongest.

    Raises:
        DataError: none of them has a solution, or there are no samples.
    """
    if not len(y):
        raise DataError("no labelled samples to choose the penalty by")
    found: tuple[float, float, Doubles, Doubles] | None = None
    for strength in sorted(strengths, reverse=True):
        try:
            weights, biases = solved(given, strength)
        except DataError:
            continue
        right = float(((features @ weights.T + biases).argmax(axis=1) == y).mean())
        if found is None or right > found[0]:
            found = right, strength, weights, biases
    if found is None:
        raise DataError(f"no penalty of {', '.join(f'{s:g}' for s in strengths)} gives a solution")
    return found[1:]
