"""The benchmark of the aggregator's speed: the same mean in every row, memory of a process of its own."""

import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import aggregator_speed as speed

from liberatai_core.sparsifier import methods
from liberatai_core.sparsifier.top_k import densify


def test_every_row_merges_the_same_updates(tmp_path: Path) -> None:
    bodies = speed.updates(3, seed=1)
    decoded = [methods.entries(body, speed.STRUCTURE) for body in bodies]
    rates, result = speed.ours(bodies, decoded, [5, 1, 2], budget=0.0)
    assert all(rate and rate > 0 for rate in rates.values())
    dense = [densify(body, speed.STRUCTURE).astype(np.float64) for body in bodies]
    assert result == pytest.approx((5 * dense[0] + dense[1] + 2 * dense[2]) / 8, rel=1e-6, abs=0)
    speed.write(tmp_path, bodies, decoded, [5, 1, 2])
    memory = speed.peak(tmp_path, 4)
    # The sum of a million float64 and the result in float32 at the least.
    assert memory["peak_mb"] > memory["before_mb"] + 11


def test_without_flower_its_rows_are_missing_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.flower_rates(tmp_path / "no-python", tmp_path, 1) == ({}, None)
    assert speed.flower_rates(Path(sys.executable), tmp_path, 1) == ({}, None)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(line.startswith("Flower is not measured: ") for line in said)
    assert "flwr" in said[1]
