"""kill -9 of everything, again and again: the same weights in the end, nothing lost, nothing doubled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("broker", "seed"), [("auto", 0), ("amqtt", 1)])
def test_kills_change_nothing(broker: str, seed: int) -> None:
    """P1, P2, P4 with real processes: six kills of coordinator, agents and broker at random moments."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.kills_fleet",
        "--quick",
        "--seed",
        str(seed),
        "--broker",
        broker,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["identical"], result["lost"], result["doubled"]) == (True, 0, 0)
    assert result["kills"] == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_coordinator_killed_at_many_moments_keeps_its_promises() -> None:
    """P1, P2, P4: forty kills while jobs are created, aborted, end, restart and are pruned."""
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "40", "--seed", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    claims = ("lost", "doubled", "other_weights", "jobs_forgotten", "jobs_failed", "tasks_left")
    assert [result[claim] for claim in claims] == [0] * 6
    assert result["kills"] == 40
    assert result["updates"] > 20
    assert result["versions"] > 10
