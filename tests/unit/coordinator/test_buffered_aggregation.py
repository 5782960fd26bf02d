"""What late updates make of a version: shorter steps under every rule, and class counts that follow all devices."""

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.models.aggregation import Advanced, Late
from liberatai_coordinator.models.members import Member, Public
from liberatai_coordinator.models.updates import check_update
from liberatai_core.contract.messages import Update, update_id
from liberatai_core.errors import SchemaError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import DataContract

DATA = DataContract(input_shape=(1, 4, 4), classes=3)
STRUCTURE = structure_of("mlp", {"hidden": 8}, DATA)
SID = STRUCTURE.id
BASE = b"b" * 16


def job(rule: Any = "mean") -> JobSpec:
    return JobSpec(
        name="late",
        data=DATA,
        structures=(StructureChoice(family="mlp", params={"hidden": 8}),),
        rounds=Rounds(mode="buffered"),
        sparsify=Sparsify(up_density=0.5),
        aggregate=Aggregate(rule=rule, hostile=0.2, ensemble="uniform"),
    )


def update(device: str, seed: int, counts: tuple[int, ...] = (4, 3, 3)) -> Update:
    noise = np.random.default_rng(seed).normal(0, 0.01, STRUCTURE.parameters).astype(np.float32)
    _, body = sparsify(init(STRUCTURE.parameters), noise, STRUCTURE, 0.5)
    return Update(
        update_id=update_id(device, "late", 1, BASE),
        device=device,
        job="late",
        round=1,
        epoch=1,
        structure=SID,
        base=BASE,
        samples=10,
        codec="topk",
        body=body,
        class_counts=counts,
    )


def start(given: JobSpec, counts: tuple[int, ...] = (0, 0, 0)) -> dict[str, Member]:
    first = aggregation.first(given, STRUCTURE, initial_weights(STRUCTURE, DATA, 0))
    return {SID: dataclasses.replace(first, class_counts=np.array(counts, dtype=np.float64))}


def advance(given: JobSpec, updates: list[Update], late: Late | None, **more: Any) -> Advanced:
    return aggregation.advance(given, 2, start(given, **more), updates, Public(), late)


def moved(given: JobSpec, made: Advanced) -> np.ndarray[Any, Any]:
    return made.members[SID].master.astype(np.float64) - start(given)[SID].master


UPDATES = [update(f"d{n}", n) for n in range(5)]


@pytest.mark.parametrize("rule", ["mean", "norm_clip", "median", "trimmed_mean", "neighbour_vote"])
def test_a_version_of_equally_late_updates_is_as_much_shorter_under_every_rule(rule: str) -> None:
    given = job(rule)
    fresh = moved(given, advance(given, UPDATES, None))
    late = Late(staleness=dict.fromkeys((one.update_id for one in UPDATES), 3))
    assert np.abs(fresh).max() > 0
    np.testing.assert_allclose(moved(given, advance(given, UPDATES, late)), fresh / 2, atol=1e-7)


@pytest.mark.parametrize("rule", ["mean", "neighbour_vote"])
def test_a_buffered_version_without_late_updates_is_that_of_a_synchronous_round(rule: str) -> None:
    given = job(rule)
    punctual = Late(staleness=dict.fromkeys((one.update_id for one in UPDATES), 0))
    sync, buffered = advance(given, UPDATES, None), advance(given, UPDATES, punctual)
    assert sync.members[SID].master.tobytes() == buffered.members[SID].master.tobytes()
    assert sync.deltas == buffered.deltas


def test_the_order_of_late_updates_changes_no_byte() -> None:
    late = Late(staleness={one.update_id: n for n, one in enumerate(UPDATES)})
    one = advance(job(), UPDATES, late)
    other = advance(job(), UPDATES[::-1], late)
    assert one.members[SID].master.tobytes() == other.members[SID].master.tobytes()


def test_a_late_update_among_fresh_ones_counts_for_the_root() -> None:
    some = UPDATES[:2]
    late = Late(staleness={some[1].update_id: 8})
    wanted = (densify(some[0].body, STRUCTURE) + densify(some[1].body, STRUCTURE) / 3.0) / 2
    np.testing.assert_allclose(moved(job(), advance(job(), some, late)), wanted, atol=1e-7)


def test_class_counts_of_few_devices_replace_their_share_of_all() -> None:
    some = [update("d0", 0, (10, 0, 0)), update("d1", 1, (0, 10, 0))]
    late = Late(devices={SID: 8})
    made = advance(job(), some, late, counts=(8, 40, 33))
    # Two of eight: three quarters of the sum before stay, in whole numbers as the manifest keeps them.
    assert made.members[SID].class_counts.tolist() == [16.0, 40.0, 24.0]


def test_class_counts_of_a_synchronous_round_are_those_of_the_round() -> None:
    made = advance(job(), [update("d0", 0, (10, 0, 0))], None, counts=(8, 40, 33))
    assert made.members[SID].class_counts.tolist() == [10.0, 0.0, 0.0]


def test_no_device_counts_for_more_than_it_has_or_the_cap_allows() -> None:
    with pytest.raises(SchemaError, match="class counts of 11 samples, the update has 10"):
        check_update(update("a", 1, (4, 3, 4)), STRUCTURE, job())
    check_update(update("a", 1), STRUCTURE, job())
    given = msgspec.structs.replace(job(), aggregate=Aggregate(sample_cap=5, ensemble="uniform"))
    made = advance(given, [update("a", 1, (10, 0, 0)), update("b", 2, (0, 2, 1))], None)
    assert made.members[SID].class_counts.tolist() == [5.0, 2.0, 1.0]
