"""Candidate codings of one tensor, and what each costs.

Entropy-constrained scalar quantisation (Chou, Lookabaugh and Gray 1989), as a uniform grid with
rate-dependent thresholds or as a codebook of weighted cell means, tables included. A cell that has zero in
its inside stands for exactly zero. Weights are sorted once, with running sums of importance and of importance
x weight, so a trial costs O(levels x log n) instead of O(n); thresholds are functions of the weight alone.

Rows (output channels) of unlike importance h want unlike steps, proportional to h^-1/2: then every row loses
as much per bit. Such a tensor may be quantised after division by one factor per row. Without importances
rows share one step, whatever their spread: equal steps are optimal for equal importance, and tables by row
(`contexts`) collect what their spread is worth.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor.layout import (
    CODEBOOK,
    CONSTANT,
    FULL,
    GRID,
    HALF,
    MAX_ENTRIES,
    MAX_LEVEL,
    MAX_RAW_BITS,
    Bytes,
    Coding,
    Integers,
    book_of,
    channel_scales,
    class_of,
    class_starts,
    class_widths,
    classes_of,
    record,
)
from liberatai_core.structure import Tensor
from liberatai_core.weights import Vector

Reals = NDArray[np.float64]

CONSTANT_BYTES = 5
_GRID_LEVELS = 1024
"""The thresholds of a finer grid are those of the next level: rates of neighbours are alike."""
BOOK_LEVELS = 64
"""Levels of a grid up to which a codebook starts from all of them."""
_BOOK_BITS, _TRAINED_BITS = 5.0, 6.0
"""Bits per weight above which cell means gain nothing over the uniform grid, and training gains nothing."""
_ENTRY_BITS = 24
"""Of a codebook's entry: its value and its place in the table."""
_MERGES = 8
"""Passes that join cells of few weights: each pass joins up to half of them."""
_SWEEPS = 8
_SETTLED = 2e-4
"""Relative gain of a sweep below which the codebook is as good as it gets."""
_STARTS = (1.0, 1.6, 2.5)
"""First steps tried, in units of the high-rate optimum: coarse ones win at low rate and in small tensors."""
_HALF_SIZE = 1024
"""float16 is for small tensors: in a large one its single rate would leave a gap in the sizes."""
_CODED_SIZE = 64
"""Weights of a tensor below which no frequency table pays."""
_BOOK_SIZE = 2048
"""Weights of a tensor below which no codebook pays: its entries would dominate."""
_PACKED_SIZE = 4096
"""Above it, a frequency table always pays, and a trial that looks at every weight is slow."""
_PACKED_WIDTHS = range(2, MAX_RAW_BITS + 1)
_ROW = 32
"""Weights of a row from which a factor of its own is tried."""
_ROW_OCTAVES = 4
"""Range of the factors: beyond it, a row of so little importance is empty anyway."""
_CLIPPED, _FLOOR = 0.999, 1e-3
"""Importances are clipped at this quantile, and this share of their mean is added."""
_SILENCE = 1e-3
"""Added to the share of signal that is left: a tensor may be replaced by a constant, at a thousand times the
price of half its energy."""
_SLOPES = (1.0, 3.0, 9.0, 27.0, 81.0, 243.0)
"""What a little more error may cost, in units of its price where there is hardly any: up to 94 % noise."""
_SMALL = 0.15
"""Relative error up to which that price hardly changes."""
_GRID_ENTRIES = 2048
"""Steps of a codebook's entries between zero and its scale: all that float16 holds exactly at the top."""
_LISTED = 1 << 12
"""Levels of a grid that a quantiser lists: finer ones change nothing that training would notice."""
LARGEST = 1e38
"""A reconstruction may exceed the largest weight by one step and must not overflow float32."""


@dataclass(frozen=True, eq=False)
class Quantiser:
    """w -> points[searchsorted(edges, w)], after division by the factor of the weight's row.

    Attributes:
        edges: float32, ascending, one fewer than points.
        points: float32.
        factors: float32, one per entry of the first axis, or None: no division.
    """

    edges: Vector
    points: Vector
    factors: Vector | None = None

    def indices(self, weights: Vector) -> Integers:
        """Return the index of every weight of the tensor, flat."""
        if self.factors is not None:
            weights = (weights.reshape(self.factors.size, -1) / self.factors[:, None]).ravel()
        return np.searchsorted(self.edges, weights)

    def project(self, weights: Vector) -> Vector:
        """Return what the file would give for these weights of the tensor, flat."""
        values = self.points[self.indices(weights)]
        if self.factors is not None:
            values = (values.reshape(self.factors.size, -1) * self.factors[:, None]).ravel()
        return values


