"""Facts about the bytes of updates: how many there are, and which are refused."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from liberatai_core import rans
from liberatai_core.cursor import varint
from liberatai_core.errors import (
    BombError,
    CodecError,
    IndexOrderError,
    IndexRangeError,
    LiberataiError,
    NonFiniteError,
)
from liberatai_core.sparsifier import codec, stream, tables


def sparse(positions: Any, levels: Any, counts: Any = None, scales: Any = (1.0,)) -> codec.Sparse:
    return codec.Sparse(
        np.array(positions, np.int64),
        np.array(levels, np.int16),
        np.array([len(positions)] if counts is None else counts, np.int64),
        np.array(scales, np.float32),
    )


def laplace(size: int, density: float, levels: int, seed: int = 0) -> codec.Sparse:
    """The largest of independent values, on a grid of `levels` magnitudes."""
    values = np.random.default_rng(seed).laplace(size=size)
    threshold = np.quantile(np.abs(values), 1 - density)
    steps = np.clip(np.rint(np.abs(values) / 6 * levels), 1, levels)
    levels_of = np.where(np.abs(values) >= threshold, np.where(values < 0, -steps, steps), 0)
    positions = np.flatnonzero(levels_of)
    return sparse(positions, levels_of[positions])


def clustered(size: int, seed: int = 0) -> codec.Sparse:
    """Bursts of neighbours with one sign, as a trained difference has them."""
    generator = np.random.default_rng(seed)
    starts = np.sort(generator.choice(size // 16, size // 800, replace=False)) * 16
    lengths = generator.integers(1, 13, starts.size)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    return sparse(positions, np.repeat(generator.choice([-1, 1], starts.size), lengths))


def entropy_bytes(difference: codec.Sparse, parameters: int) -> float:
    """Order-0 entropy of the level of every parameter, zeros included."""
    counts = np.bincount(difference.levels + 300)
    counts[300] = parameters - difference.levels.size
    share = counts[counts > 0] / parameters
    return float(-(share * np.log2(share)).sum()) * parameters / 8


def require_exact(difference: codec.Sparse, parameters: int) -> bytes:
    data = codec.encode(difference, parameters)
    positions, values = codec.decode(data, parameters)
    np.testing.assert_array_equal(positions, difference.positions)
    np.testing.assert_array_equal(values.view(np.uint32), difference.values().view(np.uint32))
    return data


# --- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "levels", "above"),
    [(0.3, 1, 1.002), (0.1, 1, 1.002), (0.1, 3, 1.003), (0.01, 1, 1.002), (0.001, 1, 1.0075)],
)
def test_bytes_of_independent_positions_are_near_the_entropy(
    density: float, levels: int, above: float
) -> None:
    size = 1_000_000
    difference = laplace(size, density, levels)
    assert len(require_exact(difference, size)) <= above * entropy_bytes(difference, size)


@pytest.mark.parametrize(("levels", "above"), [(15, 1.002), (255, 1.005)])
def test_dense_bytes_are_near_the_entropy(levels: int, above: float) -> None:
    size = 200_000
    difference = laplace(size, 1.0, levels)
    assert len(require_exact(difference, size)) <= above * entropy_bytes(difference, size)


@pytest.mark.parametrize("seed", range(4))
def test_independent_signs_stay_raw(seed: int) -> None:
    """By chance some are a few bytes shorter with a model, but raw signs pay for the coder's lanes."""
    generator = np.random.default_rng(seed)
    size = 100_000
    levels = generator.choice([-2, -1, 1, 2], size)
    # One change of signs less in eighty than by chance.
    levels = np.where(generator.random(size) < 0.012, np.sign(np.roll(levels, 1)) * np.abs(levels), levels)
    difference = sparse(range(size), levels)
    assert len(require_exact(difference, size)) <= 1.001 * entropy_bytes(difference, size)


