"""Centred clipping with bucketing.

Karimireddy, He & Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021,
arXiv:2012.10333:

    v <- v + mean_i((x_i - v) * min(1, tau / |x_i - v|))

and "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022, arXiv:2006.09365: the rule
sees means of `BUCKET` devices drawn by a seed, which are more alike than devices are.

Here v starts at zero (no device then gets more than tau in the first step), and tau is a multiple of the
median distance. Every v is a combination of the differences, so only their scalar products are needed: the
result is the devices' weights.
"""

import numpy as np
from numpy.typing import NDArray

BUCKET = 2
"""The paper's choice: larger buckets mix more, but f hostile devices then spoil a larger share of buckets."""
ITERATIONS = 3
"""The paper finds that more change nothing."""

Doubles = NDArray[np.float64]


def centred_weights(products: Doubles, clip: float, seed: int) -> Doubles:
    """Return the weight of every difference in the result, shape (devices,); they need not sum to one.

    Args:
        products: scalar products of all pairs of differences, shape (devices, devices).
        clip: tau in medians of the distances.
        seed: of the buckets.
    """
    buckets = bucketing(len(products), seed)
    centre = np.zeros(len(products))
    for _ in range(ITERATIONS):
        away = buckets - centre
        squares = np.einsum("bi,ij,bj->b", away, products, away)
        # Rounding may leave a square just below zero.
        distances = np.sqrt(np.maximum(squares, 0.0))
        limit = clip * float(np.median(distances))
        kept = np.where(distances > limit, limit / np.where(distances > 0, distances, 1.0), 1.0)
        centre = centre + (kept[:, None] * away).mean(axis=0)
    return centre


def bucketing(devices: int, seed: int) -> Doubles:
    """Return the buckets as rows of weights, shape (buckets, devices); the last one may be smaller."""
    order = np.random.default_rng(seed).permutation(devices)
    buckets = np.zeros((-(-devices // BUCKET), devices))
    for place, device in enumerate(order):
        buckets[place // BUCKET, device] = 1.0
    return np.asarray(buckets / buckets.sum(axis=1, keepdims=True))
