"""Facts about the named methods: same call, what they send, what they keep, what they refuse."""

import struct

import numpy as np
import pytest

from liberatai_core.aggregator.mean import RULES
from liberatai_core.errors import BombError, CodecError, LiberataiError, NonFiniteError, StructureError
from liberatai_core.sparsifier import (
    codec,
    dense,
    methods,
    quantile,
    random_k,
    small,
    support,
    ternary,
    top_k,
)
from liberatai_core.sparsifier.methods import METHODS
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


def noise(seed: int = 0) -> Vector:
    return np.random.default_rng(seed).laplace(size=N).astype(np.float32)


def same(one: Vector, other: Vector) -> None:
    np.testing.assert_array_equal(one, other)


# --- all of them -------------------------------------------------------------------------------------


def test_topk_is_the_default_and_every_name_of_the_issue_is_there() -> None:
    asked = {"topk", "dense", "quantile", "random_k", "client_sampling", "ternary_no_feedback"}
    assert asked <= set(METHODS)
    assert methods.DEFAULT == "topk"
    assert {method.rule for method in METHODS.values()} == set(RULES)


@pytest.mark.parametrize("name", METHODS)
def test_one_call_sends_and_reads_with_every_method(name: str) -> None:
    method = METHODS[name]
    state = top_k.State(noise(1) if method.feedback else np.zeros(N, np.float32))
    difference = noise()
    after, update = method.sparsify(state, difference, STRUCTURE, 0.1, seed=7)
    methods.require_stream(name, update)
    sent = methods.densify(update, STRUCTURE, 7)
    assert sent.dtype == np.float32
    assert after.rounds == 1
    assert sent.any()
    if method.feedback:
        same(sent + after.residual, state.residual + difference)
    else:
        assert not after.residual.any()


@pytest.mark.parametrize("name", METHODS)
def test_a_decay_of_zero_forgets_the_residual(name: str) -> None:
    residual = top_k.State(noise(1))
    _, update = METHODS[name].sparsify(residual, noise(), STRUCTURE, 0.1, decay=0.0)
    _, fresh = METHODS[name].sparsify(top_k.init(N), noise(), STRUCTURE, 0.1)
    assert update == fresh


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].feedback])
def test_decay_halves_what_was_left(name: str) -> None:
    after, update = METHODS[name].sparsify(top_k.State(noise(1)), noise(), STRUCTURE, 0.1, decay=0.5)
    same(methods.densify(update, STRUCTURE) + after.residual, np.float32(0.5) * noise(1) + noise())
    with pytest.raises(ValueError):
        METHODS[name].sparsify(top_k.State(noise(1)), noise(), STRUCTURE, 0.1, decay=1.5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_nan_and_another_structure(name: str) -> None:
    bad = noise()
    bad[5] = np.nan
    with pytest.raises(NonFiniteError):
        METHODS[name].sparsify(top_k.init(N), bad, STRUCTURE, 0.1)
    with pytest.raises(StructureError):
        METHODS[name].sparsify(top_k.init(N), noise()[1:], STRUCTURE, 0.1)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].sparsify is not dense.sparsify])
def test_every_sparse_method_refuses_a_density_out_of_range(name: str) -> None:
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            METHODS[name].sparsify(top_k.init(N), noise(), STRUCTURE, density)


