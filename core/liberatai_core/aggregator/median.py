"""Coordinate-wise median.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv:1803.01498. As in `trimmed_mean`, only values that were sent are ranked: the median over all devices of
a coordinate that fewer than half of them sent is zero, and nothing would ever be learned there.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.trimmed_mean import rank_senders

Doubles = NDArray[np.float64]


def median_of_senders(values: Doubles) -> Doubles:
    """Return the median of the values that are not zero, times the share of devices that sent them.

    Args:
        values: (devices, coordinates); zero where not sent.
    """
    ranked, senders = rank_senders(values)
    columns = np.arange(values.shape[1])
    low, high = np.maximum(senders - 1, 0) // 2, senders // 2
    middle = (ranked[low, columns] + ranked[np.minimum(high, len(values) - 1), columns]) / 2
    return np.where(senders > 0, middle, 0.0) * (senders / len(values))
