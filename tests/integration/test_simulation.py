"""The simulated fleet of the benchmarks runs the product's own decisions, and counts what would travel."""

from pathlib import Path

import numpy as np
import pytest
from benchmarks.simulation import Population, RoundEnd, Simulation
from benchmarks.sparsifier import parsed, population, structure_choice

from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_core.contract.messages import Training
from liberatai_core.learning.families import structure_of
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 6, 6), classes=3)
PARAMETERS = structure_of("mlp", {"hidden": 128}, DATA).parameters


def people(devices: int = 5) -> Population:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 1, 6, 6))

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = random.integers(0, 3, count)
        return (centres[y] + 0.7 * random.normal(size=(count, 1, 6, 6))).astype(np.float32), y

    return Population(data=DATA, devices=[some(40) for _ in range(devices)], test=some(200))


def job(sparsify: Sparsify, rounds: int = 4, target: int | None = 2) -> JobSpec:
    return JobSpec(
        name="simulated",
        data=DATA,
        structures=(StructureChoice(family="mlp", params={"hidden": 128}),),
        rounds=Rounds(count=rounds, target=target, overselect=1.0),
        training=Training(epochs=2, learning_rate=0.05),
        sparsify=sparsify,
        aggregate=Aggregate(ensemble="uniform"),
    )


def run(folder: Path, spec: JobSpec) -> list[RoundEnd]:
    simulation = Simulation(spec, people(), folder)
    try:
        return list(simulation.run())
    finally:
        simulation.close()


@pytest.mark.parametrize(
    "method", ["topk", "topk_small_dense", "random_k", "random_k_feedback", "ternary_no_feedback", "quantile"]
)
def test_every_method_runs_through_the_same_rounds(method: str, tmp_path: Path) -> None:
    ends = run(tmp_path, job(Sparsify(method=method, up_density=0.2, down_density=0.3)))  # type: ignore[arg-type]
    assert [end.number for end in ends] == [1, 2, 3, 4]
    assert all(len(end.updates) == 2 for end in ends)
    assert max(next(iter(end.accuracy.values())) for end in ends) > 0.5


def test_plain_averaging_costs_the_whole_model_both_ways(tmp_path: Path) -> None:
    *_, last = run(tmp_path, job(Sparsify(method="dense")))
    whole = 4 * PARAMETERS
    assert 8 * whole < last.traffic.up < 8 * whole + 8 * 2000
    # The first download is a recipe, also of this arm.
    assert 6 * whole < last.traffic.down < 6 * whole + 8 * 4000


def test_a_trained_part_learns_for_a_fraction_of_the_bytes(tmp_path: Path) -> None:
    sparse = Sparsify(trained_share=0.5, up_density=0.1, down_density=0.2)
    *_, last = run(tmp_path, job(sparse, rounds=8))
    assert next(iter(last.accuracy.values())) > 0.8
    bodies = last.traffic.up_body + last.traffic.down_body
    assert bodies < 16 * 8 * PARAMETERS / 20


def test_the_same_seed_gives_the_same_accuracy_and_the_same_bytes(tmp_path: Path) -> None:
    sparse = Sparsify(up_density=0.1, down_density=0.1, trained_share=0.5)
    one, two = (run(tmp_path / name, job(sparse)) for name in "ab")
    assert [end.accuracy for end in one] == [end.accuracy for end in two]
    assert [end.updates for end in one] == [end.updates for end in two]
    # Of the way up only the time that a training took differs, a field of one width or of none.
    assert abs(one[-1].traffic.up - two[-1].traffic.up) <= 9 * 8
    assert one[-1].traffic.down_body == two[-1].traffic.down_body


def test_a_device_that_was_away_pays_for_one_merged_delta(tmp_path: Path) -> None:
    simulation = Simulation(job(Sparsify(up_density=0.1, down_density=0.1), rounds=10), people(), tmp_path)
    try:
        ends = list(simulation.run())
        newest = simulation.versions.now
        sid = next(iter(newest.chains))
        away = simulation.versions.history[2][sid]
        path = (newest.chains[sid][0], away.delta)
        assert away.delta is not None
        way = simulation.versions.way(sid, (newest.chains[sid][0],), 0)
    finally:
        simulation.close()
    assert len(ends) == 10
    assert path[0].version == 0
    assert len(way.steps) == 1
    assert way.size_bytes < 4 * PARAMETERS / 5


def test_the_benchmark_splits_digits_over_devices_that_all_have_samples() -> None:
    found, owned = population(parsed(["--devices", "20", "--alpha", "0.3", "--seed", "4"]))
    assert not owned
    assert len(found.devices) == 20
    assert min(len(y) for _, y in found.devices) >= 10
    rows = {x.tobytes() for part, _ in found.devices for x in part}
    assert rows.isdisjoint({x.tobytes() for x in found.test[0]})


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (9, 128), (1, 49, 40), (64,)])
def test_models_of_both_sizes_exist_for_pictures_signals_and_rows(shape: tuple[int, ...]) -> None:
    data = DataContract(input_shape=shape, classes=10)
    for size, fits in (("small", lambda n: n <= 250_000), ("large", lambda n: n >= 1_500_000)):
        choice = structure_choice(data, size)
        assert fits(structure_of(choice.family, choice.params, data).parameters)
