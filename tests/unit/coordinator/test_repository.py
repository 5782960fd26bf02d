"""A blob is complete or absent; a version's id depends on its content only."""

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from liberatai_coordinator.store.manifests import (
    Ensemble,
    Manifest,
    MemberRecord,
    StepRecord,
    decode_manifest,
    encode_manifest,
    version_id,
)
from liberatai_coordinator.store.repository import Repository
from liberatai_core.errors import DigestError, DiskError, NotFoundError, SchemaError
from liberatai_core.structure import DataContract, Structure, Tensor


def sha_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Content:
    """What a small version consists of."""

    manifest: Manifest
    blobs: list[bytes]


def a_version(parent: str | None = None, scale: float = 1.0) -> Content:
    members, blobs = {}, []
    for width in (8, 4):
        structure = Structure(
            family="mlp", params={"hidden": width}, tensors=(Tensor(name="w", shape=(width, 2)),)
        )
        master = (np.arange(2 * width, dtype="<f4") * scale).tobytes()
        view = (np.arange(2 * width, dtype="<f4") * scale + 1).tobytes()
        keyframe, delta = b"keyframe %d" % width, b"delta %d" % width
        blobs += [master, view, keyframe, delta]
        members[structure.id] = MemberRecord(
            structure=structure,
            master=sha_of(master),
            view=sha_of(view),
            digest=sha_of(view),
            keyframe=StepRecord(version=0, blob=sha_of(keyframe), size=len(keyframe), digest="0" * 64),
            deltas=(StepRecord(version=1, blob=sha_of(delta), size=len(delta), digest=sha_of(view)),),
            class_counts=(3, 4),
        )
    manifest = Manifest(
        model="digits",
        number=1,
        parent=parent,
        round=1,
        structures=members,
        data=DataContract(input_shape=(1, 2), classes=2),
        updates=("00" * 16, "ff" * 16),
        ensemble=Ensemble(
            method="uniform", members=("mlp-hidden4", "mlp-hidden8"), weights=((0.5, 0.5), (0.5, 0.5))
        ),
    )
    return Content(manifest, blobs)


# --- blobs ---------------------------------------------------------------------------------------


