"""Every device's model as a teacher: together they know what none of them does, and nobody leads them astray."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from liberatai_coordinator.config import Aggregate, JobSpec, StructureChoice, Teach, parse_job
from liberatai_coordinator.models.members import Labelled
from liberatai_coordinator.models.teachers import Said, Teacher, ask
from liberatai_core.aggregator.ensemble import accuracy
from liberatai_core.errors import ConfigError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.structure import DataContract

CLASSES = 6
DATA = DataContract(input_shape=(8,), classes=CLASSES)
STRUCTURE = structure_of("mlp", {"hidden": 16}, DATA)
CENTRES = np.random.default_rng(0).normal(0, 1.6, (CLASSES, 8))
SAMPLES = 200
TAUGHT = tuple((one, (one + 1) % CLASSES) for one in range(CLASSES))


def samples(count: int, classes: Sequence[int], seed: int) -> Labelled:
    random = np.random.default_rng(seed)
    y = random.choice(classes, count)
    return (CENTRES[y] + random.normal(0, 1, (count, 8))).astype(np.float32), y


@cache
def trained(classes: tuple[int, ...], seed: int, flip: int) -> NDArray[np.float32]:
    x, y = samples(SAMPLES, classes, seed)
    settings = TrainSettings(epochs=15, learning_rate=0.05, balance=1.0)
    start = initial_weights(STRUCTURE, DATA, 1)
    return train(STRUCTURE, DATA, start, x, (y + flip) % CLASSES, settings, seed).weights


def teacher(number: int, flip: int = 0, claim: float = 1.0) -> Teacher:
    known = TAUGHT[number % len(TAUGHT)]
    counts = np.zeros(CLASSES)
    counts[list(known)] = claim * SAMPLES / len(known)
    return Teacher(
        id=f"{number:02}", structure=STRUCTURE, counts=counts, weights=lambda: trained(known, number, flip)
    )


def job(rule: Any = "mean", **teach: Any) -> JobSpec:
    return JobSpec(
        name="crowd",
        data=DATA,
        structures=(StructureChoice(family="mlp", params={"hidden": 16}),),
        aggregate=Aggregate(rule=rule),
        teach=Teach(**teach),
    )


LESSON, TRUTH = samples(300, range(CLASSES), 100)
FITTED, JUDGING = samples(300, range(CLASSES), 101), samples(150, range(CLASSES), 102)
NOTHING = np.full((len(JUDGING[1]), CLASSES), -np.log(CLASSES), np.float32)
"""Of structures that know nothing."""


def told(given: JobSpec, teachers: Sequence[Teacher], labels: bool = True) -> Said:
    return ask(
        given,
        1,
        teachers,
        LESSON,
        FITTED if labels else None,
        JUDGING if labels else None,
        NOTHING if labels else None,
    )


def score(said: Said) -> float:
    assert said.log_probs is not None, said.why
    assert said.log_probs.shape == (len(LESSON), CLASSES)
    return accuracy(said.log_probs, TRUTH)


@pytest.mark.parametrize("labels", [True, False])
def test_devices_that_know_two_classes_each_know_all_together(labels: bool) -> None:
    crowd = [teacher(number) for number in range(12)]
    alone = max(score(told(job(teachers="devices"), [one] * 3, labels)) for one in crowd[:6])
    together = score(told(job(teachers="devices"), crowd, labels))
    assert together > 0.8
    assert alone < 0.5


@pytest.mark.parametrize("labels", [True, False])
def test_devices_that_lie_about_their_labels_are_left_out(labels: bool) -> None:
    honest = [teacher(number) for number in range(12)]
    hostile = [replace(teacher(number, flip=2), id=f"x{number}") for number in range(3)]
    clean = score(told(job(teachers="devices"), honest, labels))
    said = told(job(teachers="devices"), [*hostile, *honest], labels)
    assert score(said) > clean - 0.015
    assert "12 devices' models teach, 3 left out" in said.why


def test_by_robust_rules_nobody_gains_by_claiming_more_samples() -> None:
    honest = [teacher(number) for number in range(12)]
    loud = replace(teacher(0, flip=2, claim=1e6), id="loud")
    given = job(rule="median", teachers="devices")
    assert (
        score(told(given, [*honest, loud], labels=False)) > score(told(given, honest, labels=False)) - 0.015
    )


def test_the_order_of_the_devices_changes_no_byte() -> None:
    crowd = [teacher(number) for number in range(7)]
    one, other = (told(job(), some).log_probs for some in (crowd, crowd[::-1]))
    assert one is not None
    assert other is not None
    assert one.tobytes() == other.tobytes()


def test_no_more_than_allowed_are_asked_and_a_seed_says_which() -> None:
    asked: list[str] = []

    def noting(one: Teacher) -> Teacher:
        def weights() -> NDArray[np.float32]:
            asked.append(one.id)
            return one.weights()

        return replace(one, weights=weights)

    crowd = [noting(teacher(number)) for number in range(9)]
    given = job(teachers="devices", most_teachers=4)
    told(given, crowd)
    first = list(asked)
    told(given, crowd)
    assert len(first) == 4
    assert asked[4:] == first


def test_what_labels_contradict_does_not_teach() -> None:
    crowd = [teacher(number) for number in range(6)]
    sure = np.log(np.eye(CLASSES)[JUDGING[1]] + 1e-6).astype(np.float32)
    said = ask(job(), 1, crowd, LESSON, FITTED, JUDGING, sure)
    assert said.log_probs is None
    assert "against 100.0% of the structures on 150 labels" in said.why
    unasked = ask(job(), 1, crowd, LESSON, None, None, None)
    assert unasked.log_probs is None
    assert "no labels" in unasked.why


def test_two_devices_are_too_few() -> None:
    said = told(job(teachers="devices"), [teacher(0), teacher(1)])
    assert said.log_probs is None
    assert "2 devices are too few" in said.why


def test_task_vectors_and_devices_are_refused_together() -> None:
    text = """
name: crowd
data: {input_shape: [8], classes: 6}
structures: [{family: mlp}]
teach: {teachers: devices, method: task_vectors}
"""
    with pytest.raises(ConfigError, match="devices go with teach.method: ensemble"):
        parse_job(text, "job.yaml")
