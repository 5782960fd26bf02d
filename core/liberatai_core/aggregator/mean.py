"""The weighted mean of differences inside one structure.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg),
AISTATS 2017, arXiv:1602.05629. With a cover (nested members, head only) every coordinate is divided by the
weight of those that cover it: Diao et al., "HeteroFL", ICLR 2021, arXiv:2010.01264.

Two rules for a coordinate that only some devices sent, in `RULES`: `mean` counts it as zero for the others,
`mean_over_senders` divides by the weight of those that sent it (both are readings of Thonglek et al.,
ICFEC 2022, which leaves it open).

Sums are exact. The values of an update are multiples of one power of two, and an array of float64 adds such
multiples without rounding up to 2^53: one addition per value that was sent. What spans more than 46 bits is
cut first (Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013), and each part has an
array of its own; an array that fills up hands its upper bits on. The result is the exact sum, rounded once.
So the same updates give the same bytes in any order, and partial sums of shards can be merged.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.packed import Packed
from liberatai_core.errors import DuplicateError, SchemaError, StructureError, TooLargeError
from liberatai_core.weights import Vector, require_finite

MAX_SAMPLES = 10_000
"""Most that one update counts for: sample counts are a device's own word, and must not buy the model."""

_LARGEST_CAP = 1 << 29
"""29 bits times the 24 of a float32 are 53: the product is exact in float64."""
MAX_UPDATES = 1 << 20
"""Most updates in one sum: 2^20 weights below 2^29 stay below 2^53, where float64 counts without rounding."""
_GRID = 32
"""Units of the arrays of one sum are so many powers of two apart: float32 allows at most a dozen arrays."""
_REACH = 46
"""Bits of what is added to an array at once: most updates need no cut, 2^7 of the widest fill an array."""
_FULL = 1 << 53
"""Units up to which float64 counts without rounding."""
_BLOCK = 1 << 14
"""Values looked at together: the buffers stay in the processor's cache."""
_DENSE = 8
"""With more than one value in 8, passing over the zeros is faster than gathering and scattering."""
_MAGNITUDE, _INFINITE, _MANTISSA = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF
"""Bits of a float32."""

Cover = NDArray[np.bool_]
"""Which coordinates an update speaks about, shape (parameters,)."""