@pytest.mark.parametrize("name", METHODS)
def test_every_cut_update_is_refused(name: str) -> None:
    _, update = METHODS[name].sparsify(top_k.init(N), noise(), STRUCTURE, 0.02)
    for size in {0, 1, 2, 5, len(update) // 2, len(update) - 4, len(update) - 1}:
        with pytest.raises(LiberataiError):
            methods.densify(update[:size], STRUCTURE)
    with pytest.raises(LiberataiError):
        methods.densify(update + b"\0", STRUCTURE)


def test_a_receiver_refuses_what_the_jobs_method_does_not_make() -> None:
    _, update = METHODS["dense"].sparsify(top_k.init(N), noise(), STRUCTURE, 1)
    methods.require_stream("client_sampling", update)
    for name, data in (("topk", update), ("topk", b""), ("no such method", update)):
        with pytest.raises(CodecError):
            methods.require_stream(name, data)


# --- dense, client sampling --------------------------------------------------------------------------


def test_dense_sends_every_bit_of_every_value() -> None:
    difference = noise()
    difference[:2] = (-0.0, 1e-45)
    _, update = dense.sparsify(top_k.init(N), difference, STRUCTURE, 0.01)
    same(top_k.densify(update, STRUCTURE).view(np.uint32), difference.view(np.uint32))
    assert 4 * N < len(update) <= 4 * N + 8


def test_client_sampling_spends_the_bytes_of_the_other_method() -> None:
    assert dense.clients_for_bytes(100, 4_000.0, 10_000) == 10
    assert dense.clients_for_bytes(50, 39_999, 10_000) == 49
    assert dense.clients_for_bytes(10, 1, 10_000) == 1
    for bad in ((0, 1, 1), (1, 0, 1), (1, float("nan"), 1), (1, 1, 0)):
        with pytest.raises(ValueError):
            dense.clients_for_bytes(*bad)


# --- quantile ----------------------------------------------------------------------------------------


def test_the_papers_saving_counts_half_of_the_real_bytes() -> None:
    _, update = quantile.sparsify(top_k.init(N), noise(), STRUCTURE, 0.1)
    values_only = quantile.values_only_bytes(update, STRUCTURE)
    assert values_only == pytest.approx(0.1 * 4 * N, abs=8)
    assert 2 * values_only < len(update) <= 2 * values_only + 8


# --- random k ----------------------------------------------------------------------------------------


def test_random_k_sends_four_bytes_per_value_and_no_positions() -> None:
    difference = noise()
    _, update = random_k.sparsify(top_k.init(N), difference, STRUCTURE, 0.01, seed=3)
    count = round(0.01 * N)
    assert len(update) == 9 + 4 * count
    positions = support.positions_from_seed(STRUCTURE, 0.01, 3)
    wanted = np.zeros(N, np.float32)
    wanted[positions] = difference[positions] * np.float32(N / count)
    same(random_k.densify(update, STRUCTURE, 3), wanted)


def test_scaled_random_k_is_unbiased_and_unscaled_is_not() -> None:
    """The mean of 4000 draws at density 0.25 has a relative deviation of sqrt(3 / 4000) = 2.7 % per value."""
    structure = Structure(family="mlp", params={}, tensors=(Tensor("w", (40,)),))
    difference = np.linspace(1, 2, 40).astype(np.float32)
    scaled, unscaled = np.zeros(40), np.zeros(40)
    for seed in range(4000):
        for method, total in ((random_k.sparsify, scaled), (random_k.sparsify_feedback, unscaled)):
            _, update = method(top_k.init(40), difference, structure, 0.25, seed=seed)
            np.add(total, methods.densify(update, structure, seed), out=total)
    scaled, unscaled = scaled / 4000 / difference, unscaled / 4000 / difference
    np.testing.assert_allclose(scaled, 1, atol=0.14)
    np.testing.assert_allclose(unscaled, 0.25, atol=0.035)


def test_random_k_with_feedback_sends_everything_in_the_end() -> None:
    state, sent = top_k.init(N), np.zeros(N, np.float32)
    for seed in range(60):
        given = noise() if seed == 0 else np.zeros(N, np.float32)
        state, update = random_k.sparsify_feedback(state, given, STRUCTURE, 0.3, seed=seed)
        sent += methods.densify(update, STRUCTURE, seed)
    same(sent, noise())
    assert not state.residual.any()


def test_a_float16_residual_of_random_k_is_the_one_on_the_disk() -> None:
    state = top_k.init(N, storage="float16")
    for seed in range(3):
        state, _ = random_k.sparsify_feedback(state, noise(seed), STRUCTURE, 0.1, seed=seed)
        again = top_k.state_from_bytes(top_k.state_to_bytes(state), N)
        same(again.residual, state.residual)
        assert again.storage == "float16"


def test_random_k_refuses_what_overflows_when_it_is_scaled() -> None:
    with pytest.raises(NonFiniteError):
        random_k.sparsify(top_k.init(N), np.full(N, 3e38, np.float32), STRUCTURE, 0.01)


def test_random_streams_are_refused_with_a_code() -> None:
    _, update = random_k.sparsify(top_k.init(N), noise(), STRUCTURE, 0.01, seed=3)
    with pytest.raises(BombError):
        random_k.densify(update[:1] + struct.pack("<I", N + 1) + update[5:], STRUCTURE, 3)
    with pytest.raises(NonFiniteError):
        random_k.densify(update[:-4] + struct.pack("<f", float("inf")), STRUCTURE, 3)
    empty = update[:1] + bytes(4) + update[5:9]
    for data in (b"", empty, update[:8], update[:-4], update + bytes(4), b"\x01" + update[1:]):
        with pytest.raises(CodecError):
            random_k.densify(data, STRUCTURE, 3)


def test_random_k_refuses_to_read_with_another_seed() -> None:
    _, update = random_k.sparsify(top_k.init(N), noise(), STRUCTURE, 0.01, seed=3)
    for seed in (0, 2, 4):
        with pytest.raises(CodecError, match="seed"):
            methods.densify(update, STRUCTURE, seed)


# --- ternary without feedback, small tensors ---------------------------------------------------------


def test_ternary_without_feedback_sends_what_topk_sends_first_and_then_forgets() -> None:
    _, wanted = top_k.sparsify(top_k.init(N), noise(), STRUCTURE, 0.01, levels=1)
    state, update = ternary.sparsify(top_k.State(noise(1)), noise(), STRUCTURE, 0.01)
    assert update == wanted
    same(state.residual, noise(1))
    values = top_k.densify(update, STRUCTURE)
    assert np.unique(np.abs(values[values != 0])).size <= len(STRUCTURE.tensors)


def test_small_tensors_are_sent_whole_and_the_rest_shares_what_is_left() -> None:
    places = small.small_positions(STRUCTURE)
    assert places.size == 144 + 16 + 64
    after, update = small.sparsify(top_k.init(N), noise(), STRUCTURE, 0.05)
    assert update[0] == small.SMALL
    sent = methods.densify(update, STRUCTURE)
    assert np.count_nonzero(sent) <= round(0.05 * N)
    # 15 magnitudes up to the largest: only values below half a step are missing.
    assert np.count_nonzero(sent[places]) > 0.8 * places.size
    assert np.abs(after.residual[places]).max() < np.abs(noise()[places]).max() / 15
    same(sent + after.residual, noise())


def test_small_tensors_are_not_apart_where_they_would_take_most_of_the_update() -> None:
    wanted = top_k.sparsify(top_k.init(N), noise(), STRUCTURE, 0.01)[1]
    assert small.sparsify(top_k.init(N), noise(), STRUCTURE, 0.01)[1] == wanted


def test_an_update_with_overlapping_parts_is_refused() -> None:
    _, update = small.sparsify(top_k.init(N), noise(), STRUCTURE, 0.05)
    size = int.from_bytes(update[1:5], "little")
    first = update[5 : 5 + size]
    _, everywhere = top_k.sparsify(top_k.init(N), noise(), STRUCTURE, 0.5)
    with pytest.raises(CodecError, match="both"):
        small.densify(update[: 5 + size] + everywhere, STRUCTURE)
    large = Structure(family="mlp", params={}, tensors=(Tensor("w", (small.SMALL_VALUES + 1,)),))
    for data, structure in ((update, large), (b"\x06" + b"\xff" * 4 + first, STRUCTURE), (b"", STRUCTURE)):
        with pytest.raises(CodecError):
            small.densify(data, structure)


def test_an_update_with_small_tensors_takes_only_sparse_parts() -> None:
    """Its parts would otherwise carry plain float32 values past the first byte that was checked."""
    structure = Structure(family="mlp", params={}, tensors=(Tensor("w", (40, 30)), Tensor("b", (40,))))
    whole = codec.encode_dense(np.ones(40, np.float32))
    rest = codec.encode_dense(np.zeros(structure.parameters, np.float32))
    body = bytes([small.SMALL]) + len(whole).to_bytes(4, "little") + whole + rest
    with pytest.raises(CodecError, match="no sparse stream"):
        small.densify(body, structure)
