"""Facts about the sparsifier: what is sent, what stays, which bytes are refused."""

import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import (
    BombError,
    CodecError,
    IndexOrderError,
    IndexRangeError,
    LiberataiError,
    NonFiniteError,
    StructureError,
)
from liberatai_core.sparsifier import codec, quantile, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector

STRUCTURE = Structure(
    family="cnn",
    params={"width": 8},
    tensors=(
        Tensor("conv1.weight", (16, 1, 3, 3)),
        Tensor("conv1.bias", (16,)),
        Tensor("fc.weight", (64, 256)),
        Tensor("fc.bias", (64,)),
    ),
)
N = STRUCTURE.parameters


def flat(size: int) -> Structure:
    return Structure(family="mlp", params={}, tensors=(Tensor("w", (size,)),))


def noise(size: int = N, seed: int = 0, law: str = "laplace") -> Vector:
    return np.asarray(getattr(np.random.default_rng(seed), law)(size=size), np.float32)


def sparse(positions: Any, levels: Any, counts: Any = None, scales: Any = (1.0,)) -> codec.Sparse:
    return codec.Sparse(
        np.array(positions, np.int64),
        np.array(levels, np.int16),
        np.array([len(positions)] if counts is None else counts, np.int64),
        np.array(scales, np.float32),
    )


def entropy_bytes(sparse_difference: codec.Sparse, parameters: int) -> float:
    """Order-0 entropy of the level of every parameter, zeros included."""
    counts = np.bincount(sparse_difference.levels + 300)
    counts[300] = parameters - sparse_difference.levels.size
    share = counts[counts > 0] / parameters
    return float(-(share * np.log2(share)).sum()) * parameters / 8


# --- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01, 0.0005])
@pytest.mark.parametrize("levels", [None, 1, 3, 15, 255])
def test_sent_plus_residual_is_the_difference_bit_for_bit(density: float, levels: Any) -> None:
    difference = noise()
    state, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, density, levels=levels)
    sent = top_k.densify(update, STRUCTURE)
    assert sent.dtype == np.float32
    assert 1 <= np.count_nonzero(sent) <= round(density * N)
    np.testing.assert_array_equal((sent + state.residual).view(np.uint32), difference.view(np.uint32))
    exact = sent.astype(np.float64) + state.residual.astype(np.float64)
    np.testing.assert_array_equal(exact, difference.astype(np.float64))


def test_the_largest_values_are_sent_and_only_they() -> None:
    difference = noise()
    _, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 0.01)
    sent = np.flatnonzero(top_k.densify(update, STRUCTURE))
    wanted = np.sort(np.argsort(-np.abs(difference), kind="stable")[: round(0.01 * N)])
    np.testing.assert_array_equal(sent, wanted)


def test_of_equal_values_the_lowest_positions_are_sent() -> None:
    difference = np.where(np.arange(N) % 3 == 1, np.float32(-0.5), np.float32(0.5))
    _, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 10 / N)
    np.testing.assert_array_equal(np.flatnonzero(top_k.densify(update, STRUCTURE)), np.arange(10))


def test_what_was_not_sent_is_sent_later() -> None:
    state, sum_sent = top_k.init(N), np.zeros(N)
    difference = noise()
    for number in range(60):
        state, update = top_k.sparsify(state, difference if number == 0 else 0 * difference, STRUCTURE, 0.1)
        sum_sent += top_k.densify(update, STRUCTURE)
    assert state.rounds == 60
    assert np.abs(sum_sent - difference).max() < 0.02 * np.abs(difference).max()


def test_decay_shrinks_an_old_residual() -> None:
    state = top_k.State(np.full(N, 0.5, np.float32))
    after, update = top_k.sparsify(state, np.zeros(N, np.float32), STRUCTURE, 0.5, decay=0.5)
    np.testing.assert_array_equal(
        top_k.densify(update, STRUCTURE) + after.residual, np.full(N, np.float32(0.25))
    )


def test_every_tensor_with_enough_values_has_its_own_scale() -> None:
    difference = np.concatenate([noise(160), np.full(N - 160, 1e-3, np.float32)])
    state, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 1.0, levels=15)
    np.testing.assert_allclose(top_k.densify(update, STRUCTURE)[200:], 1e-3, rtol=0.01)
    assert np.abs(state.residual[200:]).max() < 1e-5


def test_an_update_of_zeros_is_tiny_and_valid() -> None:
    state, update = top_k.sparsify(top_k.init(N), np.zeros(N, np.float32), STRUCTURE, 0.1)
    assert len(update) <= 6
    assert not top_k.densify(update, STRUCTURE).any()
    assert not state.residual.any()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-30, 1e30, 3.4e38])
def test_extreme_magnitudes_lose_nothing(magnitude: float) -> None:
    difference = (noise().clip(-1, 1) * np.float32(magnitude)).astype(np.float32)
    for levels in (1, 15):
        state, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 0.3, levels=levels)
        np.testing.assert_array_equal(top_k.densify(update, STRUCTURE) + state.residual, difference)