def test_a_few_larger_magnitudes_cost_next_to_nothing() -> None:
    """Merged deltas are ones with a few twos and threes."""
    size = 1_000_000
    difference = laplace(size, 0.01, 1)
    levels = difference.levels.copy()
    levels[::50] *= 2
    levels[::500] = 3
    merged = sparse(difference.positions, levels)
    assert len(require_exact(merged, size)) <= 1.005 * entropy_bytes(merged, size)


def test_clusters_of_one_sign_cost_far_less_than_their_entropy_as_independent_values() -> None:
    size = 400_000
    difference = clustered(size)
    assert len(require_exact(difference, size)) <= 0.4 * entropy_bytes(difference, size)


def test_tensors_of_unlike_densities_are_coded_as_if_they_came_alone() -> None:
    size = 500_000
    parts = [laplace(size, density, 1, seed) for seed, density in enumerate((0.1, 0.001, 0.03))]
    difference = sparse(
        np.concatenate([part.positions + number * size for number, part in enumerate(parts)]),
        np.concatenate([part.levels for part in parts]),
        counts=[part.levels.size for part in parts],
        scales=[0.5, 1.0, 0.25],
    )
    together = len(require_exact(difference, 3 * size))
    assert together <= sum(len(codec.encode(part, size)) for part in parts) + 8
    one_group = sparse(difference.positions, difference.levels)
    assert len(require_exact(one_group, 3 * size)) <= 1.02 * together


def test_the_head_of_a_sparse_stream_is_small() -> None:
    """Kind, parameters, count, flags, scale: 9 bytes; 24 raw bits fit the coder's state."""
    assert len(require_exact(sparse([123_456], [-1]), 1_000_000)) <= 12


# --- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "parameters"),
    [
        (sparse([], [], counts=[], scales=[]), 1),
        (sparse([0], [1]), 1),
        (sparse([0], [-255]), 1 << 28),
        (sparse([(1 << 28) - 1], [255]), 1 << 28),
        (sparse([0, (1 << 28) - 1], [1, -1]), 1 << 28),
        (sparse(range(1000), [1] * 1000), 1000),
        (sparse(range(1000), [-3, 7] * 500, counts=[1] * 1000, scales=[0.5] * 1000), 1000),
        (sparse(range(0, 100_000, 100), [1, -1] * 500), 100_000),
        (sparse([*range(500), 99_999], [1] * 500 + [-1]), 100_000),
        (laplace(3000, 0.5, 255), 3000),
        (clustered(60_000), 60_000),
    ],
)
def test_every_shape_is_restored_exactly(difference: codec.Sparse, parameters: int) -> None:
    require_exact(difference, parameters)


def test_a_dense_stream_holds_every_value_and_no_position() -> None:
    values = np.random.default_rng(0).normal(size=700).astype(np.float32)
    data = codec.encode_dense(values)
    assert data[0] == codec.DENSE
    assert len(data) == 4 * 700 + 3
    positions, again = codec.decode(data, 700)
    np.testing.assert_array_equal(positions, np.arange(700))
    np.testing.assert_array_equal(again.view(np.uint32), values.view(np.uint32))


def test_a_dense_stream_of_nothing_or_of_nonsense_is_refused() -> None:
    with pytest.raises(NonFiniteError):
        codec.encode_dense(np.array([1, np.inf], np.float32))
    with pytest.raises(CodecError):
        codec.encode_dense(np.empty(0, np.float32))
    data = codec.encode_dense(np.ones(3, np.float32))
    with pytest.raises(NonFiniteError):
        codec.decode(data[:-4] + np.float32(np.nan).tobytes(), 3)


# --- bytes from anywhere -----------------------------------------------------------------------------


