"""File of a compressed model, both ends.

Indices are entropy-coded by `rans`, in messages of whole tensors or parts of large ones, so a device decodes
a million weights in some ten milliseconds without compiled code of our own, and holds little beside the
result. All arithmetic is integer but one or two float32 multiplications per weight: the same bits on every
machine, which the digest in the file proves. How a tensor is taken apart: `layout`.

File::

    "LAM2" | 32 B digest of the decoded weights | varint parameters | varint tensors | one record per tensor
    messages

Records: u8 kind, then
    0 constant  f32 value
    1 half      size x f16
    2 full      size x f32
    3 grid      f32 step | varint levels K | u8 flags | varint zigzag(lowest level) | channels | tables
                value = step x (lowest level + index)
    4 codebook  f32 scale | varint entries K | u8 flags | u8 centre, if centred | channels | tables | K x f16
                value = scale x entry[index]
    5 drawn     f32 step | varint reach | u32 seed
                value = step x level, levels uniform in [-reach, reach], drawn by `levels_of`

    flags       bits 0-4: 0, or b: indices are b raw bits each and nothing else is flagged (grid only)
                32 centred | 64 classes | 128 channels
    channels    if flagged: u8 width | first axis x width bits, zero padding to a byte: exponent e
                value x 2^(-e / 8), as `layout.channel_scales` rounds it
    tables      nothing if indices are raw; unless flagged: one table
                u8 2 bits per axis: bits of its classes | per axis: classes, zero padding to a byte
                tables 0 ... sum of the largest classes, u8 254 for one that no weight uses
    table       u8 per symbol: 8 x -log2(share), 255: none (`layout.frequencies_of`)

Index and centre c (grid: level 0; not centred: c = 0) give the distance |index - c|, which is the symbol of
a codebook. The symbol of a grid is the distance below 16, and eight to the octave above:
8 e + (distance >> e) with e = bits of the distance - 4; its e low bits are raw bits. Where both c - distance
and c + distance are indices, so is a sign (1: below c).

Messages: tensors with symbols or raw bits in order, joined while they are together at most
L = clamp(2 x size of the largest tensor, 2^18, 2^19) weights and 40 tables; a tensor above L is cut into
equal parts, the last being shorter, that are joined with no other tensor.
    varint bytes | varint lanes, if there are symbols | rANS message of all symbols
    its raw bits, tensor by tensor, 2^15 weights at a time: b or e low bits of each of them, high bit first |
    their signs; zero padding

All integers are little-endian; a varint has 7 bits per byte, low bits first, at most 5 bytes.
"""

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.compressor.contexts import choose
from liberatai_core.compressor.layout import (
    CODEBOOK,
    CONSTANT,
    DRAWN,
    FULL,
    GRID,
    HALF,
    MAX_ENTRIES,
    MAX_LEVEL,
    MAX_RAW_BITS,
    MAX_REACH,
    Bytes,
    Coding,
    Indices,
    Integers,
    Reader,
    Tables,
    axes_of,
    channel_scales,
    class_starts,
    class_widths,
    classes_of,
    levels_of,
    read_record,
    record,
    varint,
)
from liberatai_core.errors import BombError, CodecError, DigestError, TooLargeError
from liberatai_core.structure import Structure, Tensor, require_length
from liberatai_core.weights import Vector, digest, require_finite

__all__ = [
    "CODEBOOK",
    "CONSTANT",
    "DRAWN",
    "FULL",
    "GRID",
    "HALF",
    "MAX_ENTRIES",
    "MAX_LEVEL",
    "MAX_RAW_BITS",
    "MAX_REACH",
    "Cells",
    "Coding",
    "Indices",
    "Integers",
    "TensorSize",
    "cells",
    "channel_scales",
    "entropy_bits",
    "header_bytes",
    "levels_of",
    "read",
    "recentred",
    "record",
    "restore",
    "sizes",
    "write",
]

