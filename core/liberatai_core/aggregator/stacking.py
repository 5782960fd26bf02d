"""Class-wise log-linear stacking: convex weights from labelled validation data.

    z_c(x) = sum_m A[m, c] log p_m(c|x) + b_c,   min over A, b:  CE(z, y) + ridge/2 (|A - 1/M|^2 + |b|^2)

Wolpert, "Stacked Generalization", 1992, restricted to one weight per member and class: M*C + C
parameters instead of M*C*C, so that a few hundred labels suffice. Below `FEW_LABELS` labels it hands over
to the label-free rule, which then has the smaller error.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FLOOR, Evidence, Pool, labelled, normalised
from liberatai_core.aggregator.label_free import label_free, log_priors

FEW_LABELS = 200
MANY_LABELS = 1000
STEPS = 500
LEARNING_RATE = 0.05
DECAY_1, DECAY_2, TINY = 0.9, 0.999, 1e-12
"""Adam (Kingma & Ba, arXiv:1412.6980): the problem is convex and small, plain steps would need tuning."""


def stacking(evidence: Evidence) -> Pool:
    """Return the pool; needs `log_probs`, `y`, `class_counts` and `balance`.

    Raises:
        SchemaError: no labels, or shapes do not fit.
        NonFiniteError: a prediction is NaN.
    """
    log_probs, y = labelled(evidence)
    if len(y) < FEW_LABELS:
        return label_free(evidence)
    strength = max(0.0, 1.0 - evidence.balance)
    priors = log_priors(evidence.class_counts, strength=strength)
    features = np.maximum(log_probs.astype(np.float64), np.log(FLOOR)) - priors[:, None, :]
    weights, bias = _fit(features, y, ridge=1e-2 if len(y) < MANY_LABELS else 1e-3)
    return Pool(weights=weights, log_priors=priors, bias=bias)


def _fit(
    features: NDArray[np.float64], y: NDArray[np.int64], ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (A, b) for features (members, n, classes), by Adam with a cosine step size."""
    members, samples, classes = features.shape
    origin = np.zeros((members + 1, classes))
    origin[:members] = 1.0 / members
    inputs = np.concatenate([features, np.ones((1, samples, classes))])
    target = np.eye(classes)[y]
    theta, first, second = origin.copy(), np.zeros_like(origin), np.zeros_like(origin)
    for step in range(1, STEPS + 1):
        probabilities = np.exp(normalised(np.einsum("mnc,mc->nc", inputs, theta)).astype(np.float64))
        gradient = np.einsum("mnc,nc->mc", inputs, probabilities - target) / samples + ridge * (
            theta - origin
        )
        first = DECAY_1 * first + (1 - DECAY_1) * gradient
        second = DECAY_2 * second + (1 - DECAY_2) * gradient**2
        rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        scale = np.sqrt(second / (1 - DECAY_2**step)) + TINY
        theta = theta - rate * (first / (1 - DECAY_1**step)) / scale
    return theta[:members], theta[members]
