"""Average of probabilities, weighted by how many samples each member learnt from.

As FedAvg weighs devices (McMahan et al., AISTATS 2017, arXiv:1602.05629): W[m, c] = N_m / sum N for every c.
"""

import numpy as np

from liberatai_core.aggregator.ensemble import Evidence, Pool, checked_counts
from liberatai_core.aggregator.label_free import SMOOTHING


def by_samples(evidence: Evidence) -> Pool:
    """Return the linear pool; needs `class_counts` only.

    Raises:
        SchemaError: counts of the wrong shape, or negative.
        NonFiniteError: a count is NaN or infinite.
    """
    counts = checked_counts(evidence.class_counts)
    samples = counts.sum(axis=1, keepdims=True) + SMOOTHING
    weights = np.broadcast_to(samples / samples.sum(), counts.shape).astype(np.float64)
    return Pool(weights=weights, kind="linear")