MAGIC = b"LAM2"
_DIGEST = 32
_PARTS = (1 << 18, 1 << 19)
"""Weights of a message: a decoder holds about 14 bytes for each of them, and wants many lanes in each row."""
_PORTION = 1 << 15
"""Weights whose raw bits lie together: a decoder's intermediate results fit a cache."""
_LONGEST = 4096
"""Most symbols per lane: bounds the time of the decoder's loop, about 20 us per row of lanes."""
_SHORTEST = 16
"""More lanes than a sixteenth of the symbols save no time."""
_LANES = 8192
"""At most, as far as they are free: more would not fit a cache."""
_PAID = 0.002
"""Share of a message that may be spent on lanes where raw bits are few."""
_ROWS, _PER_ROW = 1 << 13, 64
"""Rows of lanes in all messages together, and weights for which there may be one more. Ordinary messages have
some hundred rows; a decoder's time for others would have no measure."""
_SIGNED_WORTH = 1.02
"""Raw signs may cost this much more than modelled ones: without them a decoder has few lanes and is slow."""


@dataclass(frozen=True, slots=True)
class TensorSize:
    """Where the bytes of a file go.

    Attributes:
        name: of the tensor; "header" for what stands before the first record.
        kind: "constant", "half", "full", "grid", "codebook", "drawn" or "header".
        weights: number of them.
        bytes: of its record and its share of the messages; whole bytes that add up to the file's size.
        distinct: different values that the coding allows.
    """

    name: str
    kind: str
    weights: int
    bytes: int
    distinct: int


@dataclass(frozen=True, eq=False)
class Cells:
    """Which weights of a file share one value, and which values may change without changing its size.

    weight = value of its cell x factor, in float32.

    Attributes:
        of_weight: int32, shape (parameters,); -1: the weight is fixed (fine grids, drawn tensors).
        count: number of cells.
        pinned: bool, shape (count,): the cell's value is zero and has to stay.
        factor: float32, shape (parameters,): scale of the weight's channel, 1 where there are none.
    """

    of_weight: NDArray[np.int32]
    count: int
    pinned: NDArray[np.bool_]
    factor: Vector


@dataclass(frozen=True)
class _Part:
    """Weights start … stop of tensor `number`."""

    number: int
    start: int
    stop: int

    def portions(self) -> Iterator["_Part"]:
        """Yield parts whose raw bits lie together."""
        for start in range(self.start, self.stop, _PORTION):
            yield _Part(self.number, start, min(start + _PORTION, self.stop))


VERBATIM_HEAD = 4
"""Bytes of a tensor that stands value by value, beside its values."""


def header_bytes(structure: Structure) -> int:
    """Return the bytes of a file before its records."""
    return len(MAGIC) + _DIGEST + len(varint(structure.parameters)) + len(varint(len(structure.tensors)))