@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate coding of one tensor.

    Attributes:
        error: sum of squared errors, weighted by importance.
        head_bits: bits of its record, raw bits of packed grids included.
        coded_bits: bits that it adds to the messages, by the entropy of its indices.
        head: the coding without indices, or all of it.
        quantiser: makes the indices; None: `head` has everything, or the grid is too fine to be listed.
    """

    error: float
    head_bits: float
    coded_bits: float
    head: Coding
    quantiser: Quantiser | None = None

    def cost(self, tensor: "Prepared", multiplier: float) -> float:
        """Return the Lagrangian: the price of noise over signal, and of bits."""
        return tensor.price(self.error) + multiplier * (self.head_bits + self.coded_bits)

    def coding(self, weights: Vector) -> Coding:
        """Return the coding of the tensor's weights."""
        if self.quantiser is not None and self.head.quantised:
            indices = self.quantiser.indices(weights)
            return replace(
                self.head, indices=indices.astype(np.uint8 if self.head.count <= 256 else np.int64)
            )
        if self.head.quantised and self.head.indices.size == 0:
            nearest = np.rint(weights.astype(np.float64) / float(self.head.scale)).astype(np.int64)
            return replace(self.head, indices=np.clip(nearest - self.head.low, 0, self.head.levels - 1))
        return self.head


@dataclass(frozen=True, eq=False)
class View:
    """Weights of a tensor, sorted, with running sums; perhaps divided by one factor per row.

    Attributes:
        ordered: float32, ascending.
        mass: running sums of importance, float64, one more than weights; None: all 1.
        moment: running sums of importance x weight.
        energy: sum of importance x weight^2.
        zeros: where exact zeros begin and end.
        channels: exponents of the rows' factors, or None.
    """

    ordered: Vector
    mass: Reals | None
    moment: Reals
    energy: float
    zeros: tuple[int, int]
    channels: Bytes | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.ordered.size


@dataclass(frozen=True, eq=False)
class Prepared:
    """What of one tensor does not depend on the budget.

    Attributes:
        weights: float32, flat.
        importance: float64, flat, clipped; None: all 1.
        unit: what a squared (weighted) error of 1 costs.
        views: as it is, and perhaps divided by one factor per row.
        distinct: the values of a tensor that has few of them.
        simple: candidates that do not depend on the multiplier.
        retraining: values will be trained with frozen indices: codebooks instead of grids.
    """

    weights: Vector
    importance: Reals | None
    unit: float
    views: tuple[View, ...]
    distinct: Reals
    simple: tuple[Choice, ...]
    retraining: bool
    memo: dict[int, Choice] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weights.size

    @property
    def energy(self) -> float:
        """Sum of importance x weight^2."""
        return self.views[0].energy

    def relative(self, error: float) -> float:
        """Return an error as a share of the energy, 0 … 1."""
        return min(error / self.energy, 1.0) if self.energy > 0 else 0.0

    def price(self, error: float) -> float:
        """Return what an error costs: in proportion to noise over signal, r / (1 - r).

        r is the relative error. Behind a normalisation, and for the next layer's decision, it is the signal
        that is left that counts: an empty layer is not twice as bad as a layer at half its energy.
        """
        return self.unit * error / (1 - self.relative(error) + _SILENCE)


def clipped(importance: Vector) -> Reals:
    """Return importances of one tensor, clipped at their 99.9th percentile, plus 1e-3 of their mean."""
    exact = importance.astype(np.float64)
    exact = np.minimum(exact, np.quantile(exact, _CLIPPED))
    mean = float(exact.mean())
    return np.asarray(exact + _FLOOR * mean if mean > 0 else np.ones(exact.size), np.float64)


