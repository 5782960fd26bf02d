"""File of a compressed model: its form, and how it is written. `reading` is the other end.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

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
    Coding,
    Indices,
    Integers,
    Tables,
    axes_of,
    channel_scales,
    class_starts,
    class_widths,
    levels_of,
    record,
)
from liberatai_core.compressor.parts import (
    LONGEST,
    MAGIC,
    Part,
    coded_of,
    distances_of,
    groups,
    header_bytes,
    symbols_of,
    two_sided,
)
from liberatai_core.compressor.reading import read, restore
from liberatai_core.cursor import varint
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import digest, require_finite

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
    "Coding",
    "Indices",
    "Integers",
    "channel_scales",
    "header_bytes",
    "levels_of",
    "planned",
    "read",
    "record",
    "restore",
    "write",
    "write_planned",
]

_SHORTEST = 16
"""More lanes than a sixteenth of the symbols save no time."""
_LANES = 8192
"""At most, as far as they are free: more would not fit a cache."""
_PAID = 0.002
"""Share of a message that may be spent on lanes where raw bits are few."""
_SIGNED_WORTH = 1.02
"""Raw signs may cost this much more than modelled ones: without them a decoder has few lanes and is slow."""


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
    for group in groups(layouts, structure):
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
    distances = distances_of(coding, coding.indices)
    symbols = symbols_of(coding, distances)
    raw = np.count_nonzero(two_sided(coding, distances))
    if coding.kind == GRID:
        raw += int(class_widths(symbols).sum())
    chosen = choose(symbols, axes_of(tensor.shape), coding.symbols)
    return Planned(coding, chosen.tables, chosen.coded + raw)


def _message(
    group: list[Part], layouts: Sequence[tuple[Coding, Tables]], structure: Structure, bits: float
) -> bytes:
    rows, raw = [], []
    for part in (portion for whole in group for portion in whole.portions()):
        coding = layouts[part.number][0]
        indices = coding.indices[part.start : part.stop]
        distances = distances_of(coding, indices)
        if coding.raw_bits:
            raw.append((distances.astype(np.uint32), np.full(distances.size, coding.raw_bits, np.uint8)))
            continue
        symbols = symbols_of(coding, distances)
        rows.append(symbols.astype(np.uint16))
        if coding.kind == GRID:
            far = np.flatnonzero(class_widths(symbols))
            rests = distances[far] - class_starts(symbols[far])
            raw.append((rests.astype(np.uint32), class_widths(symbols[far]).astype(np.uint8)))
        below = indices[two_sided(coding, distances)].astype(np.int64) < (coding.centre or 0)
        raw.append((below.astype(np.uint32), np.ones(below.size, np.uint8)))
    values, widths = (np.concatenate(part) for part in zip(*raw, strict=True))
    packed = rans.pack(values, widths) if values.size else b""
    coded = coded_of(group, layouts, structure)
    if coded is None:
        return varint(len(packed)) + packed
    row = np.concatenate(rows)
    lanes = _lanes(row.size, len(packed), bits)
    body = varint(lanes) + rans.encode(row, coded, lanes, packed)
    return varint(len(body)) + body


def _lanes(symbols: int, raw_bytes: int, bits: float) -> int:
    most = min(max(symbols // _SHORTEST, 1), _LANES)
    paid = int(_PAID * bits / rans.STATE_BITS)
    return max(min(raw_bytes // 3 + paid, most), -(-symbols // LONGEST), 1)
