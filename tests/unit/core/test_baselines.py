"""Facts about the compressor's baselines: what is quantised, how well, what a table and a search choose."""

import math
from typing import Any

import numpy as np
import pytest

from liberatai_core.compressor import artifact, codebook_access2022, fixed_width, int8
from liberatai_core.compressor.codebook_access2022 import Point, pick, search
from liberatai_core.compressor.codebook_ijcnn2020 import (
    KS,
    Trial,
    biases,
    books,
    choose,
    decoded,
    free,
    kmeans,
    layers,
    packed_bytes,
    quantise,
    refreshed,
    scan,
)
from liberatai_core.errors import NonFiniteError, StructureError
from liberatai_core.structure import Structure, Tensor, to_tensors
from liberatai_core.weights import Vector

STRUCTURE = Structure(
    family="cnn",
    params={"width": 8},
    tensors=(
        Tensor("conv1.weight", (16, 1, 3, 3)),
        Tensor("conv1.bias", (16,)),
        Tensor("norm1.weight", (16,)),
        Tensor("norm1.bias", (16,)),
        Tensor("conv2.weight", (32, 16, 3, 3)),
        Tensor("head.weight", (10, 512)),
        Tensor("head.bias", (10,)),
    ),
)
N = STRUCTURE.parameters


def model(seed: int = 0, law: str = "laplace") -> Vector:
    random = np.random.default_rng(seed)
    return np.asarray(getattr(random, law)(size=N), np.float32)


def brute_force(values: Any, k: int, sweeps: int) -> Any:
    """Lloyd's algorithm as the textbook has it: every distance, every sweep."""
    centroids = np.linspace(values.min(), values.max(), k)
    for _ in range(sweeps):
        nearest = np.abs(values[:, None] - centroids[None]).argmin(axis=1)
        again = np.array(
            [values[nearest == j].mean() if (nearest == j).any() else centroids[j] for j in range(k)]
        )
        if np.array_equal(again, centroids):
            break
        centroids = again
    nearest = np.abs(values[:, None] - centroids[None]).argmin(axis=1)
    return centroids[np.unique(nearest)]


# --- k-means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 8, 32])
@pytest.mark.parametrize("sweeps", [1, 5, 100])
def test_running_sums_give_the_centroids_of_the_textbook_algorithm(k: int, sweeps: int) -> None:
    values = np.sort(np.random.default_rng(k).standard_t(3, 500))
    expected = [values.mean()] if k == 1 else brute_force(values, k, sweeps)
    np.testing.assert_allclose(kmeans(values, k, sweeps), expected, rtol=1e-9)


def test_more_centroids_leave_less_error() -> None:
    weights = model()
    ready = books(STRUCTURE, weights, KS)
    place = {tensor.name: place for tensor, place in STRUCTURE.slices()}["head.weight"]
    errors = [
        float(((ready["head.weight", k].weights(5120) - weights[place]).astype(np.float64) ** 2).sum())
        for k in KS
    ]
    assert errors == sorted(errors, reverse=True)
    # 256 cells over the range of 5120 Laplace weights.
    assert errors[-1] < 1e-3 * float((weights[place].astype(np.float64) ** 2).sum())


def test_every_weight_gets_the_nearest_centroid() -> None:
    weights = model()
    coding = books(STRUCTURE, weights, (16,))["conv2.weight", 16]
    assert coding.entries is not None
    centroids = coding.entries.astype(np.float64) * float(coding.scale)
    place = {tensor.name: place for tensor, place in STRUCTURE.slices()}["conv2.weight"]
    distance = np.abs(weights[place][:, None] - centroids[None])
    chosen = distance[np.arange(distance.shape[0]), coding.indices]
    # Centroids are float16: a weight half way between two of them may go either way.
    assert (chosen <= distance.min(axis=1) + 2e-3 * np.abs(centroids).max()).all()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_tensor_becomes_one_number(value: float) -> None:
    weights = np.full(N, value, np.float32)
    ready = books(STRUCTURE, weights, (8,))
    assert {coding.kind for coding in ready.values()} == {artifact.CONSTANT}
    np.testing.assert_array_equal(
        decoded(STRUCTURE, quantise(STRUCTURE, weights, ready, dict.fromkeys(layers(STRUCTURE), 8))), weights
    )