Doubles = NDArray[np.float64]
Place = slice | NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Exact weighted sum so far.

    Attributes:
        parameters: length of the vectors.
        pieces: by exponent e: multiples of 2^e, shape (parameters,), float64; the sum of weight * difference
            is their sum. Usually one or two arrays.
        weights: sum of weights, shape (parameters,), or (1,) while every update covered everything.
        updates: number of updates in it.
        loads: by exponent: what no multiple in that piece exceeds.
    """

    parameters: int
    pieces: Mapping[int, Doubles]
    weights: Doubles
    updates: int = 0
    loads: Mapping[int, int] = field(default_factory=dict)

    @property
    def values(self) -> Doubles:
        """The sum as float64, shape (parameters,), rounded once: whatever the order was, the same bits."""
        total = np.zeros(self.parameters)
        for place in _runs(self.parameters if self.pieces else 0):
            total[place] = _rounded(self.pieces, place)
        return total


Addend = tuple[Vector | Packed, int, Cover | None]
"""Difference, samples, and what it speaks about; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregator:
    """Five pure functions.

    Attributes:
        init: number of parameters -> empty state.
        add: (state, difference, samples, cover or None for all) -> state.
        add_all: (state, addends) -> state of all of them; one copy of the state for the whole stream, and one
            addend in memory at a time.
        merge: (state, state) -> state of the updates of both, which must not share one.
        finish: state -> mean difference, float32; zero where nothing was covered.
    """

    init: Callable[[int], Sum]
    add: Callable[[Sum, Vector | Packed, int, Cover | None], Sum]
    add_all: Callable[[Sum, Iterable[Addend]], Sum]
    merge: Callable[[Sum, Sum], Sum]
    finish: Callable[[Sum], Vector]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One device's decoded update.

    Attributes:
        id: unique name; fixes the order of summation.
        difference: shape (parameters,), float32.
        samples: number of samples it was trained on, at least 1.
        cover: see `Cover`; None for all.
    """

    id: str
    difference: Vector
    samples: int
    cover: Cover | None = None


def mean(cap: int = MAX_SAMPLES) -> Aggregator:
    """Return the mean with weight min(samples, cap); what an update did not send counts as zero."""
    return _aggregator(cap, senders_only=False)


def mean_over_senders(cap: int = MAX_SAMPLES) -> Aggregator:
    """Return the mean over those that sent a coordinate, with weight min(samples, cap).

    An update speaks about its non-zero coordinates: no sparse method sends a zero.
    """
    return _aggregator(cap, senders_only=True)


def _aggregator(cap: int, *, senders_only: bool) -> Aggregator:
    if not 1 <= cap <= _LARGEST_CAP:
        raise ValueError(f"cap must be 1 … {_LARGEST_CAP}, not {cap}")

    def init(parameters: int) -> Sum:
        return Sum(parameters, {}, np.zeros(1))

    def add_all(state: Sum, addends: Iterable[Addend]) -> Sum:
        growing = _Growing(state)
        for difference, samples, cover in addends:
            if samples < 1:
                raise SchemaError(f"update counts {samples} samples, at least 1 is needed")
            growing.add(difference, min(samples, cap), cover, senders_only=senders_only)
        return growing.sum()

    def add(state: Sum, difference: Vector | Packed, samples: int, cover: Cover | None = None) -> Sum:
        return add_all(state, [(difference, samples, cover)])

    return Aggregator(init=init, add=add, add_all=add_all, merge=merge, finish=_finish)


RULES: dict[str, Callable[[int], Aggregator]] = {"mean": mean, "mean_over_senders": mean_over_senders}
"""By name, as a sparse method names the rule that it needs."""


def merge(one: Sum, other: Sum) -> Sum:
    """Return the sum of two disjoint sets of updates; exact, so the shards' order does not matter.

    Raises:
        StructureError: the sums have different lengths.
        TooLargeError: together they hold more than `MAX_UPDATES` updates.
    """
    if one.parameters != other.parameters:
        raise StructureError(f"sums over {one.parameters} and {other.parameters} parameters")
    growing = _Growing(one)
    growing.add_sum(other)
    return growing.sum()


class _Growing:
    """A sum that grows in place; arrays of the state that it starts from are copied before they change."""

    def __init__(self, state: Sum) -> None:
        self.parameters, self.updates = state.parameters, state.updates
        self.pieces, self.loads = dict(state.pieces), dict(state.loads)
        self.borrowed = set(state.pieces)
        # Fresh arrays for every update would be fresh pages for the system.
        self.bits, self.product = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK)
        # Weights of updates that cover everything are one number, those of others an array.
        self.whole = float(state.weights[0]) if state.weights.size == 1 else 0.0
        self.partly = None if state.weights.size == 1 else state.weights.copy()

    def sum(self) -> Sum:
        """Return the sum; the arrays are its own from now on."""
        weights = np.array([self.whole]) if self.partly is None else self.partly + self.whole
        return Sum(self.parameters, self.pieces, weights, self.updates, self.loads)

    def add(
        self, difference: Vector | Packed, weight: int, cover: Cover | None, *, senders_only: bool
    ) -> None:
        """Add weight * difference, and the weight where the update speaks; 1 <= weight < 2^29."""
        positions, values = self._sent(difference)
        if cover is not None:
            if cover.shape != (self.parameters,) or cover.dtype != np.bool_:
                raise StructureError(
                    f"cover is {cover.dtype} {cover.shape}, wanted bool ({self.parameters},)"
                )
            values = np.where(cover if positions is None else cover[positions], values, np.float32(0))
        self.updates = _more(self.updates, 1)
        self._add_values(positions, values, weight)
        if cover is None and not senders_only:
            self.whole += weight
            return
        if self.partly is None:
            self.partly = np.zeros(self.parameters)
        if not senders_only:
            self.partly += float(weight) * np.asarray(cover)
        else:
            place = slice(None) if positions is None else positions
            _add_at(self.partly, place, float(weight) * (values != 0))

    def add_sum(self, other: Sum) -> None:
        """Add another sum of the same length."""
        self.updates = _more(self.updates, other.updates)
        for unit, piece in other.pieces.items():
            blocks = ((place, piece[place].copy()) for place in _runs(self.parameters))
            self._scatter(blocks, unit, unit + other.loads[unit].bit_length())
        if other.weights.size == 1:
            self.whole += float(other.weights[0])
        else:
            self.partly = other.weights + (0.0 if self.partly is None else self.partly)

    def _sent(self, difference: Vector | Packed) -> tuple[NDArray[np.intp] | None, Vector]:
        """Return positions, or None for all, and values of a difference of the right length."""
        if isinstance(difference, Packed):
            if difference.parameters != self.parameters:
                raise StructureError(f"update over {difference.parameters} values, wanted {self.parameters}")
            positions = difference.positions
            return None if positions is None else positions.astype(np.intp, copy=False), difference.values
        if difference.shape != (self.parameters,):
            raise StructureError(f"update of shape {difference.shape}, wanted ({self.parameters},)")
        sent = np.flatnonzero(difference)
        return (None, difference) if sent.size * _DENSE > difference.size else (sent, difference[sent])

    def _add_values(self, positions: NDArray[np.intp] | None, values: Vector, weight: int) -> None:
        span = _span(values, weight, self.bits)
        if span is None:
            return
        blocks = (
            (
                place if positions is None else positions[place],
                # Without the type numpy multiplies in float32, and rounds.
                np.multiply(
                    values[place],
                    float(weight),
                    out=self.product[: place.stop - place.start],
                    dtype=np.float64,
                ),
            )
            for place in _runs(values.size)
        )
        self._scatter(blocks, *span)

    def _scatter(self, blocks: Iterable[tuple[Place, Doubles]], low: int, high: int) -> None:
        """Add values at their places, all of them multiples of 2^low below 2^high; the values are consumed.

        Every step is exact: scalings by powers of two, and subtractions that leave what lies below the cut.
        """
        *cuts, last = self._units(low, high)
        for place, rest in blocks:
            for unit in cuts:
                piece = np.rint(rest * math.ldexp(1.0, -unit))
                piece *= math.ldexp(1.0, unit)
                _add_at(self.pieces[unit], place, piece)
                np.subtract(rest, piece, out=rest)
            _add_at(self.pieces[last], place, rest)

    def _units(self, low: int, high: int) -> list[int]:
        """Return the units of the arrays that such values go into, largest first, and make room there."""
        fits = [unit for unit in self.pieces if unit <= low and high <= unit + _REACH]
        if fits:
            first = max(fits)
        elif self.pieces:
            first = high - _REACH + (next(iter(self.pieces)) - high + _REACH) % _GRID
        else:
            # In the middle, where it exists: coarser and finer updates of about this size then fit, too.
            spare = low + _REACH - high
            first = low - spare // 2 if spare >= 0 else high - _REACH
        units = [first]
        self._reserve(first, high)
        while units[-1] > low:
            # What a cut leaves is at most half of its unit.
            self._reserve(units[-1] - _GRID, units[-1])
            units.append(units[-1] - _GRID)
        return units

    def _reserve(self, unit: int, reach: int) -> None:
        """Make room for one addition of values up to 2^reach to the array of a unit."""
        more = 1 << reach - unit
        if unit not in self.pieces:
            self.pieces[unit], self.loads[unit] = np.zeros(self.parameters), 0
        elif unit in self.borrowed:
            self.pieces[unit] = self.pieces[unit].copy()
            self.borrowed.remove(unit)
        if self.loads[unit] + more > _FULL:
            self._hand_on(unit)
        self.loads[unit] += more

    def _hand_on(self, unit: int) -> None:
        """Move what lies above the lowest 32 bits of an array to the next one."""
        above = unit + _GRID
        self._reserve(above, unit + _FULL.bit_length())
        piece = self.pieces[unit]
        for place in _runs(piece.size):
            high = np.rint(piece[place] * math.ldexp(1.0, -above))
            high *= math.ldexp(1.0, above)
            self.pieces[above][place] += high
            piece[place] -= high
        self.loads[unit] = 1 << _GRID - 1


def _add_at(array: Doubles, place: Place, values: Doubles) -> None:
    if isinstance(place, slice):
        array[place] += values
    else:
        # Three times as fast as reading, adding and writing with an index.
        np.add.at(array, place, values)


def _span(values: Vector, weight: int, buffer: NDArray[np.uint32]) -> tuple[int, int] | None:
    """Return low and high such that weight * values are multiples of 2^low below 2^high; None if all are 0.

    Raises:
        StructureError: the values are no float32.
        NonFiniteError: a value is NaN or infinite.
    """
    if values.dtype != np.float32:
        raise StructureError(f"update of {values.dtype}, wanted float32")
    words, largest, smallest, mantissas = values.view(np.uint32), 0, _INFINITE, _MANTISSA + 1
    for place in _runs(words.size):
        bits = np.bitwise_and(words[place], _MAGNITUDE, out=buffer[: place.stop - place.start])
        largest = max(largest, int(bits.max()))
        mantissas |= int(np.bitwise_or.reduce(bits)) & _MANTISSA
        least = int(bits.min())
        if least == 0:
            # Less 1, zeros become the largest numbers.
            bits -= np.uint32(1)
            least = int(bits.min()) + 1
        smallest = min(smallest, least)
    if largest >= _INFINITE:
        require_finite(values, "update")
    if largest == 0:
        return None
    # A float32 with exponent bits E >= 1 is a multiple of 2^(E - 150) below 2^(E - 126); E = 0 counts as 1.
    low = max(smallest >> 23, 1) - 150 + _zeros(mantissas) + _zeros(weight)
    high = max(largest >> 23, 1) - 126 + weight.bit_length()
    return low, high


def _zeros(number: int) -> int:
    """Return how many zero bits a positive number ends with."""
    return (number & -number).bit_length() - 1


def _runs(size: int) -> Iterator[slice]:
    for start in range(0, size, _BLOCK):
        yield slice(start, min(start + _BLOCK, size))


def _rounded(pieces: Mapping[int, Doubles], place: slice) -> Doubles:
    """Return the exact sum of the pieces in one run of coordinates, rounded once."""
    parts = [pieces[unit][place] for unit in sorted(pieces, reverse=True)]
    if len(parts) < 3:
        # The sum of two is rounded once anyway.
        return parts[0] + parts[1] if len(parts) == 2 else parts[0].copy()
    total, rest, lost = np.zeros(parts[0].size), np.zeros(parts[0].size), np.zeros(parts[0].size, np.bool_)
    for part in parts:
        total, error = _two_sum(total, part)
        rest, error = _two_sum(rest, error)
        lost |= error != 0
    total += rest
    for at in np.flatnonzero(lost).tolist():
        total[at] = math.fsum(part[at] for part in parts)
    return total


def _two_sum(one: Doubles, other: Doubles) -> tuple[Doubles, Doubles]:
    """Return the rounded sum and what rounding took away, exactly (Knuth, TAOCP 2, 4.2.2)."""
    total = one + other
    added = total - one
    return total, (one - (total - added)) + (other - added)


def _finish(state: Sum) -> Vector:
    result = np.zeros(state.parameters, dtype=np.float32)
    for place in _runs(state.parameters if state.pieces else 0):
        total = _rounded(state.pieces, place)
        if state.weights.size == 1:
            total /= state.weights
        else:
            np.divide(total, state.weights[place], out=total, where=state.weights[place] > 0)
        result[place] = total
    return result


def _more(updates: int, added: int) -> int:
    if updates + added > MAX_UPDATES:
        raise TooLargeError(f"{updates + added} updates in one sum, at most {MAX_UPDATES}")
    return updates + added


def aggregate(aggregator: Aggregator, parameters: int, updates: Iterable[Update]) -> Vector:
    """Return the mean difference of a set of updates; byte-identical whatever their order.

    Raises:
        DuplicateError: two updates have one id.
        StructureError: an update has another length.
        NonFiniteError: an update contains NaN or infinity.
        SchemaError: an update counts no sample.
    """
    some = sorted(updates, key=lambda update: update.id)
    for one, other in itertools.pairwise(some):
        if one.id == other.id:
            raise DuplicateError(f"update {one.id} is there twice")
    addends = ((update.difference, update.samples, update.cover) for update in some)
    return aggregator.finish(aggregator.add_all(aggregator.init(parameters), addends))
