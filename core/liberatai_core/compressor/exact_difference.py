"""The exact difference of two float32 vectors, short where few values changed: any values, bit for bit.

Floats are compared as integers in the order of their values, so that a small change is a small integer
(Lindstrom & Isenburg, "Fast and Efficient Compression of Floating-Point Data", IEEE TVCG 2006). Gaps between
changed places are Rice-coded (Golomb, "Run-length encodings", 1966): their low bits, then the rest in unary.
Of every change the number of its bits is deflated, and the bits below the leading one follow as they are.

    "LAD1" | parameters u64 | changed u64 | low bits u8 | bytes of three parts, u64 each | the parts
"""

import struct
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import BombError, CodecError, StructureError
from liberatai_core.structure import MAX_PARAMETERS
from liberatai_core.weights import Vector

MAGIC: Final = b"LAD1"
_HEADER: Final = struct.Struct("<4sQQBQQQ")
_MAX_LOW: Final = 28
_BLOCK: Final = 1 << 20
"""Changes that are packed at a time: 33 MiB of bits."""


def encode(before: Vector, after: Vector) -> bytes:
    """Return what `apply` needs to turn `before` into `after`.

    Args:
        before: float32, shape (parameters,).
        after: float32, of the same shape.

    Raises:
        StructureError: the lengths differ, or are too large.
    """
    old, new = _words(before), _words(after)
    if old.shape != new.shape or old.size > MAX_PARAMETERS:
        raise StructureError(f"a difference of {old.size} and {new.size} values")
    places = np.flatnonzero(old != new)
    gaps = np.diff(places, prepend=-1) - 1
    low = _low_bits(old.size, places.size)
    change = _ordered(new[places]) - _ordered(old[places])
    zigzag = ((change << 1) ^ (change >> 63)).astype(np.uint64)
    lengths = np.frexp(zigzag.astype(np.float64))[1].astype(np.uint8)
    gap_bits = _packed(gaps.astype(np.uint64), np.full(gaps.size, low, np.uint8))
    unary = np.zeros(int((gaps >> low).sum()) + gaps.size, np.uint8)
    unary[np.cumsum((gaps >> low) + 1) - 1] = 1
    highs = zlib.compress(np.packbits(unary).tobytes(), 6)
    kinds = zlib.compress(lengths.tobytes(), 6)
    rest = _packed(zigzag, np.maximum(lengths, 1) - np.uint8(1))
    parts = (struct.pack("<Q", len(gap_bits)) + gap_bits + highs, kinds, rest)
    header = _HEADER.pack(MAGIC, old.size, places.size, low, *map(len, parts))
    return header + b"".join(parts)


def apply(before: Vector, data: bytes) -> Vector:
    """Return the vector that `data` leads to from `before`.

    Raises:
        CodecError: not a difference, or cut short, or with something behind it.
        StructureError: it is of a vector of another length.
        BombError: it promises more than it can hold.
    """
    old = _words(before)
    if len(data) < _HEADER.size:
        raise CodecError("difference: cut short")
    magic, parameters, changed, low, *lengths = _HEADER.unpack_from(data)
    if magic != MAGIC or low > _MAX_LOW or sum(lengths) != len(data) - _HEADER.size:
        raise CodecError("difference: not of this codec, or cut short")
    if parameters != old.size:
        raise StructureError(f"difference of {parameters} values for a model of {old.size}")
    if changed > parameters:
        raise BombError("difference: changes more values than there are")
    first, second = _HEADER.size + lengths[0], _HEADER.size + lengths[0] + lengths[1]
    places = _places(data[_HEADER.size : first], changed, low, parameters)
    kinds = np.frombuffer(_inflated(data[first:second], changed), np.uint8)
    if kinds.size != changed or (kinds > 34).any() or (kinds < 1).any():
        raise CodecError("difference: impossible lengths of changes")
    widths = kinds - np.uint8(1)
    zigzag = _unpacked(data[second:], widths) | (np.uint64(1) << widths.astype(np.uint64))
    change = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)
    new = _ordered(old[places]) + change
    if (new > 0x7FFFFFFF).any() or (new < -0x80000000).any():
        raise CodecError("difference: leads to no float32")
    result = old.copy()
    result[places] = _unordered(new)
    return result.view(np.float32)


