"""Using a model: three runtimes say the same, newer versions are taken over, and faults are told in one line."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from liberatai_core.compressor.artifact import restore
from liberatai_core.compressor.codebook import compress
from liberatai_core.contract.frame import encode_spec
from liberatai_core.contract.messages import BlobRef, Step, TaskSpec, weights_name
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import ConfigError, DataError, DigestError, MissingExtraError, NotFoundError
from liberatai_core.learning import runtimes
from liberatai_core.learning.families import FAMILIES, initial_weights, structure_of
from liberatai_core.learning.inference import ENGINES, Predictor, engine_for
from liberatai_core.model import BLOBS, PATH, SPEC, Description, describe, load
from liberatai_core.sparsifier import top_k
from liberatai_core.structure import DataContract, Structure, to_tensors
from liberatai_core.weights import Vector, digest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

DATA = DataContract(input_shape=(1, 8, 8), classes=4)
DS_CNN = structure_of("ds_cnn", {"width": 8}, DATA)
NETWORKS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("mlp", {"hidden": 16, "layers": 2}, (2, 9)),
    ("cnn1d", {"width": 8}, (3, 40)),
    ("cnn", {"width": 4, "hidden": 12}, (1, 9, 9)),
    ("ds_cnn", {"width": 8}, (1, 13, 12)),
    ("vgg", {"width": 2, "depth": 11}, (3, 8, 8)),
    ("resnet", {"width": 4}, (3, 8, 8)),
    ("mobilenet", {"width": 5}, (3, 8, 8)),
]


def inputs(shape: tuple[int, ...], count: int = 1000) -> Any:
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


# --- three runtimes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("family", "params", "shape"), NETWORKS)
def test_all_runtimes_give_the_same_answers(family: str, params: Any, shape: Any, norm: str) -> None:
    data = DataContract(input_shape=shape, classes=5)
    structure = structure_of(family, {**params, "norm": norm}, data)
    weights = initial_weights(structure, data, 3)
    weights += np.random.default_rng(2).normal(size=weights.shape).astype(np.float32) * 0.05
    for name, part in to_tensors(weights, structure).items():
        if name.endswith("running_var"):
            np.abs(part, out=part)
    x = inputs(shape)
    wanted, *others = (Predictor(structure, data, weights, e).probabilities(x) for e in ENGINES)
    assert wanted.sum(axis=1) == pytest.approx(np.ones(len(x)), abs=1e-5)
    # Where two classes are equal up to rounding, neither is the right one.
    top = np.sort(wanted, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-4
    assert clear.mean() > 0.95
    for found in others:
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert (found.argmax(axis=1) == wanted.argmax(axis=1))[clear].all()


def test_every_family_is_compared() -> None:
    assert {family for family, *_ in NETWORKS} == set(FAMILIES)


def test_what_is_installed_decides_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"numpy", "onnxruntime"}
    monkeypatch.setattr(runtimes, "installed", lambda name: name in here)
    assert engine_for("cnn") == "onnxruntime"
    here.discard("onnxruntime")
    assert engine_for("cnn") == "numpy"
    with pytest.raises(MissingExtraError, match="needs torch"):
        engine_for("of_somebody_else")
    with pytest.raises(MissingExtraError, match=r"liberatai\[infer\]"):
        Predictor(DS_CNN, DATA, initial_weights(DS_CNN, DATA, 0), "onnxruntime")
    with pytest.raises(ConfigError, match="none of torch"):
        Predictor(DS_CNN, DATA, initial_weights(DS_CNN, DATA, 0), "jax")  # type: ignore[arg-type]


# --- files -------------------------------------------------------------------------------------------


def a_file(folder: Path) -> tuple[Path, Vector]:
    content = compress(initial_weights(DS_CNN, DATA, 1), DS_CNN, 4096)
    (folder / "digits.lam").write_bytes(content)
    names = ("zero", "one", "two", "three")
    told = Description(
        family="ds_cnn", params={"width": 8}, data=DATA, classes=names, model="digits", version=7
    )
    describe(folder / "digits.lam", told)
    return folder / "digits.lam", restore(content, DS_CNN)


def test_a_file_and_its_description_predict(tmp_path: Path) -> None:
    file, weights = a_file(tmp_path)
    model = load(file, runtime="numpy")
    x = inputs((1, 8, 8), 5)
    found = model.predict(x)
    assert (model.name, found.version, model.runtime) == ("digits", 7, "numpy")
    wanted = Predictor(DS_CNN, DATA, weights, "numpy").probabilities(x)
    assert found.probabilities.tobytes() == wanted.tobytes()
    assert found.names == tuple(("zero", "one", "two", "three")[label] for label in found.labels)
    one = model.predict(x[3])
    assert one.labels.tolist() == [found.labels[3]]
    images = (np.random.default_rng(3).random((5, 8, 8)) * 255).astype(np.uint8)
    as_floats = model.predict(images.astype(np.float32)[:, None] / 255)
    assert model.predict(images[:, None]).probabilities.tobytes() == as_floats.probabilities.tobytes()
    assert load(file, runtime="numpy", classes=["a", "b"]).class_name(2) == "2"


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3)), np.full((1, 1, 8, 8), np.nan), np.array(["a"]), np.zeros((0, 1, 8, 8)), 3.0],
    ids=["shape", "nan", "text", "none", "scalar"],
)
def test_inputs_that_are_none_are_refused(tmp_path: Path, x: Any) -> None:
    model = load(a_file(tmp_path)[0], runtime="numpy")
    with pytest.raises(DataError):
        model.predict(x)


def test_what_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        load(tmp_path / "nothing.lam")
    with pytest.raises(NotFoundError, match="no model yet"):
        load(tmp_path)
    file, _ = a_file(tmp_path)
    beside = tmp_path / "digits.lam.json"
    told = json.loads(beside.read_text())
    beside.write_text(json.dumps(told | {"data": {"input_shape": [0], "classes": 4}}))
    with pytest.raises(ConfigError):
        load(file)
    beside.unlink()
    with pytest.raises(NotFoundError, match="models pull"):
        load(file)


# --- an agent's folder -------------------------------------------------------------------------------


class Folder:
    """An agent's state folder that goes from version to version."""

    def __init__(self, path: Path, structure: Structure = DS_CNN) -> None:
        self.path, self.structure = path, structure
        (path / BLOBS).mkdir()
        spec = TaskSpec(job="digits", structure=structure, data=DATA, seed=4)
        (path / SPEC).write_bytes(encode_spec(spec))
        keyframe = compress(initial_weights(structure, DATA, 1), structure, 4096)
        self.weights = restore(keyframe, structure)
        self.steps: list[Step] = []
        self._add(keyframe)

    def _add(self, content: bytes) -> None:
        (self.path / BLOBS / blob_id(content)).write_bytes(content)
        ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
        name = weights_name(digest(self.weights))
        self.steps.append(Step(version=len(self.steps), blob=ref, digest=name))
        part = self.path / "part"
        part.write_bytes(msgspec.msgpack.encode(self.steps))
        part.replace(self.path / PATH)

    def next_version(self) -> None:
        count = self.structure.parameters
        difference = np.random.default_rng(len(self.steps)).normal(0, 0.3, count).astype(np.float32)
        _, body = top_k.sparsify(top_k.init(count), difference, self.structure, 0.5)
        self.weights = self.weights + top_k.densify(body, self.structure)
        self._add(body)


def test_a_newer_version_takes_over_without_a_restart(tmp_path: Path) -> None:
    folder, x = Folder(tmp_path), inputs((1, 8, 8), 20)
    model = load(tmp_path, runtime="numpy")
    assert (model.name, model.predict(x).version) == ("digits", 0)
    for version in (1, 2):
        folder.next_version()
        found = model.predict(x)
        assert found.version == version
        wanted = Predictor(DS_CNN, DATA, folder.weights, "numpy").probabilities(x)
        assert found.probabilities.tobytes() == wanted.tobytes()
    assert not model.refresh()


def test_files_that_are_damaged_leave_the_version_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liberatai_core.model.PAUSE_S", 0.0)
    folder, x = Folder(tmp_path), inputs((1, 8, 8), 3)
    model = load(tmp_path, runtime="numpy")
    before = model.predict(x)
    folder.next_version()
    blob = tmp_path / BLOBS / folder.steps[-1].blob.blob
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert model.predict(x).probabilities.tobytes() == before.probabilities.tobytes()
    with pytest.raises(DigestError):
        load(tmp_path)
    blob.unlink()
    with pytest.raises(NotFoundError):
        load(tmp_path)
    blob.write_bytes(good)
    assert model.predict(x).version == 1
