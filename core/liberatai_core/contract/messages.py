"""Every message: frozen, typed, closed, bounded. One Struct per kind; the frame's kind byte names it.

The body on the wire is one msgpack map. Fields that crossed a trust boundary carry their bounds here,
so a decoder refuses them before anything is allocated for them.
"""

import hashlib
import math
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.topics import BLOB, FLEET_OR_DEVICE, NAME
from liberatai_core.errors import NonFiniteError
from liberatai_core.structure import MAX_ID, DataContract, Structure

DeviceId = Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
Name = Annotated[str, Meta(pattern=NAME)]
BlobId = Annotated[str, Meta(pattern=BLOB)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
UpdateId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Round = Annotated[int, Meta(ge=1, le=limits.MAX_ROUND)]
Version = Annotated[int, Meta(ge=0, le=limits.MAX_ROUND)]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=limits.MAX_SECONDS)]
Text = Annotated[str, Meta(max_length=limits.MAX_TEXT)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Presence = Literal["online", "offline", "lost"]
HeadState = Literal["running", "paused", "finished", "aborted"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all messages: closed (unknown keys are refused), frozen, and without NaN or infinity.

    A field that has its default value is never written: a field that a later release adds disturbs an
    older reader only where somebody uses it.
    """

    def __post_init__(self) -> None:
        """Refuse numbers that no comparison bounds (NaN passes every `ge` and `le`).

        Values equal to their default become the default itself: the encoder leaves out what *is* the
        default, not what equals it, and a message must have one encoding only.
        """
        names = self.__struct_fields__
        for name, default in zip(reversed(names), reversed(self.__struct_defaults__), strict=False):
            value = getattr(self, name)
            if value is not default and type(value) is type(default) and value == default:
                msgspec.structs.force_setattr(self, name, default)
        for name in names:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"{name}: must be finite")


# --- device to coordinator ---------------------------------------------------------------------


def update_id(device: str, job: str, number: int, base: bytes) -> bytes:
    """Return the 16 bytes that name a device's work in a round: repeated work has the same name."""
    return hashlib.sha256(f"{device}|{job}|{number}|".encode() + base).digest()[:16]


class State(Message, frozen=True, kw_only=True):
    """Retained birth, goodbye and last will of an agent.

    Attributes:
        session: grows with every connection and survives reboots; an older one is ignored.
    """

    device: DeviceId
    state: Literal["online", "draining", "offline", "lost"]
    session: Counter
    version: Text = ""


class Capability(Message, frozen=True, kw_only=True):
    """What one device measured about itself (retained). None: could not be measured.

    Attributes:
        public_key: Ed25519 key that signs this and all further messages of the device.
        tier: "full" trains everything, "head" trains a head on a frozen backbone, "observe" only infers.
        profile: name of the hardware class that the operator set, "" if none.
        storage_bytes: what the model's files (keyframe and deltas) may take on disk.
        memory_bytes: what training may take.
        cpu_share: processors' worth of time that training may use.
        gflops: measured float32 matrix product, one thread.
        up_bits_s, down_bits_s: link, measured or from the profile.
        samples: number of local samples.
    """

    device: DeviceId
    public_key: Key
    session: Counter
    agent_version: Text
    tier: Literal["full", "head", "observe"]
    profile: Annotated[str, Meta(max_length=64)] = ""
    arch: Annotated[str, Meta(max_length=32)] = ""
    cores: Annotated[int, Meta(ge=1, le=4096)] = 1
    cpu_share: Annotated[float, Meta(gt=0, le=4096)] = 1.0
    memory_bytes: Counter = 0
    storage_bytes: Counter = 0
    disk_free_bytes: Counter = 0
    gflops: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    up_bits_s: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    down_bits_s: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    metered: bool = False
    samples: Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)] = 0
    data: DataContract | None = None
    families: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=64)] = ()
    runtimes: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=8)] = ()
    codecs: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=16)] = ()


class Report(Message, frozen=True, kw_only=True):
    """Retained: what the device is doing. `phase` says where it stands with `task`."""

    device: DeviceId
    session: Counter
    phase: Literal["idle", "gated", "fetching", "training", "sending", "failed"]
    job: Annotated[str, Meta(max_length=64)] = ""
    round: Version = 0
    reason: Text = ""


class Telemetry(Message, frozen=True, kw_only=True):
    """QoS 0 sample of load and traffic; may be lost."""

    device: DeviceId
    session: Counter
    cpu_percent: Annotated[float, Meta(ge=0, le=100_000)] = 0.0
    memory_available_bytes: Counter = 0
    rss_bytes: Counter = 0
    sent_bytes: Counter = 0
    received_bytes: Counter = 0
    temperature_c: Annotated[float, Meta(ge=-100, le=300)] | None = None


class Event(Message, frozen=True, kw_only=True):
    """Something that happened once, numbered per session."""

    device: DeviceId
    session: Counter
    number: Counter
    name: Annotated[str, Meta(max_length=64)]
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""


class Update(Message, frozen=True, kw_only=True):
    """A sparse, quantised difference against an exactly named base version.

    Attributes:
        update_id: `update_id(device, job, round, base)`: the same work has the same id, sent ever so often.
        base: digest of the decoded weights that training started from.
        samples: local samples used (self-reported; the coordinator caps it).
        class_counts: samples per class, only if the job asks for it; sums, never per record.
        evaluation: (correct, total) of the base model on the local hold-out; sums only.
        codec: how `body` is written, e.g. "topk1".
        train_seconds: what the device spent on the task: from asking its trainer to the trainer's answer.
        sent_bytes, received_bytes: socket counters of the device so far.
    """

    update_id: UpdateId
    device: DeviceId
    job: Name
    round: Round
    epoch: Counter
    structure: Annotated[str, Meta(max_length=128)]
    base: Digest
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


