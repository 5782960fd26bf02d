"""Devices that train the last layer on a frozen backbone: their updates, what is merged with whom, the refresh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.simulation import Population, Simulation

from liberatai_coordinator.config import Aggregate, Head, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.models.members import trained_part
from liberatai_core.contract.messages import Training
from liberatai_core.errors import NotFoundError
from liberatai_core.structure import DataContract, head_places

DATA = DataContract(input_shape=(1, 6, 6), classes=3)
FULL, HEAD = "mlp-hidden24", "mlp-hidden24-trainhead"


def people(devices: int) -> Population:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 1, 6, 6))

    def some(count: int) -> tuple[Any, Any]:
        y = random.integers(0, 3, count)
        return (centres[y] + 0.7 * random.normal(size=(count, 1, 6, 6))).astype(np.float32), y

    return Population(data=DATA, devices=[some(40) for _ in range(devices)], test=some(200))


def job(rounds: int = 4, refresh: int = 2, **changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "simulated",
        "data": DATA,
        "structures": (
            StructureChoice(family="mlp", params={"hidden": 24}),
            StructureChoice(family="mlp", params={"hidden": 24, "train": "head"}),
        ),
        "rounds": Rounds(count=rounds, overselect=1.0),
        "training": Training(epochs=2, learning_rate=0.02),
        "sparsify": Sparsify(up_density=0.3, down_density=0.5),
        "aggregate": Aggregate(ensemble="uniform"),
        "head": Head(refresh_rounds=refresh),
    }
    return JobSpec(**(fields | changes))


def played(folder: Path, spec: JobSpec, owners: list[int]) -> Simulation:
    simulation = Simulation(spec, people(len(owners)), folder, structures=owners)
    for _ in simulation.run():
        pass
    return simulation


def test_a_head_is_merged_with_all_devices_and_a_backbone_with_those_that_train_it(tmp_path: Path) -> None:
    spec = job(rounds=1)  # nothing follows the last round, so nothing is refreshed
    simulation = Simulation(spec, people(4), tmp_path, structures=[0, 0, 1, 1])
    try:
        start = {sid: one.master.copy() for sid, one in simulation.versions.now.members.items()}
        assert start[FULL].tobytes() == start[HEAD].tobytes()
        (end,) = simulation.run()
        after = simulation.versions.now.members
        moved = {sid: after[sid].master - start[sid] for sid in after}
        head = head_places(after[HEAD].structure)
        assert (moved[HEAD][: head.start] == 0).all()
        assert np.abs(moved[FULL][: head.start]).max() > 0
        # The same slice of the result, from the updates of all four devices.
        assert moved[HEAD][head].tobytes() == moved[FULL][head].tobytes()
        assert np.abs(moved[HEAD][head]).max() > 0
        sizes = {name: len(body) for name, body in end.updates.items()}
        assert max(sizes[d] for d in ("device-0002", "device-0003")) < 150
        assert trained_part(spec, after[HEAD].structure).part.parameters == 24 * 3 + 3
        without = played(tmp_path / "alone", job(rounds=1), [0, 0])
        alone = without.versions.now.members[FULL].master - start[FULL]
        assert moved[FULL][: head.start].tobytes() == alone[: head.start].tobytes()
        assert moved[FULL][head].tobytes() != alone[head].tobytes()
        without.close()
    finally:
        simulation.close()


def test_the_backbone_is_refreshed_every_so_many_rounds_and_costs_a_keyframe_then(tmp_path: Path) -> None:
    simulation = Simulation(job(rounds=4, refresh=2), people(4), tmp_path, structures=[0, 0, 1, 1])
    try:
        backbones, chains = [], []
        for _ in simulation.run():
            member = simulation.versions.now.members[HEAD]
            backbones.append(member.view[: head_places(member.structure).start].tobytes())
            chains.append(simulation.versions.now.chains[HEAD])
        assert backbones[0] != simulation_start(simulation), "in the first rounds it changes most"
        assert backbones[1] != backbones[0]
        assert backbones[2] == backbones[3] == backbones[1], "nothing follows the last round"
        assert [len(chain) for chain in chains] == [1, 1, 2, 2]
        assert chains[1][0].version == 2
        accuracy = simulation._accuracy()
        assert accuracy[FULL] > 0.8
        assert accuracy[HEAD] > 0.75
    finally:
        simulation.close()


def simulation_start(simulation: Simulation) -> bytes:
    view = simulation.versions._view(HEAD, 0)
    return view[: head_places(simulation.versions.now.members[HEAD].structure).start].tobytes()


def test_a_head_alone_starts_on_the_backbone_of_a_committed_model(tmp_path: Path) -> None:
    first = played(tmp_path, job(rounds=4, structures=job().structures[:1]), [0, 0])
    try:
        taught = first.versions.now.members[FULL].view
        alone = job(name="heads", structures=job().structures[1:], head=Head(backbone="simulated"))
        versions = type(first.versions)(job=alone, ledger=first.ledger, repository=first.versions.repository)
        structure = first.versions.now.members[FULL].structure
        wanted = {
            HEAD: type(structure)(structure.family, {**structure.params, "train": "head"}, structure.tensors)
        }
        versions.start(wanted, {HEAD: 4000}, first._public)
        got = versions.now.members[HEAD].view
        assert np.abs(got - taught).max() < 0.02
        for missing in ("nothing", "simulated@99"):
            bad = job(name="bad", structures=job().structures[1:], head=Head(backbone=missing))
            other = type(first.versions)(job=bad, ledger=first.ledger, repository=first.versions.repository)
            with pytest.raises(NotFoundError):
                other.start(wanted, {HEAD: 4000}, first._public)
    finally:
        first.close()
