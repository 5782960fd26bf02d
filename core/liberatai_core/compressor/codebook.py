"""Fit weights into a byte budget: per tensor the coding that costs least, over all of them one multiplier.

The objective is the sum over tensors of sensitivity x relative squared error: the relative error of a layer
is what its output sees. Importances (a diagonal Fisher information) weigh the errors within a tensor and,
where nothing is said about sensitivity, between tensors. Candidates: `quantiser`; the search: `allocation`;
the file: `artifact`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from liberatai_core.compressor import allocation, artifact, quantiser
from liberatai_core.compressor.quantiser import Quantiser
from liberatai_core.errors import BudgetError, StructureError
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

__all__ = [
    "Fitted",
    "Prepared",
    "Quantiser",
    "compress",
    "compress_prepared",
    "fitted",
    "prepare",
    "smallest",
    "smallest_bytes",
]

_INSENSITIVE = 1e-9
"""A tensor without importance still gets what costs nothing elsewhere."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What of a model does not depend on the budget; remembers what tensors chose for earlier ones.

    Attributes:
        weights: float32, shape (parameters,).
        structure: its named tensors.
        tensors: one entry per tensor.
    """

    weights: Vector
    structure: Structure
    tensors: tuple[quantiser.Prepared, ...]


def smallest_bytes(structure: Structure) -> int:
    """Return the size of the smallest file of a structure: one constant per tensor.

    No budget below it can be met, every budget from here on can. Below about 0.3 bit per weight a
    smaller structure serves better than a coarser file.
    """
    return artifact.header_bytes(structure) + quantiser.CONSTANT_BYTES * len(structure.tensors)


def smallest(weights: Vector, structure: Structure) -> bytes:
    """Return the smallest file: every tensor is replaced by its mean.

    Raises:
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    return artifact.write([quantiser.constant(weights[place]) for _, place in structure.slices()], structure)


def compress(
    weights: Vector,
    structure: Structure,
    budget_bytes: int,
    sensitivity: Mapping[str, float] | None = None,
    *,
    importance: Vector | None = None,
    max_bits: float | None = None,
    retraining: bool = False,
) -> bytes:
    """Return a file of at most `budget_bytes` bytes with the least weighted relative error found.

    It usually has over 98 % of the budget. Less where the greedy refinement finds no better coding: between
    the rates of 2 and 3 levels of uniform weights, for heavy tails (Cauchy: far less), and for weights that
    are exact already.

    Args:
        weights: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        budget_bytes: size of the file, headers and all.
        sensitivity: per tensor name, what a relative squared error of 1 costs, >= 0; default 1 each.
        importance: float32, shape (parameters,), >= 0: what a squared error of each weight costs, up to a
            common factor; only its ratios within a tensor matter where a sensitivity is given.
        max_bits: spend at most this many bits per weight on average, even if the budget allows more.
        retraining: values will be trained with frozen indices (`cells.recentred`): codebooks instead of
            grids, so that the file cannot grow.

    Raises:
        BudgetError: the budget is below `smallest_bytes(structure)`; the text names that size.
        StructureError: weights, sensitivity or importance do not belong to the structure.
        NonFiniteError: a weight or an importance is NaN or infinite.
        ValueError: a sensitivity is negative or not finite, an importance is negative, or `max_bits` is not
            positive.
    """
    _require_budget(budget_bytes, structure)
    budget = budget_bytes
    if max_bits is not None:
        if not max_bits > 0:
            raise ValueError(f"max_bits {max_bits} must be positive")
        budget = max(smallest_bytes(structure), min(budget, int(max_bits * structure.parameters / 8)))
    prepared = prepare(weights, structure, sensitivity, importance, retraining=retraining)
    return compress_prepared(prepared, budget)


