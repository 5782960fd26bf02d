"""The hostile devices of the benchmark: what they send reaches the product's own rules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from benchmarks.robustness import ATTACKS, Arm, Row, arms, parsed, patched, poisoned, run_arm, summary
from benchmarks.simulation import Population, Simulation
from tests.integration.test_simulation import DATA, job, people

from liberatai_coordinator.config import Aggregate, Sparsify, StructureChoice
from liberatai_core.contract.messages import Update

CHOICE = StructureChoice(family="mlp", params={"hidden": 16})


def run(rule: Any, attack: str) -> Row:
    options = parsed(["--rounds", "6", "--hostile", "0.2", "--learning-rate", "0.1"])
    return run_arm((options, people(10), CHOICE, Arm(rule=rule, attack=attack)))


def test_two_of_ten_destroy_the_mean_and_not_the_vote() -> None:
    clean, broken, held = run("mean", "none"), run("mean", "sign_flip"), run("neighbour_vote", "sign_flip")
    assert clean.accuracy > 0.9
    assert broken.accuracy < 0.6
    assert held.accuracy > 0.9


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_runs_to_its_end(attack: str) -> None:
    row = run("nnm_trimmed_mean", attack)
    assert 0.5 < row.accuracy <= 1
    assert 0 <= row.success <= 1


def test_what_the_coordinator_refuses_does_not_count(tmp_path: Path) -> None:
    def tamper(_number: int, updates: Sequence[Update]) -> list[Update]:
        first, *others = updates
        return [msgspec.structs.replace(first, body=b"\xff nonsense"), *others]

    spec = job(Sparsify(up_density=0.2, down_density=0.3), rounds=1, target=3)
    simulation = Simulation(spec, people(), tmp_path, tamper=tamper)
    try:
        (end,) = simulation.run()
    finally:
        simulation.close()
    assert len(end.updates) == 2


def test_poison_changes_the_data_of_hostile_devices_only() -> None:
    clean: Population = people(4)
    for attack in ("label_flip", "inflated", "backdoor", "backdoor_quiet"):
        changed = poisoned(clean, attack, [1])
        assert len(changed.devices) == 4
        for place, (one, other) in enumerate(zip(clean.devices, changed.devices, strict=True)):
            same = np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
            assert same == (place != 1)
    assert len(poisoned(clean, "absent", [1, 2]).devices) == 2
    assert poisoned(clean, "alie", [1]).devices == list(clean.devices)


def test_the_patch_covers_one_corner_of_all_channels() -> None:
    x = np.zeros((2, 3, 6, 6), dtype=np.float32)
    some = Population(
        data=DATA, devices=[(np.full((1, 1), 7.0, np.float32), np.zeros(1, int))], test=(x, np.zeros(2, int))
    )
    marked = patched(some, x)
    assert (marked[:, :, 3:, 3:] == 7).all()
    assert (marked == 7).sum() == 2 * 3 * 9
    assert not x.any()


def test_the_summary_subtracts_from_the_right_baselines() -> None:
    def row(rule: str, attack: str, accuracy: float, success: float = 0.0) -> Row:
        return Row(rule=rule, attack=attack, accuracy=accuracy, success=success, seconds=1.0)

    found = summary(
        [
            row("mean", "absent", 0.90),
            row("mean", "none", 0.92),
            row("median", "none", 0.91, 0.01),
            row("median", "ipm", 0.80),
            row("median", "alie", 0.88),
            row("median", "backdoor", 0.89, 0.5),
        ]
    )["rules"]["median"]
    assert found["clean_cost"] == 1.0
    assert found["loss"] == {"ipm": 10.0, "alie": 2.0, "backdoor": 1.0}
    assert (found["worst_loss"], found["ipm_loss"]) == (2.0, 10.0)
    assert (found["backdoor_success"], found["backdoor_without"]) == (50.0, 1.0)


def test_every_run_has_its_baselines() -> None:
    options = parsed(["--rules", "median", "--attacks", "alie"])
    assert set(arms(options)) >= {Arm(rule="mean", attack="absent"), Arm(rule="mean", attack="none")}
    assert Aggregate().rule == "mean"
