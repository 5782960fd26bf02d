"""Record of one tensor in a model file: what it is, and how its indices are stored.

The index of a quantised tensor is taken apart so that little of it has to be modelled: where the levels lie
around zero (`centre`), only the distance from it is entropy-coded and the sign is a raw bit, which also pays
for a lane of the coder (`rans`). Distances on a grid fall into classes, exact below 16, then eight to the
octave; the rest of the distance is raw bits as well: noise in fine grids, and few weights in coarse ones.

Strongly compressed networks have rows and columns that are almost empty. A tensor may therefore have several
tables: every entry of its first axis, of its second and of all others together has a class of up to three
bits, and the table of a weight is numbered by the sum of its three classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.cursor import Cursor, varint
from liberatai_core.errors import BombError, CodecError
from liberatai_core.weights import Vector, require_finite

Integers = NDArray[np.int64]
Indices = NDArray[np.integer]
Bytes = NDArray[np.uint8]

CONSTANT, HALF, FULL, GRID, CODEBOOK, DRAWN = range(6)
MAX_ENTRIES = 256
"""Of a codebook."""
MAX_RAW_BITS = 16
MAX_LEVEL = 1 << 24
"""Levels are exact in float32."""
MAX_REACH = 1 << 15
"""Of drawn levels: 2 x reach + 1 times a 32-bit draw stays below 2^64."""
_PORTION = 1 << 15
"""Weights that are drawn at a time."""
FINELY_CLASSED = 1 << 16
"""Weights of a tensor from which it may have many tables."""
FEW_TABLES, MANY_TABLES = 10, 18
"""Of a tensor: two bits per axis; three bits for two axes of a large one. More would cost more than they
save, and a decoder spends time on each of them."""
_CENTRED, _CONTEXTS, _CHANNELS = 32, 64, 128
_NEVER, _ABSENT = 255, 254
"""Codes of a symbol that does not occur, and of a table that no weight uses."""
_OCTAVE = (128, 140, 152, 166, 181, 197, 215, 235)
"""2^(i / 8) with 8 significant bits: products with entries of codebooks stay short."""
_EXACT = 16
"""Distances on a grid below this are classes of their own."""
_TABLED = 1 << 16
"""Grids with up to so many levels are looked up, finer ones multiplied."""


@lru_cache(1)
def channel_scales() -> Vector:
    """Return the factors of the exponents 0 … 255: 1 down to 2^-32 in eighths of an octave."""
    exponents = -np.arange(256)
    mantissas = np.array(_OCTAVE, np.float32)[exponents % 8]
    return np.ldexp(mantissas, exponents // 8 - 7).astype(np.float32)


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
        levels: GRID: number of levels.
        raw_bits: GRID: 0, or the width of indices that are stored as they are: nothing is entropy-coded.
        entries: CODEBOOK: float16, one per level.
        centre: index from which distances are counted, its value being zero as a rule; None: from index 0.
        indices: GRID and CODEBOOK: unsigned or int64, one per weight.
        channels: GRID and CODEBOOK: uint8, one exponent per entry of the first axis (`channel_scales`), or
            None.
        reach, seed: DRAWN: largest level, and the key of the draw.
    """

    kind: int
    scale: np.float32 = field(default_factory=lambda: np.float32(0))
    values: NDArray[np.float16] | Vector | None = None
    low: int = 0
    levels: int = 0
    raw_bits: int = 0
    entries: NDArray[np.float16] | None = None
    centre: int | None = None
    indices: Indices = field(default_factory=_no_integers)
    channels: Bytes | None = None
    reach: int = 0
    seed: int = 0

    @property
    def quantised(self) -> bool:
        """True if there are indices."""
        return self.kind in (GRID, CODEBOOK)

    @property
    def count(self) -> int:
        """Number of levels of a quantised tensor."""
        return self.levels if self.entries is None else self.entries.size

    @property
    def reaches(self) -> tuple[int, int]:
        """Return the distances from the centre that have two signs, and the largest one of all."""
        if self.centre is None:
            return 0, self.count - 1
        sides = self.centre, self.count - 1 - self.centre
        return min(sides), max(sides)

    @property
    def symbols(self) -> int:
        """Size of the alphabet that is entropy-coded; 1: nothing is."""
        if self.raw_bits:
            return 1
        far = self.reaches[1]
        return (far if self.kind == CODEBOOK else class_of(far)) + 1

    def looked_up(self, indices: Indices) -> Vector:
        """Return the float32 values of these indices, not yet multiplied by the scales of the channels."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.entries is not None:
                return np.asarray((self.entries.astype(np.float32) * self.scale)[indices], np.float32)
            if self.levels <= _TABLED:
                levels = np.arange(self.low, self.low + self.levels)
                return np.asarray((levels.astype(np.float32) * self.scale)[indices], np.float32)
            return (indices.astype(np.int64) + self.low).astype(np.float32) * self.scale

    def scale_channels(self, weights: Vector) -> None:
        """Multiply the weights of the whole tensor by the scales of the channels, in place."""
        if self.channels is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                weights.reshape(self.channels.size, -1)[...] *= channel_scales()[self.channels][:, None]

    def weights(self, size: int) -> Vector:
        """Return the `size` float32 weights that this coding decodes to."""
        if self.kind == CONSTANT:
            return np.full(size, self.scale, np.float32)
        if self.values is not None:
            return self.values.astype(np.float32)
        if self.kind == DRAWN:
            drawn = np.empty(size, np.float32)
            self.fill(drawn)
            return drawn
        weights = self.looked_up(self.indices)
        self.scale_channels(weights)
        return weights

    def fill(self, weights: Vector) -> None:
        """Write the weights of a tensor without indices: beside them it takes no memory to speak of."""
        if self.kind == CONSTANT:
            weights[:] = self.scale
        elif self.values is not None:
            weights[:] = self.values
        else:
            random = np.random.Philox(key=self.seed)
            for start in range(0, weights.size, _PORTION):
                part = weights[start : start + _PORTION]
                part[:] = _levels(random, self.reach, part.size).astype(np.float32) * self.scale


def class_of(distance: int) -> int:
    """Return the class of a distance on a grid."""
    exponent = max(distance.bit_length() - 4, 0)
    return 8 * exponent + (distance >> exponent)


def classes_of(distances: Integers) -> Integers:
    """Return the classes of distances on a grid."""
    classes = distances.copy()
    far = np.flatnonzero(distances >= _EXACT)
    large = distances[far]
    exponent = np.frexp(large.astype(np.float64))[1].astype(np.int64) - 4
    classes[far] = 8 * exponent + (large >> exponent)
    return classes


def class_widths(classes: NDArray[np.integer]) -> Integers:
    """Return the raw bits that follow each class."""
    return np.maximum(classes.astype(np.int64) // 8 - 1, 0)


def class_starts(classes: NDArray[np.integer]) -> Integers:
    """Return the smallest distance of each class."""
    widths = class_widths(classes)
    starts: Integers = (classes.astype(np.int64) - 8 * widths) << widths
    return starts


def levels_of(seed: int, reach: int, size: int) -> Integers:
    """Return `size` integers, uniform in [-reach, reach]: the same ones on every machine.

    Raw output of Philox (Salmon et al., SC 2011), which numpy keeps stable, and integer arithmetic.
    """
    return _levels(np.random.Philox(key=seed), reach, size)


def _levels(random: np.random.Philox, reach: int, size: int) -> Integers:
    """Return the next `size` levels of a draw."""
    draws = random.random_raw(size) >> np.uint64(32)
    return (draws * np.uint64(2 * reach + 1) >> np.uint64(32)).astype(np.int64) - reach


@dataclass(frozen=True, eq=False)
class Tables:
    """The frequency tables of one tensor.

    Attributes:
        codes: bytes of each table, None for one that no weight uses; empty if nothing is entropy-coded.
        classes: uint8, one array per axis (`axes_of`); an empty one: class 0 throughout.
        widths: bits of the classes of each axis.
    """

    codes: tuple[bytes | None, ...] = ()
    classes: tuple[Bytes, ...] = ()
    widths: tuple[int, ...] = (0, 0, 0)

    def frequencies(self) -> list[Integers]:
        """Return the tables that are there, each adding up to `rans.TOTAL`."""
        present = [codes for codes in self.codes if codes is not None]
        codes = np.frombuffer(b"".join(present), np.uint8).reshape(len(present), -1)
        return list(frequencies_of(codes))

    def owners(self, axes: tuple[int, int, int]) -> Bytes | None:
        """Return the number of every weight's table among those that are there; None if there is one.

        Raises:
            CodecError: a weight needs a table that is absent.
        """
        if not self.classes:
            return None
        total = np.zeros((1, 1, 1), np.uint8)
        for axis, classes in enumerate(self.classes):
            if classes.size:
                shape = [1, 1, 1]
                shape[axis] = -1
                total = total + classes.reshape(shape)
        present = np.array([codes is not None for codes in self.codes])
        numbers = np.where(present, np.cumsum(present) - 1, _ABSENT).astype(np.uint8)[total]
        if int(numbers.max()) == _ABSENT:
            raise CodecError("model file: a table is missing")
        return np.ascontiguousarray(np.broadcast_to(numbers, axes)).ravel()


def axes_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the sizes of the first axis, of the second, and of all others together."""
    rest = 1
    for side in shape[2:]:
        rest *= side
    return (shape[0] if shape else 1), (shape[1] if len(shape) > 1 else 1), rest


