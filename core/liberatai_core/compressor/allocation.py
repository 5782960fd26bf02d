"""Spread a byte budget over the tensors: one Lagrange multiplier (Shoham and Gersho 1988).

The objective is the sum over tensors of unit x weighted squared error + lambda x bits. Multipliers lie on a
lattice, and what a tensor chooses at each of its points is remembered, so further budgets cost little.

The size of a message is known only when its tables are chosen: tables by row and column save what order-0
entropy does not show. After a trial, every tensor's bits are corrected by the ratio that its own tables
reached, and the search goes on from there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Planned
from liberatai_core.compressor.quantiser import (
    BOOK_LEVELS,
    LARGEST,
    Choice,
    Prepared,
    choose,
    codebook,
    grids,
)
from liberatai_core.structure import Structure

_OCTAVE = 64
"""Lattice points per octave of the multiplier: a hundredth of a bit per weight."""
_ENDS = (-100 * _OCTAVE, 12 * _OCTAVE)
"""Everything full float32, everything constant; squared relative errors lie between."""
_ATTEMPTS = 6
_LEARNED = 2
"""Attempts from whose files the ratios are taken."""
_CLOSE = 0.997
"""A file that uses this much of its budget ends the search."""
_FILLED = 0.985
"""A file that uses this much of its budget is not refined any more."""
_REFINED_STEPS = 160
"""Steps from twice the largest weight down to 2^-9 of it, a sixteenth of an octave apart."""
_REFINED_BOOKS = 64
"""The first four octaves of these steps, up to 17 levels, where the rates of cells are far apart."""
_MESSAGE = 64
"""Bits of a message beside its symbols: its length, lanes and padding."""


@dataclass(frozen=True, eq=False)
class Search:
    """Tensors, their names and shapes, and by how much their real bits differ from entropy."""

    tensors: Sequence[Prepared]
    structure: Structure
    ratios: tuple[float, ...]

    def choices(self, point: int) -> list[Choice]:
        """Return what every tensor chooses at a point of the lattice."""
        return [
            _remembered(tensor, point + round(_OCTAVE * math.log2(ratio)))
            for tensor, ratio in zip(self.tensors, self.ratios, strict=True)
        ]

    def estimate(self, choices: Sequence[Choice]) -> int:
        """Return the expected size of the file in bytes."""
        bits = sum(
            choice.head_bits + choice.coded_bits * ratio
            for choice, ratio in zip(choices, self.ratios, strict=True)
        )
        coded = sum(
            tensor.size for tensor, choice in zip(self.tensors, choices, strict=True) if choice.coded_bits
        )
        messages = -(-coded // (1 << 17))
        return artifact.header_bytes(self.structure) + math.ceil((bits + _MESSAGE * messages) / 8)


def fit(tensors: Sequence[Prepared], structure: Structure, budget: int) -> tuple[bytes, list[Choice]] | None:
    """Return a file within the budget and what it is made of; None if only the smallest one fits."""
    search = Search(tensors, structure, (1.0,) * len(tensors))
    best: tuple[bytes, list[Choice]] | None = None
    plans: dict[int, tuple[Choice, Planned]] = {}
    target = budget
    for attempt in range(_ATTEMPTS):
        choices = _search(search, target)
        if choices is None:
            break
        planned = []
        for number, choice in enumerate(choices):
            if number not in plans or plans[number][0] is not choice:
                coding = choice.coding(tensors[number].weights)
                plans[number] = choice, artifact.planned(coding, structure.tensors[number])
            planned.append(plans[number][1])
        file = artifact.write_planned(planned, structure)
        if len(file) <= budget and (best is None or len(file) > len(best[0])):
            best = file, choices
        if _CLOSE * budget <= len(file) <= budget:
            break
        error = len(file) - search.estimate(choices)
        if attempt < _LEARNED:
            search = replace(search, ratios=_ratios(search, choices, planned))
            error = len(file) - search.estimate(choices)
            target = budget - error
        else:
            # Choices change in leaps: from here on, only the target moves, by more where it was not enough.
            target = min(budget - error, target - 1) - (max(len(file) - budget, 0) << attempt - _LEARNED)
    return best


def _ratios(search: Search, choices: Sequence[Choice], planned: Sequence[Planned]) -> tuple[float, ...]:
    ratios = []
    for ratio, choice, plan in zip(search.ratios, choices, planned, strict=True):
        real = plan.bits + 8 * len(artifact.record(plan.coding, plan.tables)) - choice.head_bits
        measured = real / choice.coded_bits if choice.coded_bits else ratio
        # A tensor that is all but empty has hardly bits to measure with: its ratio must not keep it empty.
        ratios.append(min(max(measured, 0.25), 1.15))
    return tuple(ratios)


def _remembered(tensor: Prepared, point: int) -> Choice:
    if point not in tensor.memo:
        tensor.memo[point] = choose(tensor, 2.0 ** (point / _OCTAVE))
    return tensor.memo[point]


def _search(search: Search, target: int) -> list[Choice] | None:
    """Return the choices of the smallest multiplier whose estimated file has at most `target` bytes."""
    low, high = _ENDS
    above = search.choices(low)
    if search.estimate(above) <= target:
        return above
    found = search.choices(high)
    if search.estimate(found) > target:
        return None
    while high - low > 1:
        # Whole octaves first: all budgets share them.
        middle = (low + high) // 2
        if high - low > 2 * _OCTAVE:
            middle = middle // _OCTAVE * _OCTAVE
        choices = search.choices(middle)
        if search.estimate(choices) > target:
            above, low = choices, middle
        else:
            found, high = choices, middle
            if search.estimate(found) >= _CLOSE * target:
                break
    # The last step of the bisection may change several tensors: take those that still fit.
    order = sorted(range(len(search.tensors)), key=lambda number: -search.tensors[number].size)
    for number in order:
        trial = [*found[:number], above[number], *found[number + 1 :]]
        if search.estimate(found) < search.estimate(trial) <= target:
            found = trial
    return _refine(search, found, order, target)


def _refine(search: Search, found: list[Choice], order: list[int], target: int) -> list[Choice]:
    """Spend what is left where the rate of a tensor jumps, as between 1 and 3 levels of uniform weights."""
    for number in order:
        if search.estimate(found) > _FILLED * target:
            break
        tensor = search.tensors[number]
        view = tensor.views[0]
        top = max(-float(view.ordered[0]), float(view.ordered[-1]))
        if not 0 < top < LARGEST or view.ordered[0] == view.ordered[-1]:
            continue
        for choice in _between(tensor, top):
            trial = [*found[:number], choice, *found[number + 1 :]]
            if choice.error < found[number].error and search.estimate(trial) <= target:
                found = trial
    return found


def _between(tensor: Prepared, top: float) -> list[Choice]:
    view, candidates = tensor.views[0], list(tensor.simple)
    for power in range(_REFINED_STEPS):
        step = 2 * top * 2.0 ** (-power / 16)
        candidates += grids(view, step, 0.0, retraining=tensor.retraining)
        if power < _REFINED_BOOKS:
            # Cells as they are: sweeps would lead back to the rates on both sides of the jump.
            reach = min(round(top / step), BOOK_LEVELS // 2)
            points = np.arange(-reach - 1, reach + 2, dtype=np.float64)
            for shift in (0.0, 0.25, 0.5):
                candidates += codebook(view, (points + shift) * step, 0.0, sweeps=0)
    return candidates