def test_an_outlier_beside_tiny_values_loses_nothing() -> None:
    difference = noise() * np.float32(1e-9)
    difference[77] = 1e9
    state, update = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 1.0)
    np.testing.assert_array_equal(top_k.densify(update, STRUCTURE) + state.residual, difference)
    assert top_k.densify(update, STRUCTURE)[77] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    difference = noise()
    difference[5] = bad
    with pytest.raises(NonFiniteError):
        top_k.sparsify(top_k.init(N), difference, STRUCTURE, 0.1)
    with pytest.raises(NonFiniteError):
        quantile.sparsify(top_k.init(N), difference, STRUCTURE, 0.1)


def test_a_sum_that_overflows_is_refused() -> None:
    huge = np.full(N, 3e38, np.float32)
    with pytest.raises(NonFiniteError):
        top_k.sparsify(top_k.State(huge), huge, STRUCTURE, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": float("nan")},
        {"levels": 0},
        {"levels": 256},
        {"decay": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: Any) -> None:
    settings = {"density": 0.1} | wrong
    with pytest.raises(ValueError):
        top_k.sparsify(top_k.init(N), noise(), STRUCTURE, settings.pop("density"), **settings)


def test_a_vector_of_another_structure_is_refused() -> None:
    with pytest.raises(StructureError):
        top_k.sparsify(top_k.init(N), noise(N - 1), STRUCTURE, 0.1)
    with pytest.raises(StructureError):
        top_k.sparsify(top_k.init(N - 1), noise(), STRUCTURE, 0.1)
    with pytest.raises(StructureError):
        top_k.init(0)


def test_one_parameter_is_enough() -> None:
    state, update = top_k.sparsify(top_k.init(1), np.array([-0.3], np.float32), flat(1), 0.01)
    assert top_k.densify(update, flat(1)) + state.residual == np.float32(-0.3)
    assert len(update) <= 12


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_extra_memory_is_below_twelve_bytes_per_parameter(density: float) -> None:
    size = 400_000
    state, difference, structure = top_k.init(size), noise(size), flat(size)
    tracemalloc.start()
    top_k.sparsify(state, difference, structure, density)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 12 * size


# --- size and time -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "levels", "above"), [(0.1, 1, 1.01), (0.1, 3, 1.01), (0.01, 1, 1.01), (0.001, 1, 1.02)]
)
def test_bytes_are_near_the_entropy(density: float, levels: Any, above: float) -> None:
    size = 1_000_000
    difference = noise(size)
    chosen = top_k.largest(difference, round(density * size))
    quantised = top_k._quantise(difference, chosen, flat(size), levels)
    data = codec.encode(quantised, size)
    assert len(data) <= above * entropy_bytes(quantised, size)
    positions, values = codec.decode(data, size)
    np.testing.assert_array_equal(positions, quantised.positions)
    np.testing.assert_array_equal(values, quantised.values())


def test_dense_bytes_are_near_the_entropy() -> None:
    size = 200_000
    difference = noise(size, law="normal")
    quantised = top_k._quantise(difference, np.arange(size), flat(size), 15)
    assert len(codec.encode(quantised, size)) <= 1.02 * entropy_bytes(quantised, size)


# --- bytes from anywhere -------------------------------------------------------------------------


def streams() -> dict[str, tuple[bytes, int]]:
    few = sparse([0, 3, 4, 9, 40], [1, -1, 2, -3, 1], counts=[2, 3], scales=[0.5, 2.0])
    many = sparse(np.flatnonzero(np.arange(64) % 5), (np.arange(51) % 7 - 3) * 2 + 1)
    return {
        "few": (codec.encode(few, 50), 50),
        "many": (codec.encode(many, 64), 64),
        "empty": (codec.encode(sparse([], [], counts=[], scales=[]), 50), 50),
        "full": (codec.encode(sparse(range(20), [1, -2] * 10), 20), 20),
        "plain": (codec.encode_plain(np.array([1, 7]), np.array([0.1, -3], np.float32), 50), 50),
    }


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
        data = bytes([generator.integers(1, 3), 100, generator.integers(0, 101), 1, 1]) + body
        try:
            positions, _ = codec.decode(data, 100)
        except LiberataiError:
            continue
        assert positions.size <= 100
    assert time.perf_counter() - start < 20


def varint(value: int) -> bytes:
    return codec._varint(value)


