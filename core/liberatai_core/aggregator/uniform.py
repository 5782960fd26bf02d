"""The plain average of probabilities: every member has the same say (Breiman, "Bagging Predictors", 1996)."""

import numpy as np

from liberatai_core.aggregator.ensemble import Evidence, Pool, checked_counts


def uniform(evidence: Evidence) -> Pool:
    """Return the linear pool with equal weights; needs only the shape of `class_counts`."""
    counts = checked_counts(evidence.class_counts)
    return Pool(weights=np.full(counts.shape, 1.0 / len(counts)), kind="linear")
