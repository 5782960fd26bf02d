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
_WORTH_FILLING = 11
"""A table of slots pays from 2^11 symbols on."""
_LOW = 1 << STATE_BITS
_PORTION = 1 << 14
"""Values packed at a time: their intermediate results fit a cache."""

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
    least, limits = _renormalisation(frequencies, decoder=False)
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


def decode(data: bytes, coded: Coded, lanes: int) -> tuple[Symbols, bytes]:
    """Return the symbols and the raw bytes (at least 3 per lane) of a message.

    Besides the result it holds 1 byte per symbol, 8 per byte of data and 64 KiB per table (128 above 256
    symbols).

    Raises:
        CodecError: the message is truncated.
    """
    if len(data) < 3 * lanes:
        raise CodecError("entropy-coded part: truncated")
    frequencies = np.concatenate(coded.tables).astype(np.uint32)
    starts = np.concatenate([np.cumsum(table) - table for table in coded.tables]).astype(np.uint32)
    least, limits = _renormalisation(frequencies, decoder=True)
    slots = _slots(coded)
    begins = np.cumsum(frequencies) - frequencies
    offsets = _offsets(coded).astype(np.uint16)
    owner = coded.of_symbols() if len(coded.tables) > 1 else None
    state = _states(data[: 3 * lanes])
    view, limit = _windows(data[3 * lanes :]), 8 * (len(data) - 3 * lanes)
    total, at = coded.symbols, 0
    symbols = np.empty(total, np.uint16)
    mask, precision, one, last = np.uint32(TOTAL - 1), np.uint32(PRECISION), np.uint32(1), np.uint32(31)
    for first in range(0, total, lanes):
        row = slice(first, min(first + lanes, total))
        now = state[: row.stop - first]
        slot = now & mask
        if slots is None:
            # The last table and symbol that begin at or before the slot; each table has TOTAL slots.
            place = slot if owner is None else (owner[row].astype(np.uint32) << precision) + slot
            number = np.searchsorted(begins, place, side="right") - 1
            symbols[row] = number if owner is None else number - offsets[owner[row]]
        elif owner is None:
            number = slots[slot]
            symbols[row] = number
        else:
            own = owner[row]
            symbol = slots[(own.astype(np.uint32) << precision) + slot]
            symbols[row] = symbol
            number = offsets[own] + symbol
        now = frequencies[number] * (now >> precision) + slot - starts[number]
        width = least[number] + (now < limits[number])
        ends = np.cumsum(width, dtype=np.int64)
        places = ends - width
        places += at
        at += int(ends[-1])
        if at > limit:
            raise CodecError("entropy-coded part: truncated")
        window = view[places >> 3] << (places & 7).astype(np.uint32)
        state[: now.size] = now << width | window >> one >> (last - width)
    used = 3 * lanes + (at + 7) // 8
    if at % 8 and data[used - 1] & (0xFF >> at % 8):
        raise CodecError("entropy-coded part: padding that is not zero")
    return symbols, _state_bytes(state) + data[used:]


def _slots(coded: Coded) -> NDArray[np.unsignedinteger] | None:
    """Return the symbol of every slot, one table after the other; None if that is not worth it.

    It takes a while to fill, so that a few symbols with many tables are searched instead: what a message
    costs to decode depends on its symbols, not on how many tables it brings.
    """
    tables = coded.tables
    if coded.symbols < len(tables) << _WORTH_FILLING:
        return None
    kind = np.uint8 if max(table.size for table in tables) <= 1 << 8 else np.uint16
    slots: NDArray[np.unsignedinteger] = np.empty(len(tables) << PRECISION, kind)
    for number, table in enumerate(tables):
        slots[number << PRECISION :][:TOTAL] = np.repeat(np.arange(table.size, dtype=kind), table)
    return slots


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


def _renormalisation(
    frequencies: NDArray[np.uint32], *, decoder: bool
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the smaller number of bits that a symbol moves, and the state at which it moves one more."""
    floor = np.frexp(frequencies.astype(np.float64))[1].astype(np.int64) - 1
    bits = PRECISION - floor
    if decoder:
        limits = np.where(bits > 0, 1 << (STATE_BITS + 1 - bits), 0)
    else:
        limits = np.where(bits > 0, frequencies.astype(np.int64) << (STATE_BITS - floor), 1 << 31)
    return np.maximum(bits - 1, 0).astype(np.uint32), limits.astype(np.uint32)