# --- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor on its way into a file.

    Attributes:
        coding: how it is written, with or without a centre, whichever costs less.
        tables: its frequency tables.
        bits: what it adds to the messages: information in its symbols, and raw bits.
    """

    coding: Coding
    tables: Tables
    bits: float


def write(codings: Sequence[Coding], structure: Structure) -> bytes:
    """Return the file; `codings` has one entry per tensor, in order.

    Raises:
        NonFiniteError: a weight that they stand for is NaN or infinite.
    """
    pairs = zip(codings, structure.tensors, strict=True)
    return write_planned([planned(coding, tensor) for coding, tensor in pairs], structure)


def write_planned(plans: Sequence[Planned], structure: Structure) -> bytes:
    """Return the file of codings that `planned` has seen.

    Raises:
        NonFiniteError: a weight that they stand for is NaN or infinite.
    """
    slices = list(structure.slices())
    weights = np.empty(structure.parameters, np.float32)
    for plan, (tensor, place) in zip(plans, slices, strict=True):
        weights[place] = plan.coding.weights(tensor.size)
    require_finite(weights, "decoded weights")
    parts = [MAGIC, digest(weights), varint(structure.parameters), varint(len(slices))]
    parts += [record(plan.coding, plan.tables) for plan in plans]
    layouts = [(plan.coding, plan.tables) for plan in plans]
    for group in _groups(layouts, structure):
        bits = sum(
            plans[p.number].bits * (p.stop - p.start) / plans[p.number].coding.indices.size for p in group
        )
        parts.append(_message(group, layouts, structure, bits))
    return b"".join(parts)


def planned(coding: Coding, tensor: Tensor) -> Planned:
    """Choose how the indices of one tensor are stored."""
    if not coding.quantised:
        return Planned(coding, Tables(), 0.0)
    plan = _tabled(coding, tensor)
    if coding.centre is None:
        return plan
    other = _tabled(replace(coding, centre=None), tensor)
    return other if plan.bits > _SIGNED_WORTH * other.bits else plan


def _tabled(coding: Coding, tensor: Tensor) -> Planned:
    if coding.raw_bits:
        return Planned(coding, Tables(), float(coding.raw_bits * tensor.size))
    distances = _distances(coding, coding.indices)
    symbols = _symbols(coding, distances)
    raw = np.count_nonzero(_two_sided(coding, distances))
    if coding.kind == GRID:
        raw += int(class_widths(symbols).sum())
    chosen = choose(symbols, axes_of(tensor.shape), coding.symbols)
    return Planned(coding, chosen.tables, chosen.coded + raw)


def _symbols(coding: Coding, distances: Integers) -> Integers:
    return distances if coding.kind == CODEBOOK else classes_of(distances)


def _distances(coding: Coding, indices: Indices) -> Integers:
    distances = indices.astype(np.int64)
    if coding.centre:
        distances -= coding.centre
        np.abs(distances, out=distances)
    return distances


def _two_sided(coding: Coding, distances: Indices) -> NDArray[np.bool_]:
    """Return which weights have a sign."""
    near = coding.reaches[0]
    return (distances > 0) & (distances <= near)


def _groups(layouts: Sequence[tuple[Coding, Tables]], structure: Structure) -> Iterator[list[_Part]]:
    """Yield the parts of tensors of each message."""
    largest = max(tensor.size for tensor in structure.tensors)
    limit = min(max(2 * largest, _PARTS[0]), _PARTS[1])
    group: list[_Part] = []
    weights = tables = 0
    for number, ((coding, own_tables), tensor) in enumerate(zip(layouts, structure.tensors, strict=True)):
        if not coding.quantised:
            continue
        own = sum(codes is not None for codes in own_tables.codes)
        if group and (weights + tensor.size > limit or tables + own > rans.MAX_TABLES):
            yield group
            group, weights, tables = [], 0, 0
        if tensor.size > limit:
            size = -(-tensor.size // -(-tensor.size // limit))
            for start in range(0, tensor.size, size):
                yield [_Part(number, start, min(start + size, tensor.size))]
            continue
        group.append(_Part(number, 0, tensor.size))
        weights, tables = weights + tensor.size, tables + own
    if group:
        yield group


def _message(
    group: list[_Part], layouts: Sequence[tuple[Coding, Tables]], structure: Structure, bits: float
) -> bytes:
    rows, raw = [], []
    for part in (portion for whole in group for portion in whole.portions()):
        coding = layouts[part.number][0]
        indices = coding.indices[part.start : part.stop]
        distances = _distances(coding, indices)
        if coding.raw_bits:
            raw.append((distances.astype(np.uint32), np.full(distances.size, coding.raw_bits, np.uint8)))
            continue
        symbols = _symbols(coding, distances)
        rows.append(symbols.astype(np.uint16))
        if coding.kind == GRID:
            far = np.flatnonzero(class_widths(symbols))
            rests = distances[far] - class_starts(symbols[far])
            raw.append((rests.astype(np.uint32), class_widths(symbols[far]).astype(np.uint8)))
        below = indices[_two_sided(coding, distances)].astype(np.int64) < (coding.centre or 0)
        raw.append((below.astype(np.uint32), np.ones(below.size, np.uint8)))
    values, widths = (np.concatenate(part) for part in zip(*raw, strict=True))
    packed = rans.pack(values, widths) if values.size else b""
    coded = _coded(group, layouts, structure)
    if coded is None:
        return varint(len(packed)) + packed
    row = np.concatenate(rows)
    lanes = _lanes(row.size, len(packed), bits)
    body = varint(lanes) + rans.encode(row, coded, lanes, packed)
    return varint(len(body)) + body


def _lanes(symbols: int, raw_bytes: int, bits: float) -> int:
    most = min(max(symbols // _SHORTEST, 1), _LANES)
    paid = int(_PAID * bits / rans.STATE_BITS)
    return max(min(raw_bytes // 3 + paid, most), -(-symbols // _LONGEST), 1)


def _coded(
    group: list[_Part], layouts: Sequence[tuple[Coding, Tables]], structure: Structure
) -> rans.Coded | None:
    """Return the tables of a message; None if it has no symbols."""
    frequencies: list[Integers] = []
    counts, owners = [], []
    each: list[Bytes] = []
    several = any(layouts[part.number][1].classes for part in group)
    for part in group:
        tables = layouts[part.number][1]
        if not tables.codes:
            continue
        first, size = len(frequencies), part.stop - part.start
        frequencies += tables.frequencies()
        counts.append(size)
        owners.append(first)
        if several:
            of_weight = tables.owners(axes_of(structure.tensors[part.number].shape))
            if of_weight is None:
                each.append(np.full(size, first, np.uint8))
            else:
                each.append(of_weight[part.start : part.stop] + np.uint8(first))
    if not frequencies:
        return None
    return rans.Coded(frequencies, counts, owners, np.concatenate(each) if several else None)


# --- reading ---------------------------------------------------------------------------------------


def restore(artifact: bytes, structure: Structure) -> Vector:
    """Return the weights in a file from anywhere, float32, shape (parameters,).

    Beside them it holds about 12 bytes per weight of the largest message, one byte per weight of the
    largest tensor and 150 KiB per table of a message, whatever the file says.

    Raises:
        CodecError: not such a file, of another structure, truncated, trailing or nonsensical bytes.
        TooLargeError: longer than any file of this structure.
        BombError: it promises more than the structure holds.
        NonFiniteError: a weight is NaN or infinite.
        DigestError: the weights are not the ones that were compressed.
    """
    reader, wanted, layouts = _open(artifact, structure)
    weights = np.empty(structure.parameters, np.float32)
    slices = list(structure.slices())
    for (coding, _), (_, place) in zip(layouts, slices, strict=True):
        if not coding.quantised:
            coding.fill(weights[place])
    for part, indices in _parts(reader, layouts, structure):
        start = slices[part.number][1].start
        weights[start + part.start : start + part.stop] = layouts[part.number][0].looked_up(indices)
    for (coding, _), (_, place) in zip(layouts, slices, strict=True):
        coding.scale_channels(weights[place])
    require_finite(weights, "model file")
    if digest(weights) != wanted:
        raise DigestError("model file: the decoded weights do not have the digest in the file")
    return weights


def read(artifact: bytes, structure: Structure) -> list[Coding]:
    """Return the codings in a file from anywhere, one per tensor: what `write` was given.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    reader, _, layouts = _open(artifact, structure)
    codings = [coding for coding, _ in layouts]
    indices: dict[int, list[Indices]] = {}
    for part, piece in _parts(reader, layouts, structure):
        indices.setdefault(part.number, []).append(piece)
    for number, pieces in indices.items():
        codings[number] = replace(codings[number], indices=np.concatenate(pieces))
    return codings


