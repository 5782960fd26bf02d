"""Old versions lose their files, and nothing that anybody needs goes with them."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from liberatai_coordinator.config import Keep
from liberatai_coordinator.models.retention import collect, superseded, sweep
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import (
    Manifest,
    MemberRecord,
    StepRecord,
    VariantManifest,
    decode_manifest,
    encode_manifest,
)
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import VariantRow, VersionRow
from liberatai_core.errors import NotFoundError
from liberatai_core.structure import DataContract, Structure, Tensor


class House:
    """A ledger and a repository with versions in them."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger.open(folder, reserve_bytes=0)
        self.repository = Repository(folder)
        self.parent: str | None = None
        self.variant = ""

    def add(self, number: int, model: str = "digits") -> Manifest:
        structure = Structure(family="mlp", params={"hidden": 2}, tensors=(Tensor(name="w", shape=(2, 2)),))
        names = [
            self.repository.put(f"{kind} {model} {number}".encode()) for kind in ("master", "view", "file")
        ]
        member = MemberRecord(
            structure=structure,
            master=names[0],
            view=names[1],
            digest=names[1],
            keyframe=StepRecord(version=number, blob=names[2], size=1, digest=names[1]),
        )
        manifest = Manifest(
            model=model,
            number=number,
            parent=self.parent,
            round=number,
            structures={structure.id: member},
            data=DataContract(input_shape=(1, 2), classes=2),
        )
        encoded = encode_manifest(manifest)
        sha = self.repository.put(encoded)
        row = VersionRow(
            model=model, number=number, id=sha, parent=self.parent, manifest=encoded, created_s=1.0
        )
        self.ledger.versions.add(row)
        self.parent = sha
        return manifest

    def add_variant(self, number: int) -> None:
        row = self.ledger.versions.get("digits", number)
        (member,) = decode_manifest(row.manifest).structures.values()
        manifest = VariantManifest(
            model="digits",
            parent=row.id,
            parent_structure=member.structure.id,
            structure=member.structure,
            data=DataContract(input_shape=(1, 2), classes=2),
            file=hashlib.sha256(b"variant").hexdigest(),
            size=len(b"variant"),
            digest=member.digest,
            budget_bytes=100,
            method="grid",
        )
        self.variant, encoded = self.repository.commit_variant(manifest, b"variant")
        self.ledger.versions.add_variant(
            VariantRow(
                model="digits",
                number=number,
                id=self.variant,
                structure=member.structure.id,
                size_bytes=manifest.size,
                manifest=encoded,
                created_s=1.0,
            )
        )

    def has(self, number: int) -> bool:
        row = self.ledger.versions.get("digits", number)
        there = [self.repository.has(sha) for sha in decode_manifest(row.manifest).blobs | {row.id}]
        assert all(there) or not any(there)
        assert all(there) != row.collected
        return all(there)


@contextmanager
def house(folder: Path, versions: int) -> Iterator[House]:
    made = House(folder)
    for number in range(versions):
        made.add(number)
    yield made
    made.ledger.close()


def test_old_versions_lose_their_files_and_nothing_else_does(tmp_path: Path) -> None:
    with house(tmp_path, 40) as made:
        made.ledger.versions.set_tag("digits", "stable", 3)
        made.add_variant(4)
        gone = collect(made.ledger, made.repository, "digits", Keep(newest=10, every=8), {5, 7})
        assert {3, 4, 0, 5, 7, 8, 16, 24}.isdisjoint(gone)
        kept = {0, 3, 4, 5, 7, 8, 16, 24, *range(30, 40)}
        assert {number for number in range(40) if made.has(number)} == kept
        assert len(made.ledger.versions.all("digits")) == 40
        assert made.repository.has(made.variant)


def test_few_versions_are_not_worth_the_work(tmp_path: Path) -> None:
    with house(tmp_path, 12) as made:
        assert collect(made.ledger, made.repository, "digits", Keep(newest=3, every=0), set()) == []
        assert collect(made.ledger, made.repository, "nothing", Keep(), set()) == []
        assert all(made.has(number) for number in range(12))


def test_a_version_without_files_takes_no_tag_and_no_variant(tmp_path: Path) -> None:
    with house(tmp_path, 30) as made:
        collect(made.ledger, made.repository, "digits", Keep(newest=5, every=0), set())
        assert not made.has(7)
        with pytest.raises(NotFoundError, match="version 7: its files were removed"):
            made.ledger.versions.set_tag("digits", "stable", 7)


def test_a_tag_that_comes_between_the_choice_and_the_removal_keeps_its_version(tmp_path: Path) -> None:
    with house(tmp_path, 3) as made:
        made.ledger.versions.set_tag("digits", "stable", 1)
        made.ledger.versions.set_collected("digits", [1, 2])
        assert [row.collected for row in made.ledger.versions.all("digits")] == [False, False, True]


def test_what_a_crash_left_goes_with_the_next_sweep(tmp_path: Path) -> None:
    with house(tmp_path, 3) as made:
        left = made.repository.put(b"of nobody")
        made.ledger.versions.set_collected("digits", [1])  # and killed
        assert sweep(made.ledger, made.repository) > len(b"of nobody")
        assert not made.repository.has(left)
        assert [made.has(number) for number in range(3)] == [True, False, True]


@pytest.mark.parametrize("commits", ["before the ledger is read", "after it"])
def test_a_version_that_is_committed_meanwhile_keeps_its_files(tmp_path: Path, commits: str) -> None:
    with house(tmp_path, 3) as made:
        put, go = threading.Event(), threading.Event()

        def commit() -> None:
            with made.repository.holding():
                content = made.repository.put(b"master digits 3")
                put.set()
                go.wait(60)
                assert made.repository.has(content)
                made.add(3)

        thread = threading.Thread(target=commit)
        thread.start()
        put.wait(60)
        needed = made.ledger.versions.needed_blobs

        def read() -> set[str]:
            before = needed()
            if commits == "before the ledger is read":
                go.set()
                thread.join(60)
            return before

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made.ledger.versions, "needed_blobs", read)
            sweep(made.ledger, made.repository)
        go.set()
        thread.join(60)
        assert made.has(3)


def test_what_is_superseded_is_decided_by_numbers_alone() -> None:
    assert superseded(range(1, 30), 29, Keep(newest=20, every=4), {3}) == [1, 2, 5, 6, 7, 9]
    assert superseded(range(1, 30), 29, Keep(newest=29, every=0), set()) == []