def streams() -> dict[str, tuple[bytes, int]]:
    few = sparse([0, 3, 4, 9, 40], [1, -1, 2, -3, 1], counts=[2, 3], scales=[0.5, 2.0])
    many = sparse(np.flatnonzero(np.arange(64) % 5), (np.arange(51) % 7 - 3) * 2 + 1)
    uneven = sparse([*range(0, 400, 2), *range(400, 20_000, 98)], [1] * 200 + [-1, 1] * 100)
    return {
        "few": (codec.encode(few, 50), 50),
        "many": (codec.encode(many, 64), 64),
        "uneven": (codec.encode(uneven, 20_000), 20_000),
        "empty": (codec.encode(sparse([], [], counts=[], scales=[]), 50), 50),
        "full": (codec.encode(sparse(range(20), [1, -2] * 10), 20), 20),
        "plain": (codec.encode_plain(np.array([1, 7]), np.array([0.1, -3], np.float32), 50), 50),
        "dense": (codec.encode_dense(np.array([0.1, 0, -3], np.float32)), 3),
    }


def test_the_examples_use_every_part_of_the_format() -> None:
    flags = [data[4] for name, (data, _) in streams().items() if name in {"few", "many", "full"}]
    assert any(flag & stream.MAGNITUDES for flag in flags)
    uneven = streams()["uneven"][0][6]
    assert uneven & stream.SEVERAL
    assert uneven & stream.SIGNS


@pytest.mark.parametrize("name", streams())
def test_every_truncation_and_extension_is_refused(name: str) -> None:
    data, parameters = streams()[name]
    for size in range(len(data)):
        with pytest.raises(LiberataiError):
            codec.decode(data[:size], parameters)
    for tail in (b"\0", b"\xff", data, bytes(1000)):
        with pytest.raises(LiberataiError):
            codec.decode(data + tail, parameters)


@pytest.mark.parametrize("name", streams())
def test_every_flipped_bit_is_refused_or_gives_a_valid_update(name: str) -> None:
    data, parameters = streams()[name]
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            positions, values = codec.decode(bytes(damaged), parameters)
        except LiberataiError:
            continue
        assert positions.size == values.size <= parameters
        assert (np.diff(positions) > 0).all()
        assert positions.size == 0 or 0 <= positions[0] <= positions[-1] < parameters
        assert np.isfinite(values).all()


def test_random_bytes_are_refused_or_valid_quickly() -> None:
    generator = np.random.default_rng(7)
    start = time.perf_counter()
    for _ in range(3000):
        body = generator.integers(0, 256, generator.integers(0, 60), dtype=np.uint8).tobytes()
        flags = generator.integers(0, 32)
        data = bytes([codec.SPARSE, 100, generator.integers(0, 101), flags, 0, 60]) + body
        try:
            positions, _ = codec.decode(data, 100)
        except LiberataiError:
            continue
        assert positions.size <= 100
    assert time.perf_counter() - start < 20


