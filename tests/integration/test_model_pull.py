"""A pull brings a commit into the form that fits: picked where one is stored, made where none is."""

import json

import numpy as np
import pytest

from liberatai_coordinator.cli.app import main
from liberatai_coordinator.repository.files import About, commit_weights
from liberatai_coordinator.repository.store import Store
from liberatai_core.compressor.artifact import restore
from liberatai_core.learning.export import INPUT, OUTPUT, session_of
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.model import load
from liberatai_core.structure import DataContract
from liberatai_core.weights import digest

DATA = DataContract(input_shape=(1, 4, 4), classes=3)
SHAPE = structure_of("mlp", {"hidden": 64}, DATA)


@pytest.fixture
def pulled(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path / "store")
    monkeypatch.setenv("LIBERATAI_STORE", str(store.folder))
    weights = initial_weights(SHAPE, DATA, 1)
    about = About(model="tiny", data=DATA, labels=("a", "b", "c"), input_range=(0, 1), licence="MIT")
    made = commit_weights(store, SHAPE, weights, about, [], branch="latest", kind="import")

    def pulling(*arguments, code=0):
        folder = tmp_path / "out"
        assert (
            main(["models", "pull", "tiny", *map(str, arguments), "--out", str(folder), "-o", "json"]) == code
        )
        told = capsys.readouterr()
        return (json.loads(told.out), folder) if code == 0 else told.err

    return pulling, weights, made


def test_named_tensors_onnx_and_compressed_files_come_with_what_they_are(pulled, tmp_path):
    pulling, weights, made = pulled
    told, folder = pulling()
    from safetensors import safe_open

    with safe_open(folder / told["file"], "numpy") as file:
        about = file.metadata()
        flat = np.concatenate([file.get_tensor(tensor.name).ravel() for tensor in SHAPE.tensors])
    assert np.array_equal(flat, weights)
    assert (about["commit"], about["classes"], about["input_range"], about["licence"]) == (
        made.digest,
        "a,b,c",
        "0:1",
        "MIT",
    )
    assert (folder / "README.md").read_text().startswith("---\n")
    assert json.loads((folder / "model.json").read_text())["commit"] == made.digest

    told, folder = pulling("--runtime", "onnx")
    content = (folder / told["file"]).read_bytes()
    x = np.random.default_rng(0).random((5, 1, 4, 4), dtype=np.float32)
    (logits,) = session_of(content).run([OUTPUT], {INPUT: x})
    assert np.array_equal(logits.argmax(1), log_probabilities(SHAPE, DATA, weights, x).argmax(1))
    import onnx

    props = {prop.key: prop.value for prop in onnx.load_model_from_string(content).metadata_props}
    assert (props["commit"], props["licence"]) == (made.digest, "MIT")

    told, folder = pulling("--budget", "900")
    assert told["made"]
    assert told["bytes"] <= 900
    held = restore((folder / "model.lam").read_bytes(), SHAPE)
    answered = load(folder / "model.lam", runtime="numpy").predict(x)
    assert np.array_equal(answered.labels, log_probabilities(SHAPE, DATA, held, x).argmax(1))
    assert set(answered.names) <= {"a", "b", "c"}

    inputs = tmp_path / "x.npz"
    np.savez(inputs, x=np.random.default_rng(0).random((64, 1, 4, 4), dtype=np.float32))
    told, folder = pulling("--runtime", "onnx-int8", "--unlabeled", inputs)
    assert (folder / told["file"]).stat().st_size == told["bytes"]


def test_what_does_not_fit_or_is_not_there_is_told(pulled):
    pulling, _, made = pulled
    assert "E_BUDGET" in pulling("--budget", "20", code=1)
    assert "no variant" in pulling("--variant", "owl", code=4)
    assert "--unlabeled" in pulling("--runtime", "onnx-int8", code=2)
    assert made.commit.variants[0].weights == digest(initial_weights(SHAPE, DATA, 1)).hex()
