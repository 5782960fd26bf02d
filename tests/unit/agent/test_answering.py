"""The local socket: other programs ask the newest model, and whatever they send, the agent lives on."""

import asyncio
import io
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.core.test_model import DATA, DS_CNN, Folder, a_file

from liberatai_agent.children.predictor_child import MAX_QUESTION_BYTES, Answers
from liberatai_agent.cli import main
from liberatai_agent.config import AgentConfig
from liberatai_agent.work.answering import Answering, socket_path
from liberatai_core.learning.inference import Predictor

EXAMPLE = Path(__file__).parents[3] / "examples" / "sensor" / "sensor.py"
X = np.random.default_rng(1).normal(size=(6, 1, 8, 8)).astype(np.float32)


def a_config(folder: Path, **changes: Any) -> AgentConfig:
    return AgentConfig(fleet="f", device="d", coordinator_key="0" * 64, state_dir=str(folder), **changes)


def npy(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


class Asker:
    """Another program."""

    def __init__(self, path: Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(120)
        self.connection.connect(str(path))

    def send(self, question: bytes) -> None:
        self.connection.sendall(struct.pack(">I", len(question)) + question)

    def ask(self, question: bytes) -> Any:
        self.send(question)
        size = struct.unpack(">I", self.connection.recv(4, socket.MSG_WAITALL))[0]
        return json.loads(self.connection.recv(size, socket.MSG_WAITALL))


def served(config: AgentConfig, scenario: Callable[[Path], Any]) -> Any:
    """Return what a scenario gives that runs in a thread while the agent's part serves."""

    async def run() -> Any:
        serving = asyncio.create_task(Answering(config).run())
        try:
            while not socket_path(config).exists():
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(asyncio.to_thread(scenario, socket_path(config)), 200)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    return asyncio.run(run())


def test_programs_ask_the_newest_model(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    names = np.array(["north", "east", "south", "west"])
    np.savez(tmp_path / "private.npz", x=X, y=np.arange(6) % 4, classes=names)

    def scenario(path: Path) -> tuple[Any, Any, Any]:
        assert path.stat().st_mode & 0o777 == 0o600
        asker = Asker(path)
        first = asker.ask(npy(X))
        second = asker.ask(json.dumps({"x": X[:2].tolist()}).encode())
        folder.next_version()
        asker.connection.close()
        return first, second, Asker(path).ask(npy(X))

    first, second, third = served(a_config(tmp_path, data=str(tmp_path / "private.npz")), scenario)
    assert (first["job"], first["version"], third["version"]) == ("digits", 0, 1)
    assert first["names"] == [str(names[label]) for label in first["labels"]]
    assert second["labels"] == first["labels"][:2]
    wanted = Predictor(DS_CNN, DATA, folder.weights, first["runtime"]).probabilities(X)
    np.testing.assert_allclose(third["probabilities"], wanted, atol=1e-5)
    assert not socket_path(a_config(tmp_path)).exists()


def test_whatever_is_sent_is_answered_or_dropped(tmp_path: Path) -> None:
    Folder(tmp_path)

    def scenario(path: Path) -> list[Any]:
        found = [Asker(path).ask(bad) for bad in (b"", b"{}", b"\x93NUMPY broken", npy(X[:, :, :3]))]
        pickled = io.BytesIO()
        np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
        found.append(Asker(path).ask(pickled.getvalue()))
        half = Asker(path)
        half.connection.sendall(struct.pack(">I", 100) + b"x")
        half.connection.close()
        long = Asker(path)
        long.connection.sendall(struct.pack(">I", MAX_QUESTION_BYTES + 1))
        size = struct.unpack(">I", long.connection.recv(4, socket.MSG_WAITALL))[0]
        found.append(json.loads(long.connection.recv(size, socket.MSG_WAITALL)))
        found.append(Asker(path).ask(npy(X)))
        return found

    *bad, good = served(a_config(tmp_path), scenario)
    assert [one["error"] for one in bad] == ["E_DATA"] * 5 + ["E_SIZE"]
    assert len(good["labels"]) == 6


def test_without_a_model_the_answer_says_so_and_the_first_one_is_found(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "")
    assert answers.answer(npy(X))["error"] == "E_NOT_FOUND"
    Folder(tmp_path)
    assert answers.answer(npy(X))["version"] == 0


def test_a_process_that_ended_is_started_with_the_next_question(tmp_path: Path) -> None:
    Folder(tmp_path)

    def scenario(path: Path) -> int:
        return sum(len(Asker(path).ask(npy(X))["labels"]) for _ in range(2))

    assert served(a_config(tmp_path, predict_idle_s=0.01), scenario) == 12


def test_no_socket_if_nobody_wants_one_or_its_path_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for config in (a_config(tmp_path, predict_idle_s=0), a_config(long)):
        if config.predict_idle_s:
            asyncio.run(Answering(config).run())
        assert not socket_path(config).exists()


def test_the_example_predicts_and_collects_what_the_agent_trains_with(tmp_path: Path) -> None:
    Folder(tmp_path)
    private, stream = tmp_path / "private.npz", tmp_path / "stream.npz"
    np.savez(private, x=X, y=np.arange(6) % 4, classes=np.array(list("abcd")))
    np.savez(stream, x=X[:5], y=np.arange(5) % 4)

    def scenario(_path: Path) -> str:
        command = [sys.executable, str(EXAMPLE), "--state-dir", str(tmp_path), "--data", str(private)]
        more = ["--readings", str(stream), "--every", "2"]
        return subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout

    said = served(a_config(tmp_path, data=str(private)), scenario).splitlines()
    assert len(said) == 3
    assert "11 labelled readings" in said[-1]
    with np.load(private) as kept:
        assert kept["y"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
        assert kept["classes"].tolist() == list("abcd")


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["--state-dir", "--model"])
def test_the_command_predicts(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "--model":
        where = a_file(tmp_path)[0]
    else:
        where = tmp_path
        Folder(tmp_path)
    np.save(tmp_path / "x.npy", X)
    common = ["predict", source, str(where), "--input", str(tmp_path / "x.npy"), "--runtime", "numpy"]
    assert main([*common, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["job"], len(found["labels"])) == ("digits", 6)
    assert main([*common, "-o", "name"]) == 0
    assert capsys.readouterr().out.split() == found["names"]
    assert main(common) == 0
    assert capsys.readouterr().out.startswith(f"0: {found['names'][0]} ")


def test_the_command_reads_standard_input_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(tmp_path)
    command = [sys.executable, "-m", "liberatai_agent", "predict", "--state-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--input", "-", "--runtime", "numpy", "-o", "json"],
        input=npy(X[0]),
        check=True,
        capture_output=True,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )
    assert len(json.loads(done.stdout)["labels"]) == 1
    (tmp_path / "no.npy").write_bytes(b"nothing")
    assert main(["predict", "--state-dir", str(tmp_path), "--input", str(tmp_path / "no.npy")]) == 1
    assert "E_DATA" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    np.save(tmp_path / "x.npy", X)
    assert main(["predict", "--state-dir", str(empty), "--input", str(tmp_path / "x.npy")]) == 4
    assert "no model yet" in capsys.readouterr().err
