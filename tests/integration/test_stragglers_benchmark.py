"""The benchmark of slow devices runs the product's own rounds in virtual time."""

import numpy as np
import pytest
from benchmarks.simulation import Population
from benchmarks.stragglers import Version, parsed, reached_s, run_arm, summary

from liberatai_core.structure import DataContract


def people(devices: int = 4) -> Population:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 1, 8, 8))

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = random.integers(0, 3, count)
        return (centres[y] + 0.5 * random.normal(size=(count, 1, 8, 8))).astype(np.float32), y

    data = DataContract(input_shape=(1, 8, 8), classes=3)
    return Population(data=data, devices=[some(24) for _ in range(devices)], test=some(60))


def test_buffered_versions_do_not_wait_for_the_slow_device_and_count_it_when_it_comes() -> None:
    options = parsed(["--slow", "1", "--factor", "5", "--updates", "24", "--buffer", "2", "--epochs", "1"])
    waiting, dropping, buffered = (
        run_arm(options, people(), arm) for arm in ("waiting", "dropping", "buffered")
    )
    assert [one.at_s for one in waiting] == pytest.approx([5.0 * n for n in range(1, 7)])
    assert all(len(one.staleness) == 3 for one in dropping)
    assert buffered[-1].at_s < 0.5 * waiting[-1].at_s
    assert sum(len(one.staleness) for one in buffered) == 24
    late = max(max(one.staleness) for one in buffered)
    assert late >= 4  # the slow device came, and the versions before did not wait
    assert summary(waiting, [0.5])["staleness_max"] == summary(dropping, [0.5])["staleness_max"] == 0


def test_an_accuracy_counts_as_reached_when_it_holds() -> None:
    versions = [
        Version(at_s=float(n), accuracy=accuracy, staleness=(0,))
        for n, accuracy in enumerate([0.1, 0.9, 0.2, 0.8, 0.8, 0.9, 0.3])
    ]
    assert reached_s(versions, 0.8) == 3.0
    assert reached_s(versions, 0.85) is None
