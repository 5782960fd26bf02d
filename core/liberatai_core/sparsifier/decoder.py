"""The decoder of updates: bytes from anywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.errors import BombError, CodecError, IndexRangeError, LiberataiError
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

Entries = tuple[NDArray[np.int32], Vector]
"""Positions, strictly increasing, and values."""

P = ParamSpec("P")
R = TypeVar("R")
N = TypeVar("N", np.int32, np.float32)

_PORTION = 1 << 22
"""Symbols of streams that are decoded together."""
_SIGN_BIT = np.uint32(31)
_NONE = np.empty(0, np.int64)


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
    (found,) = decode_all([(data, parameters)])
    if isinstance(found, LiberataiError):
        raise found
    positions, values = found
    return positions.astype(np.int64), values


def decode_all(streams: Sequence[tuple[bytes, int]]) -> list[Entries | LiberataiError]:
    """Return for every stream and its parameters what `decode` returns or raises, positions as int32.

    None depends on another, and many together take a fraction of the time: see `rans.decode_all`.
    """
    found: list[Entries | LiberataiError | _Head] = [_attempt(_read, *stream) for stream in streams]
    heads = [(place, one) for place, one in enumerate(found) if isinstance(one, _Head)]
    for some in _portions(heads):
        messages = rans.decode_all([head.message for _, head in some])
        for (place, head), message in zip(some, messages, strict=True):
            found[place] = message if isinstance(message, CodecError) else _attempt(_assemble, head, *message)
    return [one for one in found if not isinstance(one, _Head)]


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """A sparse stream up to its message.

    Attributes:
        several: whether there are magnitudes above 1.
    """

    parameters: int
    counts: Integers
    scales: NDArray[np.float32]
    plan: Plan
    several: bool
    message: rans.Message


def _attempt(read: Callable[P, R], *given: P.args, **more: P.kwargs) -> R | LiberataiError:
    """Return a result, or the error that explains why there is none."""
    try:
        return read(*given, **more)
    except LiberataiError as error:
        return error.with_traceback(None)


def _portions(heads: list[tuple[int, _Head]]) -> Iterator[list[tuple[int, _Head]]]:
    """Yield heads, a few at a time: what lies between two steps is bounded."""
    portion: list[tuple[int, _Head]] = []
    symbols = 0
    for one in heads:
        if portion and symbols + one[1].message.coded.symbols > _PORTION:
            yield portion
            portion, symbols = [], 0
        portion.append(one)
        symbols += one[1].message.coded.symbols
    if portion:
        yield portion


def _read(data: bytes, parameters: int) -> Entries | _Head:
    """Return what a stream says, or, if it is a sparse one, its head."""
    reader = Reader(data)
    kind = reader.byte()
    if kind not in (PLAIN, SPARSE, DENSE):
        raise CodecError(f"sparse update: unknown codec {kind}")
    claimed = reader.varint()
    if claimed != parameters:
        raise CodecError(f"sparse update: made for {claimed} parameters, wanted {parameters}")
    if kind == DENSE:
        values = reader.floats(parameters)
        reader.end()
        require_finite(values, "sparse update")
        return np.arange(parameters, dtype=np.int32), values
    count = reader.varint()
    if count > parameters:
        raise BombError(f"sparse update: {count} non-zeros among {parameters} parameters")
    if kind == PLAIN:
        return _read_plain(reader, count, parameters)
    if count == 0:
        reader.end()
        return np.empty(0, np.int32), np.empty(0, np.float32)
    return _read_head(reader, count, parameters)


def _read_plain(reader: Reader, count: int, parameters: int) -> Entries:
    positions = np.frombuffer(reader.take(4 * count), "<u4").astype(np.int64)
    values = reader.floats(count)
    reader.end()
    check_positions(positions, parameters)
    require_finite(values, "sparse update")
    return positions.astype(np.int32), values


def _read_head(reader: Reader, count: int, parameters: int) -> _Head:
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
    return _Head(parameters, counts, scales, plan, table is not None, rans.Message(rest, coded, lanes))


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


def _assemble(head: _Head, symbols: rans.Symbols, raw: bytes) -> Entries:
    """Return positions and values of decoded symbols and raw bits."""
    plan, parameters = head.plan, head.parameters
    count = sum(plan.counts)
    classes = symbols[:count] >> np.uint16(1) if plan.signs else symbols[:count]
    steps = _look_up(_steps(), classes)
    # Before the rests are read: their widths are bounded by this sum.
    if int(steps.sum()) > parameters:
        raise IndexRangeError("sparse update: a position lies outside the structure")
    gaps_far, gap_widths = _far(classes)
    size_far, size_widths = _far(symbols[count:])
    signs_at = int(gap_widths.sum())
    sizes_at = signs_at + (0 if plan.signs else count)
    _check_raw(raw, sizes_at + int(size_widths.sum()), head.message.lanes)
    if gaps_far.size:
        steps[gaps_far] += rans.unpack(raw, 0, gap_widths).astype(np.int32)
    steps[0] -= 1
    # Below 2^31: steps are at most 2^28 together, their rests an eighth of that.
    positions = np.add.accumulate(steps, out=steps)
    if positions[-1] >= parameters:
        raise IndexRangeError("sparse update: a position lies outside the structure")
    values = np.repeat(head.scales, head.counts)
    if head.several:
        magnitudes = _look_up(_magnitudes(), symbols[count:])
        if size_far.size:
            magnitudes[size_far] += rans.unpack(raw, sizes_at, size_widths)
            if magnitudes.max() > MAX_LEVELS:
                raise CodecError(f"sparse update: a magnitude above {MAX_LEVELS}")
        with np.errstate(over="ignore"):
            values *= magnitudes
    if plan.signs:
        # The last bit of the number of changes so far.
        negative = np.add.accumulate((symbols[:count] & np.uint16(1)).astype(np.uint32))
    else:
        bits = np.frombuffer(raw, np.uint8)[signs_at // 8 : (sizes_at + 7) // 8]
        negative = np.unpackbits(bits)[signs_at % 8 :][:count].astype(np.uint32)
    negative <<= _SIGN_BIT
    values.view(np.uint32)[:] ^= negative
    require_finite(values, "sparse update")
    return positions, values


@lru_cache(1)
def _steps() -> NDArray[np.int32]:
    """Return the distance to the position before of the smallest gap of each class."""
    return (class_edges() + 1).astype(np.int32)


@lru_cache(1)
def _magnitudes() -> Vector:
    """Return the smallest magnitude of each class."""
    return (class_edges() + 1).astype(np.float32)


def _look_up(table: NDArray[N], classes: rans.Symbols) -> NDArray[N]:
    """Return the entries of classes, all of which are in the table; numpy converts slowly on the way."""
    return table.take(classes.astype(np.intp), mode="wrap")


def _far(classes: rans.Symbols) -> tuple[Integers, Integers]:
    """Return which classes have raw bits behind them, and how many."""
    if classes.size == 0 or classes.max() < EXACT:
        return _NONE, _NONE
    far = np.flatnonzero(classes >= np.uint16(EXACT))
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