def test_one_weight_is_kept() -> None:
    structure = Structure(family="mlp", params={}, tensors=(Tensor("a.weight", (1, 1)),))
    weights = np.array([0.3], np.float32)
    codings = quantise(structure, weights, books(structure, weights, (256,)), {"a.weight": 256})
    np.testing.assert_array_equal(decoded(structure, codings), weights)


@pytest.mark.parametrize("k", [0, 257])
def test_impossible_numbers_of_centroids_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="centroids"):
        kmeans(np.arange(4.0), k)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["books", "fixed_width", "int8"])
def test_weights_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    weights = model()
    weights[5] = bad
    calls = {
        "books": lambda: books(STRUCTURE, weights),
        "fixed_width": lambda: fixed_width.quantise(STRUCTURE, weights, 4),
        "int8": lambda: int8.quantise(STRUCTURE, weights),
    }
    with pytest.raises(NonFiniteError):
        calls[method]()


def test_weights_of_another_structure_are_refused() -> None:
    with pytest.raises(StructureError):
        books(STRUCTURE, model()[:-1])


# --- IJCNN 2020 ------------------------------------------------------------------------------------


def test_only_biases_of_convolutions_and_dense_layers_are_biases() -> None:
    assert layers(STRUCTURE) == ("conv1.weight", "conv2.weight", "head.weight")
    assert biases(STRUCTURE) == ("conv1.bias", "head.bias")


def test_chosen_layers_have_k_values_biases_one_and_the_rest_is_untouched() -> None:
    weights = model()
    ready = books(STRUCTURE, weights, (8, 32))
    config = {"conv2.weight": 8, "head.weight": 32}
    again = to_tensors(decoded(STRUCTURE, quantise(STRUCTURE, weights, ready, config)), STRUCTURE)
    before = to_tensors(weights, STRUCTURE)
    assert np.unique(again["conv2.weight"]).size <= 8
    assert 8 < np.unique(again["head.weight"]).size <= 32
    assert np.unique(again["conv1.bias"]).tolist() == pytest.approx([before["conv1.bias"].mean()])
    for name in ("conv1.weight", "norm1.weight", "norm1.bias"):
        np.testing.assert_array_equal(again[name], before[name])


def test_a_layer_that_is_none_is_refused() -> None:
    weights = model()
    with pytest.raises(StructureError, match="norm1"):
        quantise(STRUCTURE, weights, books(STRUCTURE, weights, (8,)), {"norm1.weight": 8})


def test_files_of_all_baselines_restore_to_what_was_quantised() -> None:
    weights = model()
    ready = books(STRUCTURE, weights, (8, 256))
    all_codings = [
        quantise(STRUCTURE, weights, ready, {"conv2.weight": 8, "head.weight": 256}),
        quantise(STRUCTURE, weights, ready, {}),
        fixed_width.quantise(STRUCTURE, weights, 1),
        fixed_width.quantise(STRUCTURE, weights, 8),
        int8.quantise(STRUCTURE, weights),
    ]
    for codings in all_codings:
        file = artifact.write(codings, STRUCTURE)
        assert artifact.restore(file, STRUCTURE).tobytes() == decoded(STRUCTURE, codings).tobytes()


