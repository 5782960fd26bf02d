"""Facts about the compressor: files fit their budget, damaged files are refused."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from liberatai_core.compressor import artifact, cells, codebook, contents
from liberatai_core.compressor.artifact import Coding
from liberatai_core.errors import (
    BombError,
    BudgetError,
    CodecError,
    DigestError,
    LiberataiError,
    NonFiniteError,
    StructureError,
    TooLargeError,
)
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, digest

STRUCTURE = Structure(
    family="cnn",
    params={"width": 8},
    tensors=(
        Tensor("conv1.weight", (16, 1, 3, 3)),
        Tensor("conv1.bias", (16,)),
        Tensor("conv2.weight", (32, 16, 3, 3)),
        Tensor("norm.weight", (32,)),
        Tensor("fc.weight", (64, 256)),
        Tensor("fc.bias", (64,)),
    ),
)
N = STRUCTURE.parameters


def structure_of(*shapes: int | tuple[int, ...]) -> Structure:
    tensors = tuple(
        Tensor(f"t{i}", shape if isinstance(shape, tuple) else (int(shape),))
        for i, shape in enumerate(shapes)
    )
    return Structure(family="mlp", params={}, tensors=tensors)


def model(seed: int = 0, law: str = "laplace") -> Vector:
    generator = np.random.default_rng(seed)
    parts = [
        getattr(generator, law)(size=tensor.size) * np.sqrt(tensor.shape[0] / tensor.size)
        for tensor in STRUCTURE.tensors
    ]
    return np.concatenate(parts).astype(np.float32)


def relative_error(weights: Any, again: Any) -> float:
    return float(((weights - again).astype(np.float64) ** 2).sum() / (weights.astype(np.float64) ** 2).sum())


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("share", [0.03, 0.05, 0.0625, 0.094, 0.125, 0.2, 0.3, 0.4, 0.5])
def test_a_file_uses_its_budget_and_never_more(law: str, share: float) -> None:
    weights, budget = model(law=law), int(share * 4 * N)
    file = codebook.compress(weights, STRUCTURE, budget)
    assert 0.95 * budget <= len(file) <= budget
    again = artifact.restore(file, STRUCTURE)
    assert again.dtype == np.float32
    assert digest(again) == file[4:36]


def test_a_larger_budget_gives_a_smaller_error() -> None:
    weights = model()
    errors = [
        relative_error(
            weights, artifact.restore(codebook.compress(weights, STRUCTURE, int(bits * N / 8)), STRUCTURE)
        )
        for bits in (0.5, 1, 2, 3, 4, 6, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.06  # 2 bits: above 12 dB
    assert errors[4] < 0.004  # 4 bits: above 24 dB
    assert errors[-1] < 1e-8


def test_entropy_coding_is_within_half_a_percent_of_the_entropy() -> None:
    counts = np.array([20, 300, 9000, 60000, 9100, 310, 15])
    indices = np.random.default_rng(0).permutation(np.repeat(np.arange(7), counts))
    coding = Coding(artifact.GRID, np.float32(0.25), low=-3, levels=7, centre=3, indices=indices)
    structure = structure_of(counts.sum())
    file = artifact.write([coding], structure)
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum() * counts.sum() / 8
    assert contents.entropy_bits(file, structure) / 8 == pytest.approx(entropy)
    assert len(file) - artifact.header_bytes(structure) <= 1.005 * entropy
    np.testing.assert_array_equal(artifact.restore(file, structure), (indices - 3) * np.float32(0.25))


def test_a_budget_for_everything_gives_the_weights_bit_for_bit() -> None:
    weights = model()
    file = codebook.compress(weights, STRUCTURE, 10 * N)
    np.testing.assert_array_equal(artifact.restore(file, STRUCTURE).view(np.uint32), weights.view(np.uint32))


def test_a_budget_below_the_smallest_file_is_refused_with_its_size() -> None:
    least = codebook.smallest_bytes(STRUCTURE)
    for budget in (least - 1, 10, 0, -5):
        with pytest.raises(BudgetError, match=str(least)):
            codebook.compress(model(), STRUCTURE, budget)


def test_the_smallest_file_has_the_promised_size_and_can_be_had() -> None:
    weights, least = model(), codebook.smallest_bytes(STRUCTURE)
    assert len(codebook.smallest(weights, STRUCTURE)) == least
    for budget in (least, least + 1, least + 9, least + 40):
        file = codebook.compress(weights, STRUCTURE, budget)
        assert len(file) <= budget
        artifact.restore(file, STRUCTURE)


def test_max_bits_spares_what_the_budget_allows() -> None:
    file = codebook.compress(model(), STRUCTURE, 4 * N, max_bits=3)
    assert 0.95 * 3 * N / 8 <= len(file) <= 3 * N / 8
    with pytest.raises(ValueError):
        codebook.compress(model(), STRUCTURE, 4 * N, max_bits=0)


def test_a_sensitive_tensor_gets_a_smaller_error() -> None:
    weights, budget = model(), int(2 * N / 8)
    place = {tensor.name: place for tensor, place in STRUCTURE.slices()}["conv2.weight"]
    errors = []
    for value in (0.01, 1.0, 100.0):
        file = codebook.compress(weights, STRUCTURE, budget, {"conv2.weight": value})
        assert len(file) <= budget
        errors.append(relative_error(weights[place], artifact.restore(file, STRUCTURE)[place]))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_impossible_sensitivity_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        codebook.compress(model(), STRUCTURE, N, {"fc.bias": value})


def test_a_sensitivity_of_an_unknown_tensor_is_refused_and_zero_is_allowed() -> None:
    with pytest.raises(StructureError):
        codebook.compress(model(), STRUCTURE, N, {"nobody": 1.0})
    file = codebook.compress(model(), STRUCTURE, N // 4, dict.fromkeys(["fc.weight", "fc.bias"], 0.0))
    assert len(file) <= N // 4


# --- special weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-45, 3.4e38])
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_constant_tensors_cost_five_bytes_and_are_exact(value: float, size: int) -> None:
    structure = structure_of(size, size)
    weights = np.full(2 * size, value, np.float32)
    file = codebook.compress(weights, structure, 10_000)
    assert len(file) == codebook.smallest_bytes(structure)
    np.testing.assert_array_equal(artifact.restore(file, structure), weights)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("bits", [1, 4, 12])
def test_extreme_scales_fit_and_restore(scale: float, bits: int) -> None:
    weights = (np.random.default_rng(0).uniform(-1, 1, 3000) * scale).astype(np.float32)
    structure = structure_of(3000)
    file = codebook.compress(weights, structure, bits * 3000 // 8 + 60)
    assert len(file) <= bits * 3000 // 8 + 60
    assert np.abs(artifact.restore(file, structure)).max() <= 2 * scale


def test_zeros_of_a_pruned_tensor_stay_zero() -> None:
    weights = model()
    weights[np.random.default_rng(3).random(N) < 0.8] = 0
    again = artifact.restore(codebook.compress(weights, STRUCTURE, int(1.5 * N / 8)), STRUCTURE)
    assert not again[weights == 0].any()
    assert relative_error(weights, again) < 0.01


def test_ternary_weights_are_exact_with_their_entropy() -> None:
    generator = np.random.default_rng(0)
    weights = (generator.integers(-1, 2, 20_000) * np.float32(0.125)).astype(np.float32)
    structure = structure_of(20_000)
    file = codebook.compress(weights, structure, 10_000)
    np.testing.assert_allclose(artifact.restore(file, structure), weights, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weights = model()
    weights[3] = bad
    with pytest.raises(NonFiniteError):
        codebook.compress(weights, STRUCTURE, N)
    with pytest.raises(NonFiniteError):
        codebook.smallest(weights, STRUCTURE)


def test_weights_of_another_structure_are_refused() -> None:
    with pytest.raises(StructureError):
        codebook.compress(model()[1:], STRUCTURE, N)
    file = codebook.compress(model(), STRUCTURE, N)
    with pytest.raises(CodecError):
        artifact.restore(file, structure_of(*(tensor.size for tensor in STRUCTURE.tensors[:-1]), 65))


def test_many_tensors_share_one_entropy_coded_stream() -> None:
    structure = structure_of(*[500] * 60)
    weights = np.random.default_rng(0).normal(size=30_000).astype(np.float32)
    budget = 3 * 30_000 // 8
    file = codebook.compress(weights, structure, budget)
    assert 0.95 * budget <= len(file) <= budget
    assert relative_error(weights, artifact.restore(file, structure)) < 0.05


# --- files from anywhere -------------------------------------------------------------------------


def all_kinds() -> tuple[list[Coding], Structure, bytes]:
    """A small file with every kind of record, raw bits and several lanes."""
    place = np.arange(40)
    codings = [
        Coding(artifact.CONSTANT, np.float32(0.5)),
        Coding(artifact.HALF, values=np.array([0.1, -2, 3], np.float16)),
        Coding(artifact.FULL, values=np.array([0.1, -2], np.float32)),
        Coding(artifact.GRID, np.float32(0.125), low=-7, levels=8, raw_bits=3, indices=place[:5]),
        Coding(artifact.GRID, np.float32(0.1), low=-9, levels=60, centre=9, indices=place * place % 60),
        Coding(
            artifact.CODEBOOK,
            np.float32(2),
            entries=np.array([-1, 0, 0.5, 0.75], np.float16),
            centre=1,
            indices=place * place % 4,
        ),
        Coding(
            artifact.GRID,
            np.float32(0.1),
            low=3,
            levels=5,
            indices=place % 5,
            channels=np.array([0, 3, 17, 8], np.uint8),
        ),
    ]
    structure = structure_of(4, 3, 2, 5, 40, 40, (4, 10))
    return codings, structure, artifact.write(codings, structure)


def test_every_kind_of_record_is_restored() -> None:
    codings, structure, file = all_kinds()
    wanted = np.concatenate(
        [coding.weights(tensor.size) for coding, tensor in zip(codings, structure.tensors, strict=True)]
    )
    np.testing.assert_array_equal(artifact.restore(file, structure), wanted)


def test_every_truncation_and_extension_is_refused() -> None:
    _, structure, file = all_kinds()
    for size in range(len(file)):
        with pytest.raises(LiberataiError):
            artifact.restore(file[:size], structure)
    for tail in (b"\0", b"\xff", file):
        with pytest.raises(LiberataiError):
            artifact.restore(file + tail, structure)
    with pytest.raises(TooLargeError):
        artifact.restore(file + bytes(80_000), structure)


def test_every_flipped_bit_is_refused_or_changes_nothing() -> None:
    _, structure, file = all_kinds()
    wanted = artifact.restore(file, structure)
    for bit in range(8 * len(file)):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            again = artifact.restore(bytes(damaged), structure)
        except LiberataiError:
            continue
        np.testing.assert_array_equal(again.view(np.uint32), wanted.view(np.uint32))


def test_random_bytes_behind_a_valid_head_are_refused() -> None:
    generator = np.random.default_rng(5)
    _, structure, file = all_kinds()
    head = artifact.header_bytes(structure)
    for _ in range(1500):
        keep = int(generator.integers(head, len(file)))
        tail = generator.integers(0, 256, len(file) - keep, dtype=np.uint8).tobytes()
        if tail == file[keep:]:
            continue
        with pytest.raises(LiberataiError):
            artifact.restore(file[:keep] + tail, structure)


def test_weights_that_are_not_those_of_the_digest_are_refused() -> None:
    structure = structure_of(3)
    file = bytearray(codebook.smallest(np.ones(3, np.float32), structure))
    file[-2] ^= 1
    with pytest.raises(DigestError):
        artifact.restore(bytes(file), structure)


LONGEST = b"\xff\xff\xff\xff\x0f"
"""2^32 - 1 as a varint."""
GRID = b"\x03" + np.float32(1).tobytes()
PLAIN = GRID + b"\x02\x00\x00\x08\x08"
"""Two levels from 0 on, one table, halves."""
BOOK = b"\x04" + np.float32(1).tobytes()


def message(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", CodecError),
        (b"\x09", CodecError),
        (b"\x00" + np.float32(np.nan).tobytes(), NonFiniteError),
        (b"\x01" + np.full(100, np.inf, np.float16).tobytes(), NonFiniteError),
        (b"\x02" + np.full(100, np.inf, np.float32).tobytes(), NonFiniteError),
        (b"\x02" + bytes(399), CodecError),
        (GRID + LONGEST + b"\x00\x00", CodecError),  # levels
        (GRID + b"\x01\x00\x00", CodecError),  # one level needs no indices
        (GRID + b"\x02\x11\x00", CodecError),  # 17 raw bits
        (GRID + b"\x02\x21\x01", CodecError),  # raw bits and a centre
        (GRID + b"\x02\x00" + LONGEST, CodecError),  # lowest level
        (GRID + b"\x02\x20\x08", CodecError),  # the centre is no level
        (GRID + b"\x02\x80\x00\x09", CodecError),  # exponents of 9 bits
        (GRID + b"\x02\x40\x00\x00", CodecError),  # classes of no bits
        (GRID + b"\x02\x40\x00\x40", CodecError),  # classes of a fourth axis
        (GRID + b"\x02\x40\x00\x01" + bytes(13) + b"\xfe\xfe", CodecError),  # no table at all
        (GRID + b"\x02\x00\x00\xff\xff", CodecError),  # nothing occurs
        (GRID + b"\x02\x00\x00\x08", CodecError),  # half a table
        (GRID + b"\x10\x04\x00", CodecError),  # raw bits missing
        (BOOK + b"\x81\x02\x00", CodecError),  # 257 entries
        (BOOK + b"\x02\x01", CodecError),  # raw bits of a codebook
        (BOOK + b"\x02\x20\x02", CodecError),  # its centre
        (BOOK + b"\x02\x00\x08\x08\x00\x3c", CodecError),  # half its entries
        (PLAIN + LONGEST, CodecError),  # bytes of a message
        (PLAIN + message(LONGEST, bytes(90)), BombError),  # lanes
        (PLAIN + message(b"\x00", bytes(90)), BombError),
        (PLAIN + message(b"\x65", bytes(90)), BombError),
        (PLAIN + message(b"\x64", bytes(90)), CodecError),  # lanes without their states
        (PLAIN + message(b"\x01", bytes(3)), CodecError),  # the stream runs out
        (PLAIN + message(b"\x01", bytes(90)), CodecError),  # more than is used
    ],
)
def test_hostile_files_are_refused_with_their_code_and_little_memory(
    body: bytes, error: type[LiberataiError]
) -> None:
    structure = structure_of(100)
    head = codebook.smallest(np.ones(100, np.float32), structure)[: artifact.header_bytes(structure)]
    tracemalloc.start()
    with pytest.raises(error) as caught:
        artifact.restore(head + body, structure)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(caught.value) is error
    assert peak < 400_000


def test_too_few_lanes_would_take_too_long_and_are_refused() -> None:
    structure = structure_of(100_000)
    head = codebook.smallest(np.ones(100_000, np.float32), structure)[: artifact.header_bytes(structure)]
    with pytest.raises(CodecError, match="lanes"):
        artifact.restore(head + PLAIN + message(b"\x01", bytes(50)), structure)


def test_another_version_is_refused() -> None:
    structure = structure_of(3)
    file = codebook.smallest(np.ones(3, np.float32), structure)
    with pytest.raises(CodecError):
        artifact.restore(b"LAM1" + file[4:], structure)


def test_restoring_needs_little_memory() -> None:
    size = 400_000
    structure = structure_of(size)
    weights = np.random.default_rng(0).normal(size=size).astype(np.float32)
    file = codebook.compress(weights, structure, size // 2)
    tracemalloc.start()
    artifact.restore(file, structure)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 20 * size


def test_a_tensor_of_several_messages_needs_no_more_memory_than_one() -> None:
    size = 3 << 19
    structure = structure_of(size)
    indices = np.random.default_rng(0).integers(0, 3, size).astype(np.uint8)
    file = artifact.write(
        [Coding(artifact.GRID, np.float32(1), low=-1, levels=3, centre=1, indices=indices)], structure
    )
    tracemalloc.start()
    again = artifact.restore(file, structure)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(again, indices.astype(np.float32) - 1)
    assert peak <= 4 * size + 12 * (1 << 19) + (1 << 20)


# --- tables by row and column --------------------------------------------------------------------


def unequal(seed: int = 0) -> tuple[Vector, Structure]:
    """Rows and columns of unlike size, as training leaves them."""
    generator = np.random.default_rng(seed)
    structure = structure_of((64, 32, 3, 3), (40, 300), (40,))
    parts = []
    for tensor in structure.tensors:
        values = generator.laplace(size=tensor.shape)
        for axis, side in enumerate(tensor.shape[:2]):
            shape = [1] * len(tensor.shape)
            shape[axis] = side
            values = values * np.exp(generator.normal(size=shape))
        parts.append(values.ravel())
    return np.concatenate(parts).astype(np.float32), structure


@pytest.mark.parametrize("bits", [0.5, 1, 2])
def test_tables_by_row_and_column_beat_the_entropy_of_the_indices(bits: float) -> None:
    weights, structure = unequal()
    file = codebook.compress(weights, structure, int(bits * weights.size / 8))
    assert 8 * len(file) < 0.95 * contents.entropy_bits(file, structure)
    assert digest(artifact.restore(file, structure)) == file[4:36]


def test_alike_rows_and_columns_get_one_table() -> None:
    file = codebook.compress(model(), STRUCTURE, N // 4)
    for tensor, coding in zip(STRUCTURE.tensors, artifact.read(file, STRUCTURE), strict=True):
        if coding.quantised and not coding.raw_bits:
            plan = artifact.planned(coding, tensor)
            assert not plan.tables.classes


# --- importance ----------------------------------------------------------------------------------


def test_important_weights_get_a_smaller_error() -> None:
    weights = model()
    importance = np.where(np.abs(weights) < np.median(np.abs(weights)), 100, 1).astype(np.float32)
    errors = []
    for given in (None, importance):
        file = codebook.compress(weights, STRUCTURE, N // 4, importance=given)
        assert 0.98 * (N // 4) <= len(file) <= N // 4
        errors.append(float(importance @ (weights - artifact.restore(file, STRUCTURE)) ** 2))
    assert errors[1] < 0.7 * errors[0]


def test_rows_of_unlike_importance_get_factors_of_their_own() -> None:
    weights, structure = (
        np.random.default_rng(0).normal(size=40_000).astype(np.float32),
        structure_of((80, 500)),
    )
    importance = np.repeat(4.0 ** -(np.arange(80) % 6), 500).astype(np.float32)
    errors = []
    for given in (None, importance):
        file = codebook.compress(weights, structure, 10_000, {"t0": 1.0}, importance=given)
        coding = artifact.read(file, structure)[0]
        assert (coding.channels is None) == (given is None)
        errors.append(float(importance @ (weights - artifact.restore(file, structure)) ** 2))
    assert errors[1] < 0.8 * errors[0]


def test_equal_importances_change_nothing_but_the_unit() -> None:
    weights = model()
    given = dict.fromkeys((tensor.name for tensor in STRUCTURE.tensors), 1.0)
    equal = codebook.compress(weights, STRUCTURE, N // 4, given, importance=np.full(N, 3, np.float32))
    assert relative_error(weights, artifact.restore(equal, STRUCTURE)) == pytest.approx(
        relative_error(weights, artifact.restore(codebook.compress(weights, STRUCTURE, N // 4), STRUCTURE)),
        rel=0.02,
    )
    none = codebook.compress(weights, STRUCTURE, N // 4, importance=np.zeros(N, np.float32))
    assert none == codebook.compress(weights, STRUCTURE, N // 4)


def test_impossible_importances_are_refused() -> None:
    importance = np.ones(N, np.float32)
    with pytest.raises(StructureError):
        codebook.compress(model(), STRUCTURE, N, importance=importance[1:])
    importance[5] = -1
    with pytest.raises(ValueError, match="negative"):
        codebook.compress(model(), STRUCTURE, N, importance=importance)
    importance[5] = np.nan
    with pytest.raises(NonFiniteError):
        codebook.compress(model(), STRUCTURE, N, importance=importance)


# --- several budgets -----------------------------------------------------------------------------


def test_a_file_does_not_depend_on_the_budgets_before_it() -> None:
    weights = model()
    prepared = codebook.prepare(weights, STRUCTURE)
    files = [codebook.compress_prepared(prepared, budget) for budget in (N, N // 8, N // 3)]
    assert files[2] == codebook.compress(weights, STRUCTURE, N // 3)
    with pytest.raises(BudgetError, match=str(codebook.smallest_bytes(STRUCTURE))):
        codebook.compress_prepared(prepared, 10)


@pytest.mark.parametrize("bits", [0.6, 2, 4])
def test_quantisers_project_weights_onto_those_of_the_file(bits: float) -> None:
    weights, structure = unequal()
    generator = np.random.default_rng(1)
    importance = (generator.random(weights.size) * np.repeat([1, 9], weights.size // 2)).astype(np.float32)
    prepared = codebook.prepare(weights, structure, importance=importance)
    budget = int(bits * weights.size / 8)
    again = artifact.restore(codebook.compress_prepared(prepared, budget), structure)
    found = codebook.fitted(prepared, budget).quantisers
    assert {"t0", "t1"} <= set(found)
    for tensor, place in structure.slices():
        if tensor.name in found:
            projected = found[tensor.name].project(weights[place])
            assert np.mean(projected == again[place]) > 0.999
            assert (np.diff(found[tensor.name].edges) >= 0).all()


# --- values that move while indices stay ---------------------------------------------------------


def test_weights_are_the_values_of_their_cells_times_their_factors() -> None:
    _, structure, file = all_kinds()
    found = cells.cells_of(file, structure)
    weights = artifact.restore(file, structure)
    values = np.full(found.count, np.nan, np.float32)
    values[found.of_weight] = weights / found.factor
    np.testing.assert_allclose(values[found.of_weight] * found.factor, weights, rtol=1e-6)
    assert not values[found.pinned].any()
    assert found.pinned.sum() == 2  # the grid around zero and the codebook
    assert found.count == 1 + 3 + 2 + 5 + 60 + 4 + 5


def moved(file: bytes, structure: Structure) -> Vector:
    """Weights whose cells have moved a little."""
    found = cells.cells_of(file, structure)
    weights = artifact.restore(file, structure)
    values = np.zeros(found.count, np.float32)
    values[found.of_weight] = weights / found.factor
    change = np.random.default_rng(2).normal(1, 0.05, found.count).astype(np.float32)
    return (values * change)[found.of_weight] * found.factor


@pytest.mark.parametrize("bits", [0.6, 2, 4])
def test_a_file_for_retraining_does_not_grow_when_its_values_move(bits: float) -> None:
    weights, structure = unequal()
    importance = np.random.default_rng(1).random(weights.size).astype(np.float32)
    file = codebook.compress(
        weights, structure, int(bits * weights.size / 8), importance=importance, retraining=True
    )
    wanted = moved(file, structure)
    again = cells.recentred(file, structure, wanted)
    assert len(again) <= len(file)
    restored = artifact.restore(again, structure)
    assert relative_error(wanted, restored) < 1e-5
    assert not restored[artifact.restore(file, structure) == 0].any()


def test_recentring_every_kind_adds_no_more_than_the_tables_of_entries() -> None:
    _, structure, file = all_kinds()
    wanted = moved(file, structure)
    again = cells.recentred(file, structure, wanted)
    assert len(again) <= len(file) + 3 * (60 + 5)
    packed = slice(9, 14)
    np.testing.assert_allclose(
        np.delete(artifact.restore(again, structure), packed), np.delete(wanted, packed), rtol=1e-3
    )
    # Eight levels for what are five weights between -0.87 and -0.39.
    np.testing.assert_allclose(artifact.restore(again, structure)[packed], wanted[packed], atol=0.5 / 6)
    assert cells.recentred(file, structure, artifact.restore(file, structure)) == file


def test_weights_that_leave_their_cells_are_refused() -> None:
    weights, structure = unequal()
    file = codebook.compress(weights, structure, weights.size // 8)
    with pytest.raises(ValueError, match="cell"):
        cells.recentred(file, structure, weights)
    alike = artifact.restore(file, structure)
    zero = np.flatnonzero(alike == 0)[0]
    with pytest.raises(ValueError, match="cell"):
        cells.recentred(file, structure, np.where(alike == alike[zero], np.float32(0.5), alike))
    drawn = artifact.write([Coding(artifact.DRAWN, np.float32(0.1), reach=5, seed=1)], structure_of(100))
    assert (cells.cells_of(drawn, structure_of(100)).of_weight == -1).all()
    with pytest.raises(ValueError, match="no cells"):
        cells.recentred(drawn, structure_of(100), np.ones(100, np.float32))


# --- where the bytes go --------------------------------------------------------------------------


def test_the_sizes_of_tensors_add_up_to_the_file() -> None:
    for structure, file in (
        all_kinds()[1:],
        (STRUCTURE, codebook.compress(model(), STRUCTURE, N // 3)),
        (STRUCTURE, codebook.smallest(model(), STRUCTURE)),
    ):
        rows = contents.sizes(file, structure)
        assert sum(row.bytes for row in rows) == len(file)
        assert [row.name for row in rows] == ["header", *(tensor.name for tensor in structure.tensors)]
        assert rows[0].bytes == artifact.header_bytes(structure)
        assert sum(row.weights for row in rows) == structure.parameters


def test_the_size_of_a_tensor_is_what_it_saves_when_it_becomes_a_constant() -> None:
    file = codebook.compress(model(), STRUCTURE, N // 3)
    codings = artifact.read(file, STRUCTURE)
    row = next(row for row in contents.sizes(file, STRUCTURE) if row.name == "fc.weight")
    codings[4] = Coding(artifact.CONSTANT, np.float32(0))
    saved = len(file) - len(artifact.write(codings, STRUCTURE)) + 5
    assert row.bytes == pytest.approx(saved, rel=0.01)
    assert row.kind in ("grid", "codebook")
    assert 2 < row.distinct < 256