def prepare(
    weights: Vector, tensor: Tensor, importance: Reals | None, unit: float | None, *, retraining: bool
) -> Prepared:
    """Return what the search needs of one tensor.

    Args:
        weights: float32, shape (size,).
        tensor: its name and shape.
        importance: as `clipped` returns it, or None.
        unit: what a squared error of 1 costs; None: 1 / energy, so that errors are relative.
        retraining: see `Prepared`.
    """
    view = _view(weights, importance, None)
    views = [view]
    channels = None if importance is None else _channels(tensor, importance)
    if channels is not None:
        views.append(_view(weights, importance, channels))
    starts = np.append(0, 1 + np.flatnonzero(_steps(view.ordered)))
    distinct = view.ordered[starts] if starts.size <= BOOK_LEVELS else np.empty(0)
    if unit is None:
        unit = 1 / view.energy if view.energy > 0 else 1.0
    return Prepared(
        weights,
        importance,
        unit,
        tuple(views),
        distinct.astype(np.float64),
        tuple(_simple(weights, view, importance)),
        retraining,
    )


def weighted(tensor: Prepared, sensitivity: float) -> Prepared:
    """Return the tensor with other errors' price: `sensitivity` times what it was; nothing remembered."""
    return replace(tensor, unit=tensor.unit * sensitivity, memo={})


def constant(weights: Vector) -> Coding:
    """Return the coding of a tensor as its mean."""
    mean = np.float32(np.clip(weights.mean(dtype=np.float64), weights.min(), weights.max()))
    return Coding(CONSTANT, mean)


def choose(tensor: Prepared, multiplier: float) -> Choice:
    """Return the candidate with the least cost; the first of equal ones."""
    candidates = list(tensor.simple)
    view = tensor.views[0]
    if tensor.size < _CODED_SIZE or view.ordered[0] == view.ordered[-1]:
        return min(candidates, key=lambda choice: choice.cost(tensor, multiplier))
    if tensor.distinct.size > 1:
        candidates += codebook(view, tensor.distinct, 0.0, sweeps=0)
    for slope in _SLOPES:
        # The price of a little more error depends on the error: steps for all prices that may turn out.
        price = multiplier / (tensor.unit * slope)
        tried = []
        for each in tensor.views:
            if max(-float(each.ordered[0]), float(each.ordered[-1])) < LARGEST:
                # High-rate optimum of D + lambda R with D = step^2 / 12 per unit of importance.
                mean = 1.0 if each.mass is None else float(each.mass[-1]) / each.size
                step = math.sqrt(6 * price / (math.log(2) * mean))
                for factor in _STARTS:
                    tried += grids(each, step * factor, price, retraining=tensor.retraining)
        candidates += tried
        if tried and max(tensor.relative(choice.error) for choice in tried) < _SMALL:
            break
    return min(candidates, key=lambda choice: choice.cost(tensor, multiplier))


def recoded(choice: Choice, weights: Vector) -> Coding:
    """Return the coding of other weights of the tensor with the same quantiser, constant or grid."""
    head = choice.head
    if choice.quantiser is not None or head.kind == CONSTANT:
        return choice.coding(weights)
    if head.values is not None:
        return replace(head, values=weights.astype(np.float16) if head.kind == HALF else weights)
    nearest = np.rint(weights.astype(np.float64) / float(head.scale)).astype(np.int64)
    return replace(head, indices=np.clip(nearest - head.low, 0, head.levels - 1))


def listed(choice: Choice) -> Quantiser | None:
    """Return the quantiser of a candidate; None if it keeps the weights as they are, or nearly so."""
    head = choice.head
    if choice.quantiser is not None or head.kind != GRID or head.levels > _LISTED:
        return choice.quantiser
    step = float(head.scale)
    points = (np.arange(head.low, head.low + head.levels) * step).astype(np.float32)
    return Quantiser(
        ((np.arange(head.low, head.low + head.levels - 1) + 0.5) * step).astype(np.float32), points
    )


def _view(weights: Vector, importance: Reals | None, channels: Bytes | None) -> View:
    if channels is not None and importance is not None:
        factors = channel_scales()[channels][:, None]
        weights = (weights.reshape(channels.size, -1) / factors).ravel()
        importance = (importance.reshape(channels.size, -1) * factors.astype(np.float64) ** 2).ravel()
    if importance is None:
        ordered, mass = np.sort(weights), None
        exact = ordered.astype(np.float64)
        moment, energy = np.cumsum(exact), float(exact @ exact)
    else:
        order = np.argsort(weights)
        ordered, importance = weights[order], importance[order]
        exact = importance * ordered
        mass, moment = np.concatenate([[0.0], np.cumsum(importance)]), np.cumsum(exact)
        energy = float(exact @ ordered)
    zeros = int(ordered.searchsorted(0.0)), int(ordered.searchsorted(0.0, side="right"))
    return View(ordered, mass, np.concatenate([[0.0], moment]), energy, zeros, channels)


