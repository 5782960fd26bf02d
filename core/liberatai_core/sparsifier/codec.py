"""Bytes of a sparse difference, both ends.

A difference is a row of non-zeros: gap to the one before, sign, magnitude. Gaps fall into classes (exact
below 16, then eight per octave, the rest of the gap being raw bits) that are entropy-coded together with
magnitudes by `rans`. A table is two bytes: real updates lie in clusters, so beside the geometric law of
independent positions (Golomb 1966) there are heavy tails, S(g) = (1 + g / c)^-a (Lomax 1954);
runs of non-zeros with unlike densities (a convolution, a large dense layer) get tables of their own.
Neighbours in an update often have the same sign: where it pays, what is coded is whether the sign changes,
given the class of the gap, in one symbol with it. Decoding is integer arithmetic and one exact float32
multiplication (8-bit scale times at most 8-bit level), so it gives the same bits on every machine.
Sparse ternary updates are those of Sattler et al., arXiv 1903.02891; measured by
`benchmarks/sparsifier_codec.py`.

Stream 3, sparse::

    u8 3 | varint parameters | varint non-zeros k | nothing more if k = 0
    varint flags: 1 signs are modelled, 2 there are magnitudes above 1, 4 several gap tables,
                  8 gap table follows from k and parameters; from bit 4: groups - 1
    (groups - 1) x varint non-zeros | groups x u16 scale (upper half of a float32)
    if 4: varint tables - 2, (tables - 1) x varint non-zeros
    gap tables, but none if 8; if signs are modelled, 3 x u8: 256 x share of changes after gaps
        of 0, 1 ... 7, more
    if 2: table of magnitudes - 1
    if signs are modelled: varint lanes; otherwise `_free_lanes` of symbols and k
    rANS message: k gap classes, then, if 2, k classes of magnitude - 1
        raw bits: rests of gaps | signs (1 = negative; absent if modelled) | rests of magnitudes

    table: u8 law | u8 scale          law 0 ... 7: Lomax, a = SHAPES[law] / 8, c = 2^(scale / 8 - 4)
                                      law 8: geometric, log2 of the ratio = -2^(4 - scale / 8)
           u8 9 | u8 classes - 1 | u8 per class: 8 x -log2(share), 255: none

Stream 2, plain float32 values (baseline)::

    u8 2 | varint parameters | varint k | k x u32 positions | k x f32 values

Stream 4, dense float32 (baseline)::

    u8 4 | varint parameters | parameters x f32 values

All integers are little-endian, bits are packed high bit first; a varint has 7 bits per byte, low bits
first, at most 5 bytes. Number 1 was the Golomb code; it is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.errors import (
    BombError,
    CodecError,
    IndexOrderError,
    IndexRangeError,
)
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS
from liberatai_core.weights import Vector, require_finite

Integers = NDArray[np.int64]

PLAIN = 2
SPARSE = 3
DENSE = 4
MAX_LEVELS = 255
"""8-bit magnitude times 8-bit scale has at most 16 significant bits: exact in float32."""
MAX_RUNS = 32
"""Gap tables of one stream: bounds the decoder's memory (4 MiB) and the encoder's search."""
SHAPES = (2, 3, 4, 6, 8, 12, 20, 40)
"""Tails of the Lomax laws, in eighths; the last one is nearly geometric."""
_GEOMETRIC = len(SHAPES)
_EXPLICIT = _GEOMETRIC + 1
_NEVER = 255
"""Share code of a class that does not occur."""
_SIGNS, _MAGNITUDES, _SEVERAL, _IMPLIED = 1, 2, 4, 8
_GROUPS_SHIFT = 4
_ROW = 32
"""Symbols per lane where lanes are free: few enough rows for a fast decoder, lanes for all sizes."""
_LONGEST = 1024
"""Symbols per lane where lanes cost 3 bytes: below 1 % of what is in them."""
_LANES = 1 << 14
"""Lanes at most while rows are short: more would not fit a cache."""
_EXACT = 16
"""Classes below this are single numbers and have no raw bits."""
_PIECES = 512
"""A group with a smaller share of the non-zeros is no piece of its own: bounds the encoder's search."""
_RUN_HEAD, _SIGNED_RUN_HEAD, _SIGN_HEAD = 32, 56, 40
"""Bits in the stream for a run (table and count), for one with sign statistics, for modelled signs."""
_NEAR = 8
"""Gap classes 0, 1 ... 7 and the rest have sign statistics of their own."""
_COST = 8
"""Fractional bits of estimated costs: integers in float64, so sums are the same on every machine."""


