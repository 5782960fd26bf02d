"""Uploads in chunks: bounded per device and together, and let go when nobody goes on."""

import hashlib

import pytest

from liberatai_coordinator.intake.uploads import IDLE_S, MAX_OPEN, Uploads
from liberatai_core.contract.messages import Credit, Offer
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import BusyError, QuotaError

PIECE = 1024


def offer(device: str, content: bytes) -> Offer:
    return Offer(
        device=device,
        transfer=blob_id(content),
        size_bytes=len(content),
        chunk_bytes=PIECE,
        sha256=hashlib.sha256(content).digest(),
        update_id=bytes(16),
        job="j",
        round=1,
    )


def content(number: int, pieces: int = 8) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (PIECE // 32) * pieces


def test_many_begun_uploads_are_bounded_together() -> None:
    uploads = Uploads(max_bytes=1 << 20, total_bytes=100 * PIECE)
    taken = 0
    for number in range(200):
        whole = content(number)
        try:
            uploads.offer(offer(f"d{number}", whole), 0.0)
        except BusyError:
            continue
        for part in range(4):
            uploads.chunk(f"d{number}", blob_id(whole), part, whole[part * PIECE : (part + 1) * PIECE], 0.0)
        taken += 1
    assert 0 < taken < 50
    arrived = sum(upload.size_bytes for upload in uploads.open.values())
    assert arrived <= 100 * PIECE


def test_what_nobody_goes_on_with_makes_room() -> None:
    uploads = Uploads(max_bytes=1 << 20, total_bytes=8 * PIECE)
    first, second = content(1), content(2)
    uploads.offer(offer("a", first), 0.0)
    uploads.chunk("a", blob_id(first), 0, first[:PIECE], 0.0)
    with pytest.raises(BusyError):
        uploads.offer(offer("b", second), IDLE_S)
    assert isinstance(uploads.offer(offer("b", second), IDLE_S + 1.0), Credit)
    assert [key[0] for key in uploads.open] == ["b"]


def test_offers_alone_take_no_place_for_ever() -> None:
    uploads = Uploads(max_bytes=1 << 20)
    for number in range(MAX_OPEN):
        uploads.offer(offer(f"d{number}", content(number, 1)), 0.0)
    with pytest.raises(BusyError):
        uploads.offer(offer("late", content(9999, 1)), 1.0)
    uploads.expire(IDLE_S + 1.0)
    assert not uploads.open
    uploads.offer(offer("late", content(9999, 1)), IDLE_S + 1.0)


def test_a_third_upload_of_a_device_displaces_its_oldest_and_too_large_ones_are_refused() -> None:
    uploads = Uploads(max_bytes=10 * PIECE)
    for number in range(3):
        uploads.offer(offer("a", content(number)), float(number))
    assert [key[1] for key in uploads.open] == [blob_id(content(1)), blob_id(content(2))]
    with pytest.raises(QuotaError):
        uploads.offer(offer("a", content(4, 11)), 4.0)


def test_a_chunk_that_comes_twice_counts_once() -> None:
    uploads = Uploads(max_bytes=1 << 20)
    whole = content(1, 2)
    uploads.offer(offer("a", whole), 0.0)
    uploads.chunk("a", blob_id(whole), 0, whole[:PIECE], 0.0)
    uploads.chunk("a", blob_id(whole), 0, whole[:PIECE], 0.0)
    (upload,) = uploads.open.values()
    assert upload.size_bytes == PIECE
    assert uploads.chunk("a", blob_id(whole), 1, whole[PIECE:], 0.0) == whole
    assert not uploads.open
