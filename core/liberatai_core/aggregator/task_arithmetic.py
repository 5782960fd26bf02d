"""Merging models that come from one: differences from the common ancestor, weighted and added.

    w = w_0 + scale * sum_m share_m * (w_m - w_0)

With scale 1 and shares that sum to 1 it is the weighted mean; a larger scale undoes what averaging takes away
from changes that only one model made (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023,
arXiv:2212.04089).
"""

from collections.abc import Sequence

import numpy as np

from liberatai_core.errors import StructureError
from liberatai_core.weights import Vector, require_finite


def merged(
    ancestor: Vector, models: Sequence[Vector], shares: Sequence[float], *, scale: float = 1.0
) -> Vector:
    """Return the merged weights, float32, shape (parameters,).

    Args:
        ancestor: that all models come from, shape (parameters,).
        models: each of shape (parameters,).
        shares: of the models, not negative; only their proportions count.
        scale: of the sum of differences.

    Raises:
        StructureError: no model, shapes differ, or shares do not fit.
        NonFiniteError: a weight is NaN or infinite, or the sum overflows.
    """
    parts = normalised(models, shares, ancestor)
    total = np.zeros(ancestor.shape, np.float64)
    for model, share in zip(models, parts, strict=True):
        total += share * (model.astype(np.float64) - ancestor)
    with np.errstate(over="ignore"):
        result = (ancestor + scale * total).astype(np.float32)
    require_finite(result, "merged weights")
    return result


def normalised(models: Sequence[Vector], shares: Sequence[float], ancestor: Vector) -> list[float]:
    """Return shares that sum to 1.

    Raises:
        StructureError: no model, shapes differ, or shares do not fit.
        NonFiniteError: a weight is NaN or infinite.
    """
    if not models or len(shares) != len(models):
        raise StructureError(f"{len(models)} models and {len(shares)} shares: one of each per model")
    for number, model in enumerate([ancestor, *models]):
        if model.shape != ancestor.shape or model.ndim != 1:
            raise StructureError("models of one structure have vectors of one length")
        require_finite(model, "ancestor" if number == 0 else f"model {number}")
    total = float(sum(shares))
    if not all(np.isfinite(share) and share >= 0 for share in shares) or not 0 < total < np.inf:
        raise StructureError("shares must be finite, not negative, and not all zero")
    return [float(share) / total for share in shares]
