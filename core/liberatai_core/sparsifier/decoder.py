"""The decoder of updates: bytes from anywhere."""

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.errors import BombError, CodecError, IndexRangeError
from liberatai_core.sparsifier.stream import (
    DENSE,
    GROUPS_SHIFT,
    IMPLIED,
    MAGNITUDES,
    MAX_LEVELS,
    PLAIN,
    SEVERAL,
    SIGNS,
    SPARSE,
    Integers,
    Reader,
    Sparse,
    check_positions,
)
from liberatai_core.sparsifier.tables import (
    EXACT,
    EXPLICIT,
    IMPLIED_LAW,
    LONGEST,
    MAX_RUNS,
    NEVER,
    Plan,
    class_edges,
    class_of,
    class_widths,
    coded_by,
    free_lanes,
)
from liberatai_core.structure import MAX_TENSORS
from liberatai_core.weights import Vector, require_finite


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
    reader = Reader(data)
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


def _read_plain(reader: Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    positions = np.frombuffer(reader.take(4 * count), "<u4").astype(np.int64)
    values = reader.floats(count)
    reader.end()
    check_positions(positions, parameters)
    return positions, values


def _read_sparse(reader: Reader, count: int, parameters: int) -> tuple[Integers, Vector]:
    if count == 0:
        reader.end()
        return np.empty(0, np.int64), np.empty(0, np.float32)
    flags = reader.varint()
    counts, scales = _read_groups(reader, (flags >> GROUPS_SHIFT) + 1, count)
    plan = _read_plan(reader, flags, count, parameters)
    table = _read_table(reader, class_of(MAX_LEVELS - 1) + 1) if flags & MAGNITUDES else None
    coded = coded_by(plan, table, parameters, count)
    lanes = free_lanes(coded.symbols, count)
    if plan.signs:
        lanes = reader.varint()
        if not 0 < lanes <= coded.symbols or coded.symbols > lanes * LONGEST:
            raise BombError(f"sparse update: {lanes} lanes for {coded.symbols} symbols")
    rest = reader.take(len(reader.data) - reader.at)
    # Symbols move at most 16 bits; classes above 15 need gaps longer than their raw bits.
    if len(rest) > 3 * lanes + 2 * coded.symbols + (5 * count + parameters) // 8 + 8:
        raise BombError(f"sparse update: {len(rest)} bytes for {count} non-zeros")
    symbols, raw = rans.decode(rest, coded, lanes)
    positions, levels = _assemble(symbols, raw, plan, lanes, parameters, several=table is not None)
    return positions, Sparse(positions, levels, counts, scales).values()


def _read_groups(reader: Reader, groups: int, count: int) -> tuple[Integers, NDArray[np.float32]]:
    if groups > min(count, MAX_TENSORS):
        raise BombError(f"sparse update: {groups} groups for {count} non-zeros")
    counts = np.array(reader.split(groups, count), np.int64)
    halves = np.frombuffer(reader.take(2 * groups), "<u2").astype(np.uint32)
    scales = (halves << np.uint32(16)).view(np.float32)
    require_finite(scales, "scales of a sparse update")
    if (scales <= 0).any():
        raise CodecError("sparse update: a scale is not positive")
    return counts, scales


def _read_plan(reader: Reader, flags: int, count: int, parameters: int) -> Plan:
    signs, runs = bool(flags & SIGNS), 1
    if flags & SEVERAL:
        runs = reader.varint() + 2
        if flags & IMPLIED:
            raise CodecError("sparse update: one density cannot imply several tables")
    if runs > min(MAX_RUNS, count):
        raise BombError(f"sparse update: {runs} tables for {count} non-zeros")
    counts = reader.split(runs, count)
    laws, changes = [], []
    for _ in range(runs):
        laws.append(IMPLIED_LAW if flags & IMPLIED else _read_table(reader, class_of(parameters - 1) + 1))
        changes.append(tuple(reader.take(3)) if signs else ())
    return Plan(counts, laws, changes, signs)


def _assemble(
    symbols: rans.Symbols, raw: bytes, plan: Plan, lanes: int, parameters: int, *, several: bool
) -> tuple[Integers, NDArray[np.int16]]:
    """Return positions and levels of decoded symbols and raw bits."""
    count = sum(plan.counts)
    classes = symbols[:count] >> np.uint16(plan.signs)
    positions = class_edges()[classes]
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
        levels += class_edges()[symbols[count:]].astype(np.int16)
        levels[size_far] += rans.unpack(raw, sizes_at, size_widths).astype(np.int16)
        if levels.max() > MAX_LEVELS:
            raise CodecError(f"sparse update: a magnitude above {MAX_LEVELS}")
    np.negative(levels, out=levels, where=negative)
    return positions, levels


def _far(classes: rans.Symbols) -> tuple[Integers, Integers]:
    """Return which classes have raw bits behind them, and how many."""
    far = np.flatnonzero(classes >= EXACT)
    return far, class_widths()[classes[far]]


def _check_raw(raw: bytes, bits: int, lanes: int) -> None:
    """Refuse raw bytes that are not `bits` bits, zero padding, and at least 3 bytes per lane."""
    size = max((bits + 7) // 8, 3 * lanes)
    if len(raw) != size:
        raise CodecError("sparse update: " + ("truncated" if len(raw) < size else "trailing bytes"))
    padding = raw[bits // 8 :]
    if padding and (padding[0] & (0xFF >> bits % 8) or any(padding[1:])):
        raise CodecError("sparse update: padding that is not zero")


def _read_table(reader: Reader, classes: int) -> bytes:
    """Return the bytes of a table with at most `classes` classes."""
    law = reader.take(2)
    if law[0] > EXPLICIT:
        raise CodecError(f"sparse update: unknown law {law[0]}")
    if law[0] < EXPLICIT:
        return law
    if law[1] >= classes:
        raise IndexRangeError("sparse update: a table has more classes than there are")
    codes = reader.take(law[1] + 1)
    if codes.count(NEVER) == len(codes):
        raise CodecError("sparse update: an empty table")
    return law + codes
