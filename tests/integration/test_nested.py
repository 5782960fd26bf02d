"""Members of one family in a simulated job: they begin with shared weights and learn from all devices."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import nested as benchmark
from benchmarks.simulation import Population, Simulation
from msgspec.structs import replace

from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice, Teach
from liberatai_coordinator.models import aggregation, members
from liberatai_coordinator.models.members import Public
from liberatai_coordinator.models.versions import Versions
from liberatai_core.aggregator import nested
from liberatai_core.compressor.artifact import restore
from liberatai_core.contract.messages import Training
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 6, 6), classes=3)
WIDE, NARROW, DEEP = "mlp-hidden128-layers1", "mlp-hidden32-layers1", "mlp-hidden32-layers2"


def people(devices: int = 6) -> Population:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 1, 6, 6))

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = random.integers(0, 3, count)
        return (centres[y] + 0.7 * random.normal(size=(count, 1, 6, 6))).astype(np.float32), y

    return Population(data=DATA, devices=[some(40) for _ in range(devices)], test=some(200))


def job(aggregate: Aggregate, *, shapes: Any = ((128, 1), (32, 1)), **sparsify: Any) -> JobSpec:
    return JobSpec(
        name="simulated",
        data=DATA,
        structures=tuple(
            StructureChoice(family="mlp", params={"hidden": hidden, "layers": layers})
            for hidden, layers in shapes
        ),
        rounds=Rounds(count=3, overselect=1.0),
        training=Training(epochs=2),
        sparsify=Sparsify(**sparsify),
        aggregate=aggregate,
        teach=Teach(steps=10, copies=0),
    )


@contextmanager
def played(folder: Path, spec: JobSpec, owners: list[int], **options: Any) -> Iterator[Versions]:
    simulation = Simulation(spec, people(len(owners)), folder, structures=owners, **options)
    try:
        for _ in simulation.run():
            pass
        yield simulation.versions
    finally:
        simulation.close()


def places(versions: Versions) -> Any:
    members = versions.now.members
    return nested.index_map(members[WIDE].structure, members[NARROW].structure)


def test_members_share_widths_by_default_where_nothing_teaches_them() -> None:
    assert job(Aggregate()).nested == "width"
    assert replace(job(Aggregate()), teach=Teach(unlabeled="public.npz")).nested == "off"
    assert job(Aggregate(nested="off")).nested == "off"
    assert replace(job(Aggregate(nested="both")), teach=Teach(unlabeled="public.npz")).nested == "both"


def test_without_teaching_a_member_stays_the_slice_of_the_largest_one(tmp_path: Path) -> None:
    """The same start and the same steps: not one bit differs, although devices trained other sizes."""
    spec = job(Aggregate(nested="width", ensemble="uniform"), method="dense")
    with played(tmp_path, spec, [0, 1, 0, 1, 1, 1]) as versions:
        wide, narrow = (versions.now.members[sid].view for sid in (WIDE, NARROW))
        assert np.array_equal(narrow, wide[places(versions)])


def test_separate_structures_share_neither_start_nor_steps(tmp_path: Path) -> None:
    spec = job(Aggregate(nested="off", ensemble="uniform"), method="dense")
    with played(tmp_path, spec, [0, 1, 0, 1]) as versions:
        wide, narrow = (versions.now.members[sid].view for sid in (WIDE, NARROW))
        dense = slice(0, 36 * 32)
        assert np.abs(narrow - wide[places(versions)])[dense].min() > 0


def test_members_begin_with_shared_weights_that_every_device_can_restore(tmp_path: Path) -> None:
    spec = job(Aggregate(nested="both", ensemble="uniform"), shapes=((32, 2), (32, 1), (16, 2)))
    simulation = Simulation(spec, people(3), tmp_path, structures=[0, 1, 2])
    try:
        now = simulation.versions.now
        (group,) = aggregation.groups(spec, [one.structure for one in now.members.values()])
        assert group.largest == DEEP
        whole = now.members[DEEP].view
        for sid, lying in group.places.items():
            (step,) = now.chains[sid]
            content = simulation.versions.content(step.blob.blob)
            assert np.array_equal(restore(content, now.members[sid].structure), now.members[sid].view)
            shared = lying < whole.size
            assert np.array_equal(now.members[sid].view[shared], whole[lying[shared]])
            assert step.blob.size_bytes < 2 * now.members[sid].structure.parameters
        own = now.members[NARROW].view[-(32 * 3 + 3) :]
        assert np.abs(own).max() > 0, "the shallower member has a head of its own, drawn as any other"
    finally:
        simulation.close()


def test_a_member_moves_only_where_it_is_trained_itself(tmp_path: Path) -> None:
    """Trained parts are drawn per structure: what others train of a member's rest must not reach it."""
    spec = job(Aggregate(nested="width", ensemble="uniform"), shapes=((256, 1), (128, 1)), trained_share=0.3)
    simulation = Simulation(spec, people(4), tmp_path, structures=[0, 1, 0, 1])
    try:
        before = dict(simulation.versions.now.members)
        for _ in simulation.run():
            pass
        after = simulation.versions.now.members
        covers = []
        for sid, member in after.items():
            trained = members.trained_part(spec, member.structure)
            assert trained.gain is not None
            moved = np.flatnonzero(member.master != before[sid].master)
            assert moved.size
            assert np.isin(moved, trained.positions).all()
            covers.append(set(trained.positions.tolist()))
        assert len(covers) == 2
    finally:
        simulation.close()


