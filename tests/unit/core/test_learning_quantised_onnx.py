"""The int8 ONNX file answers like the float model, computes in integers, and never sees a label."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import DataError, MissingExtraError, NonFiniteError, StructureError
from liberatai_core.learning import quantised_onnx
from liberatai_core.learning.export import onnx_bytes, to_onnx
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.quantised_onnx import to_onnx_int8
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector, to_bytes

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

DATA = DataContract(input_shape=(1, 8, 8), classes=4)
MLP = structure_of("mlp", {"hidden": 16}, DATA)
CNN = structure_of("cnn", {"width": 8}, DATA)


@pytest.fixture(autouse=True, scope="module")
def _exported_once() -> Iterator[None]:
    """Let torch export each model once for all tests: it takes seconds and is tested elsewhere."""
    made: dict[tuple[str, bytes], bytes] = {}

    def remembered(structure: Structure, data: DataContract, weights: Vector) -> bytes:
        key = (structure.id, to_bytes(weights))
        if key not in made:
            made[key] = onnx_bytes(structure, data, weights)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_onnx, "onnx_bytes", remembered)
        yield


def stripes(n: int, seed: int) -> tuple[Any, Any]:
    """Return noisy stripes in four directions and which of them, learnt within a second."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    rows, columns = np.mgrid[0:8, 0:8]
    phase = np.stack([rows, columns, rows + columns, rows - columns])[y] + rng.integers(0, 4, (n, 1, 1))
    return (np.sin(phase) / 2 + 0.5 + 0.3 * rng.normal(size=(n, 8, 8))).astype(np.float32)[:, None], y


@pytest.fixture(scope="module")
def trained() -> tuple[Structure, Vector]:
    x, y = stripes(400, 0)
    start = initial_weights(CNN, DATA, 0)
    return CNN, train(CNN, DATA, start, x, y, TrainSettings(epochs=4, balance=0.0), 0).weights


def outputs(path: Path, x: Any) -> Any:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"x": x})
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_the_report_says_what_the_file_does(trained: tuple[Structure, Vector], tmp_path: Path) -> None:
    structure, weights = trained
    check, labels = stripes(300, 2)
    out = tmp_path / "m.onnx"
    report = to_onnx_int8(
        structure, DATA, weights, stripes(200, 1)[0], out, x_check=check, labelled=(check, labels)
    )
    found, wanted = outputs(out, check), log_probabilities(structure, DATA, weights, check)
    assert report.agreement == (found.argmax(axis=1) == wanted.argmax(axis=1)).mean()
    kl = (np.exp(wanted) * (wanted - found)).sum(axis=1).mean()
    assert report.divergence == pytest.approx(kl, abs=1e-6)
    assert report.int8_accuracy == (found.argmax(axis=1) == labels).mean()
    assert report.float_accuracy == (wanted.argmax(axis=1) == labels).mean()
    assert report.file_bytes == out.stat().st_size
    assert (report.calibrated, report.checked, report.warning) == (100, 300, "")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_trained_model_loses_at_most_half_a_point_and_over_a_third_of_its_bytes(
    trained: tuple[Structure, Vector], tmp_path: Path
) -> None:
    structure, weights = trained
    report = to_onnx_int8(
        structure, DATA, weights, stripes(400, 1)[0], tmp_path / "m.onnx", labelled=stripes(1000, 3)
    )
    assert report.float_accuracy is not None
    assert report.int8_accuracy is not None
    assert report.float_accuracy > 0.9
    assert report.float_accuracy - report.int8_accuracy <= 0.005
    assert report.agreement >= 0.99
    assert report.kept == ()
    assert report.file_bytes < report.float_bytes * 2 / 3
    to_onnx(structure, DATA, weights, tmp_path / "float.onnx")
    assert report.float_bytes == (tmp_path / "float.onnx").stat().st_size


def test_onnxruntime_computes_every_layer_in_integers(
    trained: tuple[Structure, Vector], tmp_path: Path
) -> None:
    structure, weights = trained
    to_onnx_int8(structure, DATA, weights, stripes(100, 1)[0], tmp_path / "m.onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    runtime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert operators.count("QLinearConv") == 2
    assert operators.count("QGemm") == 1
    assert not {"Conv", "Gemm", "FusedConv", "FusedGemm"} & set(operators)


@pytest.mark.parametrize(
    ("family", "params", "shape", "layers"),
    [
        ("mlp", {"hidden": 16, "layers": 2}, (1, 8, 8), 3),
        ("ds_cnn", {"width": 8}, (3, 16, 16), 6),
        ("cnn1d", {"width": 8}, (9, 32), 4),
    ],
)
def test_every_kind_of_layer_takes_part_for_every_batch_size(
    tmp_path: Path, family: str, params: Any, shape: Any, layers: int
) -> None:
    data = DataContract(input_shape=shape, classes=3)
    structure = structure_of(family, params, data)
    weights = initial_weights(structure, data, 0)
    x = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    report = to_onnx_int8(structure, data, weights, x, tmp_path / "m.onnx")
    assert (report.quantised, report.kept) == (layers, ())
    wanted = log_probabilities(structure, data, weights, x)
    found = outputs(tmp_path / "m.onnx", x)
    assert found == pytest.approx(wanted, abs=0.2)
    for batch in (1, 3):
        assert outputs(tmp_path / "m.onnx", x[:batch]) == pytest.approx(found[:batch], abs=1e-5)


def test_equal_arguments_give_equal_bytes_and_labels_change_nothing(
    trained: tuple[Structure, Vector], tmp_path: Path
) -> None:
    structure, weights = trained
    x, y = stripes(120, 1)
    made = []
    for name, labels in (("a", None), ("b", y), ("c", 3 - y)):
        given = None if labels is None else (x, labels)
        to_onnx_int8(structure, DATA, weights, x, tmp_path / name, labelled=given, seed=5)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] == made[2]


