"""File of a compressed model, both ends.

Indices of all tensors form one stream, entropy-coded by interleaved rANS (Duda, arXiv 1311.2540; Giesen,
arXiv 1402.3392) with one frequency table per tensor. Lanes are numpy elements, so a device decodes a
million weights in some ten milliseconds without compiled code of our own. All arithmetic is integer but
one float32 multiplication per table entry or weight: the same bits on every machine, which the digest
in the file proves.

File::

    "LAM1" | 32 B digest of the decoded weights | varint parameters | varint tensors | one record per tensor
    raw bits of all grids, high bit first, tensors in order, zero padding to a byte
    nothing more if no tensor has a frequency table, else
    varint lanes | varint words | lanes x u32 state | words x u16

Records: u8 kind, then
    0 constant  f32 value
    1 half      size x f16
    2 full      size x f32
    3 grid      f32 step | varint zigzag(lowest level) | u8 raw bits b | table
                value = step x (lowest level + (symbol << b | raw bits))
    4 codebook  f32 scale | table | K x f16 entries
                value = scale x entry[symbol]
    table: varint K (1 … 256) | K - 1 varint frequencies; the last is 4096 minus their sum
           (K = 1: nothing is entropy-coded)
    5 drawn     f32 step | varint reach | u32 seed
                value = step x level, levels uniform in [-reach, reach], drawn by `levels_of`

All integers are little-endian; a varint has 7 bits per byte, low bits first, at most 5 bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import BombError, CodecError, DigestError, TooLargeError
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector, digest, require_finite

Integers = NDArray[np.int64]
Bits = NDArray[np.uint8]

MAGIC = b"LAM1"
CONSTANT, HALF, FULL, GRID, CODEBOOK, DRAWN = range(6)
SCALE_BITS = 12
TOTAL = 1 << SCALE_BITS
"""Frequencies add up to this: 0.1 % above the entropy, and a lookup table of 4 KiB per tensor."""
MAX_SYMBOLS = 256
MAX_RAW_BITS = 16
MAX_LEVEL = 1 << 24
"""Levels are exact in float32."""
MAX_REACH = 1 << 15
"""Of drawn levels: 2 x reach + 1 times a 32-bit draw stays below 2^64."""
_LOW = 1 << 16
"""rANS states lie in [2^16, 2^32) and move 16 bits at a time."""
_ROWS = 4096
"""Most symbols per lane: bounds the time of the decoder's loop, about 25 us per row of lanes."""
_LANE_BITS = 3200
"""Payload bits per lane: the 16 bits that a lane costs are 0.5 %."""
_DIGEST = 32


def _no_integers() -> Integers:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Coding:
    """How one tensor is written.

    Attributes:
        kind: CONSTANT, HALF, FULL, GRID, CODEBOOK or DRAWN.
        scale: the constant, the step of the grid, or what the codebook is multiplied with.
        values: HALF and FULL: the weights, float16 or float32.
        low: GRID: level of index 0.
        raw_bits: GRID: low bits of every index that are stored as they are.
        entries: CODEBOOK: float16, one per symbol.
        frequencies: int64, one per symbol, TOTAL together; one entry if nothing is entropy-coded.
        indices: unsigned or int64, one per weight; the symbol is index >> raw_bits.
        reach, seed: DRAWN: largest level, and the key of the draw.
    """

    kind: int
    scale: np.float32 = field(default_factory=lambda: np.float32(0))
    values: NDArray[np.float16] | Vector | None = None
    low: int = 0
    raw_bits: int = 0
    entries: NDArray[np.float16] | None = None
    frequencies: Integers = field(default_factory=_no_integers)
    indices: NDArray[np.integer] = field(default_factory=_no_integers)
    reach: int = 0
    seed: int = 0

    def weights(self, size: int) -> Vector:
        """Return the `size` float32 weights that this coding decodes to."""
        if self.kind == CONSTANT:
            return np.full(size, self.scale, np.float32)
        if self.values is not None:
            return self.values.astype(np.float32)
        if self.kind == DRAWN:
            return levels_of(self.seed, self.reach, size).astype(np.float32) * self.scale
        with np.errstate(over="ignore", invalid="ignore"):
            if self.entries is not None:
                return np.asarray((self.entries.astype(np.float32) * self.scale)[self.indices], np.float32)
            if self.raw_bits == 0:
                levels = np.arange(self.low, self.low + self.frequencies.size)
                return np.asarray((levels.astype(np.float32) * self.scale)[self.indices], np.float32)
            return (self.indices + self.low).astype(np.float32) * self.scale


