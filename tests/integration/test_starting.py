"""Jobs that go on from a commit: what their structures begin with, and what lineage says."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.integration.kit import coordinator, devices, ended, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.config import parse_job
from liberatai_coordinator.models import starting
from liberatai_coordinator.models.commits import STARTED, Commits, Started
from liberatai_coordinator.models.members import Public
from liberatai_coordinator.repository import care, tensors
from liberatai_coordinator.repository.files import About, commit_weights
from liberatai_coordinator.repository.store import Store
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.repository import Repository
from liberatai_core.errors import ConfigError, DataError, NotFoundError
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.link.memory import MemoryBroker
from liberatai_core.structure import DataContract
from liberatai_core.weights import from_bytes


def committed(folder: Path, data: DataContract, hidden: int, seed: int = 5) -> tuple[str, np.ndarray]:
    shape = structure_of("mlp", {"hidden": hidden}, data)
    weights = initial_weights(shape, data, seed)
    about = About(model="before", data=data)
    made = commit_weights(Store(folder), shape, weights, about, [], branch="latest", kind="import")
    return made.digest, weights


def test_a_job_begins_with_the_weights_of_a_commit_and_its_lineage_says_so(tmp_path: Path) -> None:
    job = parse_job(job_yaml(rounds=2), "job")
    start, weights = committed(tmp_path / "models", job.data, 8)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            operations = Operations.of(service)
            with pytest.raises(NotFoundError):
                await operations.jobs.create(job_yaml() + "start: nothing\n", str(tmp_path))
            await operations.jobs.create(job_yaml(rounds=2) + "start: before\n", str(tmp_path))
            await until(lambda: ended(service), 60)

    asyncio.run(scenario())
    store = Store(tmp_path / "models")
    log = list(store.log([store.find("tiny")]))
    assert [entry.kind for entry in log] == ["finetune", "finetune", "finetune", "import"]
    assert log[-1].digest == start
    first = store.read(store.find("tiny:0")).commit
    began = tensors.read(store, first.variants[0])
    assert np.linalg.norm(began - weights) < 0.02 * np.linalg.norm(weights)
    ledger = Ledger.open(tmp_path)
    try:
        (record,) = decode_manifest(ledger.versions.get("tiny", 0).manifest).structures.values()
        assert np.array_equal(from_bytes(Repository(tmp_path).get(record.master)), weights)
    finally:
        ledger.close()
    assert care.verify(store, log[0].digest) == []


def test_a_round_that_is_worse_than_the_start_stays_off_the_branch_that_people_use(tmp_path: Path) -> None:
    job = parse_job(job_yaml(rounds=2), "job")
    start, _ = committed(tmp_path / "models", job.data, 8)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=2), str(tmp_path))
            await until(lambda: ended(service), 60)

    asyncio.run(scenario())
    ledger, store = Ledger.open(tmp_path), Store(tmp_path / "models")
    try:
        for tag in ("latest",):
            store.remove_ref("tiny", tag)
        ledger.jobs.set_value("tiny", STARTED, msgspec.msgpack.encode(Started(commit=start, accuracy=0.5)))
        rows = ledger.versions.all("tiny")
        scores = {rows[1].id: 0.4, rows[2].id: 0.6}
        for row in rows[1:]:
            stats = {"central": {"version": row.number, "samples": 9, "ensemble": scores[row.id]}}
            found = ledger.rounds.get("tiny", row.number)
            assert found.version_id == row.id
            with ledger.database.write() as connection:
                connection.exec_driver_sql(
                    "UPDATE rounds SET stats = ? WHERE job = 'tiny' AND round = ?",
                    (msgspec.msgpack.encode(stats), row.number),
                )
        commits = Commits(store=store, ledger=ledger, repository=Repository(tmp_path), author="co1")
        seen = {}

        def write(draft, layers, **options):
            made = Store.write(store, draft, layers, **options)
            seen[draft.number] = options.get("branch", "latest")
            return made

        store.write = write  # type: ignore[method-assign]
        assert commits.publish("tiny") == 3
        assert seen == {0: "latest", 1: "training", 2: "latest"}
    finally:
        ledger.close()
    assert [entry.number for entry in store.log([store.find("tiny")])] == [2, 1, 0, None]


def test_smaller_members_are_slices_and_unlike_structures_are_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "STEPS", 300)
    data = DataContract(input_shape=(1, 4, 4), classes=3)
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 1, 4, 4)).astype(np.float32)
    y = random.integers(0, 3, 400)
    x = (centres[y] + 0.3 * random.normal(size=(400, 1, 4, 4))).astype(np.float32)
    large = structure_of("mlp", {"hidden": 32}, data)
    weights = train(large, data, initial_weights(large, data, 1), x, y, TrainSettings(epochs=4), 1).weights
    store = Store(tmp_path / "store")
    commit_weights(
        store, large, weights, About(model="before", data=data), [], branch="latest", kind="import"
    )
    job = parse_job(
        "name: after\ndata: {input_shape: [1, 4, 4], classes: 3}\nstart: before\n"
        "structures: [{family: mlp, params: {hidden: 32}}, {family: mlp, params: {hidden: 16}},"
        " {family: cnn, params: {width: 4}}]\nteach: {unlabeled: x.npz}\n",
        "job",
    )
    structures = {
        one.id: one
        for one in (large, structure_of("mlp", {"hidden": 16}, data), structure_of("cnn", {"width": 4}, data))
    }
    begun = starting.begin(store, job, structures, Public(unlabeled=x[:200], validation=None))
    assert np.array_equal(begun.weights[large.id], weights)
    assert [begun.ways[sid].split(" by")[0] for sid in sorted(structures)] == [
        "taught",
        "a slice",
        "the same structure",
    ]
    for sid, structure in structures.items():
        said = log_probabilities(structure, data, begun.weights[sid], x[200:])
        assert np.mean(said.argmax(1) == y[200:]) > 0.8, sid

    alone = msgspec.structs.replace(job, teach=msgspec.structs.replace(job.teach, unlabeled=None))
    with pytest.raises(ConfigError, match="teach.unlabeled"):
        starting.check(store, alone, structures)
    other = msgspec.structs.replace(job, data=DataContract(input_shape=(1, 5, 5), classes=3))
    with pytest.raises(DataError):
        starting.check(store, other, {})