def test_retraining_may_move_float_tensors_only() -> None:
    weights = model()
    codings = quantise(STRUCTURE, weights, books(STRUCTURE, weights, (8,)), {"head.weight": 8})
    gain = to_tensors(free(STRUCTURE, codings), STRUCTURE)
    frozen = {name for name, part in gain.items() if not part.any()}
    assert frozen == {"head.weight", "conv1.bias", "head.bias"}
    assert all(part.all() for name, part in gain.items() if name not in frozen)
    moved = to_tensors(decoded(STRUCTURE, refreshed(STRUCTURE, codings, weights + 1)), STRUCTURE)
    before = to_tensors(decoded(STRUCTURE, codings), STRUCTURE)
    for name in before:
        np.testing.assert_array_equal(moved[name], before[name] if name in frozen else before[name] + 1)


def test_the_file_keeps_its_size_when_float_tensors_are_retrained() -> None:
    weights = model()
    codings = quantise(STRUCTURE, weights, books(STRUCTURE, weights, (32,)), {"head.weight": 32})
    again = refreshed(STRUCTURE, codings, weights + model(1))
    assert len(artifact.write(again, STRUCTURE)) == len(artifact.write(codings, STRUCTURE))


def test_packed_size_counts_equal_widths_tables_and_floats() -> None:
    weights = model()
    codings = quantise(STRUCTURE, weights, books(STRUCTURE, weights, (8,)), {"head.weight": 8})
    entries = next(coding.entries for coding in codings if coding.entries is not None)
    width = math.ceil(math.log2(entries.size))
    floats = 4 * (16 * 9 + 16 + 16 + 32 * 16 * 9)
    assert packed_bytes(STRUCTURE, codings) == 7 + floats + 2 * 4 + 4 * entries.size + 5120 * width // 8


def test_the_entropy_coder_beats_packed_indices_on_peaked_weights() -> None:
    weights = model()
    codings = quantise(
        STRUCTURE, weights, books(STRUCTURE, weights, (32,)), dict.fromkeys(layers(STRUCTURE), 32)
    )
    assert len(artifact.write(codings, STRUCTURE)) < 0.9 * packed_bytes(STRUCTURE, codings)


def test_the_table_quantises_one_layer_at_a_time() -> None:
    weights = model()
    ready = books(STRUCTURE, weights, (8, 64))
    seen: list[set[str]] = []

    def evaluate(trial: Vector) -> float:
        parts, whole = to_tensors(trial, STRUCTURE), to_tensors(weights, STRUCTURE)
        changed = {name for name in parts if not np.array_equal(parts[name], whole[name])}
        seen.append(changed)
        return 1.0 - float(((trial - weights) ** 2).sum() / (weights**2).sum())

    table = scan(STRUCTURE, weights, ready, evaluate)
    assert seen[0] == set()
    assert seen[1:] == [{layer} for layer, _ in ready]
    lost = {(trial.layer, trial.k): trial.lost for trial in table}
    saved = {(trial.layer, trial.k): trial.saved_bytes for trial in table}
    for layer in layers(STRUCTURE):
        assert lost[layer, 8] > lost[layer, 64] > 0
        assert saved[layer, 8] > saved[layer, 64]
    # 8 indices cost at most 3 bits of 32.
    assert saved["head.weight", 8] >= 5120 * 4 - 5120 * 3 / 8 - 16


def test_a_layer_is_left_float_where_every_k_loses_too_much() -> None:
    def trial(layer: str, k: int, saved: int, lost: float) -> Trial:
        return Trial(layer=layer, k=k, saved_bytes=saved, lost=lost)

    table = [
        trial("a", 8, 900, 0.03),
        trial("a", 32, 800, 0.01),
        trial("b", 8, 500, 0.2),
        trial("b", 32, 400, 0.1),
        trial("c", 8, -3, 0.0),
    ]
    assert choose(table, 0.01) == {"a": 32}
    assert choose(table, 0.03) == {"a": 8}
    assert choose(table, 0.5) == {"a": 8, "b": 8}
    assert choose(table, -1.0) == {}


# --- IEEE Access 2022 ------------------------------------------------------------------------------

LAYERS = ("a", "b", "c", "d")
PRICE = {"a": 0.0, "b": 0.0, "c": 0.1, "d": 1.0}


