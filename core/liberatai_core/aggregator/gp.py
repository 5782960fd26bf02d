"""Per-class weights by Bayesian optimisation with a Gaussian process, see `searches.py`.

Snoek et al., "Practical Bayesian Optimization of Machine Learning Algorithms", NeurIPS 2012, arXiv:1206.2944:
a Matern-5/2 kernel, expected improvement. One length for all coordinates and the noise are those of the
highest marginal likelihood on a small grid: fifty trials in forty dimensions tell no more. Optuna's GPSampler
would bring scipy to every coordinator.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import modelled, searched

LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Of the kernel, in units of the cube's diagonal."""
NOISES = (1e-3, 1e-2, 1e-1)
"""Variance of the scores, theirs being 1: accuracy comes in steps of one sample."""
START, CANDIDATES = 10, 1000

Doubles = NDArray[np.float64]


def gp(trials: int = 50) -> Method:
    """Return the method with this many trials; it needs `log_probs`, `y` and `seed`."""
    return searched(modelled(predicted, start=START, candidates=CANDIDATES), trials)


def predicted(points: Doubles, scores: Doubles, candidates: Doubles) -> tuple[Doubles, Doubles]:
    """Return mean and deviation of the score at candidates.

    Args:
        points: tried, shape (n, d).
        scores: theirs, shape (n,), with mean 0 and deviation 1.
        candidates: shape (k, d).
    """
    diagonal = np.sqrt(points.shape[1])
    between = _distances(points, points) / diagonal
    _, length, factor = max(
        (_fit(between / length, scores, noise, length) for length, noise in product(LENGTHS, NOISES)),
        key=lambda fit: fit[0],
    )
    across = _matern(_distances(points, candidates) / diagonal / length)
    half = np.linalg.solve(factor, np.column_stack([across, scores]))
    mean = half[:, :-1].T @ half[:, -1]
    variance = 1.0 - (half[:, :-1] ** 2).sum(axis=0)
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _fit(between: Doubles, scores: Doubles, noise: float, length: float) -> tuple[float, float, Doubles]:
    """Return (log marginal likelihood, length, Cholesky factor)."""
    kernel = _matern(between) + noise * np.eye(len(between))
    factor = np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
    half = np.linalg.solve(factor, scores)
    return float(-0.5 * half @ half - np.log(np.diag(factor)).sum()), length, factor


def _distances(one: Doubles, other: Doubles) -> Doubles:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2.0 * one @ other.T
    distances: Doubles = np.sqrt(np.maximum(squares, 0.0))
    return distances


def _matern(distance: Doubles) -> Doubles:
    scaled = np.sqrt(5.0) * distance
    kernel: Doubles = (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)
    return kernel
