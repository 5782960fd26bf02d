"""An agent connects to its broker and to nothing else, whatever it imports to train and predict."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from liberatai_coordinator.local import run

HOOK = """
import json, sys
if any("liberatai_agent" in word for word in sys.orig_argv):
    def heard(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            with open({log!r}, "a") as log:
                log.write(json.dumps([event, str(arguments[-1 if event == "socket.connect" else 0])]) + "\\n")
    sys.addaudithook(heard)
    with open({log!r}, "a") as log:
        log.write(json.dumps(["process", " ".join(sys.orig_argv)]) + "\\n")
"""
JOB = """
name: alone
data: {input_shape: [1, 6, 6], classes: 3}
structures: [{family: ds_cnn, params: {width: 8, train: head}}]
rounds: {count: 1, deadline_s: 120}
training: {epochs: 1}
"""


def test_every_connection_of_an_agent_that_trains_is_to_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python tells of every connection, in the agent and in all of its children; the broker is on loopback."""
    log, hooks = tmp_path / "connections", tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", str(hooks))
    (tmp_path / "job.yaml").write_text(JOB)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "private.npz", x=random.random((60, 1, 6, 6), dtype=np.float32), y=np.arange(60) % 3)
    done = run(
        tmp_path / "job.yaml", {"one": tmp_path / "private.npz"}, folder=tmp_path / "fleet", quiet=True
    )
    assert done.job.state == "finished"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    processes = [line for line in lines if line[0] == "process"]
    assert len(processes) >= 3, "the agent, its bench and its training"
    attempts = {tuple(line) for line in lines if line[0] != "process"}
    assert any(event == "socket.connect" for event, _ in attempts), "the hook heard nothing"
    settings = (tmp_path / "fleet" / "agents" / "one" / "agent.yaml").read_text()
    port = re.findall(r"127\.0\.0\.1:([0-9]+)", settings)[0]
    assert attempts <= {
        ("socket.connect", f"('127.0.0.1', {port})"),
        ("socket.getaddrinfo", "127.0.0.1"),
    }