LONGEST = b"\xff\xff\xff\xff\x0f"
"""2^32 - 1 as a varint."""


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CodecError),
        (b"\x07\x32\x00", CodecError),
        (b"\x01\x33\x00", CodecError),  # other parameter count
        (b"\x01\xb2\x00\x00", CodecError),  # padded varint
        (b"\x01\xff\xff\xff\xff\xff\x01", CodecError),  # varint too long
        (b"\x01\x32\x33", BombError),  # 51 of 50
        (b"\x01\x32" + LONGEST, BombError),
        (b"\x02\x32" + LONGEST, BombError),
        (b"\x01\x32\x05\x00", CodecError),  # no levels
        (b"\x01\x32\x05" + LONGEST, CodecError),
        (b"\x01\x32\x05\x01\x00", CodecError),  # no groups
        (b"\x01\x32\x05\x01" + LONGEST, BombError),
        (b"\x01\x32\x05\x01\x01\x04\x80\x3f", CodecError),  # group of 4 for 5
        (b"\x01\x32\x05\x01\x01\x05\x80\x7f", NonFiniteError),
        (b"\x01\x32\x05\x01\x01\x05\xc0\x7f", NonFiniteError),
        (b"\x01\x32\x05\x01\x01\x05\x80\xbf", CodecError),  # negative scale
        (b"\x01\x32\x05\x01\x01\x05\x00\x00", CodecError),  # zero scale
        (b"\x01\x32\x05\x01\x01\x05\x80\x3f" + LONGEST + b"\x00", IndexRangeError),  # gap beyond
        (b"\x01\x32\x05\x01\x01\x05\x80\x3f\x0a" + LONGEST, IndexRangeError),
        (b"\x01\x32\x05\x01\x01\x05\x80\x3f\x01", CodecError),  # inverted bitmap
        (
            b"\x01\x32\x05\x01\x01\x05\x80\x3f\x00\xff\xff\xff\xff\xff\xff\xff",
            CodecError,
        ),  # 50 bits set, not 5
        (b"\x01\x32\x05\x02\x01\x05\x80\x3f\x0a\x03\x06", CodecError),  # 6 of 5 survivors
        (b"\x01\x32\x05\x01\x01\x05\x80\x3f\x00" + bytes(100), BombError),
    ],
)
def test_hostile_streams_are_refused_with_their_code(data: bytes, error: type[LiberataiError]) -> None:
    with pytest.raises(error) as caught:
        codec.decode(data, 50)
    assert type(caught.value) is error


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
    data = codec.encode(sparse([3], [1]), 50)
    assert data[-1] & 1 == 0
    with pytest.raises(CodecError):
        codec.decode(data[:-1] + bytes([data[-1] | 1]), 50)


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


# --- state on disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-3, 1.9999, 1e20, 3e38])
def test_a_state_read_back_is_the_state_in_memory_bit_for_bit(
    storage: top_k.Storage, magnitude: float
) -> None:
    state, _ = top_k.sparsify(
        top_k.init(N, storage=storage), noise().clip(-1, 1) * np.float32(magnitude), STRUCTURE, 0.01
    )
    again = top_k.state_from_bytes(top_k.state_to_bytes(state), N)
    assert (again.rounds, again.storage) == (1, storage)
    np.testing.assert_array_equal(again.residual.view(np.uint32), state.residual.view(np.uint32))
    after = [top_k.sparsify(one, noise(seed=1), STRUCTURE, 0.01)[1] for one in (state, again)]
    assert after[0] == after[1]


def test_a_float16_residual_keeps_eleven_bits_and_half_the_disk() -> None:
    difference = noise()
    full, _ = top_k.sparsify(top_k.init(N), difference, STRUCTURE, 0.01)
    half, _ = top_k.sparsify(top_k.init(N, storage="float16"), difference, STRUCTURE, 0.01)
    np.testing.assert_allclose(half.residual, full.residual, rtol=2**-11, atol=1e-6)
    assert len(top_k.state_to_bytes(half)) <= 2.05 * N
    assert len(top_k.state_to_bytes(full)) <= 4.05 * N


def test_damaged_state_files_are_refused() -> None:
    data = top_k.state_to_bytes(top_k.State(noise(40), 3))
    for size in range(len(data)):
        with pytest.raises(CodecError):
            top_k.state_from_bytes(data[:size], 40)
    with pytest.raises(CodecError):
        top_k.state_from_bytes(data + b"x", 40)
    for parameters in (39, 41):
        with pytest.raises(CodecError):
            top_k.state_from_bytes(data, parameters)
    with pytest.raises(NonFiniteError):
        top_k.state_from_bytes(top_k.state_to_bytes(top_k.State(np.array([np.inf], np.float32))), 1)


def test_a_zip_bomb_is_never_inflated() -> None:
    bomb = top_k.state_to_bytes(top_k.init(10))[:11] + zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(CodecError):
        top_k.state_from_bytes(bomb, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# --- the baseline --------------------------------------------------------------------------------


def test_the_baseline_sends_plain_values_above_the_quantile_and_forgets_the_rest() -> None:
    difference = noise()
    state, update = quantile.sparsify(top_k.init(N), difference, STRUCTURE, 0.1)
    sent = top_k.densify(update, STRUCTURE)
    chosen = np.flatnonzero(sent)
    assert abs(chosen.size - 0.1 * N) <= 1
    np.testing.assert_array_equal(sent[chosen], difference[chosen])
    assert np.abs(difference[sent == 0]).max() <= np.abs(sent[chosen]).min()
    assert not state.residual.any()
    assert state.rounds == 1
    assert len(update) == 8 * chosen.size + 6


def test_the_baseline_refuses_a_density_out_of_range_and_sends_no_zeros() -> None:
    with pytest.raises(ValueError):
        quantile.sparsify(top_k.init(N), noise(), STRUCTURE, 0)
    _, update = quantile.sparsify(top_k.init(N), np.zeros(N, np.float32), STRUCTURE, 0.5)
    assert len(update) <= 6
