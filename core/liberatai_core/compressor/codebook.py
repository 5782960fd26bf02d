"""Choose the coding of every tensor so that the file meets a byte budget.

Per tensor: entropy-constrained scalar quantisation (Chou, Lookabaugh and Gray 1989), as a uniform grid
with rate-dependent thresholds or as a codebook of cell means, whichever costs less, tables included.
Over the tensors: one Lagrange multiplier lambda (Shoham and Gersho 1988), bisected until the whole file
fits. The objective is

    sum over tensors  sensitivity x |w - w'|^2 / |w|^2  +  lambda x bits

because the relative error of a layer is what its output sees. Weights are sorted once, with running sums,
so a trial quantisation costs O(levels x log n) instead of O(n).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Coding, Integers
from liberatai_core.errors import BudgetError, StructureError
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

Reals = NDArray[np.float64]

_CONSTANT_BYTES = 5
_GRID_SYMBOLS = 128
"""A finer grid stores its low bits raw: they are noise, and 4096 slots hold 128 symbols well."""
_BOOK_SYMBOLS = 64
"""Above 6 bits per weight cell means gain nothing over the uniform grid."""
_SWEEPS = 6
_STARTS = (1.0, 1.5, 2.5)
"""First steps tried, in units of the high-rate optimum: coarse ones win at low rate and in small tensors."""
_HALF_SIZE = 1024
"""float16 is for small tensors: in a large one its single rate would leave a gap in the sizes."""
_PACKED_SIZE = 4096
"""Above it, a frequency table always pays, and a trial that looks at every weight is slow."""
_LAMBDA = (2.0**-100, 2.0**10)
"""Everything full float32, everything constant; squared relative errors lie between."""
_BISECTIONS = 17
"""110 octaves down to 0.001: half a thousandth of a bit per weight."""
_ATTEMPTS = 12
_CLOSE = 0.999
"""A file that uses this much of its budget ends the search."""
_FILLED = 0.98
"""A file that uses this much of its budget is not refined any more."""
_REFINED_STEPS = 160
"""Steps from twice the largest weight down to 2^-9 of it, a sixteenth of an octave apart."""
_REFINED_BOOKS = 64
"""The first four octaves of these steps, up to 17 levels, where the rates of cells are far apart."""
_GRID = 2048
"""Steps of a codebook's entries between zero and its scale: all that float16 holds exactly at the top."""
_LARGEST = 1e38
"""A reconstruction may exceed the largest weight by one step and must not overflow float32."""


@dataclass(frozen=True, eq=False)
class _Tensor:
    """One tensor's weights, sorted, with running sums.

    `importance` is sensitivity / |w|^2; `distinct` has the values of a tensor that has few of them;
    `zeros` is the place of exact zeros.
    """

    weights: Vector
    ordered: Reals
    sums: Reals
    squares: Reals
    importance: float
    distinct: Reals
    zeros: tuple[int, int]

    @property
    def size(self) -> int:
        return self.weights.size


@dataclass(frozen=True, eq=False)
class _Choice:
    """A candidate coding of one tensor.

    Attributes:
        error: sum of squared errors.
        record_bits: bits of its record and of its raw bits.
        coded_bits: bits that it adds to the entropy-coded part.
        symbols: how many symbols it adds there.
        build: makes the coding; called for the chosen candidate only.
    """

    error: float
    record_bits: float
    coded_bits: float
    symbols: int
    build: Callable[[], Coding]

    def cost(self, importance: float, multiplier: float) -> float:
        return importance * self.error + multiplier * (self.record_bits + self.coded_bits)


def smallest_bytes(structure: Structure) -> int:
    """Return the size of the smallest file of a structure: one constant per tensor.

    No budget below it can be met, every budget from here on can. Below about 0.5 bit per weight a
    smaller structure serves better than a coarser file.
    """
    return artifact.header_bytes(structure) + _CONSTANT_BYTES * len(structure.tensors)


