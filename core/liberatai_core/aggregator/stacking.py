"""Class-wise log-linear stacking: convex weights from labelled validation data.

    z_c(x) = sum_m A[m, c] log p_m(c|x) + b_c
    min over A, b:  CE(z, y) + (|A - A0|^2 + |b|^2) / (2 n SPREAD^2)

Wolpert, "Stacked Generalization", Neural Networks 1992, restricted to one weight per member and class:
M*C + C parameters instead of M*C*C, so that a few hundred labels suffice. A0 are the weights of the
label-free rule, from which the labels must argue the result away: with n labels it is the most likely table
under a normal prior of deviation SPREAD around that rule. Below `FEW_LABELS` labels it hands over to the
rule, which then has the smaller error.

The problem is strictly convex and has one solution; Newton steps whose systems conjugate gradients solve
(Nocedal & Wright, "Numerical Optimization", 2006, algorithm 7.1) find it without the matrix of second
derivatives.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FLOOR, Evidence, Pool, labelled
from liberatai_core.aggregator.label_free import class_weights, label_free, log_priors

FEW_LABELS = 200
SPREAD = 0.4
"""Deviation of the prior: from 200 to 700 labels within 0.3 points of the best of what was tried, on images
and signals alike."""
STEPS = 50
"""Of Newton's method; ten are usual."""
PRECISION = 1e-5
"""Largest component of the gradient at the end: weights are then right to about three digits."""
DECREASE, SHORTEST = 1e-4, 1e-5
"""Share of the promised decrease that a step must bring (Armijo), and where halving it ends."""

Doubles = NDArray[np.float64]


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
    inputs = np.concatenate([features, np.ones_like(features[:1])])
    start = np.concatenate([class_weights(evidence.class_counts), np.zeros_like(priors[:1])])
    table = fit(inputs, y, start, ridge=1.0 / (len(y) * SPREAD**2))
    return Pool(weights=table[:-1], log_priors=priors, bias=table[-1])


def fit(inputs: Doubles, y: NDArray[np.int64], start: Doubles, ridge: float) -> Doubles:
    """Return the table that minimises cross-entropy + ridge/2 * |table - start|^2.

    Args:
        inputs: shape (rows, n, classes).
        y: labels, shape (n,).
        start: where the search begins and the penalty is zero, shape (rows, classes).
        ridge: above 0.
    """
    target, samples = np.eye(inputs.shape[2])[y], len(y)

    def value(table: Doubles) -> tuple[float, Doubles]:
        scores = np.einsum("mnc,mc->nc", inputs, table)
        scores -= scores.max(axis=1, keepdims=True)
        log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        penalty = 0.5 * ridge * float(((table - start) ** 2).sum())
        return penalty - float(log_probs[np.arange(samples), y].mean()), np.exp(log_probs)

    table = start
    current, shares = value(table)
    for _ in range(STEPS):
        gradient = np.einsum("mnc,nc->mc", inputs, shares - target) / samples + ridge * (table - start)
        if np.abs(gradient).max() <= PRECISION:
            break
        step = _newton_step(inputs, shares, gradient, ridge)
        promised, length = float((gradient * step).sum()), 1.0
        after, moved = value(table + step)
        while after > current + DECREASE * length * promised and length > SHORTEST:
            length /= 2
            after, moved = value(table + length * step)
        if after >= current:
            break
        table, current, shares = table + length * step, after, moved
    return table


def _newton_step(inputs: Doubles, shares: Doubles, gradient: Doubles, ridge: float) -> Doubles:
    """Return about the solution s of H s = -gradient: the closer, the smaller the gradient is."""
    step, rest = np.zeros_like(gradient), -gradient
    direction, size = rest, float((rest**2).sum())
    enough = size * min(0.01, float(np.sqrt(size)))
    for _ in range(gradient.size):
        scores = np.einsum("mnc,mc->nc", inputs, direction)
        change = shares * (scores - (shares * scores).sum(axis=1, keepdims=True))
        curved = np.einsum("mnc,nc->mc", inputs, change) / len(shares) + ridge * direction
        length = size / float((direction * curved).sum())
        step, rest = step + length * direction, rest - length * curved
        size, before = float((rest**2).sum()), size
        if size <= enough:
            break
        direction = rest + size / before * direction
    return step
