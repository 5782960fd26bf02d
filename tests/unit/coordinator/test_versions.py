"""Versions: every way that a device may take ends at the same weights, also after a restart."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.config import parse_job
from liberatai_coordinator.models import aggregation, members
from liberatai_coordinator.models import versions as versions_module
from liberatai_coordinator.models.aggregation import Advanced
from liberatai_coordinator.models.members import Public
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.rounds.catch_up import Path as Files
from liberatai_coordinator.rounds.catch_up import Way
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.repository import Repository
from liberatai_core.compressor.artifact import restore
from liberatai_core.contract.messages import weights_name
from liberatai_core.learning.families import structure_of
from liberatai_core.sparsifier import top_k
from liberatai_core.sparsifier.merge import MAX_STREAMS, exact_deltas
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector, digest

JOB = parse_job(
    """
name: tiny
data: {input_shape: [1, 8, 8], classes: 3}
structures: [{family: mlp, params: {hidden: 64}}]
""",
    "test",
)
STRUCTURE = structure_of("mlp", {"hidden": 64}, JOB.data)
SID = STRUCTURE.id


@pytest.fixture
def versions(tmp_path: Path) -> Iterator[Versions]:
    ledger = Ledger.open(tmp_path / "ledger")
    made = Versions(job=JOB, ledger=ledger, repository=Repository(tmp_path))
    made.start({SID: STRUCTURE}, {SID: 20_000}, Public())
    yield made
    ledger.close()


def commit(versions: Versions, storage_bytes: int = 0, density: float = 0.02, moves: float = 0.01) -> None:
    """Make the next version from noise."""
    now = versions.now
    member, number = now.members[SID], now.number + 1
    noise = np.random.default_rng(number).normal(0, moves, STRUCTURE.parameters).astype(np.float32)
    master = member.master + noise
    nothing = top_k.init(STRUCTURE.parameters)
    _, delta = top_k.sparsify(nothing, master - member.view, STRUCTURE, density, power_of_two=True)
    after = replace(member, master=master, view=member.view + top_k.densify(delta, STRUCTURE))
    advanced = Advanced(
        members={SID: after}, deltas={SID: delta}, keyframes={}, ensemble=now.ensemble, teach_seconds=0.0
    )
    limits = {SID: storage_bytes} if storage_bytes else {}
    versions.commit(advanced, number, [bytes([number]) * 16], limits, {SID: 2000}, Public())


def weights(versions: Versions, path: Files) -> Vector:
    """Return what a device gets from these files, every one of which must be available."""
    found = restore(versions.content(path[0].blob.blob), STRUCTURE)
    for step in path[1:]:
        found = found + top_k.densify(versions.content(step.blob.blob), STRUCTURE)
    assert weights_name(digest(found)) == path[-1].digest
    return found


def ways(versions: Versions, paths: dict[int, Files]) -> dict[int, Way]:
    return {since: versions.way(SID, path, 0) for since, path in paths.items()}


def test_from_every_version_one_delta_leads_to_the_view_of_the_newest(versions: Versions) -> None:
    paths = {0: versions.now.chains[SID]}
    for number in range(1, 7):
        commit(versions)
        paths[number] = versions.now.chains[SID]
    for since, way in ways(versions, paths).items():
        assert np.array_equal(weights(versions, way.path), versions.now.members[SID].view)
        assert way.held == paths[since][-1].digest
        assert len(way.steps) == (0 if since == 6 else 1)
    single = sum(
        record.delta.size
        for row in versions.ledger.versions.all("tiny")[1:]
        if (record := decode_manifest(row.manifest).structures[SID]).delta
    )
    merged = ways(versions, paths)[0].size_bytes
    assert merged < single, "six deltas in one are shorter than six"


def test_a_restarted_coordinator_knows_the_same_ways(versions: Versions) -> None:
    paths = {0: versions.now.chains[SID]}
    for number in range(1, 5):
        commit(versions)
        paths[number] = versions.now.chains[SID]
    again = Versions(job=JOB, ledger=versions.ledger, repository=versions.repository)
    again.restore(versions.ledger.versions.get("tiny"))
    assert ways(again, paths) == ways(versions, paths)
    for way in ways(again, paths).values():
        weights(again, way.path)
    commit(versions)
    commit_id = versions.now.id
    assert versions.ledger.versions.get("tiny").id == commit_id
    assert again.now.chains[SID] == paths[4]


def test_a_chain_stays_short_while_steps_shrink(versions: Versions) -> None:
    """Fine steps after coarse ones have no exact sum in one file, but in two; a restart knows both."""
    paths = {0: versions.now.chains[SID]}
    for number in range(1, 12):
        # The view catches up with nearly all, so that what is left shrinks with the steps.
        commit(versions, density=1.0, moves=0.05 / 3**number)
        paths[number] = versions.now.chains[SID]
    assert 2 < len(paths[11]) <= 1 + MAX_STREAMS
    assert max(map(len, paths.values())) <= 1 + MAX_STREAMS
    again = Versions(job=JOB, ledger=versions.ledger, repository=versions.repository)
    again.restore(versions.ledger.versions.get("tiny"))
    assert ways(again, paths) == ways(versions, paths)
    for way in ways(again, paths).values():
        assert np.array_equal(weights(again, way.path), versions.now.members[SID].view)
        assert way.held
    middle = versions.now.chains[SID][:2]
    assert versions.way(SID, middle, 0).held == b"", "nobody's weights"


def test_where_no_sum_from_the_keyframe_is_exact_a_later_file_is_merged_from(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = versions.now.members[SID].view
    exact = exact_deltas

    def not_from_the_first(before: Vector, after: Vector, structure: Structure) -> tuple[bytes, ...] | None:
        return None if np.array_equal(before, first) else exact(before, after, structure)

    monkeypatch.setattr(versions_module, "exact_deltas", not_from_the_first)
    for _ in range(4):
        commit(versions)
    chain = versions.now.chains[SID]
    assert [step.version for step in chain] == [0, 1, 4]
    assert np.array_equal(weights(versions, chain), versions.now.members[SID].view)


def test_a_chain_without_exact_sums_ends_with_a_new_keyframe(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before paths are too long to be gone on from."""
    monkeypatch.setattr(versions_module, "exact_deltas", lambda *_: None)
    monkeypatch.setattr(versions_module, "MAX_CHAIN_FILES", 3)
    lengths = []
    for _ in range(4):
        commit(versions)
        lengths.append(len(versions.now.chains[SID]))
    assert lengths == [2, 3, 1, 2]


