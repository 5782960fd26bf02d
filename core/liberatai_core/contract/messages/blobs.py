"""Content-addressed blobs: how they are named, cut, and lead to the weights of a version."""

from typing import Annotated, Literal

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import BlobId, Counter, Message, Name, Version, WeightsName
from liberatai_core.structure import MAX_ID


def weights_name(digest: bytes) -> bytes:
    """Return what names weights on the wire: the first 16 bytes of their SHA-256 (see DIGEST_BYTES)."""
    return digest[: limits.DIGEST_BYTES]


class BlobRef(Message, frozen=True, kw_only=True, array_like=True):
    """A content-addressed blob: its id is derived from the SHA-256 that it must have."""

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]


class Step(Message, frozen=True, kw_only=True, array_like=True):
    """One link of a path: applying `blob` gives the weights that `digest` names (16 bytes of SHA-256)."""

    version: Version
    blob: BlobRef
    digest: WeightsName


class BlobManifest(Message, frozen=True, kw_only=True, array_like=True):
    """Retained manifest of a blob that comes in several chunks; a smaller blob is its own chunk 0.

    The content's SHA-256 gives `blob`, so nothing here needs to be believed but the cut.
    """

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=2 * limits.CHUNK_BYTES)] = limits.CHUNK_BYTES


HeadState = Literal["running", "paused", "finished", "aborted"]


class Head(Message, frozen=True, kw_only=True):
    """Retained: newest version of a job, per structure, for whoever wants to follow it.

    Attributes:
        chains: per structure a keyframe and what leads from there to the newest version: usually one delta.
    """

    job: Name
    epoch: Counter
    version: Version
    state: HeadState
    chains: Annotated[
        dict[
            Annotated[str, Meta(max_length=MAX_ID)],
            Annotated[tuple[Step, ...], Meta(max_length=limits.MAX_CHAIN)],
        ],
        Meta(max_length=64),
    ]
