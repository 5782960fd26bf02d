"""Bytes of a sparse difference, both ends.

Positions are Golomb-coded gaps (Golomb 1966; sparse ternary updates: Sattler et al., arXiv 1903.02891),
signs are packed bits, and magnitudes 1 … L are L - 1 further subsets ("who among the survivors is larger
than j") in the same code. Quotients, remainders and extra bits lie in separate runs, so both ends are
numpy operations on whole arrays. Decoding is integer arithmetic and one exact float32 multiplication
(8-bit scale times at most 8-bit level), so it gives the same bits on every machine.

Stream, codec 1 ("Golomb")::

    u8 1 | varint parameters | varint non-zeros k | nothing more if k = 0
    varint L | varint groups | per group: varint non-zeros, u16 scale (upper half of a float32)
    plane 0: subset of the parameters; planes 1 … L-1: varint members, subset of the plane before
       subset head, absent if empty or full: varint (divisor << 1 | inverted), varint quotient sum;
       divisor 0: a bitmap, no quotient sum; inverted: the gaps are those of the complement
    bits: planes in order, signs (1 = negative), zero padding to a byte

Stream, codec 2 ("plain", the baseline)::

    u8 2 | varint parameters | varint k | k x u32 positions | k x f32 values

All integers are little-endian; a varint has 7 bits per byte, low bits first, at most 5 bytes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import (
    BombError,
    CodecError,
    IndexOrderError,
    IndexRangeError,
)
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS
from liberatai_core.weights import Vector, require_finite

Integers = NDArray[np.int64]
Bits = NDArray[np.uint8]
"""One bit per element, 0 or 1."""

GOLOMB = 1
PLAIN = 2
MAX_LEVELS = 255
"""8-bit magnitude times 8-bit scale has at most 16 significant bits: exact in float32."""
_SAMPLE = 1 << 16
"""Gaps looked at when the divisor is chosen: enough for 0.1 % of the size, bounded time."""


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

    Raises:
        IndexRangeError: a position is not in [0, parameters).
        IndexOrderError: positions are unsorted or doubled.
        NonFiniteError: a scale is NaN or infinite.
        CodecError: levels, counts or scales are not as `Sparse` says.
    """
    _check_positions(sparse.positions, parameters)
    count = sparse.positions.size
    head = [bytes([GOLOMB]), _varint(parameters), _varint(count)]
    if count == 0:
        return b"".join(head)
    magnitudes = np.abs(sparse.levels.astype(np.int64))
    _check_values(sparse, magnitudes)
    top = int(magnitudes.max())
    head += [_varint(top), _varint(sparse.counts.size)]
    halves = (sparse.scales.view(np.uint32) >> np.uint32(16)).tolist()
    head += [
        _varint(number) + half.to_bytes(2, "little")
        for number, half in zip(sparse.counts.tolist(), halves, strict=True)
    ]
    plane_head, bits = _write_subset(sparse.positions, parameters)
    head.append(plane_head)
    for level in range(1, top):
        larger = np.flatnonzero(magnitudes > level)
        plane_head, plane_bits = _write_subset(larger, magnitudes.size)
        head += [_varint(larger.size), plane_head]
        bits += plane_bits
        magnitudes = magnitudes[larger]
    bits.append((sparse.levels < 0).astype(np.uint8))
    return b"".join(head) + np.packbits(np.concatenate(bits)).tobytes()


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


def decode(data: bytes, parameters: int) -> tuple[Integers, Vector]:
    """Return positions (int64, strictly increasing) and values (float32) of a stream from anywhere.

    Memory stays below about 40 bytes per parameter and 8 per byte of data, whatever the stream says.

    Raises:
        CodecError: unknown codec, another parameter count, truncated, trailing or nonsensical bytes.
        BombError: more non-zeros, groups or bytes than the structure can hold.
        IndexRangeError: a position is not in [0, parameters).
        IndexOrderError: positions are unsorted or doubled.
        NonFiniteError: a scale or a value is NaN or infinite.
    """
    reader = _Reader(data)
    codec = reader.byte()
    if codec not in (GOLOMB, PLAIN):
        raise CodecError(f"sparse update: unknown codec {codec}")
    claimed = reader.varint()
    if claimed != parameters:
        raise CodecError(f"sparse update: made for {claimed} parameters, wanted {parameters}")
    count = reader.varint()
    if count > parameters:
        raise BombError(f"sparse update: {count} non-zeros among {parameters} parameters")
    positions, values = (_read_plain if codec == PLAIN else _read_golomb)(reader, count, parameters)
    require_finite(values, "sparse update")
    return positions, values


def _check_positions(positions: Integers, parameters: int) -> None:
    if not 0 < parameters <= MAX_PARAMETERS:
        raise CodecError(f"sparse update over {parameters} parameters, at most {MAX_PARAMETERS}")
    if positions.size and (positions.min() < 0 or positions.max() >= parameters):
        raise IndexRangeError(f"sparse update: a position lies outside 0 … {parameters - 1}")
    if (np.diff(positions) <= 0).any():
        raise IndexOrderError("sparse update: positions are unsorted or doubled")