def codes_of(histograms: Integers) -> Bytes:
    """Return the tables of histograms along the last axis, none of them empty: eighths of bits."""
    bits = rans.log2(histograms.sum(axis=-1, keepdims=True)) - rans.log2(np.maximum(histograms, 1))
    codes = np.minimum((bits + (1 << rans.FRACTION - 4)) >> rans.FRACTION - 3, _ABSENT - 1)
    return np.where(histograms > 0, codes, _NEVER).astype(np.uint8)


def costs_of(codes: Bytes) -> NDArray[np.float64]:
    """Return bits x 2^20 that every symbol costs with tables along the last axis, to about 0.1 %."""
    exponents = np.where(codes == _NEVER, rans.PRECISION << 3, codes.astype(np.int64)) << rans.FRACTION - 3
    total = rans.log2(rans.exp2_negative(exponents).sum(axis=-1, keepdims=True))
    return (exponents + total - (30 << rans.FRACTION)).astype(np.float64)


def frequencies_of(codes: Bytes) -> Integers:
    """Return the frequencies that tables, one per row, stand for: `rans.normalise` for all at once."""
    exponents = codes.astype(np.int64)
    weights = rans.exp2_negative(exponents << rans.FRACTION - 3)
    weights[codes == _NEVER] = 0
    frequencies: Integers = 1 + weights * (rans.TOTAL - codes.shape[1]) // weights.sum(axis=1, keepdims=True)
    rest = rans.TOTAL - frequencies.sum(axis=1)
    frequencies[np.arange(codes.shape[0]), weights.argmax(axis=1)] += rest
    return frequencies