def levels_of(seed: int, reach: int, size: int) -> Integers:
    """Return `size` integers, uniform in [-reach, reach]: the same ones on every machine.

    Raw output of Philox (Salmon et al., SC 2011), which numpy keeps stable, and integer arithmetic.
    """
    draws = np.random.Philox(key=seed).random_raw(size) >> np.uint64(32)
    return (draws * np.uint64(2 * reach + 1) >> np.uint64(32)).astype(np.int64) - reach


def header_bytes(structure: Structure) -> int:
    """Return the bytes of a file before its records."""
    return len(MAGIC) + _DIGEST + len(_varint(structure.parameters)) + len(_varint(len(structure.tensors)))


def record(coding: Coding) -> bytes:
    """Return the record of one tensor, without its indices."""
    scale = _le(coding.scale)
    kind = bytes([coding.kind])
    if coding.kind == CONSTANT:
        return kind + scale
    if coding.values is not None:
        return kind + _le(coding.values)
    if coding.kind == DRAWN:
        return kind + scale + _varint(coding.reach) + coding.seed.to_bytes(4, "little")
    numbers = coding.frequencies.tolist()
    table = _varint(len(numbers)) + b"".join(map(_varint, numbers[:-1]))
    if coding.entries is not None:
        return kind + scale + table + _le(coding.entries)
    zigzag = coding.low * 2 if coding.low >= 0 else -coding.low * 2 - 1
    return kind + scale + _varint(zigzag) + bytes([coding.raw_bits]) + table


def coded_bytes(bits: float, symbols: int) -> int:
    """Return the size of the entropy-coded section, to about 0.1 %: `bits` of information in `symbols`."""
    if symbols == 0:
        return 0
    lanes = _lanes(bits, symbols)
    # A final state holds 16 … 32 bits, 24 on average, of which 16 were there at the start.
    words = max(0, math.ceil(bits / 16 - lanes / 2))
    return 4 * lanes + 2 * words + len(_varint(lanes)) + len(_varint(words))


def write(codings: Sequence[Coding], structure: Structure) -> bytes:
    """Return the file; `codings` has one entry per tensor, in order."""
    sizes = [tensor.size for tensor in structure.tensors]
    weights = np.concatenate([coding.weights(size) for coding, size in zip(codings, sizes, strict=True)])
    require_finite(weights, "decoded weights")
    raw = [
        _to_bits(coding.indices.astype(np.int64), coding.raw_bits) for coding in codings if coding.raw_bits
    ]
    parts = [
        MAGIC,
        digest(weights),
        _varint(structure.parameters),
        _varint(len(sizes)),
        *map(record, codings),
    ]
    if raw:
        parts.append(np.packbits(np.concatenate(raw)).tobytes())
    coded = [coding for coding in codings if coding.frequencies.size > 1]
    if coded:
        parts.append(_write_symbols(coded))
    return b"".join(parts)


def restore(artifact: bytes, structure: Structure) -> Vector:
    """Return the weights in a file from anywhere, float32, shape (parameters,).

    Memory stays below 48 bytes per parameter (16 for files without raw bits) and 8 KiB per tensor,
    whatever the file says.

    Raises:
        CodecError: not such a file, of another structure, truncated, trailing or nonsensical bytes.
        TooLargeError: longer than any file of this structure.
        BombError: it promises more than the structure holds.
        NonFiniteError: a weight is NaN or infinite.
        DigestError: the weights are not the ones that were compressed.
    """
    limit = header_bytes(structure) + 5 * structure.parameters + 1100 * len(structure.tensors) + 64
    if len(artifact) > limit:
        raise TooLargeError(f"model file: {len(artifact)} bytes, at most {limit} for {structure.id}")
    reader = _Reader(artifact)
    if reader.take(len(MAGIC)) != MAGIC:
        raise CodecError("model file: wrong magic or version")
    wanted = reader.take(_DIGEST)
    parameters, tensors = reader.varint(), reader.varint()
    if parameters != structure.parameters or tensors != len(structure.tensors):
        raise CodecError(f"model file: {parameters} parameters in {tensors} tensors are not {structure.id}")
    sizes = [tensor.size for tensor in structure.tensors]
    codings = [_read_record(reader, size) for size in sizes]
    raw = _read_raw(reader, codings, sizes)
    tables = [
        (coding.frequencies, size)
        for coding, size in zip(codings, sizes, strict=True)
        if coding.frequencies.size > 1
    ]
    symbols = iter(_decode(reader, tables) if tables else ())
    reader.end()
    weights = np.empty(parameters, np.float32)
    at = 0
    for coding, (tensor, place) in zip(codings, structure.slices(), strict=True):
        filled = coding
        if coding.kind in (GRID, CODEBOOK):
            indices: NDArray[np.integer] = np.zeros(tensor.size, np.uint8)
            if coding.frequencies.size > 1:
                indices = next(symbols)
            if coding.raw_bits:
                low = _read_bits(raw, at, coding.raw_bits, tensor.size)
                indices = indices.astype(np.int64) << coding.raw_bits | low
                at += coding.raw_bits * tensor.size
            filled = replace(coding, indices=indices)
        weights[place] = filled.weights(tensor.size)
    require_finite(weights, "model file")
    if digest(weights) != wanted:
        raise DigestError("model file: the decoded weights do not have the digest in the file")
    return weights