class Offer(Message, frozen=True, kw_only=True):
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


# --- coordinator to device ---------------------------------------------------------------------


class Credit(Message, frozen=True, kw_only=True):
    """Answer to an Offer: what is there already, and how much may come."""

    device: DeviceId
    transfer: BlobId
    have: Annotated[bytes, Meta(max_length=limits.MAX_CHUNKS // 8)]
    chunks: Annotated[int, Meta(ge=0, le=limits.WINDOW_CHUNKS)]


class Receipt(Message, frozen=True, kw_only=True):
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


class BlobRef(Message, frozen=True, kw_only=True, array_like=True):
    """A content-addressed blob: its id is derived from the SHA-256 that it must have."""

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]


class Step(Message, frozen=True, kw_only=True, array_like=True):
    """One link of a chain: applying `blob` gives the weights that `digest` names.

    An array on the wire, like BlobRef: a task carries a dozen of them, and names would be half of it.
    """

    version: Version
    blob: BlobRef
    digest: Digest


class Training(Message, frozen=True, kw_only=True):
    """How a device trains: the fields of `learning.training.TrainSettings`, which explains them.

    Bounds keep a hostile or mistaken task from running for ever.
    """

    epochs: Annotated[int, Meta(ge=1, le=1000)] = 5
    max_steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    batch_size: Annotated[int, Meta(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Meta(gt=0, le=100)] = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Meta(ge=0, le=0.999)] = 0.9
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    clip_norm: Annotated[float, Meta(ge=0, le=1e6)] = 5.0
    proximal: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    balance: Annotated[float, Meta(ge=0, le=4)] = 1.0
    label_smoothing: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    augment: Annotated[float, Meta(ge=0, le=4)] = 0.0
    mixup: Annotated[float, Meta(ge=0, le=10)] = 0.0


class Task(Message, frozen=True, kw_only=True):
    """Retained, one slot per device: train on this version until the deadline.

    Attributes:
        task_id: names this assignment; equals `update_id(device, job, round, base)` of the answer.
        epoch: generation of the coordinator that gave it (fencing): lower ones are ignored.
        keyframe: whole model, compressed.
        deltas: what was published since the keyframe, oldest first; the last digest is the base.
        density: share of the parameters that the update may carry.
        deadline_s: seconds from the opening of the round.
    """

    task_id: UpdateId
    epoch: Counter
    coordinator: DeviceId
    device: DeviceId
    job: Name
    round: Round
    structure: Structure
    data: DataContract
    keyframe: Step
    deltas: Annotated[tuple[Step, ...], Meta(max_length=limits.MAX_CHAIN)] = ()
    density: Fraction = 0.05
    codec: Annotated[str, Meta(max_length=32)] = "topk1"
    training: Training = Training()
    seed: Counter = 0
    deadline_s: Seconds = 600.0
    share_class_counts: bool = False

    @property
    def base(self) -> bytes:
        """Digest of the weights that training starts from."""
        return (self.deltas[-1] if self.deltas else self.keyframe).digest


class Cancel(Message, frozen=True, kw_only=True):
    """Takes the task slot: the round is over for this device; nothing is to be trained.

    Attributes:
        final: chain of the finished job's last version; the agent fetches it, so that the device ends up
            with the model that it helped to make.
    """

    device: DeviceId
    epoch: Counter
    coordinator: DeviceId
    job: Name
    round: Version
    final: Annotated[tuple[Step, ...], Meta(max_length=limits.MAX_CHAIN)] = ()


class BlobManifest(Message, frozen=True, kw_only=True):
    """Retained manifest of a blob; a small blob travels inside it, a larger one in chunks."""

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]
    sha256: Digest
    chunk_bytes: Annotated[int, Meta(ge=1024, le=2 * limits.CHUNK_BYTES)] = limits.CHUNK_BYTES
    content: Annotated[bytes, Meta(max_length=limits.MAX_SINGLE_BYTES)] | None = None


class Head(Message, frozen=True, kw_only=True):
    """Retained: newest version of a job, per structure, for whoever wants to follow it."""

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


class CoordinatorState(Message, frozen=True, kw_only=True):
    """Retained presence of a coordinator; agents hold uploads while it is away.

    Attributes:
        epoch: bumped at every start, stored before use: fences a forgotten twin.
    """

    coordinator: DeviceId
    state: Presence
    epoch: Counter


KINDS: Final[dict[int, type[Message]]] = {
    1: State,
    2: Capability,
    3: Report,
    4: Telemetry,
    5: Event,
    6: Offer,
    7: Update,
    16: Task,
    17: Cancel,
    18: Credit,
    19: Receipt,
    32: BlobManifest,
    33: Head,
    48: CoordinatorState,
}
"""The frame's kind byte. Numbers are never used again for something else."""

KIND_OF: Final = {struct: kind for kind, struct in KINDS.items()}

MAX_BYTES: Final[dict[type[Message], int]] = dict.fromkeys(KIND_OF, limits.MAX_CONTROL_BYTES) | {
    Update: limits.MAX_OBJECT_BYTES - 128,  # with its header it travels as one object
    Task: limits.MAX_SINGLE_BYTES,
    Head: limits.MAX_SINGLE_BYTES,
    BlobManifest: limits.MAX_SINGLE_BYTES + limits.MAX_CONTROL_BYTES,
    State: 4096,
    Report: 4096,
    Receipt: 4096,
    Credit: 2048,
    CoordinatorState: 1024,
}
"""Largest body per kind, checked before the signature. A Text of 512 characters may take 2048 bytes."""