def smallest(weights: Vector, structure: Structure) -> bytes:
    """Return the smallest file: every tensor is replaced by its mean.

    Raises:
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    codings = [_constant(weights[place]) for _, place in structure.slices()]
    return artifact.write(codings, structure)


def compress(
    weights: Vector,
    structure: Structure,
    budget_bytes: int,
    sensitivity: Mapping[str, float] | None = None,
    *,
    max_bits: float | None = None,
) -> bytes:
    """Return a file of at most `budget_bytes` bytes with the least weighted relative error found.

    It usually has over 98 % of the budget. Less where the greedy refinement finds no better coding: between
    the rates of 2 and 3 levels of uniform weights (90 % seen), for heavy tails (Cauchy: far less), and for
    weights that are exact already.

    Args:
        weights: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        budget_bytes: size of the file, headers and all.
        sensitivity: per tensor name, what a relative squared error of 1 costs, >= 0; default 1 each.
        max_bits: spend at most this many bits per weight on average, even if the budget allows more.

    Raises:
        BudgetError: the budget is below `smallest_bytes(structure)`; the text names that size.
        StructureError: weights or sensitivity do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
        ValueError: a sensitivity is negative or not finite, or `max_bits` is not positive.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    given = _check_sensitivity(sensitivity or {}, structure)
    least = smallest_bytes(structure)
    if budget_bytes < least:
        raise BudgetError(
            f"{budget_bytes} bytes: the smallest possible file of {structure.id} has {least} bytes"
        )
    budget = budget_bytes
    if max_bits is not None:
        if not max_bits > 0:
            raise ValueError(f"max_bits {max_bits} must be positive")
        budget = max(least, min(budget, int(max_bits * structure.parameters / 8)))
    tensors = [_prepare(weights[place], given.get(tensor.name, 1.0)) for tensor, place in structure.slices()]
    return _fit(tensors, structure, budget) or smallest(weights, structure)


def _check_sensitivity(sensitivity: Mapping[str, float], structure: Structure) -> Mapping[str, float]:
    unknown = set(sensitivity) - {tensor.name for tensor in structure.tensors}
    if unknown:
        raise StructureError(f"{structure.id}: sensitivity of unknown tensor {min(unknown)}")
    for name, value in sensitivity.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"sensitivity of {name} is {value}, wanted a finite number >= 0")
    return sensitivity


def _prepare(weights: Vector, sensitivity: float) -> _Tensor:
    ordered = np.sort(weights).astype(np.float64)
    starts = np.flatnonzero(np.diff(ordered, prepend=-np.inf))
    squares = np.concatenate([[0.0], np.cumsum(ordered * ordered)])
    energy = float(squares[-1])
    return _Tensor(
        weights,
        ordered,
        np.concatenate([[0.0], np.cumsum(ordered)]),
        squares,
        # A tensor without importance still gets what costs nothing elsewhere.
        max(sensitivity, 1e-9) / energy if energy > 0 else 1.0,
        ordered[starts] if starts.size <= _BOOK_SYMBOLS else np.empty(0),
        (int(ordered.searchsorted(0.0)), int(ordered.searchsorted(0.0, side="right"))),
    )


def _fit(tensors: list[_Tensor], structure: Structure, budget: int) -> bytes | None:
    """Return a file within the budget, None if only the smallest one fits."""
    target = budget
    for attempt in range(_ATTEMPTS):
        choices = _search(tensors, structure, target)
        if choices is None:
            return None
        file = artifact.write([choice.build() for choice in choices], structure)
        if len(file) <= budget:
            return file
        # The size of the entropy-coded part is an estimate: aim lower, and faster each time.
        target = min(target, _estimate(choices, structure)) - (len(file) - budget << attempt)
    return None


def _search(tensors: list[_Tensor], structure: Structure, target: int) -> list[_Choice] | None:
    """Return the choices of the smallest multiplier whose estimated file has at most `target` bytes."""
    low, high = (math.log2(end) for end in _LAMBDA)
    above = [_choose(tensor, 2.0**low) for tensor in tensors]
    if _estimate(above, structure) <= target:
        return above
    found = [_choose(tensor, 2.0**high) for tensor in tensors]
    if _estimate(found, structure) > target:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        choices = [_choose(tensor, 2.0**middle) for tensor in tensors]
        estimate = _estimate(choices, structure)
        if estimate > target:
            above, low = choices, middle
            continue
        found, high = choices, middle
        if estimate >= _CLOSE * target:
            break
    # The last step of the bisection may change several tensors: take those that still fit.
    for number in sorted(range(len(tensors)), key=lambda number: -tensors[number].size):
        trial = [*found[:number], above[number], *found[number + 1 :]]
        if _estimate(found, structure) < _estimate(trial, structure) <= target:
            found = trial
    return _refine(tensors, found, structure, target)


