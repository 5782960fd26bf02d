"""The compressor's benchmark on a model small enough for a test: who sees which samples, what is told."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from benchmarks import compressor as bench
from benchmarks import teachers

from liberatai_core.errors import DataError
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract

CONTROLS = [bench.OURS_LABELLED, bench.LABELLED]
BASELINES = [bench.OURS_LABELLED, bench.IJCNN, bench.LABELLED, bench.ACCESS, bench.FIXED, bench.INT8]


def options(folder: Path, *more: str) -> argparse.Namespace:
    given = (
        "--net mlp --quick --width 0.125 --samples 300 --test-samples 200 --epochs 5 --steps 12 --trials 4"
    )
    return bench.parsed([*given.split(), "--cache", str(folder), *more])


def teacher_of(folder: Path, *more: str) -> bench.Bench:
    chosen = options(folder, *more)
    given = teachers.world(chosen)
    made = teachers.structure(chosen, given.data)
    weights = teachers.teacher(chosen, given, made, lambda text: bench._say(chosen, text))
    accuracy = float(
        np.mean(log_probabilities(made, given.data, weights, given.test[0]).argmax(1) == given.test[1])
    )
    return bench.Bench(options=chosen, world=given, structure=made, weights=weights, accuracy=accuracy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def digits_file(path: Path, count: int, shape: tuple[int, ...], seed: int = 0, **more: Any) -> Path:
    random = np.random.default_rng(seed)
    x = random.integers(0, 255, (count, *shape), dtype=np.uint8)
    np.savez(path, x=x, y=random.integers(0, 4, count), **more)
    return path


# --- samples ---------------------------------------------------------------------------------------


def test_a_fifth_of_a_file_without_test_samples_is_held_out(folder: Path) -> None:
    given = teachers.world(options(folder, "--samples", "100000", "--test-samples", "100000"))
    assert (len(given.train[0]), len(given.test[0])) == (1438, 359)
    kept = {row.tobytes() for row in given.train[0]}
    # A handful of the 1797 digits stand in the set twice.
    assert sum(row.tobytes() in kept for row in given.test[0]) < 5


def test_test_samples_come_from_their_own_file(tmp_path: Path) -> None:
    train = digits_file(tmp_path / "train.npz", 50, (3, 8, 8), 1)
    test = digits_file(tmp_path / "test.npz", 20, (3, 8, 8), 2)
    given = teachers.world(options(tmp_path, "--data", str(train), "--test", str(test)))
    assert (len(given.train[0]), len(given.test[0])) == (50, 20)
    assert given.data == DataContract(input_shape=(3, 8, 8), classes=4)
    other = digits_file(tmp_path / "other.npz", 20, (3, 9, 8), 2)
    with pytest.raises(DataError, match="samples"):
        teachers.world(options(tmp_path, "--data", str(train), "--test", str(other)))


def test_marked_test_samples_are_not_trained_on(tmp_path: Path) -> None:
    marks = np.arange(60) % 3 == 0
    path = digits_file(tmp_path / "marked.npz", 60, (8, 8), test=marks.astype(np.uint8))
    given = teachers.world(options(tmp_path, "--data", str(path)))
    assert (len(given.train[0]), len(given.test[0])) == (40, 20)


def test_inputs_have_mean_zero_and_deviation_one(folder: Path) -> None:
    given = teachers.world(options(folder))
    assert float(given.train[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(given.train[0].std()) == pytest.approx(1, abs=1e-4)


def test_a_file_without_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 4, 4), np.uint8))
    with pytest.raises(DataError, match="labels"):
        teachers.world(options(tmp_path, "--data", str(tmp_path / "x.npz")))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 40), (2, 8, 8)])
def test_samples_of_another_domain_are_brought_to_the_shape(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (20, *shape)).astype(np.float32)
    made = teachers.adapted(x, DataContract(input_shape=(3, 8, 8), classes=4), "x")
    assert made.shape == (20, 3, 8, 8)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(made.std((0, 2, 3)), 1, atol=1e-4)


def test_resizing_keeps_a_ramp_a_ramp() -> None:
    ramp = np.broadcast_to(np.arange(28, dtype=np.float32), (1, 1, 28, 28)).copy()
    made = teachers.adapted(ramp, DataContract(input_shape=(1, 32, 32), classes=2), "x")[0, 0, 5]
    steps = np.diff(made)
    np.testing.assert_allclose(steps[1:-1], steps[15], rtol=1e-3)


def test_samples_with_another_number_of_axes_are_refused() -> None:
    with pytest.raises(DataError, match="axes"):
        teachers.adapted(np.zeros((5, 3, 9), np.float32), DataContract(input_shape=(3, 8, 8), classes=4), "x")


def test_unlabeled_samples_are_the_training_inputs_foreign_ones_or_none(tmp_path: Path) -> None:
    given = teachers.world(options(tmp_path))
    assert given.unlabeled is given.train[0]
    assert teachers.world(options(tmp_path, "--unlabeled", "none")).unlabeled is None
    path = digits_file(tmp_path / "other.npz", 90, (12, 12))
    foreign = teachers.world(options(tmp_path, "--unlabeled", f"other:{path}")).unlabeled
    assert foreign is not None
    assert foreign.shape == (90, 1, 8, 8)


# --- the teacher -----------------------------------------------------------------------------------


def test_a_teacher_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = teacher_of(tmp_path)
    assert "teacher epoch 5/5" in capsys.readouterr().err
    second = teacher_of(tmp_path)
    assert "from the cache" in capsys.readouterr().err
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.accuracy > 0.3  # chance: 0.1
    assert teacher_of(tmp_path, "--seed", "1").weights.tobytes() != first.weights.tobytes()
    assert len(list((tmp_path / "teachers").glob("*.npz"))) == 2


# --- rows ------------------------------------------------------------------------------------------


def test_the_last_line_says_what_the_issue_asks_for(folder: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    chosen = options(folder, "--picture", str(drawn), "--only", *BASELINES)
    found = json.loads(json.dumps(bench.measured(chosen)))
    wanted = {
        "net",
        "params",
        "teacher_accuracy",
        "rows",
        "best_ratio_at_1pt",
        "budget_misses",
        "seed",
        "data",
    }
    assert wanted <= set(found)
    assert {row["method"] for row in found["rows"]} == set(BASELINES)
    assert {row["method"] for row in found["rows"] if row["labels_used"]} == set(CONTROLS)
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(4 * found["params"] / row["file_bytes"], abs=0.01)
        lost = 100 * (found["teacher_accuracy"] - row["accuracy"])
        assert row["lost_points"] == pytest.approx(lost, abs=0.01)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    bench.table(found)


def test_rows_that_say_no_labels_do_not_depend_on_labels(folder: Path) -> None:
    """Poisoned labels after the teacher: files and answers of all methods but the control are the same."""
    honest = teacher_of(folder)
    x, y = honest.world.train
    poisoned = replace(honest, world=replace(honest.world, train=(x, (y + 1) % 10)))
    before, after = ([*bench._rows(one, BASELINES)] for one in (honest, poisoned))
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        same = (one.file_bytes, one.accuracy) == (other.file_bytes, other.accuracy)
        assert same or one.labels_used
    assert any(a.accuracy != b.accuracy for a, b in zip(before, after, strict=True) if a.labels_used)


def test_without_unlabeled_samples_the_codebook_methods_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(bench._rows(teacher_of(folder, "--unlabeled", "none"), BASELINES))
    assert {row.method for row in rows} == {bench.FIXED, bench.INT8}
    assert "they need unlabeled samples" in capsys.readouterr().err


def row(method: str, ratio: float, lost: float, *, budget: int | None = None, size: int = 100) -> bench.Row:
    return bench.Row(
        method=method,
        setting="",
        budget_bytes=budget,
        file_bytes=size,
        packed_bytes=None,
        ratio=ratio,
        accuracy=0.9 - lost / 100,
        lost_points=lost,
        labels_used=False,
        seconds=1.0,
    )


def test_the_best_ratio_is_the_largest_that_loses_at_most_a_point() -> None:
    rows = [row("ours", 8, 0.1), row("ours", 50, 1.0), row("ours", 80, 1.2), row("int8", 4, 3.0)]
    assert bench.best_ratios(rows) == {"ours": 50, "int8": None}


@pytest.mark.parametrize(("size", "is_miss"), [(94, True), (95, False), (100, False), (101, True)])
def test_a_file_misses_its_budget_above_it_or_far_below(size: int, is_miss: bool) -> None:
    assert bench.missed(row("ours", 8, 0, budget=100, size=size)) is is_miss


def test_the_suite_leaves_out_what_has_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = bench.parsed(
        ["--suite", "quick", "--data-dir", str(tmp_path), "--cache", str(tmp_path), "--only", bench.INT8]
    )
    found = bench.suite(chosen)
    told = capsys.readouterr().err
    for net, file in (("resnet20", "cifar10_sub_train.npz"), ("vgg16", "fashion_mnist.npz")):
        assert f"{net}: left out, no {file}" in told
    assert [one["net"] for one in found["results"]] == ["cnn"]
    assert found["failed"] == []
    assert found["best_ratio_at_1pt"]["cnn"][bench.INT8] > 4


@pytest.mark.parametrize("wrong", [["--unlabeled", "some"], ["--width", "0"], ["--budgets", "0.5"]])
def test_impossible_options_are_usage_errors(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        options(tmp_path, *wrong)
    assert refused.value.code == 2
