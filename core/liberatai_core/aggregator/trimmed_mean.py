"""Coordinate-wise trimmed mean: of every coordinate the `f` largest and `f` smallest values are left out.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv:1803.01498. Sparse updates need a change: where one honest device in ten sent a coordinate, its value
is an extreme among zeros and would always be cut. So only values that were sent are ranked, at most so many
cut that one remains, and what is left counts by the share of devices that sent it, as in the plain mean.
A coordinate with few senders is therefore not protected by ranks, only by the clipping that comes before.
"""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def trimmed_mean(values: Doubles, f: int) -> Doubles:
    """Return the trimmed mean over all devices, shape (coordinates,).

    Args:
        values: (devices, coordinates).
        f: values left out on either side; 2 f < devices.
    """
    ranked = np.sort(values, axis=0)
    return np.asarray(ranked[f : len(ranked) - f].mean(axis=0))


def trimmed_mean_of_senders(values: Doubles, f: int) -> Doubles:
    """Return the trimmed mean of the values that are not zero, times the share of devices that sent them."""
    ranked, senders = rank_senders(values)
    cut = np.minimum(f, np.maximum(senders - 1, 0) // 2)
    rows = np.arange(len(values))[:, None]
    left = np.where((rows >= cut) & (rows < senders - cut), ranked, 0.0).sum(axis=0)
    return np.asarray(left / np.maximum(senders - 2 * cut, 1) * (senders / len(values)))


def rank_senders(values: Doubles) -> tuple[Doubles, NDArray[np.int64]]:
    """Return the values sorted per coordinate, and how many were sent; the rest is infinity."""
    sent = values != 0
    return np.sort(np.where(sent, values, np.inf), axis=0), sent.sum(axis=0)