def test_a_frozen_slice_stays_and_the_version_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five devices share the narrow slice; what only the wide one covers has one, and three are needed."""
    rule = Aggregate(nested="width", rule="trimmed_mean", hostile=0.2, ensemble="uniform")
    spec = job(rule, method="dense")
    simulation = Simulation(spec, people(5), tmp_path, structures=[0, 1, 1, 1, 1])
    told: list[aggregation.Advanced] = []
    real = aggregation.advance

    def listening(*given: Any) -> aggregation.Advanced:
        told.append(real(*given))
        return told[-1]

    monkeypatch.setattr(aggregation, "advance", listening)
    try:
        before = simulation.versions.now.members[WIDE].master
        for _ in simulation.run():
            pass
        after = simulation.versions.now.members[WIDE].master
        shared = places(simulation.versions)
    finally:
        simulation.close()
    alone = np.setdiff1d(np.arange(after.size), shared)
    assert np.array_equal(after[alone], before[alone])
    assert (after[shared] != before[shared]).mean() > 0.9
    assert [set(one.frozen) for one in told] == [{WIDE}] * 3
    assert "1 updates, 3 are needed" in told[0].frozen[WIDE]
    assert all(len(one.contributions) == 5 for one in told)


def test_nested_members_are_taught_apart(tmp_path: Path) -> None:
    spec = job(Aggregate(nested="width", ensemble="uniform"))
    unlabeled = people(1).devices[0][0]
    with played(tmp_path, spec, [0, 1, 0, 1], public=Public(unlabeled=unlabeled)) as versions:
        wide, narrow = (versions.now.members[sid].master for sid in (WIDE, NARROW))
        assert np.abs(narrow - wide[places(versions)]).max() > 1e-3


def test_the_same_updates_give_the_same_bytes(tmp_path: Path) -> None:
    spec = job(Aggregate(nested="both", ensemble="uniform"), shapes=((32, 2), (32, 1), (16, 2)))
    ids = []
    for name in "ab":
        with played(tmp_path / name, spec, [0, 1, 2, 2]) as versions:
            ids.append(versions.now.id)
    assert ids[0] == ids[1]


def test_the_benchmark_tells_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--samples",
        "300",
        "--public",
        "40",
        "--validation",
        "20",
        "--devices",
        "3",
        "--teach-steps",
        "5",
    ]
    options = ["--quick", "--rounds", "1", "--seeds", "0", "--families", "mlp", *sizes]
    assert benchmark.main(options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["means"]) == {
        *(f"mlp width {arm}" for arm in ("separate", "nested", "taught", "nested_taught")),
        *(f"mlp depth {arm}" for arm in ("separate", "nested")),
    }
    assert all(0 <= value <= 1 for row in found["arms"] for value in row["members"].values())
