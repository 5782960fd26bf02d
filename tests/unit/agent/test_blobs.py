"""Blobs on disk: only right content gets its name, unfinished ones are resumed."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from liberatai_agent.store.blobs import BlobStore
from liberatai_core.contract.frame import decode_spec
from liberatai_core.contract.messages import BlobRef, Step, TaskSpec
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import DigestError, DiskError, NotFoundError, SchemaError
from liberatai_core.structure import DataContract, Structure, Tensor

CONTENT = bytes(range(256)) * 40
REF = BlobRef(blob=blob_id(CONTENT), size_bytes=len(CONTENT))
CHUNK = 1024


def part(number: int) -> bytes:
    return CONTENT[number * CHUNK : (number + 1) * CHUNK]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_content_gets_its_name_only_if_it_is_right(store: BlobStore) -> None:
    with pytest.raises(DigestError):
        store.put(REF, CONTENT[:-1])
    with pytest.raises(DigestError):
        store.put(REF, CONTENT[:-1] + b"x")
    assert not store.has(REF)
    store.put(REF, CONTENT)
    assert store.has(REF)
    assert store.path(REF.blob).read_bytes() == CONTENT


def test_a_blob_cut_short_on_disk_is_not_there(store: BlobStore) -> None:
    store.put(REF, CONTENT)
    store.path(REF.blob).write_bytes(CONTENT[:100])
    assert not store.has(REF)


def test_chunks_in_any_order_some_twice_give_the_content(store: BlobStore) -> None:
    partial = store.partial(REF, CHUNK)
    for number in (9, 3, 3, 0, 1, 2, 4, 5, 6, 7, 8):
        partial.add(number, part(number))
    assert partial.missing() == []
    partial.finish()
    assert store.path(REF.blob).read_bytes() == CONTENT


def test_synced_chunks_survive_and_others_are_asked_for_again(store: BlobStore) -> None:
    partial = store.partial(REF, CHUNK)
    for number in range(9):
        partial.add(number, part(number))
    again = store.partial(REF, CHUNK)
    assert again.missing() == [8, 9], "eight chunks are one sync"
    for number in again.missing():
        again.add(number, part(number))
    again.finish()
    assert store.has(REF)


def test_another_cut_of_the_same_blob_starts_over(store: BlobStore) -> None:
    partial = store.partial(REF, CHUNK)
    for number in range(8):
        partial.add(number, part(number))
    assert len(store.partial(REF, 2 * CHUNK).missing()) == 5


@pytest.mark.parametrize("damage", [b"", b"\xff" * 3, b"\0" * 400])
def test_a_damaged_bitmap_starts_over_or_is_caught_by_the_digest(store: BlobStore, damage: bytes) -> None:
    partial = store.partial(REF, CHUNK)
    for number in range(8):
        partial.add(number, part(number))
    store.path(REF.blob + ".map").write_bytes(damage)
    assert len(store.partial(REF, CHUNK).missing()) == 10


def test_a_wrong_chunk_drops_everything_that_was_joined(store: BlobStore) -> None:
    partial = store.partial(REF, CHUNK)
    for number in range(10):
        partial.add(number, part(number) if number != 4 else bytes(CHUNK))
    with pytest.raises(DigestError):
        partial.finish()
    assert len(partial.missing()) == 10
    assert not store.has(REF)


@pytest.mark.parametrize("length", [0, CHUNK - 1, CHUNK + 1])
def test_a_chunk_of_another_length_is_refused(store: BlobStore, length: int) -> None:
    with pytest.raises(SchemaError):
        store.partial(REF, CHUNK).add(0, bytes(length))


def test_only_what_is_wanted_is_kept(store: BlobStore) -> None:
    other = BlobRef(blob=blob_id(b"other"), size_bytes=5)
    store.put(REF, CONTENT)
    store.put(other, b"other")
    store.partial(BlobRef(blob=blob_id(b"third"), size_bytes=2000), CHUNK).add(0, bytes(CHUNK))
    store.keep_only({other.blob})
    assert store.has(other)
    assert [path.name for path in store.path("x").parent.iterdir()] == [other.blob]


def test_a_disk_that_refuses_is_a_disk_error(store: BlobStore) -> None:
    store.path("x").parent.rmdir()
    with pytest.raises(DiskError):
        store.put(REF, CONTENT)
    with pytest.raises(DiskError):
        store.partial(REF, CHUNK).add(0, part(0))


def a_path(store: BlobStore, *contents: bytes) -> tuple[Step, ...]:
    steps = []
    for number, content in enumerate(contents):
        ref = BlobRef(blob=blob_id(content), size_bytes=len(content))
        store.put(ref, content)
        steps.append(Step(version=number, blob=ref, digest=bytes([number]) * 16))
    return tuple(steps)


def test_the_path_is_there_after_a_restart_up_to_the_first_file_that_is_not(store: BlobStore) -> None:
    assert store.recall_path() == ()
    path = a_path(store, b"one", b"two", b"three")
    store.remember_path(path)
    again = BlobStore(store.path("x").parent)
    assert again.recall_path() == path
    store.keep_only({path[0].blob.blob, path[2].blob.blob})
    assert again.recall_path() == path[:1]
    store.remember_path(())
    assert again.recall_path() == ()


def test_what_the_weights_are_of_stands_beside_the_path(store: BlobStore) -> None:
    structure = Structure("mlp", {"hidden": 1}, (Tensor("w", (4,)),))
    spec = TaskSpec(job="digits", structure=structure, data=DataContract((4,), 2))
    note = store.path("x").parent.parent / "model.spec"
    store.remember_path((), spec)
    assert decode_spec(note.read_bytes()) == spec
    store.remember_path(())
    assert note.exists()
    other = replace(spec, job="other")
    store.remember_path((), other)
    assert decode_spec(note.read_bytes()) == other


@pytest.mark.parametrize("damage", [b"", b"\xff", b"\x91\x91", b"\xdd\xff\xff\xff\xff"])
def test_a_damaged_note_of_the_path_is_none(store: BlobStore, damage: bytes) -> None:
    store.remember_path(a_path(store, b"one"))
    (note,) = store.path("x").parent.parent.glob("path*")
    note.write_bytes(damage)
    assert store.recall_path() == ()


def test_a_small_blob_is_read_whole_and_right_or_not_at_all(store: BlobStore) -> None:
    store.put(REF, CONTENT)
    assert store.read(REF.blob, len(CONTENT)) == CONTENT
    with pytest.raises(NotFoundError):
        store.read(REF.blob, len(CONTENT) - 1)
    store.path(REF.blob).write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(DigestError):
        store.read(REF.blob, len(CONTENT))
    assert not store.has(REF), "a damaged file stays in the way of a good one"
    with pytest.raises(NotFoundError):
        store.read(REF.blob, len(CONTENT))