def normalise(counts: Integers) -> Integers:
    """Return frequencies that add up to TOTAL, at least 1 for every symbol that occurs, 0 for others."""
    used = counts > 0
    if np.count_nonzero(used) == 1:
        return np.where(used, TOTAL, 0)
    exact = counts * (TOTAL / counts.sum())
    frequencies = np.where(used, np.maximum(np.rint(exact).astype(np.int64), 1), 0)
    # Repair the rounding where it costs least: at the largest frequencies.
    while (excess := int(frequencies.sum()) - TOTAL) != 0:
        largest = int(np.argmax(frequencies))
        step = min(excess, max(1, int(frequencies[largest]) // 8)) if excess > 0 else excess
        frequencies[largest] -= step
    return frequencies


def _le(values: np.generic | NDArray[np.floating]) -> bytes:
    """Return little-endian bytes in the width of the values."""
    return bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """Cursor over the file; what is missing is refused before anything is allocated."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CodecError("model file: truncated")
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        value = 0
        for place in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << place
            if byte < 0x80:
                if byte == 0 and place:
                    raise CodecError("model file: padded number")
                return value
        raise CodecError("model file: number too long")

    def float32(self) -> np.float32:
        value = np.frombuffer(self.take(4), "<f4").astype(np.float32)
        require_finite(value, "model file: scale")
        return np.float32(value[0])

    def end(self) -> None:
        if self.at != len(self.data):
            raise CodecError("model file: trailing bytes")


def _read_record(reader: _Reader, size: int) -> Coding:
    kind = reader.take(1)[0]
    if kind == CONSTANT:
        return Coding(kind, reader.float32())
    if kind == HALF:
        return Coding(kind, values=np.frombuffer(reader.take(2 * size), "<f2").astype(np.float16))
    if kind == FULL:
        return Coding(kind, values=np.frombuffer(reader.take(4 * size), "<f4").astype(np.float32))
    if kind == DRAWN:
        return _read_drawn(reader)
    if kind not in (GRID, CODEBOOK):
        raise CodecError(f"model file: unknown kind {kind} of record")
    scale = reader.float32()
    if kind == CODEBOOK:
        table = _read_table(reader)
        entries = np.frombuffer(reader.take(2 * table.size), "<f2").astype(np.float16)
        return Coding(kind, scale, entries=entries, frequencies=table)
    zigzag, raw_bits = reader.varint(), reader.take(1)[0]
    low = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag + 1 >> 1)
    if raw_bits > MAX_RAW_BITS or abs(low) > MAX_LEVEL:
        raise CodecError(f"model file: {raw_bits} raw bits from level {low}")
    return Coding(kind, scale, low=low, raw_bits=raw_bits, frequencies=_read_table(reader))


def _read_drawn(reader: _Reader) -> Coding:
    step, reach, seed = reader.float32(), reader.varint(), int.from_bytes(reader.take(4), "little")
    if reach > MAX_REACH:
        raise CodecError(f"model file: drawn levels up to {reach}, at most {MAX_REACH}")
    return Coding(DRAWN, step, reach=reach, seed=seed)


def _read_table(reader: _Reader) -> Integers:
    symbols = reader.varint()
    if not 1 <= symbols <= MAX_SYMBOLS:
        raise CodecError(f"model file: {symbols} symbols, at most {MAX_SYMBOLS}")
    table = np.array([reader.varint() for _ in range(symbols - 1)], np.int64)
    last = TOTAL - int(table.sum())
    table = np.append(table, last)
    # A symbol that is certain needs no table; with one, its frequency would overflow the coder.
    if last < 0 or (symbols > 1 and table.max() >= TOTAL):
        raise CodecError("model file: frequencies do not add up")
    return table


def _read_raw(reader: _Reader, codings: list[Coding], sizes: list[int]) -> Bits:
    """Return the bytes of the raw bits of all grids."""
    total = sum(coding.raw_bits * size for coding, size in zip(codings, sizes, strict=True))
    packed = np.frombuffer(reader.take((total + 7) // 8), np.uint8)
    if total % 8 and packed[-1] & (0xFF >> total % 8):
        raise CodecError("model file: padding that is not zero")
    return packed


def _read_bits(packed: Bits, at: int, width: int, size: int) -> Integers:
    """Return `size` numbers of `width` bits from bit `at` on; unpacks no more than these."""
    stop = at + width * size
    bits = np.unpackbits(packed[at // 8 : (stop + 7) // 8])[at % 8 :][: width * size]
    values = np.zeros(size, np.int64)
    for column in bits.reshape(size, width).T:
        values <<= 1
        values |= column
    return values


def _lanes(bits: float, symbols: int) -> int:
    return min(symbols, max(int(bits) // _LANE_BITS, -(-symbols // _ROWS), 1))


def _rows(lanes: int, symbols: int) -> list[slice]:
    return [slice(start, min(start + lanes, symbols)) for start in range(0, symbols, lanes)]


def _write_symbols(coded: list[Coding]) -> bytes:
    frequency, start = [], []
    for coding in coded:
        symbols = coding.indices >> coding.raw_bits
        frequency.append(coding.frequencies[symbols].astype(np.uint32))
        start.append((np.cumsum(coding.frequencies) - coding.frequencies)[symbols].astype(np.uint32))
    frequencies, starts = np.concatenate(frequency), np.concatenate(start)
    bits = float((SCALE_BITS - np.log2(frequencies)).sum())
    lanes = _lanes(bits, frequencies.size)
    state = np.full(lanes, _LOW, np.uint32)
    words = []
    for row in reversed(_rows(lanes, frequencies.size)):
        width, first = frequencies[row], starts[row]
        now = state[: width.size]
        full = now >= width << np.uint32(32 - SCALE_BITS)
        words.append(now[full].astype(np.uint16))
        now = np.where(full, now >> np.uint32(16), now)
        quotient = now // width
        state[: width.size] = (quotient << np.uint32(SCALE_BITS)) + (now - quotient * width) + first
    stream = np.concatenate(words[::-1]).astype("<u2")
    return _varint(lanes) + _varint(stream.size) + state.astype("<u4").tobytes() + stream.tobytes()


def _decode(reader: _Reader, tables: list[tuple[Integers, int]]) -> list[NDArray[np.uint8]]:
    """Undo `_write_symbols`: one uint8 array of symbols per (frequencies, size)."""
    sizes = [size for _, size in tables]
    total = sum(sizes)
    lanes, count = reader.varint(), reader.varint()
    if not 0 < lanes <= total:
        raise BombError(f"model file: {lanes} lanes for {total} symbols")
    if total > lanes * _ROWS:
        raise CodecError(f"model file: only {lanes} lanes for {total} symbols")
    state = np.frombuffer(reader.take(4 * lanes), "<u4").astype(np.uint32)
    words = np.frombuffer(reader.take(2 * count), "<u2").astype(np.uint32)
    if (state < _LOW).any():
        raise CodecError("model file: impossible state of the entropy coder")
    # One lookup from (table, slot) to the symbol, one from (table, symbol) to frequency and start.
    slots = np.concatenate([np.repeat(np.arange(f.size, dtype=np.uint8), f) for f, _ in tables])
    frequency = np.zeros(len(tables) * MAX_SYMBOLS, np.uint32)
    start = np.zeros(len(tables) * MAX_SYMBOLS, np.uint32)
    for number, (table, _) in enumerate(tables):
        frequency[number * MAX_SYMBOLS :][: table.size] = table
        start[number * MAX_SYMBOLS :][: table.size] = np.cumsum(table) - table
    owner = np.repeat(np.arange(len(tables), dtype=np.uint16), sizes)
    symbols = np.empty(total, np.uint8)
    mask, scale_bits, low = np.uint32(TOTAL - 1), np.uint32(SCALE_BITS), np.uint32(_LOW)
    at = 0
    for row in _rows(lanes, total):
        table_of = owner[row].astype(np.uint32)
        now = state[: table_of.size]
        slot = now & mask
        symbol = slots[(table_of << scale_bits) + slot]
        symbols[row] = symbol
        entry = (table_of << np.uint32(8)) + symbol
        now = frequency[entry] * (now >> scale_bits) + slot - start[entry]
        empty = np.flatnonzero(now < low)
        if empty.size > words.size - at:
            raise CodecError("model file: the entropy-coded part is truncated")
        now[empty] = now[empty] << np.uint32(16) | words[at : at + empty.size]
        at += empty.size
        state[: table_of.size] = now
    if at != words.size or (state != low).any():
        raise CodecError("model file: the entropy-coded part does not end where it should")
    return np.split(symbols, np.cumsum(sizes)[:-1])


def _to_bits(values: Integers, width: int) -> Bits:
    """Return the `width` low bits of each value, high bit first."""
    bits = np.empty((values.size, width), np.uint8)
    for place in range(width):
        bits[:, place] = values >> (width - 1 - place) & 1
    return bits.ravel()
