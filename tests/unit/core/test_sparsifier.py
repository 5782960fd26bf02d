"""Facts about the sparsifier: what is sent, what stays, which bytes are refused."""

import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import (
    CodecError,
    NonFiniteError,
    StructureError,
)
from liberatai_core.sparsifier import quantile, top_k
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
