"""Devices of virtual time: every scenario that ships, the same result for the same seed, and the real trainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from liberatai_coordinator.config import parse_job
from liberatai_coordinator.sim.fleet_file import FleetFile
from liberatai_coordinator.sim.line import Line
from liberatai_coordinator.sim.record import Record
from liberatai_coordinator.sim.scenario import load_scenario, scenario_names
from liberatai_coordinator.sim.virtual.world import Given, quick_folder, simulate
from liberatai_core.profile import Network, load_profile, profile_names

JOB = """
name: tiny
data: {input_shape: [1, 4, 4], classes: 3}
structures: [{family: mlp, params: {hidden: 8}}]
rounds: {count: 6, min_devices: 3, quorum: 0.5, deadline_s: 60}
sparsify: {up_density: 0.3}
seed: 1
"""
ROBUST = "aggregate: {rule: median, hostile: 0.25}\n"
SAMPLES = 1_000_000
"""So many that a training takes a Pi some seconds: there is time for things to happen."""


def run(folder: Path, scenario: str = "steady", job: str = JOB, **changes: Any) -> Record:
    fleet = FleetFile(devices={"pi4": 8, "pi5": 4}, training="drawn", telemetry_s=10, seed=3, samples=SAMPLES)
    fleet = replace(fleet, **changes)
    given = Given(
        fleet=fleet, scenario=load_scenario(scenario), job=parse_job(job, "job"), base_dir=".", limit_s=7200
    )
    return simulate(given, folder)


@dataclass(frozen=True)
class Expected:
    """What a scenario does to a job of six rounds that take some eight seconds each."""

    faults: int
    """At least so many."""
    distance: float = 0.05
    """At most, at the end; 0.25 at the beginning."""
    slower: bool = False
    """Than without it."""
    rounds: int = 6
    missing: int = 0
    """Updates that at least are missing, of one per device and round."""


EXPECTED = {
    "steady": Expected(0),
    "flaky-wifi": Expected(5, missing=1),
    "commuter-lte": Expected(3, slower=True, missing=1),
    "brown-out": Expected(1, rounds=16),
    "broker-restart": Expected(2, slower=True),
    "partition": Expected(6, missing=18),
    "clock-skew": Expected(4, missing=3),
    "cloned-identity": Expected(1),
    "full-disk": Expected(4, slower=True),
    "hostile": Expected(0),
    "day-and-night": Expected(1, rounds=16),
    "always-fails": Expected(0, missing=6),
}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def steady() -> Iterator[Record]:
    with quick_folder() as folder:
        yield run(folder)


def test_every_scenario_that_ships_is_expected_here() -> None:
    assert scenario_names() == sorted(EXPECTED)


@pytest.mark.parametrize("scenario", EXPECTED)
def test_a_job_ends_well_whatever_happens_and_nothing_that_was_receipted_is_lost(
    scenario: str, steady: Record, tmp_path: Path
) -> None:
    expected = EXPECTED[scenario]
    job = JOB.replace("count: 6", f"count: {expected.rounds}") + ROBUST * (scenario == "hostile")
    record = steady if scenario == "steady" else run(tmp_path, scenario, job)
    assert (record.state, record.lost) == ("finished", 0)
    assert len(record.faults) >= expected.faults
    assert record.points[-1].figure < expected.distance
    assert sum(one.updates for one in record.rounds) <= 12 * expected.rounds - expected.missing
    if expected.slower:
        assert record.job_s > steady.job_s + 2


def test_hostile_updates_spoil_a_mean(tmp_path: Path) -> None:
    """So that the robust rule above does something."""
    assert run(tmp_path, "hostile").points[-1].figure > 1


def test_the_same_seed_gives_the_same_weights_bytes_and_times(steady: Record, tmp_path: Path) -> None:
    again, other = run(tmp_path / "again"), run(tmp_path / "other", seed=4)
    assert replace(again, wall_s=0, rss_mb=0) == replace(steady, wall_s=0, rss_mb=0)
    assert other.digests != steady.digests


def test_a_coordinator_that_is_killed_changes_nothing_but_time(steady: Record, tmp_path: Path) -> None:
    scenario = tmp_path / "kill.yaml"
    scenario.write_text(
        "name: kill\ndescription: x\ncoordinator: [{at_s: 20, down_s: 4}, {at_s: 47, down_s: 2}]\n"
    )
    record = run(tmp_path / "state", str(scenario))
    assert (record.digests, record.lost) == (steady.digests, 0)
    assert len(record.faults) == 2


def test_devices_that_are_only_known_take_no_part(tmp_path: Path) -> None:
    record = run(tmp_path, devices={"pi4": 500}, awake=0.01)
    assert (record.known, len(record.devices), record.updates) == (500, 5, 30)


def test_the_trainer_itself_learns_in_virtual_time(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    random = np.random.default_rng(0)
    data = {}
    for name in ("pi4-0001", "pi4-0002", "pi5-0001"):
        y = random.integers(0, 3, 90)
        x = random.normal(0, 0.3, (90, 1, 4, 4)).astype(np.float32)
        x[np.arange(90), 0, y, 0] += 2
        path = tmp_path / f"{name}.npz"
        np.savez(path, x=x, y=y)
        data[name] = str(path)
    fleet = FleetFile(devices={"pi4": 2, "pi5": 1}, seed=5)
    given = Given(
        fleet=fleet,
        scenario=load_scenario("steady"),
        job=parse_job(JOB.replace("count: 6", "count: 4"), "job"),
        base_dir=str(tmp_path),
        data=data,
        samples=dict.fromkeys(data, 90),
        test=(x, y),
        limit_s=600,
    )
    record = simulate(given, tmp_path / "state")
    assert (record.state, record.updates) == ("finished", 12)
    assert record.points[-1].figure > 0.8
    assert {moment.what for moment in record.devices[0].moments} >= {
        "fetching",
        "training",
        "sending",
        "receipt",
    }


def test_a_message_takes_its_length_and_the_distance_and_nothing_overtakes() -> None:
    class Quiet:
        def gauss(self, _mean: float, _deviation: float) -> float:
            return 0.0

        def random(self) -> float:
            return 1.0

    line = Line.of(Network(up_mbit=8, down_mbit=80, rtt_ms=20), Quiet())  # type: ignore[arg-type]
    assert line.send(100.0, 1_000_000) == pytest.approx(101.01)
    assert line.send(100.0, 1_000) == pytest.approx(101.011), "it waits for the long one"
    assert line.receive(100.0, 1_000_000) == pytest.approx(100.11), "the other direction is free"
    assert (line.up.moved_bytes, line.down.moved_bytes) == (1_001_000, 1_000_000)


def test_every_profile_can_be_simulated(tmp_path: Path) -> None:
    names = profile_names()
    record = run(tmp_path, devices=dict.fromkeys(names, 1), job=JOB.replace("count: 6", "count: 2"))
    assert record.updates == 2 * len(names)
    times = {one.profile: one.busy_s for one in record.devices}
    assert times["nuc-n100"] < times["pi5"] < times["pi4"]
    assert load_profile("gateway-mcu", "p").parts == 8