def _channels(tensor: Tensor, importance: Reals) -> Bytes | None:
    """Return the exponents of factors importance^-1/2 of the rows; None if rows are short or alike."""
    rows = tensor.shape[0] if tensor.shape else 1
    if rows < 2 or tensor.size // rows < _ROW:
        return None
    logs = -4 * np.log2(importance.reshape(rows, -1).mean(axis=1))
    exponents = np.clip(np.rint(logs.max() - logs), 0, 8 * _ROW_OCTAVES - 1).astype(np.uint8)
    return exponents if exponents.any() else None


# --- simple ones -----------------------------------------------------------------------------------


def _simple(weights: Vector, view: View, importance: Reals | None) -> list[Choice]:
    choices = [_as_constant(weights, view)]
    if view.ordered[0] == view.ordered[-1]:
        return choices
    choices.append(Choice(0.0, 8 + 32 * weights.size, 0, Coding(FULL, values=weights)))
    if weights.size <= _HALF_SIZE:
        with np.errstate(over="ignore"):
            values = weights.astype(np.float16)
        if np.isfinite(values).all():
            error = _squares(values.astype(np.float64) - weights, importance)
            choices.append(Choice(error, 8 + 16 * weights.size, 0, Coding(HALF, values=values)))
    if weights.size <= _PACKED_SIZE:
        for width in _PACKED_WIDTHS:
            choices += _packed(weights, view, importance, width)
    return choices


def _squares(differences: Reals, importance: Reals | None) -> float:
    squares = differences * differences
    return float(squares.sum() if importance is None else squares @ importance)


def _as_constant(weights: Vector, view: View) -> Choice:
    coding = constant(weights)
    points = np.array([float(coding.scale)])
    error = _error(view, points, np.array([0, view.size]))
    if view.ordered[0] == view.ordered[-1]:
        error = 0.0
    quantiser = Quantiser(np.empty(0, np.float32), np.array([coding.scale], np.float32))
    return Choice(error, 8 * CONSTANT_BYTES, 0, coding, quantiser)


def _packed(weights: Vector, view: View, importance: Reals | None, width: int) -> list[Choice]:
    """A grid with all bits raw: no table, for small tensors."""
    exact = _short((float(view.ordered[-1]) - float(view.ordered[0])) / (2**width - 2))
    ends = _uniform(view, exact)
    if ends is None or ends[1] - ends[0] >= 1 << width:
        return []
    levels = np.rint(weights / np.float64(exact)).astype(np.int64)
    values: Reals = levels.astype(np.float64) * float(exact)
    error = _squares(values - weights, importance)
    coding = Coding(GRID, exact, low=ends[0], levels=1 << width, raw_bits=width, indices=levels - ends[0])
    bits = 8 * len(record(coding)) + width * weights.size
    return [Choice(error, bits, 0, coding)]


def _uniform(view: View, step: np.float32) -> tuple[int, int] | None:
    """Return the lowest and the highest level of a grid, or None if it is too fine or too coarse."""
    if not 0 < step < LARGEST:
        return None
    ends = float(view.ordered[0]) / float(step), float(view.ordered[-1]) / float(step)
    if max(abs(ends[0]), abs(ends[1])) > MAX_LEVEL / 4:
        return None
    return round(ends[0]), round(ends[1])


def _short(step: float) -> np.float32:
    """Return a step rounded up to 8 significant bits: sums of its multiples with deltas are exact."""
    mantissa, exponent = math.frexp(step)
    return np.float32(math.ldexp(math.ceil(mantissa * 256), exponent - 8))


# --- entropy-coded ones ----------------------------------------------------------------------------


def grids(view: View, step: float, price: float, *, retraining: bool) -> list[Choice]:
    """Return the uniform grid with this step, and the codebook that grows from its cells.

    Args:
        view: the tensor.
        step: distance of levels.
        price: weighted squared error that one bit is worth.
        retraining: no grid where a codebook would do.
    """
    exact = _short(min(step, LARGEST))
    ends = _uniform(view, exact)
    if ends is None or ends[0] == ends[1]:
        return []
    low, levels = ends[0], ends[1] - ends[0] + 1
    if levels > _GRID_LEVELS:
        plain = _fine_grid(view, exact, low, levels)
    else:
        points = np.arange(low, low + levels, dtype=np.float64) * float(exact)
        plain = _plain_grid(view, points, price, exact, low)
    rate = plain[0].coded_bits / view.size if plain else 0.0
    books: list[Choice] = []
    if rate < (_TRAINED_BITS if retraining else _BOOK_BITS) and (retraining or view.size >= _BOOK_SIZE):
        books = codebook(view, _starting_points(low, levels) * float(exact), price)
    return books if books and retraining else books + plain


