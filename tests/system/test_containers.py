"""Devices in real containers: limits that the kernel keeps, links that proxies shape, kills, and a full job."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.system.machine import missing

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.timeout(900),
]

JOB = """
name: digits
data: {input_shape: [1, 8, 8], classes: 10}
structures: [{family: mlp, params: {hidden: 32}}]
rounds: {count: 3, min_devices: 2, quorum: 0.5, deadline_s: 120}
training: {epochs: 2, learning_rate: 0.05}
seed: 1
"""
FLEET = """
devices: {pi-zero-2w: 1, pi4: 2, nuc-n100: 1}
backend: container
scenario: brown-out
seed: 1
"""


def test_a_job_on_containers_that_are_killed_ends_with_nothing_lost(
    tmp_path: Path, said: Callable[[str], None]
) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", x=(x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y=y)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "fleet.yaml").write_text(FLEET)
    command = [
        sys.executable,
        "-m",
        "liberatai_coordinator",
        "sim",
        "up",
        "-f",
        "fleet.yaml",
        "--job",
        "job.yaml",
    ]
    command += ["--data", "digits.npz", "--image", "host", "--dir", "out", "-o", "json"]
    conf = Path(__file__).with_name("containers.conf")
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "CONTAINERS_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["state"], record["backend"], record["lost"]) == ("finished", "container", 0)
    assert record["updates"] >= 6
    said(
        f"containers: {record['updates']} updates in {record['job_s']:.0f} s, {len(record['faults'])} faults"
    )