def book_of(values: NDArray[np.float64]) -> tuple[np.float32, NDArray[np.float16]]:
    """Return scale, a power of two, and float16 entries of a codebook with these values."""
    top = float(np.abs(values).max())
    exponent = min(max(math.ceil(math.log2(top)), -140), 127) if top > 0 else 0
    scale = np.float32(2.0**exponent)
    return scale, (values / float(scale)).astype(np.float16)


def record(coding: Coding, tables: Tables | None = None) -> bytes:
    """Return the record of one tensor, without its indices."""
    tables = tables or Tables()
    kind, scale = bytes([coding.kind]), _le(coding.scale)
    if coding.kind == CONSTANT:
        return kind + scale
    if coding.values is not None:
        return kind + _le(coding.values)
    if coding.kind == DRAWN:
        return kind + scale + varint(coding.reach) + coding.seed.to_bytes(4, "little")
    flags = coding.raw_bits | _CENTRED * (coding.centre is not None)
    flags |= _CONTEXTS * bool(tables.classes) | _CHANNELS * (coding.channels is not None)
    parts = [kind, scale, varint(coding.count), bytes([flags])]
    if coding.entries is None:
        parts.append(varint(coding.low * 2 if coding.low >= 0 else -coding.low * 2 - 1))
    elif coding.centre is not None:
        parts.append(bytes([coding.centre]))
    if coding.channels is not None:
        width = max(int(coding.channels.max()).bit_length(), 1)
        parts += [bytes([width]), _packed(coding.channels, width)]
    if tables.classes:
        parts.append(bytes([sum(width << 2 * axis for axis, width in enumerate(tables.widths))]))
        parts += [_packed(c, w) for c, w in zip(tables.classes, tables.widths, strict=True) if w]
    parts += [bytes([_ABSENT]) if codes is None else codes for codes in tables.codes]
    if coding.entries is not None:
        parts.append(_le(coding.entries))
    return b"".join(parts)


def _packed(numbers: Bytes, width: int) -> bytes:
    return rans.pack(numbers, np.full(numbers.size, width, np.uint8))


def _le(values: np.generic | NDArray[np.floating]) -> bytes:
    """Return little-endian bytes in the width of the values."""
    return bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())


