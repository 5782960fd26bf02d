"""Entropy coder for small integers: interleaved rANS over bits, both ends, and its probability tables.

Asymmetric numeral systems (Duda, arXiv 1311.2540), many coders side by side (Giesen, arXiv 1402.3392), so
that one row of symbols is a handful of numpy operations. Two things differ from the textbook:

- A state is renormalised by single bits into [2^24, 2^25), so it is written in 24 bits without waste.
- The coders start with 24 bits of payload each ("raw bits": signs and the like, which need no model)
  instead of a constant. The decoder finds them in its final states. A lane costs nothing as long as there
  are raw bits, so short messages can have many lanes, and few rows.

Tables are computed from a few bytes with integer arithmetic only: the same on every machine.

Message of S symbols in `lanes` lanes::

    lanes x 3 B state, big-endian | renormalisation bits, zero padding to a byte | rest of the raw bytes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import BombError, CodecError

Integers = NDArray[np.int64]
Symbols = NDArray[np.uint16]

PRECISION = 16
TOTAL = 1 << PRECISION
"""Frequencies of a table add up to this: rare symbols of a long tail cost 0.1 % at most."""
STATE_BITS = 24
"""States keep 8 bits more than the frequencies: their rounding costs less than 0.01 %."""
MAX_TABLES = 40
"""Tables of one message: a decoder holds up to 128 KiB for each."""
MAX_ALPHABET = 512
"""Symbols of one table; all tables together are numbered in 16 bits."""
_WORTH_FILLING = 10
"""A table of slots pays from 2^10 symbols on."""
_LOW = 1 << STATE_BITS
_PORTION = 1 << 14
"""Values packed at a time: their intermediate results fit a cache."""
_SIDE_BY_SIDE = 1 << 13
"""Lanes of all messages that are decoded side by side: their intermediate results fit a cache."""
_TABLES = 1 << 8
"""Tables of all messages that are decoded side by side: 32 MiB."""
_PADDING = 1.25
"""Symbols that are decoded per symbol of a message, where messages of unlike shapes stand side by side."""
_SEGMENT = 1 << 15
"""Bytes of a message that are looked at together: 6 bytes of memory for each."""
_GLANCE = 64
"""Rows after which a decoder looks whether there is anything left."""
_MANTISSA = np.uint32(23)
_EXPONENT = 127 + STATE_BITS - 1
"""Exponent bits of the float32 that is half of a full state."""
_ZERO = np.zeros(1, np.int64)
_TRUNCATED = "entropy-coded part: truncated"

_STEPS = 1 << 12
FRACTION = 20
"""Fractional bits of `log2` and of the argument of `exp2`."""
_UNIT = 1 << 30
# Every entry lies further from a tie than any C library errs: the tables are the same everywhere (tested).
_LOG = np.array([round(math.log2(1 + i / _STEPS) * (1 << FRACTION)) for i in range(_STEPS + 1)], np.int64)
_EXP = np.array([round(2.0 ** (-i / _STEPS) * _UNIT) for i in range(_STEPS + 1)], np.int64)


def log2(numbers: Integers) -> Integers:
    """Return the binary logarithm of integers in [1, 2^38), with 20 fractional bits, to about 1e-6."""
    exponent = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    mantissa = (numbers << 24) >> exponent
    place, rest = (mantissa >> 12) & (_STEPS - 1), mantissa & (_STEPS - 1)
    low = _LOG[place]
    result: Integers = (exponent << FRACTION) + low + ((_LOG[place + 1] - low) * rest >> 12)
    return result


def exp2_negative(numbers: Integers) -> Integers:
    """Return 2^30 x 2^-x for x >= 0 with 20 fractional bits."""
    whole, fraction = np.minimum(numbers >> FRACTION, 40), numbers & ((1 << FRACTION) - 1)
    place, rest = fraction >> 8, fraction & 0xFF
    high = _EXP[place]
    result: Integers = (high - ((high - _EXP[place + 1]) * rest >> 8)) >> whole
    return result


def normalise(weights: Integers) -> Integers:
    """Return frequencies that add up to TOTAL, each at least 1, in proportion to weights (>= 0, < 2^45)."""
    total = max(int(weights.sum()), 1)
    shift = max(total.bit_length() - 46, 0)
    total = max(total >> shift, 1)
    frequencies = 1 + (weights >> shift) * (TOTAL - weights.size) // total
    frequencies[int(np.argmax(weights))] += TOTAL - int(frequencies.sum())
    return frequencies


@dataclass(frozen=True, eq=False)
class Coded:
    """Which table every symbol of a message belongs to.

    Attributes:
        tables: frequencies, one int64 array per table, each adding up to TOTAL.
        counts: symbols per run; run i uses table owners[i].
        owners: table numbers, one per run.
        each: table numbers, one per symbol, where runs are short; counts and owners are not used then.
    """

    tables: list[Integers]
    counts: list[int]
    owners: list[int]
    each: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Refuse what the decoder could not hold."""
        if len(self.tables) > MAX_TABLES or max(table.size for table in self.tables) > MAX_ALPHABET:
            raise BombError(f"{len(self.tables)} tables, at most {MAX_TABLES} of {MAX_ALPHABET} symbols")

    @property
    def symbols(self) -> int:
        """Number of symbols."""
        return sum(self.counts) if self.each is None else self.each.size

    def of_symbols(self) -> NDArray[np.uint8]:
        """Return the table number of every symbol."""
        return np.repeat(np.array(self.owners, np.uint8), self.counts) if self.each is None else self.each