LONGEST = b"\xff\xff\xff\xff\x0f"
"""2^32 - 1 as a varint."""
ONE = b"\x80\x3f"
"""Scale 1."""
LAST = b"\x09\x1c" + b"\xff" * 28 + b"\x00"
"""A table in which only the last of 29 classes occurs: gaps of 48 and more."""


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CodecError),
        (b"\x07\x32\x00", CodecError),
        (b"\x01\x32\x00", CodecError),  # the Golomb code of earlier versions
        (b"\x03\x33\x00", CodecError),  # other parameter count
        (b"\x04\x33" + bytes(204), CodecError),
        (b"\x04\x32" + bytes(199), CodecError),
        (b"\x04\x32" + bytes(201), CodecError),
        (b"\x03\xb2\x00\x00", CodecError),  # padded varint
        (b"\x03\xff\xff\xff\xff\xff\x01", CodecError),  # varint too long
        (b"\x03\x32\x00\x00", CodecError),  # something behind nothing
        (b"\x03\x32\x33", BombError),  # 51 of 50
        (b"\x03\x32" + LONGEST, BombError),
        (b"\x02\x32" + LONGEST, BombError),
        (b"\x03\x32\x05\x58" + ONE * 6, BombError),  # 6 groups for 5
        (b"\x03\x32\x05" + LONGEST, BombError),
        (b"\x03\x32\x05\x18\x05" + ONE * 2, CodecError),  # 5 of 5 in the first of two groups
        (b"\x03\x32\x05\x18" + LONGEST + ONE * 2, CodecError),
        (b"\x03\x32\x05\x18\x00" + ONE * 2, CodecError),
        (b"\x03\x32\x05\x08\x80\x7f", NonFiniteError),
        (b"\x03\x32\x05\x08\xc0\x7f", NonFiniteError),
        (b"\x03\x32\x05\x08\x80\xbf", CodecError),  # negative scale
        (b"\x03\x32\x05\x08\x00\x00", CodecError),  # zero scale
        (b"\x03\x32\x05\x0c" + ONE + b"\x00\x01", CodecError),  # implied, but several
        (b"\x03\x32\x05\x04" + ONE + b"\x04", BombError),  # 6 tables for 5
        (b"\x03\x32\x05\x04" + ONE + LONGEST, BombError),
        (b"\x03\x32\x05\x04" + ONE + b"\x00\x05", CodecError),  # 5 of 5 in the first of two
        (b"\x03\x32\x05\x00" + ONE + b"\x0a\x00", CodecError),  # unknown law
        (b"\x03\x32\x05\x00" + ONE + b"\x09\x1d" + bytes(30), IndexRangeError),  # classes beyond 50
        (b"\x03\x32\x05\x00" + ONE + b"\x09\x01\xff\xff", CodecError),  # empty table
        (b"\x03\x32\x05\x0a" + ONE + b"\x09\x30" + bytes(49), IndexRangeError),  # magnitudes beyond 255
        (b"\x03\x32\x05\x09" + ONE + b"\x80\x80\x80\x00", BombError),  # no lanes
        (b"\x03\x32\x05\x09" + ONE + b"\x80\x80\x80\x06", BombError),  # 6 lanes for 5 symbols
        (b"\x03\x32\x05\x09" + ONE + b"\x80\x80\x80" + LONGEST, BombError),
        (b"\x03\x32\x05\x08" + ONE + bytes(100), BombError),
        (b"\x03\x32\x05\x08" + ONE + b"\x00\x00", CodecError),  # no state
        (b"\x03\x32\x05\x00" + ONE + LAST + b"\x00\xff\xff" + bytes(9), IndexRangeError),  # 5 gaps of 48
    ],
)
def test_hostile_streams_are_refused_with_their_code(data: bytes, error: type[LiberataiError]) -> None:
    with pytest.raises(error) as caught:
        codec.decode(data, 50)
    assert type(caught.value) is error