@dataclass(frozen=True, eq=False)
class Sparse:
    """A quantised sparse difference: value i = levels[i] x the scale of the group that i lies in.

    Attributes:
        positions: int64, shape (k,), strictly increasing.
        levels: int16, shape (k,), 1 … 255 in magnitude, signed.
        counts: int64, shape (groups,): non-zeros per group, each at least 1, k together.
        scales: float32, shape (groups,): positive, as `round_scale` returns them.
    """

    positions: Integers
    levels: NDArray[np.int16]
    counts: Integers
    scales: NDArray[np.float32]

    def values(self) -> Vector:
        """Return the float32 values, shape (k,); exact products, unless they overflow to infinity."""
        with np.errstate(over="ignore"):
            return self.levels.astype(np.float32) * np.repeat(self.scales, self.counts)


def round_scale(scale: float) -> np.float32:
    """Return the nearest float32 with 8 significant bits (its lower half zero); 0 if too small."""
    bits = int(np.float32(scale).view(np.uint32))
    return np.uint32(min((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, 0x7F7F) << 16).view(np.float32)


def encode(sparse: Sparse, parameters: int) -> bytes:
    """Return the stream of a sparse difference over `parameters` values.

    Groups should end where the statistics change, e.g. where tensors do: gap tables end there, too.

    Raises:
        IndexRangeError: a position is not in [0, parameters).
        IndexOrderError: positions are unsorted or doubled.
        NonFiniteError: a scale is NaN or infinite.
        CodecError: levels, counts or scales are not as `Sparse` says.
    """
    _check_positions(sparse.positions, parameters)
    count = sparse.positions.size
    start = bytes([SPARSE]) + _varint(parameters) + _varint(count)
    if count == 0:
        return start
    magnitudes = np.abs(sparse.levels)
    _check_values(sparse, magnitudes)
    # 32 bits hold any gap: what the encoder needs beside the difference stays small.
    gaps = sparse.positions.astype(np.int32)
    gaps[1:] -= gaps[:-1] + np.int32(1)
    classes, negative = _classes(gaps), sparse.levels < 0
    symbols = (classes.astype(np.uint16) << np.uint16(1)) | np.diff(negative, prepend=False)
    plan = _plan(symbols, sparse.counts, parameters)
    magnitude_table = None
    raw = [_rests(gaps, classes)]
    del gaps
    if not plan.signs:
        symbols = classes
        raw.append((negative.astype(np.uint32), np.ones(count, np.uint8)))
    if several := int(magnitudes.max()) > 1:
        magnitudes -= 1
        classes = _classes(magnitudes)
        magnitude_table, _ = _best_law(np.bincount(classes, minlength=_CLASSES))
        symbols = np.concatenate([symbols, classes])
        raw.append(_rests(magnitudes, classes))
    flags = _SIGNS * plan.signs | _MAGNITUDES * several | _SEVERAL * (len(plan.laws) > 1)
    flags |= _IMPLIED * (plan.laws[0] == _IMPLIED_LAW)
    head = [start, _varint((sparse.counts.size - 1) << _GROUPS_SHIFT | flags)]
    head += map(_varint, sparse.counts[:-1].tolist())
    head.append((sparse.scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes())
    if len(plan.laws) > 1:
        head += [_varint(len(plan.laws) - 2), *map(_varint, plan.counts[:-1])]
    for law, shares in zip(plan.laws, plan.changes, strict=True):
        head += [b"" if law == _IMPLIED_LAW else law, bytes(shares)]
    head.append(magnitude_table or b"")
    coded = _coded(plan, magnitude_table, parameters, count)
    values, widths = (np.concatenate(parts) for parts in zip(*raw, strict=True))
    del classes, negative, magnitudes, raw
    lanes = _free_lanes(coded.symbols, count)
    if plan.signs:
        lanes = max(
            _free_lanes(coded.symbols, int(widths.sum(dtype=np.int64))), -(-coded.symbols // _LONGEST)
        )
        head.append(_varint(lanes))
    return b"".join(head) + rans.encode(symbols, coded, lanes, rans.pack(values, widths))


def encode_plain(positions: Integers, values: Vector, parameters: int) -> bytes:
    """Return the plain stream: 8 bytes per value, nothing quantised.

    Raises:
        IndexRangeError, IndexOrderError, NonFiniteError: as for `encode`.
    """
    _check_positions(positions, parameters)
    require_finite(values, "plain update")
    if values.shape != positions.shape:
        raise CodecError(f"{values.size} values for {positions.size} positions")
    head = bytes([PLAIN]) + _varint(parameters) + _varint(positions.size)
    return head + positions.astype("<u4").tobytes() + values.astype("<f4").tobytes()


def encode_dense(values: Vector) -> bytes:
    """Return the dense stream: 4 bytes per parameter, no positions, nothing quantised.

    Args:
        values: float32, shape (parameters,).

    Raises:
        NonFiniteError: a value is NaN or infinite.
        CodecError: there are no values, or more than 2^28.
    """
    if values.ndim != 1 or not 0 < values.size <= MAX_PARAMETERS:
        raise CodecError(f"dense update of shape {values.shape}, at most {MAX_PARAMETERS} values")
    require_finite(values, "dense update")
    return bytes([DENSE]) + _varint(values.size) + values.astype("<f4").tobytes()


def decode(data: bytes, parameters: int) -> tuple[Integers, Vector]:
    """Return positions (int64, strictly increasing) and values (float32) of a stream from anywhere.

    Memory stays below about 56 bytes per parameter, 8 per byte of data and 6 MiB, whatever the stream says.

    Raises:
        CodecError: unknown codec, another parameter count, truncated, trailing or nonsensical bytes.
        BombError: more non-zeros, groups, tables, lanes or bytes than the structure can hold.
        IndexRangeError: a position is not in [0, parameters).
        IndexOrderError: positions are unsorted or doubled.
        NonFiniteError: a scale or a value is NaN or infinite.
    """
    reader = _Reader(data)
    kind = reader.byte()
    if kind not in (PLAIN, SPARSE, DENSE):
        raise CodecError(f"sparse update: unknown codec {kind}")
    claimed = reader.varint()
    if claimed != parameters:
        raise CodecError(f"sparse update: made for {claimed} parameters, wanted {parameters}")
    if kind == DENSE:
        positions, values = np.arange(parameters), reader.floats(parameters)
        reader.end()
    else:
        count = reader.varint()
        if count > parameters:
            raise BombError(f"sparse update: {count} non-zeros among {parameters} parameters")
        positions, values = (_read_plain if kind == PLAIN else _read_sparse)(reader, count, parameters)
    require_finite(values, "sparse update")
    return positions, values


def _check_positions(positions: Integers, parameters: int) -> None:
    if not 0 < parameters <= MAX_PARAMETERS:
        raise CodecError(f"sparse update over {parameters} parameters, at most {MAX_PARAMETERS}")
    if positions.size and (positions.min() < 0 or positions.max() >= parameters):
        raise IndexRangeError(f"sparse update: a position lies outside 0 … {parameters - 1}")
    if (np.diff(positions) <= 0).any():
        raise IndexOrderError("sparse update: positions are unsorted or doubled")


def _check_values(sparse: Sparse, magnitudes: NDArray[np.int16]) -> None:
    if magnitudes.shape != sparse.positions.shape or magnitudes.min() < 1 or magnitudes.max() > MAX_LEVELS:
        raise CodecError(f"sparse update: levels must be 1 … {MAX_LEVELS} in magnitude, one per position")
    if sparse.counts.shape != sparse.scales.shape or sparse.counts.size > MAX_TENSORS:
        raise CodecError(f"sparse update: one scale per group and at most {MAX_TENSORS} groups")
    if sparse.counts.min() < 1 or sparse.counts.sum() != magnitudes.size:
        raise CodecError("sparse update: group counts do not add up to the non-zeros")
    require_finite(sparse.scales, "scales")
    if (sparse.scales <= 0).any() or (sparse.scales.view(np.uint32) & np.uint32(0xFFFF)).any():
        raise CodecError("sparse update: scales must be positive with 8 significant bits")


# --- classes of gaps and magnitudes ----------------------------------------------------------------


def _classes(numbers: NDArray[np.signedinteger]) -> NDArray[np.uint8]:
    """Return classes: the number itself below 16, then eight to the octave."""
    classes: NDArray[np.uint8] = np.minimum(numbers, _EXACT).astype(np.uint8)
    far = np.flatnonzero(numbers >= _EXACT)
    large = numbers[far].astype(np.int64)
    exponent = np.frexp(large.astype(np.float64))[1].astype(np.int64) - 4
    classes[far] = 8 * exponent + (large >> exponent)
    return classes


def _class(number: int) -> int:
    exponent = max(number.bit_length() - 4, 0)
    return 8 * exponent + (number >> exponent)


_CLASSES = _class(MAX_PARAMETERS - 1) + 1


@lru_cache(1)
def _widths() -> Integers:
    """Return the raw bits that follow each class, and one class more."""
    return np.maximum(np.arange(_CLASSES + 1) // 8 - 1, 0)


@lru_cache(1)
def _edges() -> Integers:
    """Return the smallest number of each class, and of one class more."""
    number, exponent = np.arange(_CLASSES + 1), _widths()
    return (number - 8 * exponent) << exponent


def _rests(
    numbers: NDArray[np.signedinteger], classes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return values and widths of the raw bits behind the classes, without the empty ones."""
    far = np.flatnonzero(classes >= _EXACT)
    classes = classes[far]
    return (numbers[far] - _edges()[classes]).astype(np.uint32), _widths()[classes].astype(np.uint8)


# --- tables ----------------------------------------------------------------------------------------

_IMPLIED_LAW = b"\xff"
"""In a plan: the geometric law that follows from the density; it is not in the stream."""


def _shares(law: bytes) -> Integers:
    """Return the weight of every class, sum about 2^30, from the two bytes of a parametric table."""
    shape, scale = law
    if shape == _GEOMETRIC:
        # 2^(4 - scale / 8) with 34 fractional bits.
        rate = int(rans.exp2_negative(np.array([scale << rans.FRACTION - 3]))[0]) << 8
        return _geometric(rate)
    # c = 2^(scale / 8 - 4) with 8 fractional bits: 2^(29 + eighths), shifted.
    wide = int(rans.exp2_negative(np.array([(8 - scale % 8) << rans.FRACTION - 3]))[0])
    c = (wide << 6) >> 31 - scale // 8
    ratios = rans.log2((_edges() << 8) + c) - int(rans.log2(np.array([c]))[0])
    survival = rans.exp2_negative(ratios * SHAPES[shape] >> 3)
    weights: Integers = np.maximum(survival[:-1] - survival[1:], 0)
    return weights


def _geometric(rate: int) -> Integers:
    """Return weights of a geometric law: -log2 of the ratio with 34 fractional bits."""
    gaps = np.minimum(_edges(), (40 << 34) // max(rate, 1) + 1)
    survival = rans.exp2_negative(gaps * rate >> 34 - rans.FRACTION)
    weights: Integers = np.maximum(survival[:-1] - survival[1:], 0)
    return weights


def _implied(count: int, parameters: int) -> Integers:
    """Return weights for `count` non-zeros that lie anywhere among `parameters`."""
    if count == parameters:
        return _geometric(16 << 34)
    rate = rans.log2(np.array([parameters])) - rans.log2(np.array([parameters - count]))
    return _geometric(max(int(rate[0]), 1) << 34 - rans.FRACTION)


def _weights(law: bytes, parameters: int, count: int) -> Integers:
    """Return the weights of the classes that numbers below `parameters` can have."""
    if law[0] == _EXPLICIT:
        codes = np.frombuffer(law[2:], np.uint8).astype(np.int64)
        weights = rans.exp2_negative(codes << rans.FRACTION - 3)
        return np.where(codes == _NEVER, 0, weights)
    weights = _implied(count, parameters) if law == _IMPLIED_LAW else _shares(law)
    return weights[: _class(parameters - 1) + 1]


def _with_signs(weights: Integers, changes: Sequence[int]) -> Integers:
    """Return weights of (class, does the sign change?), interleaved."""
    share = np.full(weights.size, changes[2], np.int64)
    share[:_NEAR], share[:1] = changes[1], changes[0]
    return np.stack([weights * (256 - share), weights * share], axis=1).ravel()


# --- the encoder's choices ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Gap tables: runs of `counts` non-zeros with their laws; `changes` are empty if signs are raw."""

    counts: list[int]
    laws: list[bytes]
    changes: list[tuple[int, ...]]
    signs: bool


_COARSE = 4
_SCALES = 256


def _cost(weights: Integers) -> NDArray[np.int16]:
    """Return the bits that each class costs, times 2^8; unlikely ones cost what `rans.normalise` grants."""
    share = (weights << 6) + (1 << 20)
    bits = rans.log2(share.sum(keepdims=True)) - rans.log2(share)
    return (bits + (1 << rans.FRACTION - _COST - 1) >> rans.FRACTION - _COST).astype(np.int16)


@lru_cache(4096)
def _law_cost(law: bytes) -> NDArray[np.int16]:
    return _cost(_shares(law))


@lru_cache(1)
def _coarse() -> tuple[list[bytes], NDArray[np.int16]]:
    """Return laws on a coarse grid and their costs, shape (laws, classes)."""
    laws = [bytes([s, c]) for s in range(_GEOMETRIC + 1) for c in range(0, _SCALES, _COARSE)]
    return laws, np.stack([_cost(_shares(law)) for law in laws])


def _best_law(histogram: Integers) -> tuple[bytes, float]:
    """Return the best table for a histogram over all classes, and its cost: bits x 2^8 with the table."""
    used = int(np.flatnonzero(histogram)[-1]) + 1
    weights = histogram[:used].astype(np.float64)
    laws, costs = _coarse()
    # Integers in float64: sums are the same on every machine.
    shape, scale = laws[int(np.argmin(costs[:, :used].astype(np.float64) @ weights))]
    near = range(max(scale - _COARSE + 1, 0), min(scale + _COARSE, _SCALES))
    candidates = [bytes([shape, c]) for c in near]
    sums = np.stack([_law_cost(law)[:used] for law in candidates]).astype(np.float64) @ weights
    best, least = candidates[int(np.argmin(sums))], float(sums.min()) + (16 << _COST)
    table = _explicit(histogram[:used])
    cost = float(_cost(_weights(table, MAX_PARAMETERS, 0)).astype(np.float64) @ weights)
    cost += 8 * len(table) << _COST
    return (table, cost) if cost < least else (best, least)


def _explicit(histogram: Integers) -> bytes:
    """Return a table with the share of every class; the last class of the histogram occurs."""
    counts = histogram
    bits = rans.log2(counts.sum(keepdims=True)) - rans.log2(np.maximum(counts, 1))
    codes = np.minimum((bits + (1 << rans.FRACTION - 4)) >> rans.FRACTION - 3, _NEVER - 1)
    return (
        bytes([_EXPLICIT, counts.size - 1]) + np.where(counts > 0, codes, _NEVER).astype(np.uint8).tobytes()
    )


@lru_cache(1)
def _share_costs() -> NDArray[np.float64]:
    """Return bits x 2^8 of a change and of none, shape (255, 2), for shares of 1 ... 255 in 256."""
    shares = np.arange(1, 256)
    bits = (8 << rans.FRACTION) - rans.log2(np.stack([shares, 256 - shares], axis=1))
    return np.asarray((bits + (1 << rans.FRACTION - _COST - 1)) >> rans.FRACTION - _COST, np.float64)


def _plan(symbols: rans.Symbols, groups: Integers, parameters: int) -> _Plan:
    """Return the gap tables: neighbouring pieces of the row are joined as long as that saves bytes.

    Args:
        symbols: 2 x gap class + (does the sign change?), shape (k,).
        groups: non-zeros per group.
        parameters: size of the structure.
    """
    ends = _pieces(groups)
    sizes = np.diff(ends, prepend=0)
    both = np.stack(
        [np.bincount(part, minlength=2 * _CLASSES) for part in np.split(symbols, ends[:-1])]
    ).reshape(sizes.size, _CLASSES, 2)
    histograms = both.sum(axis=2)
    kinds = np.add.reduceat(both, [0, 1, _NEAR], axis=1)
    # Cost of every piece under every law and share: those of a run are the sums over its pieces.
    change_costs = kinds[:, :, ::-1].astype(np.float64) @ _share_costs().T
    # Signs are modelled in all runs or in none: the choice is made for one run.
    modelled = float(change_costs.sum(axis=0).min(axis=1).sum())
    # Raw signs pay for lanes; without them a lane may have to be paid for, gaps and magnitudes alike.
    lanes = 2 * rans.STATE_BITS * symbols.size // _LONGEST
    signs = modelled + (_SIGN_HEAD + lanes << _COST) < symbols.size << _COST
    used = int(np.flatnonzero(histograms.any(axis=0))[-1]) + 1
    law_costs = histograms[:, :used].astype(np.float64) @ _coarse()[1][:, :used].T.astype(np.float64)
    runs = _joined(law_costs, change_costs if signs else None)
    counts, laws, changes = [], [], []
    for first, last in zip(runs, [*runs[1:], sizes.size], strict=True):
        counts.append(int(sizes[first:last].sum()))
        histogram = histograms[first:last].sum(axis=0)
        law, cost = _best_law(histogram)
        if len(runs) == 1 and _cost(_implied(symbols.size, parameters)) @ histogram <= cost:
            law = _IMPLIED_LAW
        laws.append(law)
        shares = change_costs[first:last].sum(axis=0).argmin(axis=1) + 1
        changes.append(tuple(shares.tolist()) if signs else ())
    return _Plan(counts, laws, changes, signs)


def _pieces(groups: Integers) -> Integers:
    """Return ends of the pieces that runs are made of: groups, small ones joined, large ones cut."""
    total = int(groups.sum())
    least, small = max(total // MAX_RUNS, 64), max(total // _PIECES, 32)
    ends, last = [], 0
    for end in np.cumsum(groups).tolist():
        size = end - last
        if size < small and end != total:
            continue
        parts = max(size // least, 1)
        ends += [last + size * part // parts for part in range(1, parts + 1)]
        last = end
    return np.array(ends, np.int64)


def _joined(law_costs: NDArray[np.float64], change_costs: NDArray[np.float64] | None) -> list[int]:
    """Return the first piece of every run: neighbours are joined, best first, while that saves anything.

    Args:
        law_costs: bits x 2^8, shape (pieces, laws).
        change_costs: the same for shares of sign changes, shape (pieces, 3, shares).
    """
    head = (_RUN_HEAD if change_costs is None else _SIGNED_RUN_HEAD) << _COST

    def cost(laws: NDArray[np.float64], changes: NDArray[np.float64] | None) -> float:
        return float(laws.min()) + head + (0 if changes is None else float(changes.min(axis=1).sum()))

    def pair(left: int) -> float:
        both = None if changes is None else changes[left] + changes[left + 1]
        return costs[left] + costs[left + 1] - cost(laws[left] + laws[left + 1], both)

    firsts, laws = list(range(len(law_costs))), list(law_costs)
    changes = None if change_costs is None else list(change_costs)
    costs = [cost(row, None if changes is None else changes[at]) for at, row in enumerate(laws)]
    savings = [pair(left) for left in range(len(laws) - 1)]
    while savings:
        best = max(range(len(savings)), key=savings.__getitem__)
        if savings[best] <= 0 and len(firsts) <= MAX_RUNS:
            break
        costs[best : best + 2] = [costs[best] + costs[best + 1] - savings[best]]
        laws[best : best + 2] = [laws[best] + laws[best + 1]]
        if changes is not None:
            changes[best : best + 2] = [changes[best] + changes[best + 1]]
        del firsts[best + 1], savings[best]
        for left in (best - 1, best):
            if 0 <= left < len(savings):
                savings[left] = pair(left)
    return firsts


def _coded(plan: _Plan, magnitude_table: bytes | None, parameters: int, count: int) -> rans.Coded:
    """Return tables and runs of symbols: gaps, then magnitudes. Both ends."""
    tables = []
    for law, changes in zip(plan.laws, plan.changes, strict=True):
        weights = _weights(law, parameters, count)
        tables.append(rans.normalise(_with_signs(weights, changes) if plan.signs else weights))
    counts, owners = list(plan.counts), list(range(len(tables)))
    if magnitude_table is not None:
        owners.append(len(tables))
        counts.append(count)
        tables.append(rans.normalise(_weights(magnitude_table, MAX_LEVELS, 0)))
    return rans.Coded(tables, counts, owners)


def _free_lanes(symbols: int, raw_bits: int) -> int:
    """Return the lanes that raw bits pay for, as many as are of use."""
    lanes = min(-(-symbols // _ROW), raw_bits // rans.STATE_BITS, max(_LANES, -(-symbols // _LONGEST)))
    return max(lanes, 1)


# --- the decoder -------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Cursor over a stream; what is missing is refused before anything is allocated."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CodecError("sparse update: truncated")
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for place in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << place
            if byte < 0x80:
                if byte == 0 and place:
                    raise CodecError("sparse update: padded number")
                return value
        raise CodecError("sparse update: number too long")

    def floats(self, count: int) -> Vector:
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)

    def split(self, parts: int, total: int) -> list[int]:
        """Return `parts` numbers, each at least 1, `total` together; the last one is not in the stream."""
        counts = [self.varint() for _ in range(parts - 1)]
        counts.append(total - sum(counts))
        if min(counts) < 1:
            raise CodecError("sparse update: counts do not add up to the non-zeros")
        return counts

    def table(self, classes: int) -> bytes:
        """Return the bytes of a table with at most `classes` classes."""
        law = self.take(2)
        if law[0] > _EXPLICIT:
            raise CodecError(f"sparse update: unknown law {law[0]}")
        if law[0] < _EXPLICIT:
            return law
        if law[1] >= classes:
            raise IndexRangeError("sparse update: a table has more classes than there are")
        codes = self.take(law[1] + 1)
        if codes.count(_NEVER) == len(codes):
            raise CodecError("sparse update: an empty table")
        return law + codes

    def end(self) -> None:
        if self.at != len(self.data):
            raise CodecError("sparse update: trailing bytes")


def _read_plain(reader: _Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    positions = np.frombuffer(reader.take(4 * count), "<u4").astype(np.int64)
    values = reader.floats(count)
    reader.end()
    _check_positions(positions, parameters)
    return positions, values


def _read_sparse(reader: _Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    if count == 0:
        reader.end()
        return np.empty(0, np.int64), np.empty(0, np.float32)
    flags = reader.varint()
    counts, scales = _read_groups(reader, (flags >> _GROUPS_SHIFT) + 1, count)
    plan = _read_plan(reader, flags, count, parameters)
    table = reader.table(_class(MAX_LEVELS - 1) + 1) if flags & _MAGNITUDES else None
    coded = _coded(plan, table, parameters, count)
    lanes = _free_lanes(coded.symbols, count)
    if plan.signs:
        lanes = reader.varint()
        if not 0 < lanes <= coded.symbols or coded.symbols > lanes * _LONGEST:
            raise BombError(f"sparse update: {lanes} lanes for {coded.symbols} symbols")
    rest = reader.take(len(reader.data) - reader.at)
    # Symbols move at most 16 bits; classes above 15 need gaps longer than their raw bits.
    if len(rest) > 3 * lanes + 2 * coded.symbols + (5 * count + parameters) // 8 + 8:
        raise BombError(f"sparse update: {len(rest)} bytes for {count} non-zeros")
    symbols, raw = rans.decode(rest, coded, lanes)
    positions, levels = _assemble(symbols, raw, plan, lanes, parameters, several=table is not None)
    return positions, Sparse(positions, levels, counts, scales).values()


def _read_groups(reader: _Reader, groups: int, count: int) -> tuple[Integers, NDArray[np.float32]]:
    if groups > min(count, MAX_TENSORS):
        raise BombError(f"sparse update: {groups} groups for {count} non-zeros")
    counts = np.array(reader.split(groups, count), np.int64)
    halves = np.frombuffer(reader.take(2 * groups), "<u2").astype(np.uint32)
    scales = (halves << np.uint32(16)).view(np.float32)
    require_finite(scales, "scales of a sparse update")
    if (scales <= 0).any():
        raise CodecError("sparse update: a scale is not positive")
    return counts, scales


def _read_plan(reader: _Reader, flags: int, count: int, parameters: int) -> _Plan:
    signs, runs = bool(flags & _SIGNS), 1
    if flags & _SEVERAL:
        runs = reader.varint() + 2
        if flags & _IMPLIED:
            raise CodecError("sparse update: one density cannot imply several tables")
    if runs > min(MAX_RUNS, count):
        raise BombError(f"sparse update: {runs} tables for {count} non-zeros")
    counts = reader.split(runs, count)
    laws, changes = [], []
    for _ in range(runs):
        laws.append(_IMPLIED_LAW if flags & _IMPLIED else reader.table(_class(parameters - 1) + 1))
        changes.append(tuple(reader.take(3)) if signs else ())
    return _Plan(counts, laws, changes, signs)


def _assemble(
    symbols: rans.Symbols, raw: bytes, plan: _Plan, lanes: int, parameters: int, *, several: bool
) -> tuple[Integers, NDArray[np.int16]]:
    """Return positions and levels of decoded symbols and raw bits."""
    count = sum(plan.counts)
    classes = symbols[:count] >> np.uint16(plan.signs)
    positions = _edges()[classes]
    # Before the rests are read: their widths are bounded by this sum.
    if int(positions.sum()) + count > parameters:
        raise IndexRangeError("sparse update: a position lies outside the structure")
    gaps_far, gap_widths = _far(classes)
    size_far, size_widths = _far(symbols[count:])
    signs_at = int(gap_widths.sum())
    sizes_at = signs_at + (0 if plan.signs else count)
    _check_raw(raw, sizes_at + int(size_widths.sum()), lanes)
    positions[gaps_far] += rans.unpack(raw, 0, gap_widths)
    positions += 1
    np.cumsum(positions, out=positions)
    positions -= 1
    if positions[-1] >= parameters:
        raise IndexRangeError("sparse update: a position lies outside the structure")
    if plan.signs:
        negative = np.logical_xor.accumulate((symbols[:count] & np.uint16(1)).astype(np.bool_))
    else:
        bits = np.frombuffer(raw, np.uint8)[signs_at // 8 : (sizes_at + 7) // 8]
        negative = np.unpackbits(bits)[signs_at % 8 :][:count].view(np.bool_)
    levels = np.ones(count, np.int16)
    if several:
        levels += _edges()[symbols[count:]].astype(np.int16)
        levels[size_far] += rans.unpack(raw, sizes_at, size_widths).astype(np.int16)
        if levels.max() > MAX_LEVELS:
            raise CodecError(f"sparse update: a magnitude above {MAX_LEVELS}")
    np.negative(levels, out=levels, where=negative)
    return positions, levels


def _far(classes: rans.Symbols) -> tuple[Integers, Integers]:
    """Return which classes have raw bits behind them, and how many."""
    far = np.flatnonzero(classes >= _EXACT)
    return far, _widths()[classes[far]]


def _check_raw(raw: bytes, bits: int, lanes: int) -> None:
    """Refuse raw bytes that are not `bits` bits, zero padding, and at least 3 bytes per lane."""
    size = max((bits + 7) // 8, 3 * lanes)
    if len(raw) != size:
        raise CodecError("sparse update: " + ("truncated" if len(raw) < size else "trailing bytes"))
    padding = raw[bits // 8 :]
    if padding and (padding[0] & (0xFF >> bits % 8) or any(padding[1:])):
        raise CodecError("sparse update: padding that is not zero")
