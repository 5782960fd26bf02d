"""Facts about the compressor: files fit their budget, damaged files are refused."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from liberatai_core.compressor import artifact, codebook
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


def structure_of(*sizes: int) -> Structure:
    return Structure(
        family="mlp", params={}, tensors=tuple(Tensor(f"t{i}", (s,)) for i, s in enumerate(sizes))
    )


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


def test_entropy_coding_is_within_one_percent_of_the_entropy() -> None:
    counts = np.array([20, 300, 9000, 60000, 9100, 310, 15])
    indices = np.random.default_rng(0).permutation(np.repeat(np.arange(7), counts))
    coding = Coding(
        artifact.GRID, np.float32(0.25), low=-3, frequencies=artifact.normalise(counts), indices=indices
    )
    structure = structure_of(counts.sum())
    file = artifact.write([coding], structure)
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum() * counts.sum() / 8
    assert len(file) - artifact.header_bytes(structure) - len(artifact.record(coding)) <= 1.01 * entropy
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


@pytest.mark.parametrize("counts", [[1, 10**9], [1] * 256, [0, 5, 0, 7, 0], [10**6, *[1] * 255], [3, 0]])
def test_frequencies_add_up_and_keep_every_symbol(counts: Any) -> None:
    counts = np.array(counts)
    table = artifact.normalise(counts)
    assert table.sum() == artifact.TOTAL
    np.testing.assert_array_equal(table > 0, counts > 0)


# --- files from anywhere -------------------------------------------------------------------------


def all_kinds() -> tuple[list[Coding], Structure, bytes]:
    """A small file with every kind of record, raw bits and several lanes."""
    place = np.arange(40)
    codings = [
        Coding(artifact.CONSTANT, np.float32(0.5)),
        Coding(artifact.HALF, values=np.array([0.1, -2, 3], np.float16)),
        Coding(artifact.FULL, values=np.array([0.1, -2], np.float32)),
        Coding(
            artifact.GRID,
            np.float32(0.125),
            low=-7,
            raw_bits=3,
            frequencies=np.array([4096]),
            indices=place[:5],
        ),
        Coding(
            artifact.GRID,
            np.float32(0.1),
            low=-9,
            raw_bits=2,
            frequencies=np.array([96, 3000, 1000]),
            indices=place % 12,
        ),
        Coding(
            artifact.CODEBOOK,
            np.float32(2),
            entries=np.array([-1, 0, 0.5], np.float16),
            frequencies=np.array([1000, 2596, 500]),
            indices=place * place % 3,
        ),
    ]
    structure = structure_of(4, 3, 2, 5, 40, 40)
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
        artifact.restore(file + bytes(20_000), structure)


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
TABLE = b"\x02\x80\x10"
"""Two symbols of frequency 2048."""
GRID = b"\x03" + np.float32(1).tobytes() + b"\x00\x00"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", CodecError),
        (b"\x09", CodecError),
        (b"\x00" + np.float32(np.nan).tobytes(), NonFiniteError),
        (b"\x01" + np.full(100, np.inf, np.float16).tobytes(), NonFiniteError),
        (b"\x02" + np.full(100, np.inf, np.float32).tobytes(), NonFiniteError),
        (b"\x02" + bytes(399), CodecError),
        (GRID + LONGEST, CodecError),  # symbols
        (GRID + b"\x00", CodecError),
        (GRID + b"\x02" + LONGEST, CodecError),  # frequency
        (GRID + b"\x02\x80\x20", CodecError),  # a certain symbol with a table
        (GRID[:5] + LONGEST + b"\x00\x01", CodecError),  # lowest level
        (GRID[:6] + b"\x11\x01", CodecError),  # raw bits
        (GRID[:6] + b"\x10\x01", CodecError),  # raw bits missing
        (GRID + TABLE + LONGEST + b"\x00", BombError),  # lanes
        (GRID + TABLE + b"\x00\x00", BombError),
        (GRID + TABLE + b"\x01" + LONGEST + bytes(4), CodecError),  # words
        (GRID + TABLE + b"\x01\x00" + bytes(4), CodecError),  # state below 2^16
        (GRID + TABLE + b"\x01\x00" + b"\x00\x00\x01\x00", CodecError),  # words run out
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
    assert peak < 200_000


def test_too_few_lanes_would_take_too_long_and_are_refused() -> None:
    structure = structure_of(100_000)
    head = codebook.smallest(np.ones(100_000, np.float32), structure)[: artifact.header_bytes(structure)]
    with pytest.raises(CodecError, match="lanes"):
        artifact.restore(head + GRID + TABLE + b"\x01\x00" + b"\x00\x00\x01\x00", structure)


def test_another_version_is_refused() -> None:
    structure = structure_of(3)
    file = codebook.smallest(np.ones(3, np.float32), structure)
    with pytest.raises(CodecError):
        artifact.restore(b"LAM2" + file[4:], structure)


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
