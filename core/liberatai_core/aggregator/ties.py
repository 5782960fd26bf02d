"""TIES: merging of models that come from one, without what is small and what they disagree about.

Of every model's difference from the ancestor only the largest values stay (trim); every coordinate gets the
sign that has more weight behind it (elect); and the values of that sign are averaged (disjoint merge). Yadav
et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv:2306.01708.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.task_arithmetic import normalised
from liberatai_core.errors import StructureError
from liberatai_core.weights import Vector, require_finite


def merged(
    ancestor: Vector,
    models: Sequence[Vector],
    shares: Sequence[float],
    *,
    density: float = 0.2,
    scale: float = 1.0,
) -> Vector:
    """Return the merged weights, float32, shape (parameters,).

    Args:
        ancestor: that all models come from, shape (parameters,).
        models: each of shape (parameters,).
        shares: of the models, not negative; only their proportions count.
        density: share of each model's values that stays, in (0, 1].
        scale: of the merged difference.

    Raises:
        StructureError: no model, shapes differ, or shares or density do not fit.
        NonFiniteError: a weight is NaN or infinite, or the sum overflows.
    """
    if not 0 < density <= 1:
        raise StructureError(f"density {density}: must be above 0 and at most 1")
    parts = normalised(models, shares, ancestor)
    differences = [_trimmed(model.astype(np.float64) - ancestor, density) for model in models]
    elected = np.sign(sum(part * difference for part, difference in zip(parts, differences, strict=True)))
    total, behind = np.zeros(ancestor.shape), np.zeros(ancestor.shape)
    for part, difference in zip(parts, differences, strict=True):
        agrees = np.sign(difference) == elected
        total += np.where(agrees, part * difference, 0.0)
        behind += np.where(agrees & (difference != 0), part, 0.0)
    with np.errstate(over="ignore"):
        mean = np.divide(total, behind, out=np.zeros_like(total), where=behind > 0)
        result = (ancestor + scale * mean).astype(np.float32)
    require_finite(result, "merged weights")
    return result


def _trimmed(difference: NDArray[np.float64], density: float) -> NDArray[np.float64]:
    """Return the largest values, zero elsewhere; of equal ones the first."""
    kept = max(1, round(density * difference.size))
    if kept >= difference.size:
        return difference
    order = np.argsort(-np.abs(difference), kind="stable")[:kept]
    result = np.zeros_like(difference)
    result[order] = difference[order]
    return result