def _starting_points(low: int, levels: int) -> Reals:
    """Return levels of a grid, ascending; of a long one those from which classes of distances start."""
    if levels <= BOOK_LEVELS:
        return np.arange(low, low + levels, dtype=np.float64)
    distances = class_starts(np.arange(class_of(max(abs(low), abs(low + levels - 1))) + 1))
    points = np.unique(np.concatenate([-distances, distances]))
    inside: Reals = points[(points >= low) & (points < low + levels)].astype(np.float64)
    return inside


def _plain_grid(view: View, points: Reals, price: float, step: np.float32, low: int) -> list[Choice]:
    edges = _middles(points)
    places = _places(view, edges)
    for _ in range(2):
        edges = _thresholds(view, points, places, price)
        places = _places(view, edges)
    used = np.flatnonzero(_steps(places))
    if used.size < 2:
        return []
    first, last = int(used[0]), int(used[-1])
    low, levels = low + first, last - first + 1
    points, edges, places = points[first : last + 1], edges[first:last], places[first : last + 2]
    coding = Coding(GRID, step, low=low, levels=levels, centre=_centre(-low, levels), channels=view.channels)
    return [_choice(view, coding, points, edges, places)]


def _fine_grid(view: View, step: np.float32, low: int, levels: int) -> list[Choice]:
    if view.channels is not None:
        return []
    head = Coding(GRID, step, low=low, levels=levels, centre=_centre(-low, levels))
    starts = class_starts(np.arange(head.symbols + 1))
    # First levels of the cells, counted from the centre: classes on both sides of it, or from index 0 on.
    firsts = starts[1:] if head.centre is None else np.unique(np.concatenate([1 - starts[1:], starts[1:]]))
    edges: Reals = (low + (head.centre or 0) + firsts.astype(np.float64) - 0.5) * float(step)
    counts = _steps(_places(view, edges))
    before, after = np.append(-1, firsts), np.append(firsts, 1)
    distances = np.where(before >= 0, before, 1 - after)
    bits = _entropy(counts) + float(counts @ class_widths(classes_of(distances)))
    mass = float(view.size if view.mass is None else view.mass[-1])
    return [Choice(float(step) ** 2 / 12 * mass, 8 * (len(record(head)) + head.symbols), bits, head)]


def _centre(centre: int, levels: int) -> int | None:
    return centre if 0 <= centre < levels else None


def codebook(view: View, points: Reals, price: float, sweeps: int = _SWEEPS) -> list[Choice]:
    """Return the codebook that grows from `points`: thresholds and means alternate; empty cells vanish."""
    edges = _middles(points)
    places = _places(view, edges)
    before = math.inf
    for _ in range(sweeps):
        points, places = _means(view, places)
        if points.size < 2:
            return []
        edges = _thresholds(view, points, places, price)
        places = _places(view, edges)
        now = _error(view, points, places) + price * _entropy(_steps(places))
        if now > (1 - _SETTLED) * before:
            break
        before = now
    kept = np.flatnonzero(_steps(places))
    edges = edges[kept[1:] - 1]
    points, places = _means(view, places)
    for _ in range(_MERGES if sweeps else 0):
        apart = _kept_apart(view, points, places, price)
        if apart.all():
            break
        edges = edges[apart]
        points, places = _means(view, places[np.concatenate([[True], apart, [True]])])
    if not 2 <= points.size <= MAX_ENTRIES or not 0 < float(np.abs(points).max()) < LARGEST:
        return []
    scale, _ = book_of(points)
    # On a grid of one power of two, sums with deltas are exact (`sparsifier.merge`).
    entries = (np.rint(points / float(scale) * _GRID_ENTRIES) / _GRID_ENTRIES).astype(np.float16)
    zero = np.flatnonzero(entries == 0)
    centre = int(zero[0]) if zero.size else None
    head = Coding(CODEBOOK, scale, entries=entries, centre=centre, channels=view.channels)
    return [_choice(view, head, entries.astype(np.float64) * float(scale), edges, places)]


