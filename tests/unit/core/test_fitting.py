"""Fitting without labels: sensitivity, retraining, and what a fit says about its files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liberatai_core.compressor import artifact, codebook
from liberatai_core.errors import BudgetError, ConfigError, DataError, NonFiniteError, TrainingError
from liberatai_core.learning import fitting
from liberatai_core.learning.families import initial_weights, statistics_of, structure_of
from liberatai_core.learning.fitting import FitSettings, Variant, fit, pareto
from liberatai_core.learning.retraining import RetrainSettings, retrain
from liberatai_core.learning.sensitivity import importance, sensitivity
from liberatai_core.learning.statistics import reestimate
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, to_tensors

torch = pytest.importorskip("torch")

DATA = DataContract(input_shape=(1, 8, 8), classes=4)
CNN = structure_of("cnn", {"width": 16}, DATA)
QUICK = FitSettings(steps=60, batch_size=32, augment=0.3)
EIGHTH = CNN.parameters // 2


def blobs(samples: int, seed: int) -> Any:
    """One noisy prototype per class."""
    prototypes = np.random.default_rng(7).normal(size=(DATA.classes, *DATA.input_shape))
    random = np.random.default_rng(seed)
    y = random.integers(0, DATA.classes, samples)
    return (prototypes[y] + random.normal(size=(samples, *DATA.input_shape))).astype(np.float32), y


X, Y = blobs(240, 1)
TEST = blobs(400, 2)


@pytest.fixture(scope="module")
def original() -> Any:
    start = np.concatenate([t.ravel() for t in to_tensors(_initial(), CNN).values()])
    return train(CNN, DATA, start, X, Y, TrainSettings(epochs=6, batch_size=32), 1).weights


def _initial() -> Any:
    from liberatai_core.learning.families import initial_weights

    return initial_weights(CNN, DATA, 3)


@pytest.fixture(scope="module")
def measured(original: Any) -> Any:
    fisher = importance(CNN, DATA, original, X, 1)
    return fisher, sensitivity(CNN, DATA, original, X, fisher, 1)


def test_the_fisher_information_is_small_where_a_weight_cannot_matter(original: Any, measured: Any) -> None:
    """A convolution that sees only zeros has no information; the others do."""
    fisher, _ = measured
    assert fisher.shape == original.shape
    assert fisher.min() >= 0
    assert fisher.max() > 0
    blind = importance(CNN, DATA, original, np.zeros_like(X), 1)
    first = next(place for tensor, place in CNN.slices() if len(tensor.shape) == 4)
    assert not blind[first].any()


def test_sensitivity_predicts_which_tensor_bears_coarse_weights(original: Any, measured: Any) -> None:
    """Zeroing a quarter of the energy of a tensor diverges more where the sensitivity says so."""
    _, found = measured
    assert set(found) == {tensor.name for tensor in CNN.tensors}
    wanted = log_probabilities(CNN, DATA, original, X)
    seen = {}
    for tensor, place in CNN.slices():
        if len(tensor.shape) < 2:
            continue
        changed = original.copy()
        noise = np.random.default_rng(0).normal(size=tensor.size).astype(np.float32)
        changed[place] += noise * np.linalg.norm(original[place]) / np.linalg.norm(noise) * 0.5
        answer = log_probabilities(CNN, DATA, changed, X)
        seen[tensor.name] = float((np.exp(wanted) * (wanted - answer)).sum(axis=1).mean())
    most, least = max(seen, key=seen.__getitem__), min(seen, key=seen.__getitem__)
    assert found[most] > found[least]


def test_measures_are_the_same_for_the_same_seed(original: Any, measured: Any) -> None:
    fisher, found = measured
    again = importance(CNN, DATA, original, X, 1)
    assert np.array_equal(again, fisher)
    assert sensitivity(CNN, DATA, original, X, again, 1) == found


def test_retraining_recovers_what_the_search_lost(original: Any, measured: Any) -> None:
    """At one bit per weight the retrained file is closer to the original than the searched one."""
    _, found = measured
    budget = CNN.parameters // 8 + 100
    wanted = log_probabilities(CNN, DATA, original, TEST[0])

    def divergence(file: bytes) -> float:
        answer = log_probabilities(CNN, DATA, artifact.restore(file, CNN), TEST[0])
        return float((np.exp(wanted) * (wanted - answer)).sum(axis=1).mean())

    plain = codebook.compress(original, CNN, budget, found)
    result = retrain(
        CNN, DATA, original, budget, X, found, RetrainSettings(steps=150, batch_size=32, augment=0.3), 1
    )
    assert len(result.file) <= budget
    assert divergence(result.file) < 0.7 * divergence(plain)


def test_an_interrupted_retraining_ends_with_the_same_bytes(
    original: Any, measured: Any, tmp_path: Path
) -> None:
    _, found = measured
    settings = RetrainSettings(steps=40, batch_size=16, refresh=10)
    whole = retrain(CNN, DATA, original, EIGHTH, X, found, settings, 1)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(done: int, _planned: int) -> None:
        if done == 27:
            raise Stop

    with pytest.raises(Stop):
        retrain(CNN, DATA, original, EIGHTH, X, found, settings, 1, cache=tmp_path, on_step=stop)
    (left,) = tmp_path.iterdir()
    steps: list[int] = []
    again = retrain(
        CNN,
        DATA,
        original,
        EIGHTH,
        X,
        found,
        settings,
        1,
        cache=tmp_path,
        on_step=lambda d, _: steps.append(d),
    )
    assert steps[0] == 26
    assert again.file == whole.file
    assert np.array_equal(again.shadow, whole.shadow)
    assert not left.exists()


def test_a_damaged_cache_starts_over(original: Any, measured: Any, tmp_path: Path) -> None:
    _, found = measured
    settings = RetrainSettings(steps=12, batch_size=16, refresh=5)

    def fail(done: int, _planned: int) -> None:
        if done == 9:
            raise TrainingError("stop")

    with pytest.raises(TrainingError):
        retrain(CNN, DATA, original, EIGHTH, X, found, settings, 1, cache=tmp_path, on_step=fail)
    (left,) = tmp_path.iterdir()
    left.write_bytes(left.read_bytes()[:50])
    steps: list[int] = []
    retrain(
        CNN,
        DATA,
        original,
        EIGHTH,
        X,
        found,
        settings,
        1,
        cache=tmp_path,
        on_step=lambda d, _: steps.append(d),
    )
    assert steps[0] == 1


def test_every_file_keeps_its_budget_and_says_what_it_lost(original: Any) -> None:
    budgets = [EIGHTH // 4, EIGHTH]
    found = fit(CNN, DATA, original, budgets, X, QUICK, 1, test=TEST)
    assert [variant.budget_bytes for variant in found] == budgets
    for variant in found:
        assert len(variant.file) <= variant.budget_bytes
        weights = artifact.restore(variant.file, variant.structure)
        assert variant.accuracy == fitting.accuracy(variant.structure, DATA, weights, *TEST)
        assert 0 <= variant.divergence < 1
        assert 0 < variant.agreement <= 1
    assert found[1].divergence < found[0].divergence


def test_labels_are_not_read(original: Any) -> None:
    """Poisoned labels of the test set change the reported accuracy and not one byte of the file."""
    honest = fit(CNN, DATA, original, [EIGHTH], X, QUICK, 1, test=TEST)[0]
    poisoned = fit(CNN, DATA, original, [EIGHTH], X, QUICK, 1, test=(TEST[0], (TEST[1] + 1) % 4))[0]
    assert honest.file == poisoned.file
    assert honest.accuracy != poisoned.accuracy


def test_without_samples_the_weights_alone_decide(original: Any) -> None:
    variant = fit(CNN, DATA, original, [EIGHTH], None, QUICK, 1, test=TEST)[0]
    assert math.isnan(variant.divergence)
    assert math.isnan(variant.agreement)
    assert "no unlabeled samples" in variant.why
    assert variant.file == codebook.compress(original, CNN, EIGHTH)


def test_one_unlabeled_sample_is_enough(original: Any) -> None:
    variant = fit(CNN, DATA, original, [EIGHTH], X[:1], FitSettings(steps=5), 1)[0]
    assert len(variant.file) <= EIGHTH
    assert np.isfinite(variant.divergence)


def test_a_smaller_member_is_tried_where_much_is_lost(original: Any) -> None:
    """The better of both is kept, and the reason names both."""
    budget = codebook.smallest_bytes(CNN) + 100
    settings = FitSettings(steps=40, batch_size=32, augment=0.3)
    variant = fit(CNN, DATA, original, [budget], X, settings, 1)[0]
    assert len(variant.file) <= budget
    alone = fit(
        CNN, DATA, original, [budget], X, FitSettings(steps=40, batch_size=32, augment=0.3, smaller=False), 1
    )
    assert variant.divergence <= alone[0].divergence
    assert CNN.id in variant.why
    assert "cnn-width" in variant.why.replace(CNN.id, "")


def test_refusals(original: Any) -> None:
    with pytest.raises(BudgetError, match="smallest possible file"):
        fit(CNN, DATA, original, [EIGHTH, 20], X, QUICK, 1)
    with pytest.raises(DataError):
        fit(CNN, DATA, original, [EIGHTH], X[:, :, :4], QUICK, 1)
    with pytest.raises(DataError):
        fit(CNN, DATA, original, [EIGHTH], X[:0], QUICK, 1)
    broken = original.copy()
    broken[3] = np.nan
    with pytest.raises(NonFiniteError):
        fit(CNN, DATA, broken, [EIGHTH], X, QUICK, 1)
    with pytest.raises(ConfigError, match="steps"):
        FitSettings(steps=0)
    with pytest.raises(ConfigError, match="ramp"):
        RetrainSettings(ramp=2)


def test_pareto_drops_what_is_larger_and_worse() -> None:
    def variant(size: int, divergence: float) -> Variant:
        return Variant(
            structure=CNN,
            file=bytes(size),
            budget_bytes=size,
            divergence=divergence,
            agreement=1.0,
            accuracy=None,
            method="",
            why="",
            seconds=0.0,
        )

    small, bad, good = variant(10, 0.2), variant(20, 0.3), variant(30, 0.1)
    assert pareto([good, bad, small]) == [small, good]


def test_progress_is_told(original: Any) -> None:
    said: list[tuple[str, int, int]] = []
    fit(CNN, DATA, original, [EIGHTH], X, QUICK, 1, on_progress=lambda *step: said.append(step))
    assert said[-1][1:] == (QUICK.steps, QUICK.steps)
    assert {what for what, _, _ in said} == {"measuring the sensitivity", f"retraining for {EIGHTH} bytes"}


@pytest.mark.parametrize("retrain", [False, True])
def test_running_statistics_are_those_of_the_compressed_model_whatever_the_budget(retrain: bool) -> None:
    structure = structure_of("resnet", {"depth": 20, "width": 4, "norm": "batch"}, DATA)
    start = initial_weights(structure, DATA, 0)
    weights = train(structure, DATA, start, X, Y, TrainSettings(epochs=6, balance=0.0), 0).weights
    settings = FitSettings(steps=6, batch_size=16, retrain=retrain, smaller=False)
    budgets = [structure.parameters, structure.parameters // 2, structure.parameters // 10]
    made = fit(structure, DATA, weights, budgets, X, settings, 0)
    for variant in made:
        assert 0.9 * variant.budget_bytes <= len(variant.file) <= variant.budget_bytes
    assert made[0].agreement > 0.7
    teaching = np.sort(np.random.default_rng(0).permutation(len(X))[len(X) // 10 :])
    for variant in made[:2]:
        restored = artifact.restore(variant.file, structure)
        again = reestimate(structure, DATA, restored, X[teaching])
        names = statistics_of(structure)
        for tensor, place in structure.slices():
            if tensor.name in names:
                np.testing.assert_array_equal(restored[place], again[place].astype(np.float16))