def test_a_blob_comes_back_and_is_stored_once(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    sha = repository.put(b"weights")
    assert sha == sha_of(b"weights")
    assert repository.put(b"weights") == sha
    assert Repository(tmp_path).get(sha) == b"weights"
    assert repository.has(sha)
    assert repository.path(sha) == tmp_path / "blobs" / "sha256" / sha
    assert [path.name for path in (tmp_path / "blobs" / "sha256").iterdir()] == [sha]


def test_an_absent_blob_and_a_name_that_is_none_are_not_found(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    assert not repository.has("0" * 64)
    for name in ("0" * 64, "../../../etc/passwd", "", "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(NotFoundError):
            repository.get(name)


def test_a_damaged_blob_is_refused_with_its_file_and_repaired_by_storing_it_again(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    sha = repository.put(b"weights")
    repository.path(sha).write_bytes(b"weightz")
    with pytest.raises(DigestError, match=str(repository.path(sha))):
        repository.get(sha)
    repository.put(b"weights")
    assert repository.get(sha) == b"weights"


def test_the_file_and_then_the_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository(tmp_path)
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")  # noqa: PTH112
        real_fsync(handle)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    repository.put(b"weights")
    assert steps == ["sync file", "rename", "sync folder"]
    steps.clear()
    repository.put_all([b"master", b"weights", b"view", b"master"])
    assert steps == ["sync file"] * 2 + ["rename"] * 2 + ["sync folder"]


def test_blobs_that_are_stored_together_are_all_there_or_none_of_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository(tmp_path)
    before = repository.put(b"before")
    real, calls = os.fsync, iter(range(10))

    def refuse(handle: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "no space left")
        real(handle)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(DiskError):
            repository.put_all([b"before", b"one", b"two"])
    assert [path.name for path in (tmp_path / "blobs" / "sha256").iterdir()] == [before]
    shas = repository.put_all([b"one", b"two"])
    assert [repository.get(sha) for sha in shas] == [b"one", b"two"]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_leaves_nothing_behind_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    repository = Repository(tmp_path)

    def refuse(_handle: int) -> None:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(DiskError, match=os.strerror(fault)):
            repository.put(b"weights")
    assert list((tmp_path / "blobs" / "sha256").iterdir()) == []
    assert repository.get(repository.put(b"weights")) == b"weights"


def test_what_a_crash_left_half_written_is_removed_at_the_next_start(tmp_path: Path) -> None:
    sha = Repository(tmp_path).put(b"weights")
    half = tmp_path / "blobs" / "sha256" / f"{'0' * 64}.abc.tmp"
    half.write_bytes(b"hal")
    repository = Repository(tmp_path)
    assert not half.exists()
    assert repository.get(sha) == b"weights"


def test_collecting_removes_what_is_not_kept(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    keep, drop = repository.put(b"keep"), repository.put(b"drop it")
    assert repository.collect({keep}) == len(b"drop it")
    assert repository.has(keep)
    assert not repository.has(drop)


# --- versions ------------------------------------------------------------------------------------


def test_a_manifest_comes_back_and_has_one_encoding(tmp_path: Path) -> None:
    manifest = a_version("a" * 64).manifest
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded) == manifest
    turned = msgspec.structs.replace(manifest, structures=dict(reversed(manifest.structures.items())))
    assert encode_manifest(turned) == encoded
    assert version_id(manifest) == sha_of(encoded)


def test_the_id_depends_on_content_only() -> None:
    assert version_id(a_version().manifest) == version_id(a_version().manifest)
    assert version_id(a_version().manifest) != version_id(a_version(scale=2).manifest)
    assert version_id(a_version().manifest) != version_id(a_version("a" * 64).manifest)


def test_a_committed_version_is_complete_and_verifies(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    version = a_version()
    name, encoded = repository.commit(version.manifest, version.blobs)
    assert name == version_id(version.manifest)
    assert repository.get(name) == encoded
    repository.verify(version.manifest)
    assert len(version.manifest.blobs) == len(version.blobs) == 8


def test_a_version_with_a_missing_blob_is_not_committed(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    version = a_version()
    for left_out in range(len(version.blobs)):
        given = version.blobs[:left_out] + version.blobs[left_out + 1 :]
        repository.collect(set())
        with pytest.raises(NotFoundError, match=sha_of(version.blobs[left_out])):
            repository.commit(version.manifest, given)
        assert not repository.has(version_id(version.manifest))


def test_a_version_with_a_wrong_size_is_not_committed(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    version = a_version()
    member = version.manifest.structures["mlp-hidden8"]
    wrong = msgspec.structs.replace(member, keyframe=msgspec.structs.replace(member.keyframe, size=5))
    manifest = msgspec.structs.replace(
        version.manifest, structures={**version.manifest.structures, "mlp-hidden8": wrong}
    )
    with pytest.raises(DigestError, match="not of the 5 bytes"):
        repository.commit(manifest, version.blobs)
    assert not repository.has(version_id(manifest))


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_blob_of_a_version_is_found(tmp_path: Path, number: int) -> None:
    repository = Repository(tmp_path)
    version = a_version()
    repository.commit(version.manifest, version.blobs)
    path = repository.path(sha_of(version.blobs[number]))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DigestError, match=path.name):
        repository.verify(version.manifest)


def test_bytes_that_are_no_manifest_are_refused() -> None:
    good = encode_manifest(a_version().manifest)
    raw = msgspec.msgpack.decode(good)
    for bad in (
        b"",
        good[:-1],
        good + b"\x00",
        msgspec.msgpack.encode({**raw, "created_s": 1.0}),
        msgspec.msgpack.encode({**raw, "model": "../x"}),
        msgspec.msgpack.encode({**raw, "number": -1}),
        msgspec.msgpack.encode({**raw, "structures": {}}),
        msgspec.msgpack.encode(
            {**raw, "structures": dict(zip("ab", raw["structures"].values(), strict=True))}
        ),
        msgspec.msgpack.encode({**raw, "updates": ["ff" * 16, "00" * 16]}),
        msgspec.msgpack.encode({**raw, "updates": ["ff" * 16, "ff" * 16]}),
        msgspec.msgpack.encode({**raw, "ensemble": {**raw["ensemble"], "weights": [[float("nan")]]}}),
        msgspec.msgpack.encode(dict(reversed(raw.items()))),
    ):
        with pytest.raises(SchemaError):
            decode_manifest(bad)