def _open(artifact: bytes, structure: Structure) -> tuple[Reader, bytes, list[tuple[Coding, Tables]]]:
    """Return a reader behind the records, the digest and what the records say."""
    limit = header_bytes(structure) + 8 * structure.parameters + 8192 * len(structure.tensors)
    if len(artifact) > limit:
        raise TooLargeError(f"model file: {len(artifact)} bytes, at most {limit} for {structure.id}")
    reader = Reader(artifact)
    if reader.take(len(MAGIC)) != MAGIC:
        raise CodecError("model file: wrong magic or version")
    wanted = reader.take(_DIGEST)
    parameters, tensors = reader.varint(), reader.varint()
    if parameters != structure.parameters or tensors != len(structure.tensors):
        raise CodecError(f"model file: {parameters} parameters in {tensors} tensors are not {structure.id}")
    return reader, wanted, [read_record(reader, tensor.shape, tensor.size) for tensor in structure.tensors]


def _parts(
    reader: Reader, layouts: list[tuple[Coding, Tables]], structure: Structure
) -> Iterator[tuple[_Part, Indices]]:
    """Yield the indices of all quantised tensors, part by part, and check that nothing follows."""
    _require_few_rows(reader, layouts, structure)
    for group in _groups(layouts, structure):
        yield from _read_message(Reader(reader.take(reader.varint())), group, layouts, structure)
    reader.end()