def _kept_apart(view: View, points: Reals, places: Integers, price: float) -> NDArray[np.bool_]:
    """Return which edges stay: those between cells whose own entries are worth their bits.

    Pairwise nearest neighbours (Equitz 1989); of adjacent edges at most the one that saves most goes.
    """
    counts, masses = _steps(places).astype(np.float64), _masses(view, places)
    apart = np.ones(points.size - 1, np.bool_)
    if points.size <= 2:
        return apart
    together = np.maximum(masses[1:] + masses[:-1], 1e-300)
    error = masses[1:] * masses[:-1] / together * (points[1:] - points[:-1]) ** 2
    logs = counts * np.log2(counts)
    joint = counts[1:] + counts[:-1]
    bits = joint * np.log2(joint) - logs[1:] - logs[:-1] + _ENTRY_BITS
    gain = np.where((points[1:] == 0) | (points[:-1] == 0), 0.0, price * bits - error)
    best = np.maximum(np.append(gain[1:], 0.0), np.append(0.0, gain[:-1]))
    return np.asarray((gain <= 0) | (gain < best), np.bool_)


def _choice(view: View, head: Coding, points: Reals, edges: Reals, places: Integers) -> Choice:
    with np.errstate(over="ignore"):
        exact = np.maximum.accumulate(edges.astype(np.float32))
    factors = None if view.channels is None else channel_scales()[view.channels]
    bits = 8 * (len(record(head)) + head.symbols)
    quantiser = Quantiser(exact, points.astype(np.float32), factors)
    return Choice(_error(view, points, places), bits, _entropy(_steps(places)), head, quantiser)


def _steps(values: NDArray[Any]) -> NDArray[Any]:
    """Return the differences of neighbours: `np.diff`, whose checks would take longer than its work."""
    return np.asarray(values[1:] - values[:-1])


def _middles(points: Reals) -> Reals:
    return np.asarray((points[1:] + points[:-1]) / 2, np.float64)


def _places(view: View, edges: Reals) -> Integers:
    """Return where the cells between edges begin and end among the sorted weights."""
    places = np.empty(edges.size + 2, np.int64)
    places[0], places[-1] = 0, view.size
    with np.errstate(over="ignore"):
        places[1:-1] = view.ordered.searchsorted(edges.astype(np.float32), side="right")
    return places


def _masses(view: View, places: Integers) -> Reals:
    at = places if view.mass is None else view.mass[places]
    return _steps(at).astype(np.float64)


def _means(view: View, places: Integers) -> tuple[Reals, Integers]:
    """Return the weighted means of the cells that are not empty, zero where zero lies inside."""
    counts = _steps(places)
    kept = np.append(np.flatnonzero(counts), counts.size)
    places = places[kept]
    masses = _masses(view, places)
    means = _steps(view.moment[places]) / np.maximum(masses, 1e-300)
    lowest, highest = view.ordered[places[:-1]], view.ordered[places[1:] - 1]
    around = (lowest < 0) & (highest > 0)
    first, stop = view.zeros
    if stop > first:
        # Zeros at the border of a cell pin it if they are most of it, as in a pruned one-sided tensor.
        cell = int(places.searchsorted(first, side="right")) - 1
        around[cell] |= bool(2 * (stop - first) >= places[cell + 1] - places[cell])
    means[around] = 0.0
    return means, places


def _error(view: View, points: Reals, places: Integers) -> float:
    sums = _steps(view.moment[places])
    error = view.energy - 2 * float(points @ sums) + float((points * points) @ _masses(view, places))
    return max(error, 0.0)


def _thresholds(view: View, points: Reals, places: Integers, price: float) -> Reals:
    """Return the edges between which each point is the cheapest: importance x distance^2 + price x bits."""
    counts = _steps(places)
    bits = -np.log2(np.maximum(counts, 0.5) / view.size)
    gaps = np.maximum(points[1:] - points[:-1], 1e-300)
    local = 1.0
    if view.mass is not None:
        masses = _masses(view, places)
        local = (masses[1:] + masses[:-1]) / np.maximum(counts[1:] + counts[:-1], 1)
        local = np.maximum(local, 1e-6 * view.mass[-1] / view.size)
    edges = _middles(points) + price * (bits[1:] - bits[:-1]) / (2 * gaps * local)
    return np.maximum.accumulate(edges)


def _entropy(counts: Integers) -> float:
    used = counts[counts > 0].astype(np.float64)
    return float(used @ (math.log2(used.sum()) - np.log2(used)))
