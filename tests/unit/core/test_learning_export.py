"""Files for other programs hold the same model."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import DiskError, MissingExtraError, NonFiniteError, StructureError
from liberatai_core.learning.export import to_onnx, to_safetensors
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, from_tensors
from liberatai_core.weights import to_bytes

pytest.importorskip("torch")

DATA = DataContract(input_shape=(1, 8, 8), classes=3)
MLP = structure_of("mlp", {"hidden": 8}, DATA)


def test_safetensors_hold_every_tensor_and_the_metadata(tmp_path: Path) -> None:
    reader = pytest.importorskip("safetensors")
    weights = initial_weights(MLP, DATA, 0)
    to_safetensors(MLP, weights, tmp_path / "m.safetensors", {"version": "abc"})
    with reader.safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"version": "abc"}
    assert to_bytes(from_tensors(tensors, MLP)) == to_bytes(weights)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("family", "params", "shape"),
    [
        ("mlp", {"hidden": 8}, (1, 8, 8)),
        ("cnn", {"width": 4, "hidden": 8}, (1, 28, 28)),
        ("ds_cnn", {"width": 8}, (3, 32, 32)),
        ("cnn1d", {"width": 4}, (9, 128)),
    ],
)
def test_onnx_computes_the_same_for_every_batch_size(
    tmp_path: Path, family: str, params: Any, shape: Any
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    data = DataContract(input_shape=shape, classes=4)
    structure = structure_of(family, params, data)
    weights = initial_weights(structure, data, 0)
    to_onnx(structure, data, weights, tmp_path / "m.onnx")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = np.random.default_rng(batch).normal(size=(batch, *shape)).astype(np.float32)
        (logits,) = session.run(["logits"], {"x": x})
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert scores == pytest.approx(log_probabilities(structure, data, weights, x), abs=1e-4)


def test_an_onnx_file_says_nothing_about_the_machine_that_made_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    to_onnx(MLP, DATA, initial_weights(MLP, DATA, 0), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_an_onnx_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    right = runtime.InferenceSession.run
    monkeypatch.setattr(
        runtime.InferenceSession, "run", lambda self, *given: [out + 0.01 for out in right(self, *given)]
    )
    with pytest.raises(StructureError, match="differ from torch"):
        to_onnx(MLP, DATA, initial_weights(MLP, DATA, 0), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_weights_and_places_are_refused(tmp_path: Path) -> None:
    good = initial_weights(MLP, DATA, 0)
    with pytest.raises(NonFiniteError):
        to_safetensors(MLP, good * np.float32("nan"), tmp_path / "m.safetensors")
    with pytest.raises(StructureError):
        to_safetensors(MLP, good[1:], tmp_path / "m.safetensors")
    with pytest.raises(DiskError):
        to_safetensors(MLP, good, tmp_path / "missing" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxscript_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"liberatai\[coordinator\]"):
        to_onnx(MLP, DATA, initial_weights(MLP, DATA, 0), tmp_path / "m.onnx")
