"""Teachers that teach apart: whose change is taken, and how much of it."""

from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import DataError
from liberatai_core.structure import DataContract

pytest.importorskip("torch")
from liberatai_core.learning import task_vectors
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.task_vectors import Integrated, integrate
from liberatai_core.learning.training import log_probabilities

DATA = DataContract(input_shape=(6,), classes=3)
MLP = structure_of("mlp", {"hidden": 8}, DATA)
START = initial_weights(MLP, DATA, 3)
SETTINGS = DistillSettings(steps=60, batch_size=16, learning_rate=0.02, copies=0)


def samples(number: int, seed: int) -> Any:
    x = np.random.default_rng(seed).standard_normal((number, *DATA.input_shape)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1).astype(np.int64)


def sure(y: Any) -> Any:
    """Log-probabilities of a teacher that names these classes."""
    return np.log(np.full((len(y), DATA.classes), 0.02) + 0.94 * np.eye(DATA.classes)[y]).astype(np.float32)


X, Y = samples(200, 0)
RIGHT, WRONG = sure(Y), sure((Y + 1) % DATA.classes)


def taught(teachers: list[Any], labelled: Any = None, seed: int = 5) -> Integrated:
    return integrate(MLP, DATA, START, X, np.stack(teachers), SETTINGS, seed, labelled=labelled)


def right(weights: Any) -> float:
    x, y = samples(500, 9)
    return float(np.mean(log_probabilities(MLP, DATA, weights, x).argmax(axis=1) == y))


def test_labels_take_the_change_of_the_teacher_that_is_right() -> None:
    found = taught([WRONG, RIGHT], samples(100, 1))
    assert found.shares[1] > 0.9
    assert found.shares.sum() == pytest.approx(1)
    assert right(found.weights) > right(START) + 0.2
    assert right(found.weights) > right(taught([WRONG, RIGHT]).weights) + 0.1


def test_without_labels_all_count_alike() -> None:
    """The weights are the mean of what each teacher alone would have made of the student."""
    found = taught([RIGHT, WRONG])
    assert found.shares.tolist() == [0.5, 0.5]
    assert taught([RIGHT, WRONG], (X[:0], Y[:0])).shares.tolist() == [0.5, 0.5]
    alone = [taught([RIGHT], seed=5).weights, taught([WRONG], seed=6).weights]
    assert found.weights == pytest.approx(np.mean(alone, axis=0), abs=1e-5)


def test_a_loyal_student_changes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = []
    for loyalty in (0.0, 1.0, 100.0):
        monkeypatch.setattr(task_vectors, "LOYALTY", loyalty)
        changed.append(float(np.linalg.norm(taught([RIGHT]).weights - START)))
        if loyalty == 0:
            plain = distill(MLP, DATA, START, X, RIGHT, SETTINGS, 5)
            assert taught([RIGHT]).weights == pytest.approx(plain, abs=1e-6)
    assert changed == sorted(changed, reverse=True)


def test_equal_arguments_give_equal_bytes() -> None:
    labelled = samples(50, 2)
    first = taught([RIGHT, WRONG], labelled).weights.tobytes()
    assert taught([RIGHT, WRONG], labelled).weights.tobytes() == first
    assert taught([RIGHT, WRONG], labelled, seed=6).weights.tobytes() != first


@pytest.mark.parametrize("shape", [(0, 200, 3), (200, 3), (1, 199, 3)])
def test_answers_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError):
        integrate(MLP, DATA, START, X, np.zeros(shape, np.float32), SETTINGS, 0)
