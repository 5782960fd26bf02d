"""Majority vote: every member names one class, the class with most votes wins.

Where votes are equal, the mean of the probabilities decides (Lam & Suen, "Application of Majority Voting to
Pattern Recognition", IEEE Transactions on Systems, Man and Cybernetics 1997).
"""

import numpy as np

from liberatai_core.aggregator.ensemble import Evidence, Pool, checked_counts


def majority_vote(evidence: Evidence) -> Pool:
    """Return the voting pool with equal weights; needs only the shape of `class_counts`.

    Raises:
        SchemaError: counts of the wrong shape, or negative.
        NonFiniteError: a count is NaN or infinite.
    """
    counts = checked_counts(evidence.class_counts)
    return Pool(weights=np.full(counts.shape, 1.0 / len(counts)), kind="vote")
