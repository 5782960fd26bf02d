"""Chunks may come in any order, twice, or not at all; never too many, and never as something else."""

import hashlib
import tracemalloc
from typing import Any

import pytest

from liberatai_core.contract.chunks import Assembly, count, cut, missing
from liberatai_core.contract.limits import MAX_CHUNKS, MAX_OBJECT_BYTES
from liberatai_core.errors import DigestError, SchemaError, TooLargeError

CONTENT = bytes(range(256)) * 20  # 5120 bytes: five full chunks of 1000 and one of 120


def assembly(content: bytes = CONTENT, chunk_bytes: int = 1000) -> Any:
    return Assembly(len(content), chunk_bytes, hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    ("size", "chunk", "expected"),
    [(1, 1024, 1), (1024, 1024, 1), (1025, 1024, 2), (MAX_OBJECT_BYTES, 131_072, 512)],
)
def test_the_last_chunk_may_be_shorter(size: int, chunk: int, expected: Any) -> None:
    assert count(size, chunk) == expected


@pytest.mark.parametrize("size", [0, -1, MAX_OBJECT_BYTES + 1, 2**63])
def test_empty_negative_and_too_large_objects_are_refused(size: int) -> None:
    for use in (lambda: count(size, 131_072), lambda: Assembly(size, 131_072, bytes(32))):
        with pytest.raises(TooLargeError):
            use()


def test_more_chunks_than_the_limit_are_refused() -> None:
    assert count(MAX_CHUNKS * 1024, 1024) == MAX_CHUNKS
    with pytest.raises(TooLargeError, match="4097 chunks"):
        count(MAX_CHUNKS * 1024 + 1, 1024)


@pytest.mark.parametrize("chunk", [0, -1, -131_072])
def test_chunks_without_content_are_refused(chunk: int) -> None:
    with pytest.raises(SchemaError):
        count(1000, chunk)


@pytest.mark.parametrize("number", [-1, 6, 2**32])
def test_a_chunk_that_does_not_exist_can_be_neither_cut_nor_added(number: int) -> None:
    with pytest.raises(SchemaError):
        cut(CONTENT, number, 1000)
    with pytest.raises(SchemaError):
        assembly().add(number, bytes(1000))


def test_reordered_and_doubled_chunks_join_to_the_content() -> None:
    a = assembly()
    assert [a.add(n, cut(CONTENT, n, 1000)) for n in (5, 3, 3, 0, 4, 1, 5, 2)] == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
        True,
    ]
    assert a.complete
    assert a.join() == CONTENT


def test_a_missing_chunk_is_named_and_nothing_is_joined() -> None:
    a = assembly()
    for number in (0, 2, 5):
        a.add(number, cut(CONTENT, number, 1000))
    assert not a.complete
    assert missing(a.bitmap(), a.chunks) == [1, 3, 4]
    with pytest.raises(SchemaError, match="3 of 6 chunks are missing"):
        a.join()


@pytest.mark.parametrize(("number", "length"), [(0, 0), (0, 999), (0, 1001), (5, 119), (5, 121), (5, 1000)])
def test_a_chunk_of_the_wrong_length_is_refused_before_it_is_kept(number: int, length: int) -> None:
    a = assembly()
    with pytest.raises(SchemaError, match="wanted"):
        a.add(number, bytes(length))
    assert a.parts == {}


def test_a_chunk_of_another_object_is_found_out_and_everything_is_fetched_again() -> None:
    a = assembly()
    for number in range(6):
        a.add(number, cut(CONTENT[::-1] if number == 2 else CONTENT, number, 1000))
    with pytest.raises(DigestError):
        a.join()
    assert missing(a.bitmap(), a.chunks) == list(range(6))
    for number in range(6):
        a.add(number, cut(CONTENT, number, 1000))
    assert a.join() == CONTENT


def test_the_first_of_two_different_chunks_of_one_number_stays() -> None:
    a = assembly()
    a.add(0, bytes(1000))
    assert not a.add(0, cut(CONTENT, 0, 1000))
    assert a.parts[0] == bytes(1000)


def test_an_offer_of_64_mib_costs_no_memory_until_its_chunks_come() -> None:
    tracemalloc.start()
    a = Assembly(MAX_OBJECT_BYTES, 131_072, bytes(32))
    a.add(511, bytes(131_072))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_bit_zero_of_the_first_byte_is_chunk_zero() -> None:
    a = assembly(bytes(10_000))
    for number in (0, 9):
        a.add(number, bytes(1000))
    assert a.bitmap() == bytes([0b00000001, 0b00000010])


@pytest.mark.parametrize(
    ("bitmap", "chunks", "expected"),
    [
        (b"", 3, [0, 1, 2]),
        (b"\xff", 3, []),
        (b"\xff" * 512, 3, []),
        (b"\x05", 3, [1]),
        (b"\x00\xff", 10, list(range(8))),
        (b"\xff", 0, []),
    ],
    ids=["none", "all", "too long", "middle", "first byte", "no chunks"],
)
def test_a_bitmap_of_any_length_names_what_is_missing(bitmap: bytes, chunks: int, expected: Any) -> None:
    assert missing(bitmap, chunks) == expected
