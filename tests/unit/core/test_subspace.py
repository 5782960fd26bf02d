"""A job may train a part of every large tensor: the same one everywhere, and nothing outside it moves."""

import hashlib
import itertools

import numpy as np
import pytest

from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.sparsifier.subspace import SMALLEST, Subspace, recommended_share, subspace
from liberatai_core.structure import DataContract, Structure, Tensor

BIG = Structure(
    family="mlp",
    params={},
    tensors=(Tensor("a", (300, 100)), Tensor("b", (50,)), Tensor("c", (80, 30)), Tensor("d", (7, 1000))),
)
DATA = DataContract(input_shape=(1, 8, 8), classes=3)


def counts(found: Subspace) -> list[int]:
    return [tensor.size for tensor in found.part.tensors]


def test_small_tensors_are_whole_and_large_ones_keep_their_share() -> None:
    found = subspace(BIG, 0.2, 1)
    assert counts(found) == [6000, 50, SMALLEST, SMALLEST]
    assert (np.diff(found.positions) > 0).all()


def test_a_share_of_one_is_the_whole_vector() -> None:
    found = subspace(BIG, 1.0, 1)
    values = np.arange(BIG.parameters, dtype=np.float32)
    assert found.gain is None
    assert found.part is BIG
    assert found.gather(values) is values
    assert found.replaced(values + 1, values) is values


def test_what_was_replaced_is_gathered_and_the_rest_stays() -> None:
    found = subspace(BIG, 0.1, 3)
    values = np.arange(1, found.part.parameters + 1, dtype=np.float32)
    whole = found.replaced(np.zeros(BIG.parameters, np.float32), values)
    assert np.array_equal(found.gather(whole), values)
    assert np.count_nonzero(whole) == values.size


def test_the_gain_is_the_inverse_share_and_zero_outside() -> None:
    found = subspace(BIG, 0.2, 1)
    assert found.gain is not None
    first, second, *_ = [found.gain[place] for _, place in BIG.slices()]
    assert set(first.tolist()) == {0.0, 5.0}
    assert set(second.tolist()) == {1.0}
    assert np.array_equal(np.flatnonzero(found.gain), found.positions)


def test_the_part_is_drawn_by_the_seed_alone_and_the_same_everywhere() -> None:
    drawn = hashlib.sha256(subspace(BIG, 0.2, 1).positions.astype("<i8").tobytes()).hexdigest()
    assert drawn[:16] == "e7be61f8a5aac911"
    other = subspace(BIG, 0.2, 2).positions
    assert not np.array_equal(subspace(BIG, 0.2, 1).positions, other)


@pytest.mark.parametrize(("share", "seed"), [(0.0, 0), (1.1, 0), (float("nan"), 0), (0.5, -1)])
def test_shares_and_seeds_out_of_range_are_refused(share: float, seed: int) -> None:
    with pytest.raises(ValueError, match="share"):
        subspace(BIG, share, seed)


@pytest.fixture(scope="module")
def world() -> tuple[Structure, Subspace, np.ndarray, np.ndarray, np.ndarray]:
    structure = structure_of("mlp", {"hidden": 64}, DATA)
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 1, 8, 8)).astype(np.float32)
    return (
        structure,
        subspace(structure, 0.25, 5, smallest=10),
        initial_weights(structure, DATA, 1),
        x,
        random.integers(0, 3, 60),
    )


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(epochs=1),
        TrainSettings(epochs=1, optimizer="adam", learning_rate=0.01),
        TrainSettings(epochs=1, weight_decay=0.1),
        TrainSettings(epochs=1, weight_decay=0.1, optimizer="adam", proximal=0.1),
    ],
)
def test_training_moves_the_part_and_nothing_else(world, settings: TrainSettings) -> None:
    structure, part, weights, x, y = world
    moved = train(structure, DATA, weights, x, y, settings, 0, gain=part.gain).weights != weights
    assert moved[part.positions].mean() > 0.5
    assert not np.delete(moved, part.positions).any()


def test_distillation_moves_the_part_and_nothing_else(world) -> None:
    structure, part, weights, x, _ = world
    answers = np.log(np.random.default_rng(1).dirichlet(np.ones(3), len(x))).astype(np.float32)
    taught = distill(structure, DATA, weights, x, answers, DistillSettings(steps=3), 0, gain=part.gain)
    moved = taught != weights
    assert moved[part.positions].any()
    assert not np.delete(moved, part.positions).any()


def test_a_gain_of_one_changes_nothing(world) -> None:
    structure, _, weights, x, y = world
    ones = np.ones(structure.parameters, np.float32)
    plain = train(structure, DATA, weights, x, y, TrainSettings(epochs=1), 0).weights
    assert np.array_equal(
        train(structure, DATA, weights, x, y, TrainSettings(epochs=1), 0, gain=ones).weights, plain
    )


def test_the_recommended_share_falls_with_size_and_small_models_are_trained_whole() -> None:
    sizes = [1_000, 5_000, 250_000, 1_500_000, 60_000_000]
    shares = [recommended_share(size) for size in sizes]
    assert shares[0] == 1
    assert shares[2] == pytest.approx(0.15)
    assert shares[3] == pytest.approx(0.033, rel=0.02)
    assert shares == sorted(shares, reverse=True)
    # More is trained of a larger model, if less of each tensor.
    assert all(a * b < c * d for (a, b), (c, d) in itertools.pairwise(zip(shares, sizes, strict=True)))