def made_up(config: Any) -> tuple[int, float]:
    """Layers of equal size; a and b lose nothing, d loses much."""
    bits = sum(math.log2(config[layer]) if layer in config else 32 for layer in LAYERS)
    return int(1000 * bits), sum(PRICE[layer] / k for layer, k in config.items())


def test_the_search_returns_points_of_which_none_beats_another() -> None:
    points = search(LAYERS, made_up, 80, seed=0)
    sizes, lost = [point.size for point in points], [point.lost for point in points]
    assert sizes == sorted(sizes, reverse=True)
    assert lost == sorted(lost)
    assert len(set(sizes)) == len(sizes) > 3
    assert all(made_up(point.config) == (point.size, point.lost) for point in points)


def test_the_search_finds_better_configurations_than_one_k_for_all_layers() -> None:
    points = search(LAYERS, made_up, 80, seed=0)
    uniform = made_up(dict.fromkeys(LAYERS, 64))
    assert any(point.size < uniform[0] and point.lost < uniform[1] for point in points)


def test_the_search_is_the_same_for_the_same_seed() -> None:
    assert search(LAYERS, made_up, 30, seed=4) == search(LAYERS, made_up, 30, seed=4)


def test_a_search_of_few_trials_asks_for_one_k_for_all_layers() -> None:
    asked: list[dict[str, int]] = []

    def score(config: Any) -> tuple[int, float]:
        asked.append(dict(config))
        return made_up(config)

    search(LAYERS, score, 3, seed=0)
    assert asked == [dict.fromkeys(LAYERS, k) for k in (256, 128, 64)]


@pytest.mark.parametrize("trials", [0, codebook_access2022.MAX_TRIALS + 1])
def test_impossible_budgets_of_trials_are_refused(trials: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        search(LAYERS, made_up, trials, seed=0)


def test_the_smallest_point_within_each_tolerance_is_picked_once() -> None:
    points = [Point(config={"a": k}, size=size, lost=lost) for k, size, lost in
              [(256, 100, 0.0), (32, 60, 0.02), (8, 40, 0.3)]]  # fmt: skip
    assert [point.size for point in pick(points, (0.01, 0.05, 0.1, 1.0))] == [100, 60, 40]
    assert pick(points, (-1.0,)) == []


# --- fixed width and int8 --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_fixed_width_codebook_quantises_every_layer_with_two_to_the_bits(bits: int) -> None:
    weights = model()
    again = to_tensors(decoded(STRUCTURE, fixed_width.quantise(STRUCTURE, weights, bits)), STRUCTURE)
    before = to_tensors(weights, STRUCTURE)
    for name in before:
        if name in layers(STRUCTURE):
            assert 1 < np.unique(again[name]).size <= 1 << bits
        else:
            np.testing.assert_array_equal(again[name], before[name])


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        fixed_width.quantise(STRUCTURE, model(), bits)


def test_int8_is_off_by_at_most_half_a_step() -> None:
    weights = model()
    again = to_tensors(decoded(STRUCTURE, int8.quantise(STRUCTURE, weights)), STRUCTURE)
    for name, part in to_tensors(weights, STRUCTURE).items():
        step = np.abs(part).max() / 127 if name in layers(STRUCTURE) else 0.0
        assert np.abs(again[name] - part).max() <= step * 0.5001


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_int8_of_a_constant_tensor_is_that_constant(value: float) -> None:
    weights = np.full(N, value, np.float32)
    np.testing.assert_allclose(decoded(STRUCTURE, int8.quantise(STRUCTURE, weights)), weights, rtol=1e-6)


def test_int8_takes_about_a_quarter_of_float32() -> None:
    weights = model(law="uniform") - np.float32(0.5)
    size = packed_bytes(STRUCTURE, int8.quantise(STRUCTURE, weights))
    assert N < size < 1.1 * N
    assert len(artifact.write(int8.quantise(STRUCTURE, weights), STRUCTURE)) < 1.15 * N