def _refine(tensors: list[_Tensor], found: list[_Choice], structure: Structure, target: int) -> list[_Choice]:
    """Spend what is left where the rate of a tensor jumps, as between 1 and 3 levels of uniform weights."""
    for number in sorted(range(len(tensors)), key=lambda number: -tensors[number].size):
        if _estimate(found, structure) > _FILLED * target:
            break
        tensor = tensors[number]
        top = max(-float(tensor.ordered[0]), float(tensor.ordered[-1]))
        if not 0 < top < _LARGEST:
            continue
        for power in range(_REFINED_STEPS):
            step = 2 * top * 2.0 ** (-power / 16)
            candidates = _as_grid(tensor, step, 0.0)
            if power < _REFINED_BOOKS:
                # Cells as they are: sweeps would lead back to the rates on both sides of the jump.
                reach = round(top / step)
                points = np.arange(-reach - 1, reach + 2, dtype=np.float64)
                for shift in (0.0, 0.25, 0.5):
                    candidates += _as_codebook(tensor, (points + shift) * step, 0.0, sweeps=0)
            for choice in candidates:
                trial = [*found[:number], choice, *found[number + 1 :]]
                if choice.error < found[number].error and _estimate(trial, structure) <= target:
                    found = trial
    return found


def _estimate(choices: list[_Choice], structure: Structure) -> int:
    records = math.ceil(sum(choice.record_bits for choice in choices) / 8)
    coded = artifact.coded_bytes(
        sum(choice.coded_bits for choice in choices), sum(choice.symbols for choice in choices)
    )
    return artifact.header_bytes(structure) + records + coded


def _choose(tensor: _Tensor, multiplier: float) -> _Choice:
    """Return the candidate with the least cost; the first of equal ones."""
    candidates = [_as_constant(tensor)]
    if tensor.size > 1 and tensor.ordered[0] < tensor.ordered[-1]:
        candidates += _as_plain(tensor)
        # High-rate optimum of D + lambda R with D = step^2 / 12 per weight.
        step = math.sqrt(6 * multiplier / (math.log(2) * tensor.importance))
        if max(-tensor.ordered[0], tensor.ordered[-1]) < _LARGEST:
            rate_price = multiplier / tensor.importance
            candidates += _as_packed(tensor, step)
            if tensor.distinct.size > 1:
                candidates += _as_codebook(tensor, tensor.distinct, 0.0)
            for factor in _STARTS:
                candidates += _as_grid(tensor, step * factor, rate_price)
    return min(candidates, key=lambda choice: choice.cost(tensor.importance, multiplier))


def _constant(weights: Vector) -> Coding:
    mean = np.float32(np.clip(weights.mean(dtype=np.float64), weights.min(), weights.max()))
    return Coding(artifact.CONSTANT, mean)


def _as_constant(tensor: _Tensor) -> _Choice:
    coding = _constant(tensor.weights)
    error = float(tensor.squares[-1] - tensor.sums[-1] ** 2 / tensor.size)
    if tensor.ordered[0] == tensor.ordered[-1]:
        error = 0.0
    return _Choice(max(error, 0.0), 8 * _CONSTANT_BYTES, 0, 0, lambda: coding)


def _as_plain(tensor: _Tensor) -> list[_Choice]:
    full = Coding(artifact.FULL, values=tensor.weights)
    choices = [_Choice(0.0, 8 + 32 * tensor.size, 0, 0, lambda: full)]
    if tensor.size <= _HALF_SIZE:
        with np.errstate(over="ignore"):
            values = tensor.weights.astype(np.float16)
        if np.isfinite(values).all():
            half = Coding(artifact.HALF, values=values)
            error = float(((values.astype(np.float64) - tensor.weights) ** 2).sum())
            choices.append(_Choice(error, 8 + 16 * tensor.size, 0, 0, lambda: half))
    return choices


