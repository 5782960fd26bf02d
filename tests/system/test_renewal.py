"""Certificates renewed under load, with kills at the worst moments: the benchmark, short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from liberatai_coordinator.brokers.start import find_mosquitto

pytestmark = pytest.mark.system


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed: apt install mosquitto")
def test_no_job_is_disturbed_and_no_update_lost_while_certificates_are_renewed() -> None:
    command = [sys.executable, "-m", "benchmarks.renewal", "--quick"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["updates_lost"], found["jobs_disturbed"]) == (0, 0)
    assert found["renewals"] >= 6
    assert sorted(found["outages"]) == ["agent", "broker", "coordinator"]
    assert found["updates"] == found["rounds"] * found["devices"]