def _check_values(sparse: Sparse, magnitudes: Integers) -> None:
    if magnitudes.shape != sparse.positions.shape or magnitudes.min() < 1 or magnitudes.max() > MAX_LEVELS:
        raise CodecError(f"sparse update: levels must be 1 … {MAX_LEVELS} in magnitude, one per position")
    if sparse.counts.shape != sparse.scales.shape or sparse.counts.size > MAX_TENSORS:
        raise CodecError(f"sparse update: one scale per group and at most {MAX_TENSORS} groups")
    if sparse.counts.min() < 1 or sparse.counts.sum() != magnitudes.size:
        raise CodecError("sparse update: group counts do not add up to the non-zeros")
    require_finite(sparse.scales, "scales")
    if (sparse.scales <= 0).any() or (sparse.scales.view(np.uint32) & np.uint32(0xFFFF)).any():
        raise CodecError("sparse update: scales must be positive with 8 significant bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Cursor over the head of a stream, then over the bits behind it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.bits: Bits = np.empty(0, np.uint8)

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

    def end(self) -> None:
        if self.at != len(self.data):
            raise CodecError("sparse update: trailing bytes")

    def open_bits(self, limit: int) -> None:
        """Turn all bytes that are left into bits; no stream of the encoder has more than `limit`."""
        rest = len(self.data) - self.at
        if rest * 8 > limit + 7:
            raise BombError(f"sparse update: {rest} bytes where {limit} bits are possible")
        self.bits = np.unpackbits(np.frombuffer(self.take(rest), np.uint8))
        self.at = 0

    def take_bits(self, size: int) -> Bits:
        if size > self.bits.size - self.at:
            raise CodecError("sparse update: truncated bits")
        self.at += size
        return self.bits[self.at - size : self.at]

    def end_bits(self) -> None:
        rest = self.bits[self.at :]
        if rest.size > 7 or rest.any():
            raise CodecError("sparse update: trailing bytes or padding that is not zero")


@dataclass(frozen=True)
class _Plane:
    """Head of one subset: `count` of `universe`; divisor None: empty or full, 0: bitmap."""

    count: int
    universe: int
    divisor: int | None
    inverted: bool
    quotients: int


def _read_plain(reader: _Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    positions = np.frombuffer(reader.take(4 * count), "<u4").astype(np.int64)
    values = np.frombuffer(reader.take(4 * count), "<f4").astype(np.float32)
    reader.end()
    _check_positions(positions, parameters)
    return positions, values


def _read_golomb(reader: _Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    if count == 0:
        reader.end()
        return np.empty(0, np.int64), np.empty(0, np.float32)
    top = reader.varint()
    if not 1 <= top <= MAX_LEVELS:
        raise CodecError(f"sparse update: {top} levels, at most {MAX_LEVELS}")
    counts, scales = _read_groups(reader, count)
    planes = [_read_head(reader, count, parameters)]
    for _ in range(1, top):
        members, universe = reader.varint(), planes[-1].count
        if not 1 <= members <= universe:
            raise CodecError(f"sparse update: {members} of {universe} survivors have a larger magnitude")
        planes.append(_read_head(reader, members, universe))
    reader.open_bits(sum(plane.universe for plane in planes) + count)
    positions = _read_subset(reader, planes[0])
    magnitudes = np.ones(count, np.int16)
    alive = np.arange(count)
    for plane in planes[1:]:
        alive = alive[_read_subset(reader, plane)]
        magnitudes[alive] += 1
    negative = reader.take_bits(count)
    reader.end_bits()
    levels = np.where(negative, -magnitudes, magnitudes)
    return positions, Sparse(positions, levels, counts, scales).values()


def _read_groups(reader: _Reader, count: int) -> tuple[Integers, NDArray[np.float32]]:
    groups = reader.varint()
    if groups > min(count, MAX_TENSORS):
        raise BombError(f"sparse update: {groups} groups for {count} non-zeros")
    pairs = [(reader.varint(), int.from_bytes(reader.take(2), "little")) for _ in range(groups)]
    counts = np.array([number for number, _ in pairs], np.int64)
    if groups == 0 or counts.min() < 1 or counts.sum() != count:
        raise CodecError("sparse update: group counts do not add up to the non-zeros")
    scales = (np.array([half for _, half in pairs], np.uint32) << np.uint32(16)).view(np.float32)
    require_finite(scales, "scales of a sparse update")
    if (scales <= 0).any():
        raise CodecError("sparse update: a scale is not positive")
    return counts, scales


def _remainder_code(divisor: int) -> tuple[int, int]:
    """Return (bits of every remainder, values from which one more bit follows): truncated binary."""
    width = (divisor - 1).bit_length()
    return max(width - 1, 0), (1 << width) - divisor


def _golomb_bits(gaps: Integers, divisor: int) -> int:
    width, spare = _remainder_code(divisor)
    quotients = gaps // divisor
    extra = np.count_nonzero(gaps - quotients * divisor >= spare) if divisor > 1 else 0
    return int(quotients.sum()) + gaps.size * (1 + width) + int(extra)


def _best_divisor(gaps: Integers) -> int:
    sample = gaps[:: max(1, gaps.size // _SAMPLE)]
    # The optimum for a geometric law, and its surroundings for positions that lie in clusters.
    centre, top = float(sample.mean()) * math.log(2) + 0.5, max(1, int(gaps.max()))
    candidates = {
        min(top, max(1, round(centre * factor)))
        for factor in (0.12, 0.25, 0.4, 0.6, 0.8, 0.9, 1, 1.1, 1.25, 1.6)
    }
    costs = [(_golomb_bits(sample, divisor), divisor) for divisor in candidates]
    return min(costs)[1]


def _write_subset(members: Integers, universe: int) -> tuple[bytes, list[Bits]]:
    """Return head and bits of a subset of range(universe), given by its sorted members."""
    if members.size in (0, universe):
        return b"", []
    inverted = members.size * 2 > universe
    bitmap = np.zeros(universe, np.uint8) if members.size * 8 > universe else None
    rare = members
    if bitmap is not None:
        bitmap[members] = 1
        rare = np.flatnonzero(bitmap == 0) if inverted else members
    gaps = np.diff(rare, prepend=-1) - 1
    divisor = _best_divisor(gaps)
    if bitmap is not None and _golomb_bits(gaps, divisor) + 24 >= universe:
        return _varint(0), [bitmap]
    quotients = gaps // divisor
    remainders = gaps - quotients * divisor
    total = int(quotients.sum())
    unary = np.zeros(total + gaps.size, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    bits = [unary]
    if divisor > 1:
        width, spare = _remainder_code(divisor)
        long = remainders >= spare
        shifted = remainders + spare
        bits += [
            _to_bits(np.where(long, shifted >> 1, remainders), width),
            (shifted[long] & 1).astype(np.uint8),
        ]
    return _varint(divisor << 1 | inverted) + _varint(total), bits


def _read_head(reader: _Reader, count: int, universe: int) -> _Plane:
    if count in (0, universe):
        return _Plane(count, universe, None, inverted=False, quotients=0)
    word = reader.varint()
    divisor, inverted = word >> 1, bool(word & 1)
    if divisor == 0:
        if inverted:
            raise CodecError("sparse update: unknown subset code")
        return _Plane(count, universe, 0, inverted=False, quotients=0)
    quotients = reader.varint()
    if divisor > universe or quotients * divisor > universe:
        raise IndexRangeError("sparse update: a gap leads outside the structure")
    return _Plane(count, universe, divisor, inverted=inverted, quotients=quotients)


def _read_subset(reader: _Reader, plane: _Plane) -> Integers:
    if plane.divisor is None:
        return np.arange(plane.count)
    if plane.divisor == 0:
        members = np.flatnonzero(reader.take_bits(plane.universe))
        if members.size != plane.count:
            raise CodecError("sparse update: bitmap and count differ")
        return members
    number = plane.universe - plane.count if plane.inverted else plane.count
    unary = reader.take_bits(number + plane.quotients)
    ends = np.flatnonzero(unary)
    if ends.size != number or not unary[-1]:
        raise CodecError("sparse update: quotients and count differ")
    gaps = (np.diff(ends, prepend=-1) - 1) * plane.divisor
    if plane.divisor > 1:
        width, spare = _remainder_code(plane.divisor)
        remainders = _from_bits(reader.take_bits(number * width), width, number)
        long = remainders >= spare
        extra = reader.take_bits(int(np.count_nonzero(long)))
        remainders[long] = 2 * remainders[long] + extra - spare
        gaps += remainders
    rare = np.cumsum(gaps + 1) - 1
    if rare[-1] >= plane.universe:
        raise IndexRangeError("sparse update: a position lies outside the structure")
    if not plane.inverted:
        return rare
    bitmap = np.ones(plane.universe, np.bool_)
    bitmap[rare] = False
    return np.flatnonzero(bitmap)


def _to_bits(values: Integers, width: int) -> Bits:
    """Return `width` bits per value, high bit first."""
    bits = np.empty((values.size, width), np.uint8)
    for place in range(width):
        bits[:, place] = values >> (width - 1 - place) & 1
    return bits.ravel()


def _from_bits(bits: Bits, width: int, number: int) -> Integers:
    """Undo `_to_bits` for `number` values."""
    values = np.zeros(number, np.int64)
    for column in bits.reshape(number, width).T:
        values <<= 1
        values |= column
    return values