def _uniform(tensor: _Tensor, step: np.float32) -> tuple[int, int] | None:
    """Return the lowest and the highest level of a grid, or None if it is too fine or too coarse."""
    if not 0 < step < _LARGEST:
        return None
    ends = tensor.ordered[0] / float(step), tensor.ordered[-1] / float(step)
    if max(abs(ends[0]), abs(ends[1])) > artifact.MAX_LEVEL / 2:
        return None
    return round(ends[0]), round(ends[1])


def _as_packed(tensor: _Tensor, step: float) -> list[_Choice]:
    """A grid with all bits raw: no table, for small tensors."""
    if tensor.size > _PACKED_SIZE:
        return []
    spread = float(tensor.ordered[-1] - tensor.ordered[0])
    width = max(2, math.ceil(math.log2(spread / step + 2))) if 0 < step < spread else 2
    if width > artifact.MAX_RAW_BITS:
        return []
    exact = _short(spread / (2**width - 2))
    ends = _uniform(tensor, exact)
    if ends is None or ends[1] - ends[0] >= 1 << width:
        return []
    levels = np.rint(tensor.weights / np.float64(exact)).astype(np.int64)
    error = float(((levels * float(exact) - tensor.weights) ** 2).sum())
    coding = Coding(
        artifact.GRID,
        exact,
        low=ends[0],
        raw_bits=width,
        frequencies=np.array([artifact.TOTAL]),
        indices=levels - ends[0],
    )
    bits = 8 * len(artifact.record(coding)) + width * tensor.size
    return [_Choice(error, bits, 0, 0, lambda: coding)]


def _as_grid(tensor: _Tensor, step: float, rate_price: float) -> list[_Choice]:
    """Uniform grid with this step, and the codebook that grows from its cells."""
    exact = _short(min(step, _LARGEST))
    ends = _uniform(tensor, exact)
    if ends is None or ends[0] == ends[1]:
        return []
    low, levels = ends[0], ends[1] - ends[0] + 1
    if levels > _GRID_SYMBOLS:
        return _fine_grid(tensor, exact, low, levels)
    points = np.arange(low, low + levels, dtype=np.float64) * float(exact)
    edges = _middles(points)
    counts = _counts(tensor, edges)
    choices = []
    for _ in range(2):
        edges = _thresholds(points, counts, rate_price, tensor.size)
        counts = _counts(tensor, edges)
    used = np.flatnonzero(counts)
    if used.size > 1:
        first, last = int(used[0]), int(used[-1])
        choices.append(_grid_choice(tensor, exact, low + first, points[first : last + 1], edges[first:last]))
    if levels <= _BOOK_SYMBOLS:
        choices += _as_codebook(tensor, points, rate_price)
    return choices


def _short(step: float) -> np.float32:
    """Return a step rounded up to 8 significant bits: sums of its multiples with deltas are exact."""
    mantissa, exponent = math.frexp(step)
    return np.float32(math.ldexp(math.ceil(mantissa * 256), exponent - 8))


def _fine_grid(tensor: _Tensor, step: np.float32, low: int, levels: int) -> list[_Choice]:
    raw_bits = max(0, math.ceil(math.log2(levels / _GRID_SYMBOLS)))
    if raw_bits > artifact.MAX_RAW_BITS:
        return []
    symbols = (levels - 1 >> raw_bits) + 1
    edges: Reals = ((low + (np.arange(1, symbols) << raw_bits)).astype(np.float64) - 0.5) * float(step)
    counts = _counts(tensor, edges)
    frequencies = artifact.normalise(counts)
    if frequencies.max() == artifact.TOTAL:
        return []

    def build() -> Coding:
        exact = tensor.weights.astype(np.float64)
        first = np.searchsorted(edges, exact, side="right") << raw_bits
        nearest = np.rint(exact / float(step)).astype(np.int64) - low
        indices = np.clip(nearest, first, first + (1 << raw_bits) - 1)
        return replace(head, indices=indices)

    head = Coding(artifact.GRID, step, low=low, raw_bits=raw_bits, frequencies=frequencies)
    bits = 8 * len(artifact.record(head)) + raw_bits * tensor.size
    error = float(step) ** 2 / 12 * tensor.size
    return [_Choice(error, bits, _rate(counts, frequencies), tensor.size, build)]


