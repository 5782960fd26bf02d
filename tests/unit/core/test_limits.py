"""The limits fit together: what one of them allows, no other one forbids."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.golden import make

from liberatai_core.contract import limits
from liberatai_core.contract import messages as m
from liberatai_core.contract.chunks import count
from liberatai_core.contract.frame import HEADER_BYTES, open_frame, seal
from liberatai_core.contract.topics import Topics

WIDE = "\U0001f642"
"""A character of four bytes: bounds of text count characters, packets count bytes."""


def _longest() -> Iterator[Any]:
    text = WIDE * limits.MAX_TEXT
    device, blob = "d" * 32, "a" * 26
    big = 2**53
    yield m.State(device=device, state="draining", session=big, version=text)
    yield m.Report(
        device=device, session=big, phase="fetching", job=WIDE * 64, round=limits.MAX_ROUND, reason=text
    )
    yield m.Event(device=device, session=big, number=big, name=WIDE * 64, code=WIDE * 32, text=text)
    yield m.Receipt(device=device, update_id=bytes(16), accepted=False, code=WIDE * 32, text=text, retry=True)
    yield m.Credit(
        device=device, transfer=blob, have=bytes(limits.MAX_CHUNKS // 8), chunks=limits.WINDOW_CHUNKS
    )
    presence = m.CoordinatorState(coordinator=device, state="offline", epoch=big)
    yield presence
    yield m.EpochSeen(device=device, session=big, word=seal(presence, make.SIGNER))
    yield m.EpochSeen(device=device, session=big, word=bytes(limits.MAX_WORD_BYTES))
    yield m.SessionSeen(device=device, session=limits.MAX_SESSION)
    yield m.Capability(
        device=device,
        public_key=make.SIGNER.public_key,
        session=big,
        agent_version=text,
        tier="observe",
        profile=WIDE * 64,
        arch=WIDE * 32,
        families=(WIDE * 32,) * 64,
        runtimes=(WIDE * 32,) * 8,
        codecs=(WIDE * 32,) * 16,
    )
    yield m.BlobManifest(
        blob=blob,
        size_bytes=limits.MAX_OBJECT_BYTES,
        chunk_bytes=2 * limits.CHUNK_BYTES,
    )
    steps = [msgspec.structs.replace(make.DELTA, version=n) for n in range(limits.MAX_CHAIN)]
    yield msgspec.structs.replace(make.FULL[m.Task], steps=tuple(steps))
    yield msgspec.structs.replace(make.FULL[m.Cancel], final=tuple(steps))
    yield msgspec.structs.replace(
        make.MINIMAL[m.Update],
        body=bytes(limits.MAX_OBJECT_BYTES - 1_000_000),
        class_counts=(limits.MAX_SAMPLES,) * 10_000,
    )


@pytest.mark.parametrize("message", list(_longest()), ids=lambda message: type(message).__name__)
def test_the_longest_message_that_its_fields_allow_fits_its_kind(message: Any) -> None:
    frame = seal(message, make.SIGNER)
    assert open_frame(frame, make.FLEET, lambda _: make.SIGNER.public_key).message == message


@pytest.mark.parametrize("kind", [k for k in m.KIND_OF if k is not m.Update], ids=lambda kind: kind.__name__)
def test_every_message_but_an_update_fits_into_one_packet(kind: Any) -> None:
    assert m.MAX_BYTES[kind] + HEADER_BYTES + 256 + 16 <= limits.MAX_PACKET_BYTES


def test_every_presence_of_a_coordinator_fits_where_a_device_shows_it() -> None:
    assert HEADER_BYTES + m.MAX_BYTES[m.CoordinatorState] <= limits.MAX_WORD_BYTES


def test_a_single_update_and_the_largest_chunk_fit_into_one_packet() -> None:
    topic = Topics(fleet="f" * 32).upload("d" * 32, "a" * 26, limits.MAX_CHUNKS - 1)
    assert 2 * limits.CHUNK_BYTES + len(topic) + 16 <= limits.MAX_PACKET_BYTES
    assert limits.MAX_SINGLE_BYTES + len(topic) + 16 <= limits.MAX_PACKET_BYTES


def test_the_largest_object_can_be_cut_into_usual_chunks_and_its_bitmap_fits_a_credit() -> None:
    assert count(limits.MAX_OBJECT_BYTES, limits.CHUNK_BYTES) <= limits.MAX_CHUNKS
    assert limits.MAX_CHUNKS % 8 == 0


def test_the_longest_update_travels_with_its_header_as_one_object() -> None:
    """What is cut into chunks is a whole frame: whatever can be sealed must be possible to offer."""
    assert m.MAX_BYTES[m.Update] + HEADER_BYTES <= limits.MAX_OBJECT_BYTES


def test_the_version_in_topics_and_magic_is_the_protocol_version() -> None:
    frame = seal(make.MINIMAL[m.State], make.SIGNER)
    assert frame[:3] == f"LA{limits.PROTOCOL_VERSION}".encode()
    assert Topics(fleet="f").head("j").split("/")[1] == f"v{limits.PROTOCOL_VERSION}"
