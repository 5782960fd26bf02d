"""What a device trained, on its way to the coordinator, and the word that ends it."""

from typing import Annotated

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import (
    BlobId,
    Counter,
    DeviceId,
    Digest,
    Message,
    Name,
    Round,
    Seconds,
    Text,
    UpdateId,
    WeightsName,
)


class Update(Message, frozen=True, kw_only=True, array_like=True):
    """A sparse, quantised difference against an exactly named base version.

    Attributes:
        update_id: `update_id(device, job, round, base, run)`: the same work has one id, sent ever so often.
        base: name of the decoded weights that training started from.
        samples: local samples used (self-reported; the coordinator caps it).
        class_counts: samples per class, only if the job asks for it; sums, never per record.
        evaluation: (correct, total) of the base model on the local hold-out; sums only.
        codec: the sparse method that wrote `body`, as the task named it.
        train_seconds: what the device spent on the task: from asking its trainer to the trainer's answer.
        sent_bytes, received_bytes: socket counters of the device so far.
    """

    update_id: UpdateId
    device: DeviceId
    job: Name
    round: Round
    epoch: Counter
    structure: Annotated[str, Meta(max_length=128)]
    base: WeightsName
    samples: Annotated[int, Meta(ge=1, le=limits.MAX_SAMPLES)]
    codec: Annotated[str, Meta(max_length=32)]
    body: Annotated[bytes, Meta(max_length=limits.MAX_OBJECT_BYTES)]
    class_counts: (
        Annotated[
            tuple[Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)], ...], Meta(max_length=limits.MAX_CLASSES)
        ]
        | None
    ) = None
    evaluation: (
        tuple[
            Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)],
            Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)],
        ]
        | None
    ) = None
    train_seconds: Seconds = 0.0
    loss: float | None = None
    sent_bytes: Counter = 0
    received_bytes: Counter = 0


class Offer(Message, frozen=True, kw_only=True, array_like=True):
    """Manifest of an upload that is too long for one message: sent before any byte moves.

    The chunks, joined, are one signed frame of their own (an Update). `transfer` is its blob id.
    """

    device: DeviceId
    transfer: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=2 * limits.CHUNK_BYTES)]
    sha256: Digest
    update_id: UpdateId
    job: Name
    round: Round


class Credit(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to an Offer: what is there already, and how much may come."""

    device: DeviceId
    transfer: BlobId
    have: Annotated[bytes, Meta(max_length=limits.MAX_CHUNKS // 8)]
    chunks: Annotated[int, Meta(ge=0, le=limits.WINDOW_CHUNKS)]


class Receipt(Message, frozen=True, kw_only=True, array_like=True):
    """The coordinator's signed word about an update: only now the device may forget it.

    Attributes:
        accepted: stored durably (now, or earlier: code "E_DUP").
        code: "" or the reason of the refusal, or "E_DUP".
        retry: the device should keep the update and try again later (E_BUSY, E_DISK).
    """

    device: DeviceId
    update_id: UpdateId
    accepted: bool
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    retry: bool = False