def _grid_choice(tensor: _Tensor, step: np.float32, low: int, points: Reals, edges: Reals) -> _Choice:
    counts = _counts(tensor, edges)
    head = Coding(artifact.GRID, step, low=low, frequencies=artifact.normalise(counts))
    return _choice(tensor, head, points, edges, counts)


def _choice(tensor: _Tensor, head: Coding, points: Reals, edges: Reals, counts: Integers) -> _Choice:
    def build() -> Coding:
        indices = np.searchsorted(edges, tensor.weights.astype(np.float64), side="right")
        return replace(head, indices=indices.astype(np.uint8))

    error = _error(tensor, points, edges)
    bits = 8 * len(artifact.record(head))
    return _Choice(error, bits, _rate(counts, head.frequencies), tensor.size, build)


def _as_codebook(tensor: _Tensor, points: Reals, rate_price: float, sweeps: int = _SWEEPS) -> list[_Choice]:
    """Alternate thresholds and cell means; empty cells vanish; zeros of a pruned tensor stay zero."""
    edges = _middles(points)
    counts, means = _cells(tensor, edges)
    for _ in range(sweeps):
        keep = counts > 0
        points, counts = means[keep], counts[keep]
        if points.size < 2:
            return []
        edges = _thresholds(points, counts, rate_price, tensor.size)
        counts, means = _cells(tensor, edges)
    keep = counts > 0
    points, counts = means[keep], counts[keep]
    if points.size < 2:
        return []
    top = float(np.abs(points).max())
    if not top > 0:
        return []
    # On a grid of one power of two, sums with deltas are exact (`sparsifier.merge`).
    scale = np.float32(2.0 ** math.ceil(math.log2(top)))
    entries = (np.rint(points / float(scale) * _GRID) / _GRID).astype(np.float16)
    # The lower edge of every kept cell but the first: no weight lies in the others.
    edges = edges[np.flatnonzero(keep)[1:] - 1]
    head = Coding(artifact.CODEBOOK, scale, entries=entries, frequencies=artifact.normalise(counts))
    return [_choice(tensor, head, entries.astype(np.float64) * float(scale), edges, counts)]


def _middles(points: Reals) -> Reals:
    return np.asarray((points[1:] + points[:-1]) / 2, np.float64)


def _places(tensor: _Tensor, edges: Reals) -> Integers:
    """Return where the cells between edges begin and end among the sorted weights."""
    places = np.empty(edges.size + 2, np.int64)
    places[0], places[-1] = 0, tensor.size
    places[1:-1] = tensor.ordered.searchsorted(edges)
    return places


def _counts(tensor: _Tensor, edges: Reals) -> Integers:
    places = _places(tensor, edges)
    return places[1:] - places[:-1]


def _cells(tensor: _Tensor, edges: Reals) -> tuple[Integers, Reals]:
    """Return number and mean of the weights in every cell; a cell that is mostly zeros has mean 0."""
    places = _places(tensor, edges)
    counts = places[1:] - places[:-1]
    sums = tensor.sums[places]
    means = (sums[1:] - sums[:-1]) / np.maximum(counts, 1)
    first, stop = tensor.zeros
    cell = int(places.searchsorted(first, side="right")) - 1
    if stop > first and cell < counts.size and 2 * (stop - first) >= counts[cell]:
        means[cell] = 0.0
    return counts, means


def _error(tensor: _Tensor, points: Reals, edges: Reals) -> float:
    places = _places(tensor, edges)
    counts, sums = places[1:] - places[:-1], tensor.sums[places]
    error = float(tensor.squares[-1] - 2 * (points @ (sums[1:] - sums[:-1])) + (points * points) @ counts)
    return max(error, 0.0)


def _thresholds(points: Reals, counts: Integers, rate_price: float, size: int) -> Reals:
    """Return the edges between which each point is the cheapest: distance^2 + price x bits."""
    bits = -np.log2(np.maximum(counts, 0.5) / size)
    gaps = points[1:] - points[:-1]
    edges = _middles(points) + rate_price * (bits[1:] - bits[:-1]) / (2 * np.maximum(gaps, 1e-300))
    return np.maximum.accumulate(edges)


def _rate(counts: Integers, frequencies: Integers) -> float:
    used = counts > 0
    return float(counts[used] @ (artifact.SCALE_BITS - np.log2(frequencies[used])))