def _require_few_rows(reader: Reader, layouts: list[tuple[Coding, Tables]], structure: Structure) -> None:
    """Refuse messages that would take long to decode, before the first one is; the reader does not move."""
    start, rows = reader.at, 0
    for group in _groups(layouts, structure):
        message = Reader(reader.take(reader.varint()))
        symbols = sum(part.stop - part.start for part in group if layouts[part.number][1].codes)
        rows += -(-symbols // _read_lanes(message, symbols)) if symbols else 0
    if rows > _ROWS + structure.parameters // _PER_ROW:
        raise BombError(f"model file: {rows} rows of lanes for {structure.parameters} weights")
    reader.at = start


def _read_lanes(reader: Reader, symbols: int) -> int:
    lanes = reader.varint()
    if not 0 < lanes <= symbols:
        raise BombError(f"model file: {lanes} lanes for {symbols} symbols")
    if symbols > lanes * _LONGEST:
        raise CodecError(f"model file: only {lanes} lanes for {symbols} symbols")
    return lanes


def _read_message(
    reader: Reader,
    group: list[_Part],
    layouts: list[tuple[Coding, Tables]],
    structure: Structure,
) -> Iterator[tuple[_Part, Indices]]:
    coded = _coded(group, layouts, structure)
    symbols: Indices = np.empty(0, np.uint16)
    least = 0
    if coded is not None:
        lanes = _read_lanes(reader, coded.symbols)
        symbols, raw = rans.decode(reader.take(len(reader.data) - reader.at), coded, lanes)
        least = 3 * lanes
    else:
        raw = reader.data
    bits = _Bits(raw)
    at = 0
    for part in (portion for whole in group for portion in whole.portions()):
        coding, size = layouts[part.number][0], part.stop - part.start
        if coding.raw_bits:
            numbers = bits.numbers(np.full(size, coding.raw_bits))
            if int(numbers.max()) >= coding.levels:
                raise CodecError(f"model file: index {int(numbers.max())} of {coding.levels} levels")
            yield part, numbers
            continue
        yield part, _indices(coding, symbols[at : at + size], bits)
        at += size
    bits.end(least)


class _Bits:
    """Cursor over raw bits."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def _slice(self, size: int) -> tuple[bytes, int]:
        """Return the bytes in which the next `size` bits lie, and where they begin."""
        start, stop = self.at, self.at + size
        if stop > 8 * len(self.data):
            raise CodecError("model file: raw bits are missing")
        self.at = stop
        return self.data[start // 8 : (stop + 7) // 8], start % 8

    def take(self, size: int) -> Bytes:
        """Return the next `size` bits."""
        data, first = self._slice(size)
        return np.unpackbits(np.frombuffer(data, np.uint8))[first:][:size]

    def numbers(self, widths: Integers) -> Integers:
        """Return the next numbers of these widths."""
        data, first = self._slice(int(widths.sum()))
        return rans.unpack(data, first, widths)

    def end(self, least: int) -> None:
        """Refuse more bytes than the bits, or `least` bytes, need, and padding that is not zero."""
        used = (self.at + 7) // 8
        if len(self.data) != max(used, least) or any(self.data[used:]):
            raise CodecError("model file: raw bits that nothing needs")
        if self.at % 8 and self.data[used - 1] & (0xFF >> self.at % 8):
            raise CodecError("model file: padding that is not zero")


def _indices(coding: Coding, symbols: Indices, bits: _Bits) -> Indices:
    """Return the indices that the symbols of a portion and its raw bits stand for."""
    distances: Indices = symbols
    if coding.kind == GRID:
        far_off = np.flatnonzero(symbols >= 16)
        if far_off.size:
            classes = symbols[far_off]
            distances = symbols.astype(np.int32)
            distances[far_off] = class_starts(classes) + bits.numbers(class_widths(classes))
    near, far = coding.reaches
    if int(distances.max()) > far:
        raise CodecError(f"model file: index of distance {int(distances.max())}, at most {far}")
    if coding.centre is None:
        return distances
    signed = np.flatnonzero(_two_sided(coding, distances))
    below = signed[bits.take(signed.size).astype(np.bool_)]
    indices = distances.astype(np.int32)
    indices[below] *= -1
    if coding.centre > near:
        indices[distances > near] *= -1
    indices += coding.centre
    return indices


# --- what is in a file -----------------------------------------------------------------------------

_KINDS = ("constant", "half", "full", "grid", "codebook", "drawn")


def sizes(artifact: bytes, structure: Structure) -> list[TensorSize]:
    """Return where the bytes of a file go: its header first, then every tensor in order.

    The bytes of a message are shared in proportion to the information of its tensors.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    reader, _, layouts = _open(artifact, structure)
    codings = read(artifact, structure)
    heads = [len(record(coding, tables)) for coding, tables in layouts]
    shares = [0.0] * len(layouts)
    for group in _groups(layouts, structure):
        before = reader.at
        reader.take(reader.varint())
        bits = [_information(codings[p.number], layouts[p.number][1], p, structure) for p in group]
        for part, information in zip(group, bits, strict=True):
            shares[part.number] += (reader.at - before) * information / (sum(bits) or 1.0)
    ends = np.rint(np.cumsum(np.array(heads) + np.array(shares))).astype(np.int64)
    own = np.diff(ends, prepend=0).tolist()
    rows = [TensorSize("header", "header", 0, header_bytes(structure), 0)]
    for tensor, coding, size in zip(structure.tensors, codings, own, strict=True):
        rows.append(TensorSize(tensor.name, _KINDS[coding.kind], tensor.size, size, _distinct(coding)))
    return rows


def entropy_bits(artifact: bytes, structure: Structure) -> float:
    """Return what the indices of a file would take with one ideal table per tensor: order-0 entropy.

    Indices that are stored raw, in small tensors, count as they are: a table would cost more.
    """
    bits = 0.0
    for coding in read(artifact, structure):
        if coding.raw_bits:
            bits += coding.raw_bits * coding.indices.size
        elif coding.quantised:
            symbols, distances = coding.indices.astype(np.int64), np.zeros(0, np.int64)
            if coding.kind == GRID:
                # Rests of distances are noise that no table of a finite tensor could tell from a law.
                distances = _distances(coding, symbols)
                signs = np.where(symbols < (coding.centre or 0), -1, 1)
                symbols = signs * classes_of(distances)
            counts = np.unique(symbols, return_counts=True)[1].astype(np.float64)
            bits += float(counts @ (math.log2(symbols.size) - np.log2(counts)))
            bits += float(class_widths(classes_of(distances)).sum())
    return bits


def _distinct(coding: Coding) -> int:
    if coding.kind == DRAWN:
        return 2 * coding.reach + 1
    if coding.values is not None:
        return int(np.unique(coding.values).size)
    return int(np.unique(coding.indices).size) if coding.quantised else 1


def _information(coding: Coding, tables: Tables, part: _Part, structure: Structure) -> float:
    if coding.raw_bits:
        return float(coding.raw_bits * (part.stop - part.start))
    distances = _distances(coding, coding.indices[part.start : part.stop])
    symbols = _symbols(coding, distances)
    bits = float(np.count_nonzero(_two_sided(coding, distances)))
    if coding.kind == GRID:
        bits += float(class_widths(symbols).sum())
    costs = rans.PRECISION - np.log2(np.stack(tables.frequencies()))
    owners = tables.owners(axes_of(structure.tensors[part.number].shape))
    rows = 0 if owners is None else owners[part.start : part.stop].astype(np.intp)
    return bits + float(costs[rows, symbols].sum())


def cells(artifact: bytes, structure: Structure) -> Cells:
    """Return which weights of a file share a value: what training with frozen indices may move.

    A packed grid (small tensors) has a cell for every weight: `recentred` rounds to a new grid of the same
    width.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    of_weight = np.full(structure.parameters, -1, np.int32)
    factor = np.ones(structure.parameters, np.float32)
    pinned: list[bool] = []
    count = 0
    for coding, (tensor, place) in zip(read(artifact, structure), structure.slices(), strict=True):
        own, zero = _own_cells(coding, tensor.size)
        if own is None:
            continue
        of_weight[place] = own + count
        count += len(zero)
        pinned += zero
        coding.scale_channels(factor[place])
    return Cells(of_weight, count, np.array(pinned, np.bool_), factor)


def _own_cells(coding: Coding, size: int) -> tuple[Indices | None, list[bool]]:
    """Return cells of one tensor, and which of them are pinned; None: its weights are fixed."""
    if coding.kind == CONSTANT:
        return np.zeros(size, np.int32), [False]
    if coding.values is not None or _packed_grid(coding):
        return np.arange(size, dtype=np.int32), [False] * size
    if coding.kind == DRAWN or coding.raw_bits or coding.count > MAX_ENTRIES:
        return None, []
    values = coding.looked_up(np.arange(coding.count))
    return coding.indices, [bool(value == 0) for value in values]


def _packed_grid(coding: Coding) -> bool:
    return coding.kind == GRID and coding.raw_bits > 0


def recentred(artifact: bytes, structure: Structure, weights: Vector) -> bytes:
    """Return a file with the same indices and other values, those of `weights`.

    Entries of codebooks become float16 times a power of two; packed grids are rounded to a grid of the same
    width: neither grows. Grids with tables become codebooks, which adds two bytes per level, and one more
    per level beyond the 16 nearest to zero; files for retraining have none.

    Args:
        artifact: the file.
        structure: its named tensors.
        weights: float32, shape (parameters,); constant on every cell of `cells(artifact, structure)`, times
            its factors, to 1e-4 of the tensor's largest weight.

    Raises:
        ValueError: weights of one cell differ, a pinned one is not zero, or a fixed one changed.
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        CodecError, TooLargeError, BombError: as for `restore`.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    codings = [
        _moved(coding, weights[place], tensor)
        for coding, (tensor, place) in zip(read(artifact, structure), structure.slices(), strict=True)
    ]
    return write(codings, structure)


def verbatim_bytes(structure: Structure, names: AbstractSet[str]) -> int:
    """Return at most what `verbatim` adds to a file."""
    return sum(2 * tensor.size + VERBATIM_HEAD for tensor in structure.tensors if tensor.name in names)


def verbatim(artifact: bytes, structure: Structure, weights: Vector, names: AbstractSet[str]) -> bytes:
    """Return a file in which these tensors stand value by value, as float16; the others stay as they are.

    Values that float16 cannot hold make their tensor float32, which may take more than `verbatim_bytes`.

    Args:
        artifact: the file.
        structure: its named tensors.
        weights: float32, shape (parameters,), of which only those of `names` are looked at.
        names: of tensors.

    Raises:
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        CodecError, TooLargeError, BombError: as for `restore`.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    codings = read(artifact, structure)
    for number, (tensor, place) in enumerate(structure.slices()):
        if tensor.name in names:
            values = weights[place]
            fits = float(np.abs(values).max()) <= float(np.finfo(np.float16).max)
            half = Coding(HALF, values=values.astype(np.float16)) if fits else None
            codings[number] = half or Coding(FULL, values=values.copy())
    return write(codings, structure)


def _moved(coding: Coding, weights: Vector, tensor: Tensor) -> Coding:
    before = coding.weights(tensor.size)
    if np.array_equal(before, weights):
        return coding
    if coding.values is not None:
        exact = weights if coding.kind == FULL else weights.astype(np.float16)
        return replace(coding, values=exact)
    if _packed_grid(coding):
        return _regridded(coding, weights)
    own, pinned = _own_cells(coding, tensor.size)
    if own is None:
        raise ValueError(f"{tensor.name}: its coding has no cells, so its weights cannot change")
    counts = np.bincount(own, minlength=len(pinned))
    factor = np.ones(tensor.size, np.float32)
    coding.scale_channels(factor)
    # Rows with large factors know the value best.
    power = np.bincount(own, factor.astype(np.float64) ** 2, len(pinned))
    sums = np.bincount(own, factor.astype(np.float64) * weights, len(pinned))
    values = sums / np.where(counts > 0, power, 1)
    if coding.kind != CONSTANT:
        values = np.where(counts > 0, values, coding.looked_up(np.arange(coding.count)))
    values[pinned] = 0.0
    if np.abs(values[own] * factor - weights).max() > 1e-4 * np.abs(weights).max():
        raise ValueError(f"{tensor.name}: weights of one cell differ, or a zero moved")
    if coding.kind == CONSTANT:
        return replace(coding, scale=np.float32(values[0]))
    scale, entries = book_of(values)
    return replace(coding, kind=CODEBOOK, scale=scale, entries=entries, low=0, levels=0)


def book_of(values: NDArray[np.float64]) -> tuple[np.float32, NDArray[np.float16]]:
    """Return scale, a power of two, and float16 entries of a codebook with these values."""
    top = float(np.abs(values).max())
    exponent = min(max(math.ceil(math.log2(top)), -140), 127) if top > 0 else 0
    scale = np.float32(2.0**exponent)
    return scale, (values / float(scale)).astype(np.float16)


def _regridded(coding: Coding, weights: Vector) -> Coding:
    """Return a packed grid of the same width and record size around other weights."""
    low, high = float(weights.min()), float(weights.max())
    size = len(record(coding))
    top = max(abs(low), abs(high), float(np.finfo(np.float32).tiny))
    step = max((high - low) / max(coding.levels - 2, 1), 2 * top / MAX_LEVEL)
    while True:
        exact = np.float32(step)
        first, last = round(low / float(exact)), round(high / float(exact))
        moved = replace(coding, scale=exact, low=first)
        if last - first < coding.levels and len(record(moved)) <= size:
            break
        step *= 1.01
    indices = np.rint(weights / np.float64(exact)).astype(np.int64) - first
    return replace(moved, indices=indices)
