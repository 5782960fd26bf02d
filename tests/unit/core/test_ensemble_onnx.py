"""One ONNX file answers what the members of an ensemble answer together."""

import itertools

import numpy as np
import pytest

from liberatai_core.aggregator.ensemble import Pool, pooled
from liberatai_core.errors import SchemaError, StructureError
from liberatai_core.learning.ensemble_onnx import ensemble_onnx
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

DATA = DataContract(input_shape=(1, 8, 8), classes=4)
SHAPES = [
    structure_of("mlp", {"hidden": 8}, DATA),
    structure_of("cnn", {"width": 4, "hidden": 8}, DATA),
]
RANDOM = np.random.default_rng(3)
PRIORS = np.log(RANDOM.dirichlet(np.ones(4), size=2))


@pytest.fixture(scope="module")
def members():
    return [(shape, 2 * initial_weights(shape, DATA, seed)) for seed, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(
    "pool",
    [
        Pool(weights=RANDOM.uniform(0, 1, (2, 4))),
        Pool(weights=RANDOM.uniform(-1, 1, (2, 4)), log_priors=PRIORS, bias=RANDOM.normal(size=4)),
        Pool(weights=RANDOM.uniform(0, 1, (2, 4)), kind="linear"),
        Pool(weights=RANDOM.uniform(0, 1, (2, 4)), kind="vote"),
    ],
    ids=["log", "priors and bias", "linear", "vote"],
)
def test_the_file_answers_what_the_pool_answers_for_every_batch_size(members, pool):
    content = ensemble_onnx(members, pool, DATA)
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 50):
        x = np.random.default_rng(batch).normal(size=(batch, 1, 8, 8)).astype(np.float32)
        (found,) = session.run(["logits"], {"x": x})
        said = np.stack([log_probabilities(shape, DATA, weights, x) for shape, weights in members])
        assert found == pytest.approx(pooled(pool, said), abs=1e-4)


def test_the_same_ensemble_gives_the_same_bytes_and_nothing_of_the_machine(members):
    pool = Pool(weights=np.ones((1, 4)))
    content = ensemble_onnx(members[:1], pool, DATA)
    assert content == ensemble_onnx(members[:1], pool, DATA)
    assert b".py" not in content


def test_an_ensemble_of_other_members_is_refused(members):
    with pytest.raises(SchemaError, match="wanted"):
        ensemble_onnx(members, Pool(weights=np.ones((3, 4))), DATA)


def test_a_file_that_answers_something_else_is_not_returned(members, monkeypatch):
    pool = Pool(weights=np.ones((2, 4)))
    right, calls = runtime.InferenceSession.run, itertools.count()

    def run(self, names, given):
        (found,) = right(self, names, given)
        # the members' own checks and the answers that are compared with come first
        return [found + (0.5 * np.arange(4) if next(calls) >= 2 * 2 + 2 else 0)]

    monkeypatch.setattr(runtime.InferenceSession, "run", run)
    with pytest.raises(StructureError, match="differ from the ensemble"):
        ensemble_onnx(members, pool, DATA)