def _words(values: Vector) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint32)


def _ordered(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return integers in the order of the values; negative zero is -1/2 of nothing: it gets its own place."""
    whole = words.astype(np.int64)
    return np.where(whole & 0x80000000, -1 - (whole & 0x7FFFFFFF), whole)


def _unordered(ordered: NDArray[np.int64]) -> NDArray[np.uint32]:
    return np.where(ordered < 0, 0x80000000 | (-1 - ordered), ordered).astype(np.uint32)


def _low_bits(parameters: int, changed: int) -> int:
    mean = parameters / max(changed, 1)
    return min(_MAX_LOW, max(0, int(np.log2(max(mean * 0.69, 1.0)) + 0.5)))


def _packed(values: NDArray[np.uint64], widths: NDArray[np.uint8]) -> bytes:
    """Return the lowest bits of every value, so many as its width says, one after the other."""
    parts = []
    for start in range(0, values.size, _BLOCK):
        part, width = values[start : start + _BLOCK], widths[start : start + _BLOCK]
        widest = int(width.max(initial=0))
        steps = np.arange(widest - 1, -1, -1, dtype=np.uint64)
        bits = (part[:, None] >> steps[None, :] & np.uint64(1)).astype(np.uint8)
        parts.append(bits[steps[None, :] < width[:, None]])
    return np.packbits(np.concatenate(parts)).tobytes() if parts else b""


def _unpacked(data: bytes, widths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the values that `_packed` wrote.

    Raises:
        CodecError: other than so many bits.
    """
    total = int(widths.sum(dtype=np.int64))
    if len(data) != (total + 7) // 8:
        raise CodecError("difference: other than the bits that it announces")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total)
    values = np.zeros(widths.size, np.uint64)
    place = 0
    for start in range(0, widths.size, _BLOCK):
        width = widths[start : start + _BLOCK]
        widest, taken = int(width.max(initial=0)), int(width.sum(dtype=np.int64))
        steps = np.arange(widest - 1, -1, -1, dtype=np.uint64)
        mask = steps[None, :] < width[:, None]
        table = np.zeros(mask.shape, np.uint64)
        table[mask] = bits[place : place + taken]
        values[start : start + _BLOCK] = (table << steps[None, :]).sum(axis=1, dtype=np.uint64)
        place += taken
    return values


def _places(part: bytes, changed: int, low: int, parameters: int) -> NDArray[np.int64]:
    if len(part) < 8:
        raise CodecError("difference: cut short")
    (length,) = struct.unpack_from("<Q", part)
    lows = _unpacked(part[8 : 8 + length], np.full(changed, low, np.uint8)).astype(np.int64)
    # Never more bits than gaps of this total length can need.
    most = changed + (parameters >> low) + 8
    bits = np.unpackbits(np.frombuffer(_inflated(part[8 + length :], most // 8 + 1), np.uint8))
    ends = np.flatnonzero(bits)
    if ends.size != changed:
        raise CodecError("difference: other than the places that it announces")
    highs = np.diff(ends, prepend=-1) - 1
    places = np.cumsum((highs << low) + lows + 1) - 1
    if changed and not 0 <= int(places[-1]) < parameters:
        raise CodecError("difference: a place outside the model")
    return places.astype(np.int64)


def _inflated(data: bytes, most: int) -> bytes:
    """Return what was deflated, at most so many bytes.

    Raises:
        CodecError, BombError: it was not, or is longer.
    """
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, most + 1)
    except zlib.error:
        raise CodecError("difference: damaged") from None
    if len(found) > most:
        raise BombError("difference: promises more than it can hold")
    if not inflater.eof or inflater.unused_data:
        raise CodecError("difference: cut short, or something follows")
    return found
