"""Retraining of the compressor's baselines: what is frozen stays, what is float learns, labels only where said."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from liberatai_core.compressor import codebook_ijcnn2020 as book
from liberatai_core.errors import DataError
from liberatai_core.learning.baselines import agreement, retrained, retrained_with_labels
from liberatai_core.learning.distillation import DistillSettings
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, to_tensors

DATA = DataContract(input_shape=(12,), classes=3)
MLP = structure_of("mlp", {"hidden": 16, "layers": 2}, DATA)
SETTINGS = DistillSettings(steps=120, batch_size=32, learning_rate=5e-3, copies=0)


@pytest.fixture(scope="module")
def taught() -> Any:
    """A trained original, its inputs and labels."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 300)
    x = (np.random.default_rng(9).normal(size=(3, 12))[y] + random.normal(size=(300, 12))).astype(np.float32)
    start = initial_weights(MLP, DATA, 0)
    return train(MLP, DATA, start, x, y, TrainSettings(epochs=8, balance=0.0), 0).weights, x, y


@pytest.fixture(scope="module")
def damaged(taught: Any) -> Any:
    """Two of three layers with three values each: far from the original."""
    weights = taught[0]
    config = {"dense1.weight": 3, "dense2.weight": 3}
    return book.quantise(MLP, weights, book.books(MLP, weights, (3,)), config)


def error(codings: Any, taught: Any) -> float:
    weights, x, _ = taught
    ours = np.exp(log_probabilities(MLP, DATA, book.decoded(MLP, codings), x))
    return float(((ours - np.exp(log_probabilities(MLP, DATA, weights, x))) ** 2).mean())


def test_agreement_with_the_original_is_full_and_falls_with_damage(taught: Any, damaged: Any) -> None:
    measure = agreement(MLP, DATA, taught[0], taught[1])
    assert measure(taught[0]) == 1.0
    assert measure(book.decoded(MLP, damaged)) < 1.0


def test_float_layers_learn_the_outputs_and_frozen_ones_stay(taught: Any, damaged: Any) -> None:
    weights, x, _ = taught
    answers = log_probabilities(MLP, DATA, weights, x)
    again = retrained(MLP, DATA, damaged, x, answers, SETTINGS, 0)
    assert error(again, taught) < 0.5 * error(damaged, taught)
    before = to_tensors(book.decoded(MLP, damaged), MLP)
    after = to_tensors(book.decoded(MLP, again), MLP)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "head.weight"}


def test_retraining_is_the_same_for_the_same_seed(taught: Any, damaged: Any) -> None:
    weights, x, _ = taught
    answers = log_probabilities(MLP, DATA, weights, x)
    first, second = (
        book.decoded(MLP, retrained(MLP, DATA, damaged, x, answers, SETTINGS, 3)) for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()


def test_the_control_learns_labels_and_keeps_frozen_layers(taught: Any, damaged: Any) -> None:
    _, x, y = taught
    again = retrained_with_labels(MLP, DATA, damaged, x, y, SETTINGS, 0)

    def loss(codings: Any) -> float:
        return -float(
            log_probabilities(MLP, DATA, book.decoded(MLP, codings), x)[np.arange(len(y)), y].mean()
        )

    assert loss(again) < 0.9 * loss(damaged)
    before = to_tensors(book.decoded(MLP, damaged), MLP)
    after = to_tensors(book.decoded(MLP, again), MLP)
    for name in ("dense1.weight", "dense2.weight", "head.bias"):
        np.testing.assert_array_equal(before[name], after[name])


def test_without_unlabeled_samples_there_is_no_retraining(taught: Any, damaged: Any) -> None:
    _, x, _ = taught
    with pytest.raises(DataError, match="no unlabeled samples"):
        retrained(MLP, DATA, damaged, x[:0], np.empty((0, 3), np.float32), SETTINGS, 0)