class Reader(Cursor):
    """Cursor over a file; what is missing is refused before anything is allocated."""

    what = "model file"

    def float32(self) -> np.float32:
        """Return the next float32.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        value = np.frombuffer(self.take(4), "<f4").astype(np.float32)
        require_finite(value, "model file: scale")
        return np.float32(value[0])

    def packed(self, size: int, width: int) -> Bytes:
        """Return `size` numbers of `width` bits, at most 8, that end on a byte."""
        data = self.take((size * width + 7) // 8)
        if (size * width) % 8 and data[-1] & (0xFF >> (size * width) % 8):
            raise CodecError("model file: padding that is not zero")
        return rans.unpack(data, 0, np.full(size, width)).astype(np.uint8)


def read_record(reader: Reader, shape: Sequence[int], size: int) -> tuple[Coding, Tables]:
    """Return what a record from anywhere says of a tensor; quantised ones have no indices yet.

    Raises:
        CodecError: it is truncated or makes no sense.
        NonFiniteError: a scale is NaN or infinite.
    """
    kind = reader.byte()
    if kind == CONSTANT:
        return Coding(kind, reader.float32()), Tables()
    if kind == HALF:
        return Coding(kind, values=np.frombuffer(reader.take(2 * size), "<f2").astype(np.float16)), Tables()
    if kind == FULL:
        return Coding(kind, values=np.frombuffer(reader.take(4 * size), "<f4").astype(np.float32)), Tables()
    if kind == DRAWN:
        return _read_drawn(reader), Tables()
    if kind not in (GRID, CODEBOOK):
        raise CodecError(f"model file: unknown kind {kind} of record")
    return _read_quantised(reader, kind, shape)


def _read_drawn(reader: Reader) -> Coding:
    step, reach, seed = reader.float32(), reader.varint(), int.from_bytes(reader.take(4), "little")
    if reach > MAX_REACH:
        raise CodecError(f"model file: drawn levels up to {reach}, at most {MAX_REACH}")
    return Coding(DRAWN, step, reach=reach, seed=seed)


def _read_quantised(reader: Reader, kind: int, shape: Sequence[int]) -> tuple[Coding, Tables]:
    scale, levels, flags = reader.float32(), reader.varint(), reader.byte()
    raw_bits = flags & (_CENTRED - 1)
    if raw_bits > (MAX_RAW_BITS if kind == GRID else 0) or levels < 2 or (raw_bits and flags & ~raw_bits):
        raise CodecError(f"model file: {levels} levels with {raw_bits} raw bits")
    low, centre = 0, None
    if kind == GRID:
        zigzag = reader.varint()
        low = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag + 1 >> 1)
        centre = -low
        if max(abs(low), abs(low + levels)) > MAX_LEVEL:
            raise CodecError(f"model file: {levels} levels from {low} on")
    elif levels > MAX_ENTRIES:
        raise CodecError(f"model file: {levels} entries, at most {MAX_ENTRIES}")
    elif flags & _CENTRED:
        centre = reader.byte()
    if not flags & _CENTRED:
        centre = None
    elif not 0 <= (centre or 0) < levels:
        raise CodecError(f"model file: centre {centre} of {levels} levels")
    axes = axes_of(shape)
    channels = None
    if flags & _CHANNELS:
        if not 1 <= (width := reader.byte()) <= 8:
            raise CodecError(f"model file: exponents of {width} bits")
        channels = reader.packed(axes[0], width)
    coding = Coding(
        kind,
        scale,
        low=low,
        levels=levels,
        raw_bits=raw_bits,
        centre=centre,
        channels=channels,
    )
    tables = _read_tables(reader, coding.symbols, axes, contexts=bool(flags & _CONTEXTS))
    if kind == CODEBOOK:
        entries = np.frombuffer(reader.take(2 * levels), "<f2").astype(np.float16)
        coding = replace(coding, levels=0, entries=entries)
    return coding, tables


def _read_tables(reader: Reader, symbols: int, axes: tuple[int, int, int], *, contexts: bool) -> Tables:
    if symbols == 1:
        return Tables()
    if not contexts:
        return Tables((_table(reader, symbols),))
    packed = reader.byte()
    widths = (packed & 3, packed >> 2 & 3, packed >> 4)
    if not 0 < packed < 64:
        raise CodecError("model file: impossible widths of classes")
    classes = tuple(
        reader.packed(size, width) if width else np.empty(0, np.uint8)
        for size, width in zip(axes, widths, strict=True)
    )
    weights = axes[0] * axes[1] * axes[2]
    count = sum((1 << width) - 1 for width in widths) + 1
    if count > (MANY_TABLES if weights >= FINELY_CLASSED else FEW_TABLES):
        raise BombError(f"model file: {count} tables for {weights} weights")
    codes: list[bytes | None] = []
    for _ in range(count):
        first = reader.take(1)
        codes.append(None if first[0] == _ABSENT else _table(reader, symbols, first))
    return Tables(tuple(codes), classes, widths)


def _table(reader: Reader, symbols: int, first: bytes = b"") -> bytes:
    codes = first + reader.take(symbols - len(first))
    if _ABSENT in codes or set(codes) == {_NEVER}:
        raise CodecError("model file: impossible table")
    return codes