def crafted(gap: int, rest: int, magnitude: int, magnitude_rest: int) -> bytes:
    """A stream of one non-zero among 50, with these classes and the rests behind them."""
    table = bytes([9, 47]) + bytes(48)
    plan = tables.Plan([1], [b"\x08\x40"], [()], signs=False)
    values, widths = [0, magnitude_rest], [1, 4]
    if gap >= 16:
        values, widths = [rest, *values], [gap // 8 - 1, *widths]
    raw = rans.pack(np.array(values, np.uint32), np.array(widths, np.uint32))
    message = rans.encode(np.array([gap, magnitude]), tables.coded_by(plan, table, 50, 1), 1, raw)
    return b"\x03\x32\x01\x02" + ONE + b"\x08\x40" + table + message


def test_a_gap_or_magnitude_that_its_rest_carries_too_far_is_refused() -> None:
    positions, values = codec.decode(crafted(28, 1, 47, 14), 50)
    assert (positions.tolist(), values.tolist()) == ([49], [255])
    with pytest.raises(IndexRangeError):
        codec.decode(crafted(28, 2, 47, 14), 50)
    with pytest.raises(CodecError, match="magnitude"):
        codec.decode(crafted(28, 1, 47, 15), 50)


def test_plain_streams_are_checked_for_order_range_and_values() -> None:
    def plain(positions: Any, values: Any) -> bytes:
        head = bytes([codec.PLAIN, 50, len(positions)])
        return head + np.array(positions, "<u4").tobytes() + np.array(values, "<f4").tobytes()

    for positions, error in (
        ([3, 2], IndexOrderError),
        ([3, 3], IndexOrderError),
        ([3, 50], IndexRangeError),
    ):
        with pytest.raises(error):
            codec.decode(plain(positions, [1, 1]), 50)
    with pytest.raises(NonFiniteError):
        codec.decode(plain([3], [np.nan]), 50)


def test_padding_that_is_not_zero_is_refused() -> None:
    data = crafted(0, 0, 0, 0)
    state = np.frombuffer(data[-3:], np.uint8).copy()
    codec.decode(data, 50)
    refused = 0
    for byte in range(256):
        state[2] = byte
        try:
            codec.decode(data[:-3] + state.tobytes(), 50)
        except CodecError as fault:
            refused += "padding" in str(fault)
    assert refused > 200


def test_a_scale_that_overflows_with_its_level_is_refused() -> None:
    big = codec.round_scale(3e38)
    with pytest.raises(NonFiniteError):
        codec.decode(codec.encode(sparse([1], [9], scales=[big]), 50), 50)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (sparse([3, 2], [1, 1]), IndexOrderError),
        (sparse([2, 2], [1, 1]), IndexOrderError),
        (sparse([2, 50], [1, 1]), IndexRangeError),
        (sparse([-1, 2], [1, 1]), IndexRangeError),
        (sparse([1, 2], [1, 0]), CodecError),
        (sparse([1, 2], [1, 256]), CodecError),
        (sparse([1, 2], [1, -32768]), CodecError),
        (sparse([1, 2], [1, 1], counts=[1]), CodecError),
        (sparse([1, 2], [1, 1], counts=[1, 1]), CodecError),
        (sparse([1, 2], [1, 1], scales=[0.1]), CodecError),  # more than 8 significant bits
        (sparse([1, 2], [1, 1], scales=[-1]), CodecError),
        (sparse([1, 2], [1, 1], scales=[np.inf]), NonFiniteError),
    ],
)
def test_the_encoder_refuses_what_the_decoder_would(wrong: Any, error: type[LiberataiError]) -> None:
    with pytest.raises(error):
        codec.encode(wrong, 50)


def test_scales_are_rounded_to_eight_significant_bits() -> None:
    assert codec.round_scale(1.0) == 1
    assert codec.round_scale(0.0) == 0
    assert abs(codec.round_scale(0.1) / 0.1 - 1) <= 2**-8
    assert np.isfinite(codec.round_scale(float(np.finfo(np.float32).max)))


# --- many at a time ----------------------------------------------------------------------------------


def outcome(found: Any) -> tuple[Any, ...]:
    if isinstance(found, LiberataiError):
        return type(found), str(found)
    positions, values = found
    return positions.astype(np.int64).tobytes(), values.tobytes()


def alone(data: bytes, parameters: int) -> tuple[Any, ...]:
    try:
        return outcome(codec.decode(data, parameters))
    except LiberataiError as error:
        return outcome(error)


@pytest.mark.parametrize("seed", range(3))
def test_many_streams_say_what_each_says_alone_and_a_bad_one_spoils_no_other(seed: int) -> None:
    """Sound, damaged, cut and foreign streams of all shapes, decoded together in any order."""
    generator = np.random.default_rng(seed)
    pool = [*streams().values()]
    for density in (1.0, 0.3, 0.05):
        for levels in (1, 3, 255):
            pool += [(codec.encode(laplace(size, density, levels, seed), size), size) for size in (700, 9000)]
    asked = []
    for data, parameters in pool * 3:
        damaged = bytearray(data)
        match generator.integers(0, 4):
            case 0:
                damaged[generator.integers(0, len(data))] ^= 1 << generator.integers(0, 8)
            case 1:
                del damaged[generator.integers(0, len(data)) :]
            case 2 if len(data) > 60:
                damaged[40:] = generator.bytes(len(data) - 40)
        asked.append((bytes(damaged), parameters))
    asked += [(asked[0][0], 7), (b"", 50)]
    generator.shuffle(asked)
    found = codec.decode_all(asked)
    wanted = [alone(*one) for one in asked]
    assert [outcome(one) for one in found] == wanted
    refused = sum(isinstance(one, LiberataiError) for one in found)
    assert 10 < refused < len(found) - 10


