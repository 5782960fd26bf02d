"""The example of two institutes, as a user runs it: two fleets, a real registry, one model that knows more."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
pytest.importorskip("torch")
pytest.importorskip("matplotlib")

PROGRAM = Path(__file__).parents[2] / "examples" / "two-institutes" / "run.py"


def run(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(PROGRAM)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.skipif(shutil.which("docker-registry") is None, reason="needs docker-registry: see .ci/run")
def test_the_merge_knows_what_each_of_two_institutes_knew(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"north ([\d.]+)%, south ([\d.]+)%, merged ([\d.]+)% right", done.stdout)
    assert found, done.stdout
    north, south, merged = map(float, found.groups())
    assert max(north, south) < 60  # neither has seen the other's digits
    assert merged > max(north, south) + 30
    pulled = re.search(r"12 KB to spare: ([\d.]+)% right", done.stdout)
    assert pulled, done.stdout
    assert float(pulled[1]) > merged - 10
    pushed = re.search(r"digits:merged ([0-9a-f]{12}): \d+ commits, \d+ files", done.stdout)
    fetched = re.search(r"^digits:merged ([0-9a-f]{12}): 6 commits are new", done.stdout, re.MULTILINE)
    assert pushed, done.stdout
    assert fetched, done.stdout
    assert pushed[1] == fetched[1]
    assert (tmp_path / "two-institutes.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_registry_it_says_what_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("--registry HOST:PORT")
    assert "apt-get install docker-registry" in done.stderr