def prepare(
    weights: Vector,
    structure: Structure,
    sensitivity: Mapping[str, float] | None = None,
    importance: Vector | None = None,
    *,
    retraining: bool = False,
) -> Prepared:
    """Do what does not depend on the budget; arguments and refusals are those of `compress`."""
    require_length(weights, structure)
    require_finite(weights, "weights")
    given = _check_sensitivity(sensitivity, structure)
    weighed = _check_importance(importance, structure)
    common = None
    if weighed is not None and given is None:
        # One unit for all tensors, as if their errors were relative on average.
        energy = float(weighed.astype(np.float64) @ weights.astype(np.float64) ** 2)
        common = len(structure.tensors) / energy if energy > 0 else None
    tensors = []
    for tensor, place in structure.slices():
        own = None if weighed is None else quantiser.clipped(weighed[place])
        part = quantiser.prepare(weights[place], tensor, own, common, retraining=retraining)
        if given is not None:
            part = quantiser.weighted(part, max(given.get(tensor.name, 1.0), _INSENSITIVE))
        tensors.append(part)
    return Prepared(weights, structure, tuple(tensors))


def compress_prepared(prepared: Prepared, budget_bytes: int) -> bytes:
    """Return the file for one budget.

    Raises:
        BudgetError: the budget is below `smallest_bytes(structure)`; the text names that size.
    """
    _require_budget(budget_bytes, prepared.structure)
    found = allocation.fit(prepared.tensors, prepared.structure, budget_bytes)
    return found[0] if found else smallest(prepared.weights, prepared.structure)


@dataclass(frozen=True, eq=False)
class Fitted:
    """The codings that a file of some budget has, to be used for other weights, too.

    Attributes:
        structure: the named tensors.
        choices: one per tensor.
    """

    structure: Structure
    choices: tuple[quantiser.Choice, ...]

    @property
    def quantisers(self) -> dict[str, Quantiser]:
        """The scalar quantiser of every tensor.

        Tensors that the file keeps as they are, or on a grid of more than 4096 levels, are missing.
        """
        found = {
            tensor.name: quantiser.listed(choice)
            for tensor, choice in zip(self.structure.tensors, self.choices, strict=True)
        }
        return {name: each for name, each in found.items() if each is not None}

    def file(self, weights: Vector) -> bytes:
        """Return the file of these weights; it has about the size of the one that was fitted.

        Raises:
            StructureError: the weights do not belong to the structure.
            NonFiniteError: a weight is NaN or infinite, or too large for float16 where the file has that.
        """
        require_length(weights, self.structure)
        require_finite(weights, "weights")
        codings = [
            quantiser.recoded(choice, weights[place])
            for choice, (_, place) in zip(self.choices, self.structure.slices(), strict=True)
        ]
        return artifact.write(codings, self.structure)


def fitted(prepared: Prepared, budget_bytes: int) -> Fitted:
    """Return the codings of the file for one budget.

    Raises:
        BudgetError: the budget is below `smallest_bytes(structure)`; the text names that size.
    """
    _require_budget(budget_bytes, prepared.structure)
    found = allocation.fit(prepared.tensors, prepared.structure, budget_bytes)
    choices = found[1] if found else [tensor.simple[0] for tensor in prepared.tensors]
    return Fitted(prepared.structure, tuple(choices))


def _require_budget(budget_bytes: int, structure: Structure) -> None:
    least = smallest_bytes(structure)
    if budget_bytes < least:
        raise BudgetError(
            f"{budget_bytes} bytes: the smallest possible file of {structure.id} has {least} bytes"
        )


def _check_sensitivity(
    sensitivity: Mapping[str, float] | None, structure: Structure
) -> Mapping[str, float] | None:
    if sensitivity is None:
        return None
    unknown = set(sensitivity) - {tensor.name for tensor in structure.tensors}
    if unknown:
        raise StructureError(f"{structure.id}: sensitivity of unknown tensor {min(unknown)}")
    for name, value in sensitivity.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"sensitivity of {name} is {value}, wanted a finite number >= 0")
    return sensitivity


def _check_importance(importance: Vector | None, structure: Structure) -> Vector | None:
    if importance is None:
        return None
    require_length(importance, structure)
    require_finite(importance, "importance")
    if (importance < 0).any():
        raise ValueError("an importance is negative")
    return importance if importance.any() else None