PART = parse_job(
    """
name: tiny
data: {input_shape: [1, 16, 16], classes: 3}
structures: [{family: mlp, params: {hidden: 32}}]
sparsify: {trained_share: 0.3}
""",
    "test",
)
PART_STRUCTURE = structure_of("mlp", {"hidden": 32}, PART.data)


def test_a_renewal_does_not_touch_weights_that_are_never_trained(tmp_path: Path) -> None:
    """The old keyframe stays, and one lossy delta within the budget leads to the part that is trained."""
    sid, limit = PART_STRUCTURE.id, 1200
    ledger = Ledger.open(tmp_path / "ledger")
    made = Versions(job=PART, ledger=ledger, repository=Repository(tmp_path))
    made.start({sid: PART_STRUCTURE}, {sid: 20_000}, Public())
    part = members.trained_part(PART, PART_STRUCTURE)
    frozen = np.setdiff1d(np.arange(PART_STRUCTURE.parameters), part.positions)
    (keyframe,) = made.now.chains[sid]
    untouched = made.now.members[sid].view[frozen].copy()
    random, renewed = np.random.default_rng(0), 0
    for number in range(1, 9):
        member = made.now.members[sid]
        moved = random.normal(0, 0.02, part.part.parameters).astype(np.float32)
        master = part.replaced(member.master, part.gather(member.master) + moved)
        after, delta = aggregation._publish(PART, replace(member, master=master), 0.4)
        advanced = Advanced(
            members={sid: after},
            deltas={sid: delta},
            keyframes={},
            ensemble=made.now.ensemble,
            teach_seconds=0.0,
        )
        made.commit(advanced, number, [bytes([number]) * 16], {sid: limit}, {sid: 1000}, Public())
        renewed += sid not in made.now.deltas
        chain, view = made.now.chains[sid], made.now.members[sid].view
        assert chain[0] == keyframe
        assert sum(step.blob.size_bytes for step in chain) <= limit
        assert np.array_equal(view[frozen], untouched)
        reached = restore(made.content(keyframe.blob.blob), PART_STRUCTURE)
        for step in chain[1:]:
            reached = part.added(reached, top_k.densify(made.content(step.blob.blob), part.part))
        assert np.array_equal(reached, view)
    ledger.close()
    assert renewed, "the chain never outgrew its limit: the test shows nothing"
    behind = made.now.members[sid].master - made.now.members[sid].view
    assert np.abs(behind).mean() < 0.05


def test_single_deltas_lead_on_where_no_merged_one_is_exact(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions_module, "exact_deltas", lambda *_: None)
    paths = {0: versions.now.chains[SID]}
    for number in range(1, 4):
        commit(versions)
        paths[number] = versions.now.chains[SID]
    assert [len(path) for path in paths.values()] == [1, 2, 3, 4]
    found = ways(versions, paths)
    assert [[step.version for step in way.steps] for way in found.values()] == [[1, 2, 3], [2, 3], [3], []]
    for way in found.values():
        assert np.array_equal(weights(versions, way.path), versions.now.members[SID].view)


def test_a_new_keyframe_comes_when_keyframe_and_delta_outgrow_the_storage(versions: Versions) -> None:
    first = versions.now.chains[SID]
    commit(versions, storage_bytes=4000)
    assert versions.now.chains[SID][0] == first[0]
    room = first[0].blob.size_bytes + 20
    commit(versions, storage_bytes=room)
    (renewed,) = versions.now.chains[SID]
    assert renewed.version == 2
    record = decode_manifest(versions.ledger.versions.get("tiny").manifest).structures[SID]
    assert (record.deltas, record.delta) == ((), None)
    afresh = versions.way(SID, first, 0)
    assert np.array_equal(weights(versions, afresh.path), versions.now.members[SID].view)
    commit(versions)
    onward = versions.way(SID, (renewed,), 0)
    assert [step.version for step in onward.steps] == [3]
    assert np.array_equal(weights(versions, onward.path), versions.now.members[SID].view)


def test_sums_with_a_renewed_keyframe_are_exact_too(versions: Versions) -> None:
    """Its values lie on coarse grids: deltas of later versions merge into one."""
    commit(versions)
    commit(versions, storage_bytes=versions.now.chains[SID][0].blob.size_bytes + 20)
    renewed = versions.now.chains[SID]
    for _ in range(4):
        commit(versions)
    assert [step.version for step in versions.now.chains[SID]] == [2, 6]
    assert len(versions.way(SID, renewed, 0).steps) == 1


def test_what_a_device_claims_to_hold_must_be_a_version_of_this_structure(versions: Versions) -> None:
    commit(versions)
    (keyframe, *_) = versions.now.chains[SID]
    for wrong in (
        msgspec.structs.replace(keyframe, digest=b"x" * 16),
        msgspec.structs.replace(keyframe, version=99),
        msgspec.structs.replace(keyframe, version=1),
    ):
        assert versions.way(SID, (wrong,), 0).held == b""
