import json

import numpy as np
import pytest
import torch

from liberatai_coordinator.cli.app import main
from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.store import Store
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.structure import DataContract, to_tensors

DATA = DataContract(input_shape=(1, 8, 8), classes=10)
SHAPE = structure_of("mlp", {"hidden": 8}, DATA)
OF = ["--model", "digits", "--family", "mlp", "--params", "hidden=8", "--input", "1x8x8", "--classes", "10"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIBERATAI_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LIBERATAI_AUTHOR", "tester")

    def running(*arguments, code=0):
        assert main(["models", *map(str, arguments)]) == code
        done = capsys.readouterr()
        return done.err if code else done.out

    return running


@pytest.fixture
def file(tmp_path):
    def made(change=0.0, name="m.pt"):
        weights = initial_weights(SHAPE, DATA, 1)
        weights[3] += np.float32(change)
        torch.save({k: torch.tensor(v) for k, v in to_tensors(weights, SHAPE).items()}, tmp_path / name)
        return tmp_path / name

    return made


def test_a_model_is_committed_listed_compared_and_named(run, file, tmp_path):
    run(
        "commit",
        file(),
        *OF,
        "-m",
        "first",
        "--metric",
        "accuracy=0.9",
        "--licence",
        "MIT",
        "--labels",
        "a,b",
    )
    run("commit", file(1.0), *OF, "-m", "second")
    log = json.loads(run("log", "digits", "-o", "json"))
    assert [one["message"] for one in log] == ["second", "first"]
    assert log[0]["parents"] == [log[1]["commit"]]
    assert (log[1]["accuracy"], log[1]["author"], log[0]["names"]) == (0.9, "tester", ["digits:latest"])
    assert run("log", "digits").splitlines()[0].split()[:2] == ["COMMIT", "KIND"]
    assert [line[0] for line in run("log", "digits", "--graph").splitlines()] == ["*", "*"]
    run("tag", "digits~1", "v1")
    run("tag", "digits", "v1", code=1)
    run("branch", "digits:v1", "side")
    run("commit", file(2.0), *OF, "-m", "aside", "--branch", "side")
    assert len(run("log", "digits:side", "--graph").splitlines()) == 2
    assert {one["names"][0] for one in json.loads(run("list", "-o", "json"))} == {
        "digits:latest",
        "digits:side",
        "digits:v1",
    }
    found = json.loads(run("diff", "digits:v1", "digits", "-o", "json"))[0]
    assert sum(one["changed"] for one in found["tensors"]) == 1
    assert found["ancestor"] == log[1]["commit"]
    inputs = tmp_path / "x.npz"
    np.savez(inputs, x=np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32))
    assert "same answer on" in run("diff", "digits:v1", "digits", "--samples", inputs)
    run("tag", "digits:v1", "--delete")
    run("log", "digits:v1", code=4)


def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(run, file, tmp_path):
    for arguments, code, told in (
        (["log", "digits"], 4, "no model repository here"),
        (["commit", tmp_path / "none.pt", "--model", "digits"], 4, "no such file"),
        (["commit", file(), "--model", "Digits!"], 1, "E_SCHEMA"),
        (["commit", file(), "--model", "digits", "--family", "mlp"], 2, "--input"),
        (["commit", file(), "--model", "digits", "--input", "axb", "--classes", "3"], 2, "1x8x8"),
        (["commit", file(), "--model", "digits", "--metric", "accuracy"], 2, "NAME=NUMBER"),
        (["commit", file(), *OF[:-1], "7"], 1, "E_STRUCTURE"),
        (["commit", file(), "--model", "digits", "--range", "1"], 2, "LEAST:LARGEST"),
    ):
        said = run(*arguments, code=code)
        assert told in said, said
        assert len(said.splitlines()) == 1
    assert Store(tmp_path / "store").names() == []


def test_graphs_of_two_lines_join(run, file):
    run("commit", file(), *OF, "-m", "base")
    run("branch", "digits", "side")
    run("commit", file(1.0), *OF, "-m", "left")
    run("commit", file(2.0), *OF, "-m", "right", "--branch", "side")
    run("commit", file(3.0), *OF, "-m", "both", "--parent", "digits:latest", "--parent", "digits:side")
    drawn = run("log", "digits", "--graph").splitlines()
    commits = [line for line in drawn if "*" in line]
    assert commits[0].startswith("* ")
    assert (commits[0].split()[-1], commits[-1].split()[-1]) == ("both", "base")
    assert len(commits) == 4
    assert any(line.startswith("| *") for line in commits)


def test_checks_keys_and_collecting(run, file, tmp_path):
    for number in range(6):
        run("commit", file(float(number)), *OF, "-m", f"n{number}")
    assert "whole" in run("verify")
    keys = json.loads(run("trust", "-o", "json"))
    assert keys[0]["name"] == "this repository"
    run("trust", "lab", "ab" * 32, "--model", "lab/*")
    run("trust", "lab", "nothing", code=2)
    assert [one["models"] for one in json.loads(run("trust", "-o", "json"))] == [["*"], ["lab/*"]]
    run("trust", "--delete", "ab" * 32)
    run("trust", "--delete", "ab" * 32, code=4)
    assert "would be freed" in run("gc", "--newest", "2", "--dry-run")
    run("gc", "--every", "3", code=2)
    assert len(run("gc", "--newest", "2").splitlines()) == 5
    store = Store(tmp_path / "store")
    head = store.read(store.find("digits"))
    path = store.layout.path(store.layers(head.commit.variants[0])[0].digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = run("verify", code=1)
    assert path.name in said
    assert "E_DIGEST" in said
    with pytest.raises(Exception, match="damaged"):
        tensors.read(store, head.commit.variants[0])
