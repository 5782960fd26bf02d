"""What holds for every sparse update, every run of rounds and every model file."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liberatai_core.compressor import artifact, codebook
from liberatai_core.errors import BudgetError, LiberataiError
from liberatai_core.sparsifier import codec, quantile, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, digest

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)


def build(dimensions: list[list[int]]) -> Structure:
    tensors = tuple(Tensor(f"t{number}", tuple(shape)) for number, shape in enumerate(dimensions))
    return Structure(family="mlp", params={}, tensors=tensors)


@st.composite
def vectors(draw: st.DrawFn, size: int) -> Vector:
    """Differences as they occur and as they do not: heavy tails, zeros, ties, huge and tiny values."""
    generator = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["laplace", "sparse", "ties", "tails", "tiny", "bits"]))
    values = generator.laplace(size=size)
    if kind == "sparse":
        values *= generator.random(size) < 0.1
    elif kind == "ties":
        values = np.rint(values)
    elif kind == "tails":
        values **= 9
    elif kind == "tiny":
        values *= 1e-42
    elif kind == "bits":
        bits = generator.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
        values = np.where(np.isfinite(bits) & (np.abs(bits) < 1e38), bits, 0).astype(np.float64)
    return values.astype(np.float32)


@st.composite
def sparse_differences(draw: st.DrawFn) -> tuple[codec.Sparse, int]:
    parameters = draw(st.integers(1, 3000))
    count = draw(st.integers(0, parameters))
    generator = np.random.default_rng(draw(seeds))
    positions = np.sort(generator.choice(parameters, count, replace=False))
    if draw(st.booleans()) and count:  # in clusters
        gaps = np.minimum(generator.pareto(draw(st.floats(0.2, 3)), count), parameters).astype(np.int64)
        positions = np.cumsum(gaps + 1) - 1
        positions = positions[positions < parameters]
        count = positions.size
    top = draw(st.sampled_from([1, 2, 3, 15, 255]))
    changes = generator.random(count) < draw(st.sampled_from([0.5, 0.1, 0.0]))
    signs = 1 - 2 * (np.cumsum(changes) & 1)
    levels = (signs * np.minimum(generator.geometric(draw(st.floats(0.05, 0.95)), count), top)).astype(
        np.int16
    )
    groups = draw(st.integers(min(count, 1), min(count, 9)))
    borders: Any = (
        np.sort(generator.choice(np.arange(1, count), groups - 1, replace=False)) if groups > 1 else []
    )
    counts = np.diff([0, *borders, count]) if count else np.empty(0, np.int64)
    scales = np.array([codec.round_scale(x) for x in generator.uniform(1e-6, 9, counts.size)], np.float32)
    return codec.Sparse(positions, levels, counts, scales), parameters


@quick
@given(sparse_differences())
def test_decoding_is_the_exact_inverse_of_encoding(case: tuple[codec.Sparse, int]) -> None:
    sparse, parameters = case
    data = codec.encode(sparse, parameters)
    positions, values = codec.decode(data, parameters)
    np.testing.assert_array_equal(positions, sparse.positions)
    np.testing.assert_array_equal(values.view(np.uint32), sparse.values().view(np.uint32))
    exact = sparse.levels.astype(np.float64) * np.repeat(sparse.scales.astype(np.float64), sparse.counts)
    np.testing.assert_array_equal(values, exact)


@quick
@given(st.data(), shapes, st.floats(1e-4, 1), st.integers(1, 255))
def test_sent_plus_residual_is_difference_plus_residual_bit_for_bit(
    data: st.DataObject, dimensions: list[list[int]], density: float, levels: int
) -> None:
    structure = build(dimensions)
    size = structure.parameters
    state = top_k.State(data.draw(vectors(size)))
    difference = data.draw(vectors(size))
    after, update = top_k.sparsify(state, difference, structure, density, levels=levels)
    sent, total = top_k.densify(update, structure), difference + state.residual
    np.testing.assert_array_equal(sent + after.residual, total)
    np.testing.assert_array_equal(
        sent.astype(np.float64) + after.residual.astype(np.float64), total.astype(np.float64)
    )
    assert np.count_nonzero(sent) <= max(1, round(density * size))
    again = top_k.state_from_bytes(top_k.state_to_bytes(after), size)
    np.testing.assert_array_equal(again.residual.view(np.uint32), after.residual.view(np.uint32))


@quick
@given(st.data(), shapes, st.floats(0.01, 1))
def test_a_float16_state_is_the_same_after_every_reload(
    data: st.DataObject, dimensions: list[list[int]], density: float
) -> None:
    structure = build(dimensions)
    state = top_k.init(structure.parameters, storage="float16")
    for _ in range(3):
        state, _ = top_k.sparsify(state, data.draw(vectors(structure.parameters)), structure, density)
        again = top_k.state_from_bytes(top_k.state_to_bytes(state), structure.parameters)
        np.testing.assert_array_equal(again.residual.view(np.uint32), state.residual.view(np.uint32))
        assert (again.rounds, again.storage) == (state.rounds, "float16")


@settings(quick, max_examples=15)
@given(shapes, seeds, st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.sampled_from(["float32", "float16"]))
def test_nothing_is_lost_over_many_rounds(
    dimensions: list[list[int]], seed: int, density: float, storage: top_k.Storage
) -> None:
    structure = build(dimensions)
    generator = np.random.default_rng(seed)
    state = top_k.init(structure.parameters, storage=storage)
    given_sum, sent_sum = np.zeros(structure.parameters), np.zeros(structure.parameters)
    moved = np.zeros(structure.parameters)
    for _ in range(40):
        difference = generator.laplace(size=structure.parameters).astype(np.float32)
        state, update = top_k.sparsify(state, difference, structure, density)
        sent = top_k.densify(update, structure)
        given_sum += difference
        sent_sum += sent
        moved += np.abs(state.residual) + np.abs(sent)
    # One float32 rounding of the sum per round, and one float16 rounding of the residual if chosen.
    unit = 2.0**-24 if storage == "float32" else 2.0**-24 + 2.0**-11
    assert (np.abs(given_sum - sent_sum - state.residual) <= unit * moved + 1e-6).all()


@quick
@given(st.data(), shapes, st.floats(0.001, 1))
def test_the_baseline_sends_its_values_unchanged(
    data: st.DataObject, dimensions: list[list[int]], density: float
) -> None:
    structure = build(dimensions)
    difference = data.draw(vectors(structure.parameters))
    _, update = quantile.sparsify(top_k.init(structure.parameters), difference, structure, density)
    sent = top_k.densify(update, structure)
    chosen = sent != 0
    np.testing.assert_array_equal(sent[chosen], difference[chosen])


@quick
@given(sparse_differences(), st.data())
def test_a_damaged_stream_is_refused_or_a_valid_update(
    case: tuple[codec.Sparse, int], data: st.DataObject
) -> None:
    sparse, parameters = case
    damaged = bytearray(codec.encode(sparse, parameters))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    stop = data.draw(st.integers(0, len(damaged)))
    for content in (bytes(damaged), bytes(damaged[:stop]), bytes(damaged) + bytes(damaged[:stop])):
        tracemalloc.start()
        try:
            positions, values = codec.decode(content, parameters)
        except LiberataiError:
            continue
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak <= 40 * parameters + 16 * len(content) + (6 << 20)
        assert positions.size == values.size
        assert (np.diff(positions) > 0).all()
        assert positions.size == 0 or (positions[0] >= 0 and positions[-1] < parameters)
        assert np.isfinite(values).all()


@quick
@given(sparse_differences())
def test_every_truncation_of_a_stream_is_refused(case: tuple[codec.Sparse, int]) -> None:
    sparse, parameters = case
    data = codec.encode(sparse, parameters)
    for stop in {0, 1, 2, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1} - {-1, -2}:
        with pytest.raises(LiberataiError):
            codec.decode(data[:stop], parameters)


@quick
@given(st.binary(max_size=80), st.integers(1, 127), st.sampled_from([codec.SPARSE, codec.PLAIN, codec.DENSE]))
def test_any_bytes_are_refused_or_a_valid_update(body: bytes, parameters: int, kind: int) -> None:
    for data in (body, bytes([kind, parameters]) + body):
        try:
            positions, values = codec.decode(data, parameters)
        except LiberataiError:
            continue
        assert (np.diff(positions) > 0).all()
        assert positions.size == 0 or (positions[0] >= 0 and positions[-1] < parameters)
        assert np.isfinite(values).all()


@settings(quick, max_examples=40)
@given(st.data(), shapes, st.integers(0, 60_000))
def test_a_file_fits_its_budget_and_restores_what_its_digest_names(
    data: st.DataObject, dimensions: list[list[int]], budget: int
) -> None:
    structure = build(dimensions)
    weights = data.draw(vectors(structure.parameters))
    budget %= 5 * structure.parameters + 200
    least = codebook.smallest_bytes(structure)
    if budget < least:
        with pytest.raises(BudgetError, match=str(least)):
            codebook.compress(weights, structure, budget)
        return
    file = codebook.compress(weights, structure, budget)
    assert len(file) <= budget
    assert digest(artifact.restore(file, structure)) == file[4:36]


@settings(quick, max_examples=30)
@given(
    st.lists(st.integers(0, 5000), min_size=2, max_size=200).filter(lambda c: sum(x > 0 for x in c) > 1),
    seeds,
)
def test_any_histogram_of_symbols_survives_the_entropy_coder(counts: list[int], seed: int) -> None:
    number = np.array(counts)
    kept = np.minimum(number, 60)
    symbols = np.random.default_rng(seed).permutation(np.repeat(np.arange(number.size), kept))
    structure = build([[symbols.size]])
    coding = artifact.Coding(artifact.GRID, np.float32(1), levels=max(kept.size, 2), indices=symbols)
    restored: Any = artifact.restore(artifact.write([coding], structure), structure)
    np.testing.assert_array_equal(restored, symbols)