def test_layers_stay_float_until_the_asked_divergence_is_met(
    trained: tuple[Structure, Vector], tmp_path: Path
) -> None:
    structure, weights = trained
    x = stripes(400, 1)[0]
    free = to_onnx_int8(structure, DATA, weights, x, tmp_path / "free.onnx")
    # Below what all layers together reach, above what the least harmful one alone does.
    tight = to_onnx_int8(structure, DATA, weights, x, tmp_path / "tight.onnx", target=free.divergence / 3)
    assert 1 <= len(tight.kept) < 3
    assert tight.quantised == 3 - len(tight.kept)
    assert set(tight.kept) < {"conv1_1", "conv2_1", "head"}
    assert tight.divergence < free.divergence
    assert free.file_bytes < tight.file_bytes < tight.float_bytes
    assert (tight.warning, free.warning) == ("", "")


def test_an_impossible_divergence_keeps_the_float_model_and_says_so(
    trained: tuple[Structure, Vector], tmp_path: Path
) -> None:
    structure, weights = trained
    x = stripes(60, 1)[0]
    report = to_onnx_int8(structure, DATA, weights, x, tmp_path / "m.onnx", target=0.0)
    assert report.quantised == 0
    assert report.agreement == 1.0
    assert "every layer stays float32" in report.warning
    wanted = log_probabilities(structure, DATA, weights, x)
    assert outputs(tmp_path / "m.onnx", x) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("samples", "calibrated", "checked"), [(1, 1, 1), (7, 7, 7), (8, 4, 2)])
def test_few_samples_work_and_the_report_says_what_is_lost(
    tmp_path: Path, samples: int, calibrated: int, checked: int
) -> None:
    weights = initial_weights(MLP, DATA, 0)
    report = to_onnx_int8(MLP, DATA, weights, stripes(samples, 0)[0], tmp_path / "m.onnx")
    assert (report.calibrated, report.checked) == (calibrated, checked)
    assert f"ranges come from {calibrated} samples only" in report.warning
    assert ("too few to keep some apart" in report.warning) == (samples < 8)


def test_samples_that_calibrate_choose_and_check_are_different_ones() -> None:
    x = np.arange(400, dtype=np.float32)[:, None]
    parts = quantised_onnx._parts(x, None, 0)
    assert [len(part) for part in parts] == [200, 100, 100]
    assert sorted(np.concatenate(parts).ravel()) == sorted(x.ravel())
    assert len(quantised_onnx._parts(np.zeros((9000, 1), np.float32), None, 0)[0]) == 256


def test_constant_samples_and_zero_weights_are_quantised_without_a_division_by_zero(tmp_path: Path) -> None:
    report = to_onnx_int8(
        MLP, DATA, np.zeros(MLP.parameters, np.float32), np.zeros((40, 1, 8, 8), np.float32), tmp_path / "m"
    )
    assert report.divergence == pytest.approx(0, abs=1e-9)
    assert np.isfinite(outputs(tmp_path / "m", np.ones((2, 1, 8, 8), np.float32))).all()


def test_bad_samples_and_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    weights, x = initial_weights(MLP, DATA, 0), stripes(20, 0)[0]
    infinite = np.full_like(weights, np.inf)
    out = tmp_path / "m.onnx"
    with pytest.raises(DataError, match="at least one unlabeled sample"):
        to_onnx_int8(MLP, DATA, weights, x[:0], out)
    with pytest.raises(DataError, match="inputs have shape"):
        to_onnx_int8(MLP, DATA, weights, x[:, :, :4], out)
    with pytest.raises(DataError, match="NaN"):
        to_onnx_int8(MLP, DATA, weights, x * np.float32("nan"), out)
    with pytest.raises(DataError, match="check samples"):
        to_onnx_int8(MLP, DATA, weights, x, out, x_check=x[:0])
    with pytest.raises(NonFiniteError):
        to_onnx_int8(MLP, DATA, infinite, x, out)
    with pytest.raises(StructureError):
        to_onnx_int8(MLP, DATA, weights[1:], x, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_without_a_part_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module} is not installed: pip install"):
        to_onnx_int8(MLP, DATA, initial_weights(MLP, DATA, 0), stripes(9, 0)[0], tmp_path / "m.onnx")


# --- ranges ----------------------------------------------------------------------------------------


def test_tails_drop_the_outermost_values_and_keep_zero_inside() -> None:
    counts = np.zeros(2048, dtype=np.int64)
    counts[1000:1100] = 10_000
    counts[2047] = 1
    low, high = quantised_onnx._without_tails(counts, 0.0, 2048.0)
    assert low == 0.0  # values start at 1000, but zero must stay inside
    assert high == pytest.approx(1100, abs=1)


def test_clipping_pays_where_one_value_stretches_the_range() -> None:
    counts = np.zeros(2048, dtype=np.int64)
    counts[:512] = 1_000
    counts[2047] = 1
    low, high = quantised_onnx._least_error(counts, 0.0, 1.0)
    assert low == 0.0
    assert 0.25 <= high < 0.9
    even = np.full(2048, 1_000, dtype=np.int64)
    assert quantised_onnx._least_error(even, -1.0, 1.0) == pytest.approx((-1, 1), abs=0.03)
