"""Two that trained apart on data of unlike classes merge: better than either, or nothing happens."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from liberatai_coordinator.cli.app import main
from liberatai_coordinator.repository import merge, tensors
from liberatai_coordinator.repository.files import About, commit_weights
from liberatai_coordinator.repository.store import Store
from liberatai_core.errors import StructureError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 8, 8), classes=10)
SETTINGS = TrainSettings(epochs=6)


@pytest.fixture(scope="module")
def samples():
    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32)[:, None], digits.target.astype(np.int64)
    order = np.random.default_rng(1).permutation(len(y))
    return x[order], y[order]


@pytest.fixture
def halves(tmp_path, samples):
    """A repository with a start, and two branches that each know half of the classes."""
    x, y = samples
    store = Store(tmp_path / "store")
    shape = structure_of("mlp", {"hidden": 32}, DATA)
    weights = initial_weights(shape, DATA, 7)
    about = About(model="digits", data=DATA, author="a")
    start = commit_weights(store, shape, weights, about, [], branch="latest", kind="import")
    for name, mine in (("low", y[900:] < 5), ("high", y[900:] >= 5)):
        own = train(shape, DATA, weights, x[900:][mine], y[900:][mine], SETTINGS, 1).weights
        commit_weights(store, shape, own, about, [start.digest], branch=name, kind="finetune")
    np.savez(tmp_path / "held.npz", x=x[300:600], y=y[300:600])
    np.savez(tmp_path / "inputs.npz", x=x[600:900])
    return store


def accuracy(store, ref, samples):
    x, y = samples
    (variant,) = store.read(store.find(ref)).commit.variants
    said = log_probabilities(variant.structure, DATA, tensors.read(store, variant), x[:300])
    return float(np.mean(said.argmax(1) == y[:300]))


def test_a_merge_is_better_than_both_parents_and_knows_them(halves, samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIBERATAI_STORE", str(halves.folder))
    with_data = ["--held-out", str(tmp_path / "held.npz"), "--unlabeled", str(tmp_path / "inputs.npz")]
    assert (
        main(["models", "merge", "digits:low", "digits:high", *with_data, "--branch", "both", "-o", "json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    made = halves.read(halves.find("digits:both"))
    assert told["commit"] == made.digest
    assert made.commit.kind == "merge"
    assert made.commit.parents == (halves.find("digits:low"), halves.find("digits:high"))
    parents = max(accuracy(halves, "digits:low", samples), accuracy(halves, "digits:high", samples))
    assert accuracy(halves, "digits:both", samples) > parents + 0.2
    assert main(["models", "merge", "digits:both", "digits:low"]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["models", "merge", "digits:latest", "digits:low"]) == 1
    assert "nothing to merge" in capsys.readouterr().err


def test_a_merge_that_is_worse_is_a_conflict_and_names_nothing(
    halves, tmp_path, samples, capsys, monkeypatch
):
    monkeypatch.setenv("LIBERATAI_STORE", str(halves.folder))
    x, y = samples
    low = y[300:600] < 5
    np.savez(tmp_path / "low.npz", x=x[300:600][low], y=y[300:600][low])
    before = halves.names()
    shape = halves.read(halves.find("digits:low")).commit.variants[0].structure
    noise = np.random.default_rng(0).normal(size=shape.parameters).astype(np.float32) * 3
    base = halves.find("digits")
    commit_weights(
        halves, shape, noise, About(model="digits", data=DATA), [base], branch="noise", kind="finetune"
    )
    code = main(
        [
            "models",
            "merge",
            "digits:low",
            "digits:noise",
            "--held-out",
            str(tmp_path / "low.npz"),
            "--branch",
            "bad",
        ]
    )
    assert code == 1
    said = capsys.readouterr().err
    assert "E_STATE" in said
    assert "conflict" in said
    assert [one for one in halves.names() if one.tag != "noise"] == before


def test_unlike_structures_teach_one_another_and_without_inputs_it_is_said(halves, samples, monkeypatch):
    monkeypatch.setattr(merge, "ROUNDS", 1)
    x, y = samples
    shape = structure_of("mlp", {"hidden": 16}, DATA)
    mine = y[900:] >= 5
    own = train(
        shape, DATA, initial_weights(shape, DATA, 3), x[900:][mine], y[900:][mine], SETTINGS, 1
    ).weights
    other = commit_weights(
        halves,
        shape,
        own,
        About(model="digits", data=DATA),
        [halves.find("digits")],
        branch="small",
        kind="import",
    )
    low = halves.read(halves.find("digits:low"))
    with pytest.raises(StructureError, match="--unlabeled"):
        merge.merge(halves, low, other)
    held, inputs = (x[300:600], y[300:600]), x[600:900]
    made = merge.merge(halves, low, other, held_out=held, unlabeled=inputs, seed=1)
    again = merge.merge(halves, low, other, held_out=held, unlabeled=inputs, seed=1)
    assert set(made.members) == {"mlp-hidden32", "mlp-hidden16"}
    assert made.conflict == ""
    assert max(made.accuracy.values()) > max(made.parents)
    for sid, (_, weights) in made.members.items():
        assert np.array_equal(weights, again.members[sid][1])