def encode(symbols: NDArray[np.integer], coded: Coded, lanes: int, raw: bytes) -> bytes:
    """Return the message.

    Args:
        symbols: integers, in the order of the runs of `coded`, each below the size of its table.
        coded: the tables; there is at least one symbol.
        lanes: coders side by side, 1 … number of symbols.
        raw: bytes that travel with the message; 3 per lane are free.
    """
    frequencies = np.concatenate(coded.tables).astype(np.uint32)
    starts = np.concatenate([np.cumsum(table) - table for table in coded.tables]).astype(np.uint32)
    least, limits = _renormalisation(frequencies)
    number = symbols.astype(np.uint16)
    if len(coded.tables) > 1:
        number += _offsets(coded).astype(np.uint16)[coded.of_symbols()]
    state = _states(raw[: 3 * lanes].ljust(3 * lanes, b"\0"))
    widths, values = np.empty(number.size, np.uint8), np.empty(number.size, np.uint16)
    one, precision = np.uint32(1), np.uint32(PRECISION)
    for at in range((number.size - 1) // lanes * lanes, -1, -lanes):
        row = number[at : at + lanes]
        now, size = state[: row.size], frequencies[row]
        width = least[row] + (now >= limits[row])
        widths[at : at + lanes] = width
        values[at : at + lanes] = now & ((one << width) - one)
        now = now >> width
        quotient = now // size
        state[: row.size] = (quotient << precision) + (now - quotient * size) + starts[row]
    return _state_bytes(state) + pack(values, widths) + raw[3 * lanes :]


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What a message is decoded with: its bytes, its tables, the number of its lanes."""

    data: bytes
    coded: Coded
    lanes: int

    @property
    def rows(self) -> int:
        """Symbols of the longest lane."""
        return -(-self.coded.symbols // self.lanes)


Decoded = tuple[Symbols, bytes]
"""Symbols and raw bytes, at least 3 per lane."""


def decode(data: bytes, coded: Coded, lanes: int) -> Decoded:
    """Return the symbols and the raw bytes (at least 3 per lane) of a message.

    Besides the result it holds 128 KiB per table, 60 bytes per lane and 1 MiB.

    Raises:
        CodecError: the message is truncated, or its padding is not zero.
    """
    (found,) = decode_all([Message(data, coded, lanes)])
    if isinstance(found, CodecError):
        raise found
    return found


def decode_all(messages: Sequence[Message]) -> list[Decoded | CodecError]:
    """Return for every message what `decode` returns or raises; none depends on another.

    Messages of like shapes are decoded side by side: an operation on 3000 lanes costs little more than one
    on 300.
    """
    found: list[Decoded | CodecError] = [CodecError(_TRUNCATED) for _ in messages]
    whole = [number for number, one in enumerate(messages) if len(one.data) >= 3 * one.lanes]
    for group in _groups(messages, whole):
        results = _side_by_side([messages[number] for number in group])
        for number, result in zip(group, results, strict=True):
            found[number] = result
    return found


def _groups(messages: Sequence[Message], numbers: list[int]) -> Iterator[list[int]]:
    """Yield messages to decode side by side: few enough for the cache, alike enough for little padding."""
    group: list[int] = []
    rows = used = tables = 0
    for number in sorted(numbers, key=lambda number: (messages[number].lanes, messages[number].rows)):
        one = messages[number]
        lanes = one.lanes * (len(group) + 1)
        rows, used = max(rows, one.rows), used + one.rows * one.lanes
        tables += len(one.coded.tables)
        if group and (lanes > _SIDE_BY_SIDE or tables > _TABLES or rows * lanes > _PADDING * used):
            yield group
            group, rows, used, tables = [], one.rows, one.rows * one.lanes, len(one.coded.tables)
        group.append(number)
    if group:
        yield group


def _side_by_side(messages: Sequence[Message]) -> list[Decoded | CodecError]:
    """Decode messages in lockstep, each in as many lanes as the widest of them has."""
    tables = _Tables.of(messages)
    shape = len(messages), max(one.lanes for one in messages)
    state = np.full(shape, _LOW, np.uint32)
    for own, one in zip(state, messages, strict=True):
        own[: one.lanes] = _states(one.data[: 3 * one.lanes])
    numbers = np.empty((max(one.rows for one in messages), *shape), np.uint16)
    bits = _Bits(messages, shape[1])
    # numpy is fastest where nothing is converted on the way: places are int64, all else uint32.
    first, place = np.zeros(shape, np.int64), np.empty(shape, np.int64)
    slot, other, width = (np.empty(shape, np.uint32) for _ in range(3))
    real = other.view(np.float32)
    mask, precision, one_bit, exponent = (np.uint32(n) for n in (TOTAL - 1, PRECISION, 1, _EXPONENT))
    for row, symbols in enumerate(numbers):
        tables.switch(first, row)
        np.bitwise_and(state, mask, out=slot)
        state >>= precision
        place[:] = slot
        place += first
        tables.look_up(place, symbols)
        place[:] = symbols
        state *= tables.frequencies.take(place, out=other, mode="wrap")
        state += slot
        state -= tables.starts.take(place, out=other, mode="wrap")
        # The exponent of a float32 says how many bits are missing; without the last bit it is exact.
        np.right_shift(state, one_bit, out=width)
        real[:] = width
        np.right_shift(real.view(np.uint32), _MANTISSA, out=width)
        np.subtract(exponent, width, out=width)
        state <<= width
        state |= bits.read(width, slot, other, place)
        if row % _GLANCE == 0 and bits.spent():
            break
    return [
        _result(one, numbers[:, place], tables.offsets[place], state[place], int(bits.at[place]))
        for place, one in enumerate(messages)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """The tables of messages side by side, numbered through, and where which one is used.

    The first one has one symbol, which moves no bit and changes no state: that of lanes without a symbol.

    Attributes:
        slots: number of the symbol of every slot, one table after the other. It takes a while to fill: None
            where a few symbols come with many tables, so that what messages cost depends on their symbols.
        firsts: first slot of every symbol.
        frequencies, starts: of every symbol; starts are within its table.
        offsets: per message, the number of its tables' first symbols.
        switches: by row, (message, lanes, first slot of their table from then on).
        each: messages whose tables are named symbol by symbol, and the first slots of these tables.
    """

    slots: Symbols | None
    firsts: Integers
    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    offsets: list[Integers]
    switches: dict[int, list[tuple[int, slice, int]]]
    each: list[tuple[int, Message, Integers]]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "_Tables":
        idle = np.array([TOTAL])
        # Messages that share a table also share its slots: more of it stays in the cache.
        tables = {id(table): table for one in messages for table in (idle, *one.coded.tables)}
        places = {key: place for place, key in enumerate(tables)}
        sizes = np.array([table.size for table in tables.values()])
        frequencies = np.concatenate(list(tables.values()))
        firsts = np.cumsum(frequencies) - frequencies
        worth = sum(one.coded.symbols for one in messages) >= len(tables) << _WORTH_FILLING
        owners = [np.array([places[id(table)] for table in one.coded.tables]) for one in messages]
        switches: dict[int, list[tuple[int, slice, int]]] = {}
        for place, (one, owner) in enumerate(zip(messages, owners, strict=True)):
            for row, lanes, table in _switches(one, owner.tolist()):
                switches.setdefault(row, []).append((place, lanes, table << PRECISION))
        return cls(
            slots=np.repeat(np.arange(frequencies.size, dtype=np.uint16), frequencies) if worth else None,
            firsts=firsts,
            frequencies=frequencies.astype(np.uint32),
            starts=(firsts & TOTAL - 1).astype(np.uint32),
            offsets=[(np.cumsum(sizes) - sizes)[owner] for owner in owners],
            switches=switches,
            each=[
                (place, one, owner << PRECISION)
                for place, (one, owner) in enumerate(zip(messages, owners, strict=True))
                if one.coded.each is not None
            ],
        )

    def look_up(self, slots: Integers, numbers: Symbols) -> None:
        """Write the numbers of the symbols that have these slots."""
        if self.slots is None:
            numbers[:] = np.searchsorted(self.firsts, slots, side="right") - 1
        else:
            self.slots.take(slots, out=numbers, mode="wrap")

    def switch(self, first: Integers, row: int) -> None:
        """Write the first slots of the tables of a row over those of the row before."""
        for place, lanes, slot in self.switches.get(row, ()):
            first[place, lanes] = slot
        for place, one, slots in self.each:
            some = slots[one.coded.of_symbols()[row * one.lanes : (row + 1) * one.lanes]]
            first[place, : some.size] = some
            first[place, some.size :] = 0


def _switches(message: Message, owners: list[int]) -> Iterator[tuple[int, slice, int]]:
    """Yield row, lanes and table wherever a lane changes its table; the idle one follows the last symbol."""
    coded, at = message.coded, 0
    if coded.each is not None:
        return
    for table, count in [*zip((owners[owner] for owner in coded.owners), coded.counts, strict=True), (0, 0)]:
        row, lane = divmod(at, message.lanes)
        yield row, slice(lane, message.lanes), table
        at += count
        if lane and (at > (row + 1) * message.lanes or count == 0):
            yield row + 1, slice(0, lane), table


class _Bits:
    """Renormalisation bits of messages side by side, read row by row.

    What lies behind the end of a message is read as zeros or as bits of another one; `at` then tells.
    """

    def __init__(self, messages: Sequence[Message], lanes: int) -> None:
        """Start at the first bit of every message."""
        self.parts = [memoryview(one.data)[3 * one.lanes :] for one in messages]
        self.limits = np.array([8 * len(part) for part in self.parts])
        self.at = np.zeros(len(messages), np.int64)
        # A row takes 2 bytes per lane at most.
        self.row = 16 * lanes
        self.size = max(min(max(map(len, self.parts)), _SEGMENT), self.row // 8) + 8
        self.whole = all(len(part) <= self.size for part in self.parts)
        self._fill()

    def _fill(self) -> None:
        """Look at the next `size` bytes of every message."""
        self.start = np.minimum(self.at, self.limits) >> 3
        parts = [
            bytes(part[start : start + self.size]).ljust(self.size, b"\0")
            for part, start in zip(self.parts, self.start.tolist(), strict=True)
        ]
        self.windows = _windows(b"".join(parts))
        self.shift = (np.arange(len(parts)) * self.size - self.start) << 3

    def read(
        self,
        width: NDArray[np.uint32],
        places: NDArray[np.uint32],
        window: NDArray[np.uint32],
        index: Integers,
    ) -> NDArray[np.uint32]:
        """Return the next `width` (at most 25) bits of every lane in `window`; the rest is scratch."""
        if not self.whole and (self.at - 8 * self.start > 8 * self.size - self.row).any():
            self._fill()
        # One long sum is faster than a sum for each of many short rows.
        np.add.accumulate(width.reshape(-1), out=places.reshape(-1))
        ends = places[:, -1].astype(np.int64)
        starts = np.concatenate([_ZERO, ends[:-1]])
        before = (self.at + self.shift - starts).astype(np.uint32)
        self.at += ends
        self.at -= starts
        places -= width
        places += before[:, None]
        np.right_shift(places, np.uint32(3), out=window)
        index[:] = window
        places &= np.uint32(7)
        self.windows.take(index, out=window, mode="clip")
        window <<= places
        # A shift by all 32 bits leaves nothing.
        np.subtract(np.uint32(32), width, out=places)
        window >>= places
        return window

    def spent(self) -> bool:
        """Whether all messages were shorter than what was read."""
        return bool((self.at > self.limits).all())


def _result(
    message: Message, numbers: Symbols, offsets: Integers, state: NDArray[np.uint32], bits: int
) -> Decoded | CodecError:
    """Return a message's symbols and raw bytes from the numbers of its lanes, or why there are none."""
    coded, lanes, data = message.coded, message.lanes, message.data
    if bits > 8 * (len(data) - 3 * lanes):
        return CodecError(_TRUNCATED)
    used = 3 * lanes + (bits + 7) // 8
    if bits % 8 and data[used - 1] & (0xFF >> bits % 8):
        return CodecError("entropy-coded part: padding that is not zero")
    symbols = numbers[: message.rows, :lanes].reshape(-1)[: coded.symbols]
    if coded.each is not None:
        symbols -= offsets.astype(np.uint16)[coded.each]
    else:
        at = 0
        for owner, count in zip(coded.owners, coded.counts, strict=True):
            symbols[at : at + count] -= np.uint16(offsets[owner])
            at += count
    return symbols, _state_bytes(state[:lanes]) + data[used:]


def pack(values: NDArray[np.unsignedinteger], widths: NDArray[np.unsignedinteger]) -> bytes:
    """Return the `widths` (at most 25) low bits of each value, high bit first, zero padding to a byte.

    Bits above the width must be zero. Values are taken in portions, so it needs no memory to speak of.
    """
    total = int(widths.sum(dtype=np.int64))
    words = np.zeros(total // 32 + 2, np.uint32)
    at = 0
    for first in range(0, values.size, _PORTION):
        width = widths[first : first + _PORTION].astype(np.int64)
        places = at + np.cumsum(width) - width
        at += int(width.sum())
        shifted = values[first : first + _PORTION].astype(np.uint64)
        shifted <<= (64 - (places & 31) - width).astype(np.uint64)
        start = int(places[0]) >> 5
        word, size = (places >> 5) - start, (at >> 5) + 2 - start
        # Sums of disjoint bits: below 2^32, exact in float64.
        high = np.bincount(word, (shifted >> np.uint64(32)).astype(np.float64), size)
        low = np.bincount(word + 1, (shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), size)
        words[start : start + size] |= (high + low).astype(np.uint32)
    return words.astype(">u4").tobytes()[: (total + 7) // 8]


def unpack(data: bytes, at: int, widths: Integers) -> Integers:
    """Return numbers of these widths (at most 25) from bit `at` on; the caller checked the length."""
    places = np.cumsum(widths) - widths + at
    window = _windows(data)[places >> 3] << (places & 7).astype(np.uint32)
    numbers: Integers = (window >> np.uint32(1) >> (31 - widths).astype(np.uint32)).astype(np.int64)
    return numbers


def _windows(data: bytes) -> NDArray[np.uint32]:
    """Return the 32 bits from every byte on, high bit first; zeros follow the data."""
    overlapping = np.ndarray((len(data) + 1,), ">u4", data + bytes(4), strides=(1,))
    return overlapping.astype(np.uint32)


def _states(data: bytes) -> NDArray[np.uint32]:
    """Return states of 3 bytes each."""
    part = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.uint32)
    states: NDArray[np.uint32] = part[:, 0] << np.uint32(16) | part[:, 1] << np.uint32(8) | part[:, 2]
    return states | np.uint32(_LOW)


def _state_bytes(states: NDArray[np.uint32]) -> bytes:
    return states.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()


def _offsets(coded: Coded) -> Integers:
    """Return the number of every table's first symbol when all tables are numbered through."""
    sizes = np.array([table.size for table in coded.tables], np.int64)
    return np.cumsum(sizes) - sizes


def _renormalisation(frequencies: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the smaller number of bits that a symbol moves out, and the state at which it moves one more."""
    floor = np.frexp(frequencies.astype(np.float64))[1].astype(np.int64) - 1
    bits = PRECISION - floor
    limits = np.where(bits > 0, frequencies.astype(np.int64) << (STATE_BITS - floor), 1 << 31)
    return np.maximum(bits - 1, 0).astype(np.uint32), limits.astype(np.uint32)