def test_nothing_to_decode_is_nothing() -> None:
    assert codec.decode_all([]) == []


def by_the_book(data: bytes, coded: rans.Coded, lanes: int) -> tuple[list[int], bytes]:
    """Decode a message symbol by symbol, as the head of `rans` describes it."""
    states = [1 << 24 | int.from_bytes(data[3 * lane : 3 * lane + 3], "big") for lane in range(lanes)]
    rest, at, symbols = data[3 * lanes :], 0, []
    bits = "".join(f"{byte:08b}" for byte in rest)
    for number, owner in enumerate(coded.of_symbols().tolist()):
        table, lane = coded.tables[owner].tolist(), number % lanes
        slot, symbol = states[lane] % rans.TOTAL, 0
        while slot >= table[symbol]:
            slot -= table[symbol]
            symbol += 1
        states[lane] = table[symbol] * (states[lane] // rans.TOTAL) + slot
        symbols.append(symbol)
        while states[lane] < 1 << 24:
            states[lane] = 2 * states[lane] + int(bits[at])
            at += 1
    heads = b"".join((state - (1 << 24)).to_bytes(3, "big") for state in states)
    return symbols, heads + rest[(at + 7) // 8 :]


@pytest.mark.parametrize("lanes", [1, 3, 50, 700])
def test_messages_side_by_side_say_what_the_book_says(lanes: int) -> None:
    """Messages of one to three tables, one of which has one symbol only, and with a table per symbol."""
    generator = np.random.default_rng(lanes)
    tables = [rans.normalise(generator.integers(0, 1000, size)) for size in (1, 2, 300)]
    messages, wanted = [], []
    for number in range(6):
        counts = [int(n) for n in generator.integers(1, 300, 4)]
        owners = [2, 0, 1, 2]
        each = np.repeat(np.array(owners, np.uint8), counts)
        if number % 3 == 2:
            generator.shuffle(each)
            coded = rans.Coded(tables, counts, owners, each)
        else:
            coded = rans.Coded(tables, counts, owners)
        own = min(lanes + number % 2, coded.symbols)
        drawn = [generator.choice(tables[o].size, p=tables[o] / rans.TOTAL) for o in each.tolist()]
        data = rans.encode(np.array(drawn), coded, own, generator.bytes(1000))
        messages.append(rans.Message(data, coded, own))
        wanted.append((drawn, by_the_book(data, coded, own)[1]))
        assert by_the_book(data, coded, own)[0] == drawn
    short = rans.Message(messages[0].data[: 3 * messages[0].lanes + 1], messages[0].coded, messages[0].lanes)
    found: list[Any] = rans.decode_all([*messages, short])
    assert isinstance(found.pop(), CodecError)
    assert [(symbols.tolist(), raw) for symbols, raw in found] == wanted


# --- memory ------------------------------------------------------------------------------------------


def peak_of(data: bytes, parameters: int) -> int:
    tracemalloc.start()
    try:
        codec.decode(data, parameters)
    except LiberataiError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("levels", [1, 15, 255])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_the_decoder_holds_at_most_forty_bytes_per_parameter(density: float, levels: int) -> None:
    size = 300_000
    data = codec.encode(laplace(size, density, levels), size)
    assert peak_of(data, size) <= 40 * size + 8 * len(data) + (6 << 20)


def test_a_short_stream_of_many_values_stays_in_bounds() -> None:
    """One class of gaps and signs that hardly change: millions of values in few bytes are legal."""
    size = 1_000_000
    data = codec.encode(sparse(range(size), [1] * size), size)
    assert len(data) <= 8000
    assert peak_of(data, size) <= 40 * size + (6 << 20)
    huge = bytes([codec.SPARSE]) + varint(1 << 28) + varint(1 << 28)
    assert peak_of(huge + b"\x08" + ONE + bytes(1000), 1 << 28) <= 6 << 20


# --- the entropy coder -------------------------------------------------------------------------------


def test_logarithms_are_the_same_with_every_mathematical_library() -> None:
    """No table entry is rounded from near a tie, so an error in the last place changes nothing."""
    steps = np.arange(1 << 12)
    for exact in (np.log2(1 + steps / 4096) * 2**20, 2.0 ** (-steps / 4096) * 2**30):
        ties = np.abs(exact - np.floor(exact) - 0.5)
        assert ties.min() > 1e-5


def test_integer_logarithm_and_power_are_near_the_real_ones() -> None:
    numbers = np.unique(
        np.concatenate([np.arange(1, 5000), np.geomspace(1, 2**38 - 1, 5000).astype(np.int64)])
    )
    np.testing.assert_allclose(rans.log2(numbers) / 2**20, np.log2(numbers), atol=3e-6)
    powers = np.arange(0, 40 << 20, 12_345)
    np.testing.assert_allclose(rans.exp2_negative(powers), 2.0 ** (30 - powers / 2**20), rtol=1e-6, atol=1)


@pytest.mark.parametrize("weights", [[1], [0, 0, 0], [1 << 44] * 416, [0] * 400 + [1], [1, 10**12]])
def test_frequencies_add_up_and_leave_room_for_every_symbol(weights: list[int]) -> None:
    frequencies = rans.normalise(np.array(weights, np.int64))
    assert frequencies.sum() == rans.TOTAL
    assert frequencies.min() >= 1


@pytest.mark.parametrize("lanes", [1, 7, 64])
@pytest.mark.parametrize("raw_size", [0, 1, 100, 5000])
def test_messages_of_several_tables_and_raw_bytes_are_restored(lanes: int, raw_size: int) -> None:
    generator = np.random.default_rng(lanes + raw_size)
    tables = [rans.normalise(generator.integers(0, 1000, size)) for size in (1, 2, 300)]
    coded = rans.Coded(tables, [30, 200, 50, 500], [0, 2, 1, 2])
    parts = [
        generator.choice(tables[owner].size, count, p=tables[owner] / rans.TOTAL)
        for count, owner in zip(coded.counts, coded.owners, strict=True)
    ]
    symbols, raw = np.concatenate(parts), generator.bytes(raw_size)
    data = rans.encode(symbols, coded, lanes, raw)
    again, rest = rans.decode(data, coded, lanes)
    np.testing.assert_array_equal(again, symbols)
    assert rest == raw.ljust(3 * lanes, b"\0")
    with pytest.raises(CodecError):
        rans.decode(data[: 3 * lanes + 100], coded, lanes)


def test_lanes_are_free_where_there_are_raw_bytes() -> None:
    generator = np.random.default_rng(0)
    table = rans.normalise(np.array([5, 3, 1]))
    symbols, raw = generator.choice(3, 20_000, p=table / rans.TOTAL), generator.bytes(3000)
    coded = rans.Coded([table], [20_000], [0])
    entropy = 20_000 * -(table / rans.TOTAL * np.log2(table / rans.TOTAL)).sum() / 8 + 3000
    for lanes in (1, 1000):
        assert len(rans.encode(symbols, coded, lanes, raw)) <= 1.005 * entropy


def test_more_tables_than_the_decoder_holds_are_refused() -> None:
    table = rans.normalise(np.ones(2, np.int64))
    with pytest.raises(BombError):
        rans.Coded([table] * 41, [1] * 41, list(range(41)))


@pytest.mark.parametrize("size", [0, 1, 5, 40_000])
def test_packed_numbers_are_unpacked(size: int) -> None:
    generator = np.random.default_rng(size)
    widths = generator.integers(0, 26, size)
    values = generator.integers(0, 1 << widths)
    data = rans.pack(values.astype(np.uint32), widths.astype(np.uint32))
    assert len(data) == (int(widths.sum()) + 7) // 8
    np.testing.assert_array_equal(rans.unpack(data, 0, widths), values)
    if size:
        at = int(widths[0])
        np.testing.assert_array_equal(rans.unpack(data, at, widths[1:]), values[1:])
