"""Trainings commit to the model repository: every version, once, exactly as devices hold it."""

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.integration.kit import coordinator, devices, ended, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.models.commits import Commits
from liberatai_coordinator.repository import care, tensors
from liberatai_coordinator.repository.commits import Commit
from liberatai_coordinator.repository.store import Store
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_core.errors import DigestError
from liberatai_core.link.memory import MemoryBroker
from liberatai_core.weights import digest


def trained(folder: Path) -> None:
    """Run a job of three rounds to its end."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c"), coordinator(broker, folder) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=3), str(folder))
            await until(lambda: ended(service), 60)

    asyncio.run(scenario())


def test_every_version_is_committed_as_devices_hold_it_and_again_the_same(tmp_path: Path) -> None:
    trained(tmp_path)
    store = Store(tmp_path / "models")
    newest = store.find("tiny")
    log = list(store.log([newest]))
    assert [entry.number for entry in log] == [3, 2, 1, 0]
    assert [entry.updates for entry in log] == [3, 3, 3, 0]
    assert [entry.parents for entry in log] == [(log[1].digest,), (log[2].digest,), (log[3].digest,), ()]
    assert care.verify(store, newest) == []

    ledger, blobs = Ledger.open(tmp_path), Repository(tmp_path)
    try:
        rows = ledger.versions.all("tiny")
        for row in rows:
            commit = store.read(store.find(f"tiny:{row.number}")).commit
            for variant in commit.variants:
                weights = tensors.read(store, variant)
                assert variant.weights == digest(weights).hex()
        # An older release left no repository: it comes out the same, commit by commit.
        key = (tmp_path / "models" / "signing.key").read_bytes()
        shutil.rmtree(tmp_path / "models")
        again = Store(tmp_path / "models")
        (tmp_path / "models" / "signing.key").write_bytes(key)
        (tmp_path / "models" / "signing.key").chmod(0o600)
        made = Commits(store=again, ledger=ledger, repository=blobs, author="co1")
        assert made.publish_all() == 4
        assert made.publish_all() == 0
        assert [entry.digest for entry in again.log([again.find("tiny")])] == [entry.digest for entry in log]
    finally:
        ledger.close()


def test_an_operators_commit_on_latest_stays_and_the_training_goes_on_beside(tmp_path: Path) -> None:
    trained(tmp_path)
    store = Store(tmp_path / "models")
    second = store.read(store.find("tiny:2"))
    for name in ("latest",):
        store.remove_ref("tiny", name)
    structure = second.commit.variants[0].structure
    assert structure is not None
    ones = np.ones(structure.parameters, np.float32)
    own = tensors.variant_of(structure, ones)
    draft = Commit(model="tiny", kind="import", parents=(second.digest,), variants=(own,))
    mine = store.write(draft, {own.name: tensors.layers_for(store, structure, ones, None)})
    ledger = Ledger.open(tmp_path)
    try:
        commits = Commits(store=store, ledger=ledger, repository=Repository(tmp_path), author="co1")
        assert commits.publish_all() == 1  # version 3 has no name any more, and is made again
    finally:
        ledger.close()
    assert store.find("tiny") == mine.digest
    assert store.entry(store.find("tiny:training")).number == 3


def test_a_damaged_file_is_found_and_named(tmp_path: Path) -> None:
    trained(tmp_path)
    store = Store(tmp_path / "models")
    commit = store.read(store.find("tiny"))
    layer = store.layers(commit.commit.variants[0])[0]
    path = store.layout.path(layer.digest)
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestError, match=path.name):
        tensors.read(store, commit.commit.variants[0])
