"""Ensemble weights without labels, from how many samples of every class each member learnt.

A member that saw a class more often gets more say about it: W[m, c] proportional to sqrt(N[m, c]),
normalised over members. A member trained with plain softmax also carries its own class shares as a prior,
which is subtracted (logit adjustment: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021,
arXiv:2007.07314); one trained with balanced softmax does not. Only sums of class counts are needed.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import Counts, Evidence, Pool, checked_counts

SMOOTHING = 1.0
"""Laplace: one imagined sample per class, so that no share is zero."""


def label_free(evidence: Evidence) -> Pool:
    """Return the pool; needs `class_counts` and `balance` only.

    Raises:
        SchemaError: counts of the wrong shape, or negative.
        NonFiniteError: a count is NaN or infinite.
    """
    weights = class_weights(evidence.class_counts)
    strength = max(0.0, 1.0 - evidence.balance)
    return Pool(
        weights=weights, log_priors=log_priors(evidence.class_counts, strength=strength) if strength else None
    )


def class_weights(class_counts: Counts) -> NDArray[np.float64]:
    """Return sqrt(N[m, c] + 1), normalised over members: shape (members, classes), columns sum to 1."""
    roots = np.sqrt(checked_counts(class_counts) + SMOOTHING)
    weights: NDArray[np.float64] = roots / roots.sum(axis=0, keepdims=True)
    return weights


def log_priors(class_counts: Counts, *, strength: float = 1.0) -> NDArray[np.float64]:
    """Return strength * log(smoothed class shares) of each member, shape (members, classes)."""
    counts = checked_counts(class_counts) + SMOOTHING
    priors: NDArray[np.float64] = strength * np.log(counts / counts.sum(axis=1, keepdims=True))
    return priors
