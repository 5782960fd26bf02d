"""Every message: frozen, typed, closed, bounded. One Struct per kind; the frame's kind byte names it.

The body on the wire is one msgpack map, or one array for the kinds of every round: there, names would be half
of the bytes. Fields that crossed a trust boundary carry their bounds here,
so a decoder refuses them before anything is allocated for them.
"""

import hashlib
import math
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.topics import BLOB, FLEET_OR_DEVICE, NAME
from liberatai_core.errors import NonFiniteError, SchemaError
from liberatai_core.structure import MAX_ID, DataContract, Structure

DeviceId = Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
Name = Annotated[str, Meta(pattern=NAME)]
BlobId = Annotated[str, Meta(pattern=BLOB)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
WeightsName = Annotated[bytes, Meta(min_length=limits.DIGEST_BYTES, max_length=limits.DIGEST_BYTES)]
UpdateId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Round = Annotated[int, Meta(ge=1, le=limits.MAX_ROUND)]
Version = Annotated[int, Meta(ge=0, le=limits.MAX_ROUND)]
Sums = tuple[
    Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)], Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)]
]
Counter = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=limits.MAX_SECONDS)]
Text = Annotated[str, Meta(max_length=limits.MAX_TEXT)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Presence = Literal["online", "offline", "lost"]
SparseMethod = Literal[
    "topk",
    "topk_small_dense",
    "dense",
    "client_sampling",
    "quantile",
    "quantile_over_senders",
    "random_k",
    "random_k_feedback",
    "ternary_no_feedback",
]
"""Names of `sparsifier.methods.METHODS`, as jobs choose them; a test holds the two together."""
SPARSE_METHODS: tuple[str, ...] = get_args(SparseMethod)
"""What an agent of this version knows; it refuses a task with another one."""
HeadState = Literal["running", "paused", "finished", "aborted"]


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False
):
    """Base of all messages: closed (unknown keys are refused), frozen, and without NaN or infinity.

    Nothing frozen can be part of a cycle, so the garbage collector need not look at messages: a coordinator
    holds some for every device.

    A field that has its default value is never written (of an array: at its end): a field that a later
    release adds disturbs an older reader only where somebody uses it.
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


def weights_name(digest: bytes) -> bytes:
    """Return what names weights on the wire: the first 16 bytes of their SHA-256 (see DIGEST_BYTES)."""
    return digest[: limits.DIGEST_BYTES]


RUN_BYTES = 8
"""Of the random name of a job's creation."""


def update_id(device: str, job: str, number: int, base: bytes, run: bytes = b"") -> bytes:
    """Return the 16 bytes that name a device's work in a round: repeated work has the same name.

    `base` names the weights that the work starts from (`weights_name`), `run` the creation of the job: a job
    that was deleted and created again asks for new work, also where it starts from equal weights.
    """
    return hashlib.sha256(f"{device}|{job}|{number}|".encode() + base + run).digest()[:16]


def work_seed(seed: int, device: str, job: str, number: int) -> int:
    """Return the seed of a device's work in a round: 63 bits, which torch takes.

    Both sides need it: an update of coordinates that were drawn does not say which.
    """
    parts = ("training", str(seed), device, job, str(number))
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") >> 1


def part_seed(seed: int, job: str, structure: str) -> int:
    """Return the seed of the coordinates that a job trains of a structure (`sparsifier.subspace`)."""
    return int.from_bytes(hashlib.sha256(f"part|{seed}|{job}|{structure}".encode()).digest()[:8], "big") >> 1


class State(Message, frozen=True, kw_only=True):
    """Retained birth, goodbye and last will of an agent.

    Attributes:
        session: grows with every start of the agent and survives reboots; an older one is ignored.
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
        link_measured: `up_bits_s` comes from real transfers; otherwise from the profile or the settings.
        day_quota_bytes: what the link may move in a day, both ways together; 0: no quota.
        quota_spent: today's quota is used up: no task until this changes.
        telemetry_s: a Telemetry comes about so often: who is silent for much longer is not there, whatever
            stands at the broker.
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
    link_measured: bool = False
    day_quota_bytes: Counter = 0
    quota_spent: bool = False
    telemetry_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0


class Report(Message, frozen=True, kw_only=True, array_like=True):
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


class EpochSeen(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to a coordinator whose epoch is lower than one that its own key has signed before.

    Attributes:
        word: the whole frame of the CoordinatorState with the highest epoch that the device believes: the
            coordinator believes its own signature, not the device.
    """

    device: DeviceId
    session: Counter
    word: Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_WORD_BYTES)]


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


class Answer(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to a Request.

    Attributes:
        epoch, number: of the request.
        code: "" or why it was not done.
        lines: of the device's log, the oldest first.
    """

    device: DeviceId
    session: Counter
    epoch: Counter
    number: Counter
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    lines: Annotated[tuple[Text, ...], Meta(max_length=limits.MAX_LINES)] = ()


class Wishes(Message, frozen=True, kw_only=True):
    """Settings that a fleet may wish for; None: as the device has it. They tighten, they never loosen.

    Attributes:
        pause: no training.
        telemetry_s: seconds between two samples of load and traffic.
        max_load_others, min_battery_percent, max_temp_c, min_free_disk_mb, min_free_memory_mb: of the gate.
        quota_mb_per_day: of the link.
    """

    pause: bool = False
    telemetry_s: Annotated[float, Meta(ge=1, le=86_400)] | None = None
    max_load_others: Annotated[float, Meta(ge=0, le=4096)] | None = None
    min_battery_percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    max_temp_c: Annotated[float, Meta(gt=0, le=200)] | None = None
    min_free_disk_mb: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    min_free_memory_mb: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    quota_mb_per_day: Annotated[float, Meta(gt=0, le=1e9)] | None = None


class Have(Message, frozen=True, kw_only=True):
    """Retained: what the device is like, measured by the newest Want.

    Attributes:
        version: of the Want; 0: none was seen.
        state: "done": it is as wished; "working": on the way; "failed": it could not be done, and the device
            is as before; "refused": it is not done on principle.
        code, text: why, if it is not done.
        settings: as they are in force.
        limited: names of settings that the device's own limits hold tighter than was wished.
        model, model_version, structure: that is in use; "" and 0: none.
        evaluation: (correct, total) of the new model on the local hold-out; None: nothing is held out.
        before: the same of the model that was in use before, or still is.
        agent_version: that runs.
    """

    device: DeviceId
    session: Counter
    version: Counter = 0
    state: Literal["done", "working", "failed", "refused"] = "done"
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    settings: Wishes = Wishes()
    limited: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=16)] = ()
    model: Annotated[str, Meta(max_length=64)] = ""
    model_version: Version = 0
    structure: Annotated[str, Meta(max_length=MAX_ID)] = ""
    evaluation: Sums | None = None
    before: Sums | None = None
    agent_version: Annotated[str, Meta(max_length=64)] = ""


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


# --- coordinator to device ---------------------------------------------------------------------


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


class Request(Message, frozen=True, kw_only=True, array_like=True):
    """A question to a device, answered once (Answer); lost if the device is not there.

    Attributes:
        number: grows within an epoch: an older one is not answered again.
        lines: of the log that are wanted.
    """

    device: DeviceId
    epoch: Counter
    number: Counter
    what: Literal["ping", "probe", "logs"]
    lines: Annotated[int, Meta(ge=0, le=limits.MAX_LINES)] = 0


class SessionSeen(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to what came from an older session than one heard before: the device was put back from a copy.

    Attributes:
        session: highest number that was heard of the device: it goes on above it. Bounded, so that room to
            grow is left for ever.
    """

    device: DeviceId
    session: Annotated[int, Meta(ge=1, le=limits.MAX_SESSION)]


class CertificateRequest(Message, frozen=True, kw_only=True):
    """Asks for a certificate: with an invitation, before the old one ends, or after it has ended.

    Signed with the device's own key, which it carries, so that it introduces the device.

    Attributes:
        public_key: Ed25519 key of the device.
        nonce: names the answer.
        request: PKCS #10 (DER) for the device's name, with the EC key that the certificate shall have.
        claim: name of the invitation; "": the coordinator knows the device's key.
        proof: signature of the invitation's key under what is asked for (`claimed`).
    """

    device: DeviceId
    public_key: Key
    nonce: UpdateId
    request: Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_REQUEST_BYTES)]
    claim: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)] | None = None
    proof: Annotated[bytes, Meta(max_length=128)] = b""


def claimed(fleet: str, device: str, public_key: bytes, request: bytes) -> bytes:
    """Return what the holder of an invitation signs: this device, with these keys, of this fleet."""
    parts = (b"liberatai/claim", fleet.encode(), device.encode(), public_key, request)
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


class CertificateReply(Message, frozen=True, kw_only=True):
    """Answers a CertificateRequest.

    Attributes:
        nonce: of the request.
        state: "pending": an operator has to approve the device; it asks again later.
        code, text: why it was refused, or whom it waits for.
        now_s: Unix seconds of the coordinator: a device without a clock knows no other.
        certificate: X.509 (DER) for the key of the request.
        authority: the authority's certificate (DER).
        claim: certificate (DER) for the same key, with which the device may ask again by the door for claims.
        profile: hardware class that the invitation names; "": none.
    """

    device: DeviceId
    nonce: UpdateId
    state: Literal["issued", "pending", "refused"]
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    now_s: Annotated[float, Meta(ge=0, le=2**53)] = 0.0
    certificate: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    authority: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    claim: Annotated[bytes, Meta(max_length=limits.MAX_CERTIFICATE_BYTES)] = b""
    profile: Annotated[str, Meta(max_length=64)] = ""


class BlobRef(Message, frozen=True, kw_only=True, array_like=True):
    """A content-addressed blob: its id is derived from the SHA-256 that it must have."""

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]


class Step(Message, frozen=True, kw_only=True, array_like=True):
    """One link of a path: applying `blob` gives the weights that `digest` names (16 bytes of SHA-256)."""

    version: Version
    blob: BlobRef
    digest: WeightsName


class ModelWish(Message, frozen=True, kw_only=True, array_like=True):
    """A version of a model that a device shall hold and use.

    Attributes:
        spec: a TaskSpec with its structure and the form of its data.
        steps: the whole path to its weights, a keyframe first.
    """

    model: Name
    version: Version
    spec: BlobRef
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=limits.MAX_CHAIN)]


class AgentWish(Message, frozen=True, kw_only=True, array_like=True):
    """A release of the agent that shall run: its bundle, signed with the release key."""

    version: Annotated[str, Meta(min_length=1, max_length=64)]
    bundle: BlobRef


class Want(Message, frozen=True, kw_only=True):
    """Retained, one per device: what it shall be like, as a whole.

    Attributes:
        epoch: of the coordinator that says so; lower ones than the highest seen are ignored.
        version: grows with every change of it.
        model: None: none by wish.
        agent: None: whatever runs.
    """

    device: DeviceId
    epoch: Counter
    version: Counter
    settings: Wishes = Wishes()
    model: ModelWish | None = None
    agent: AgentWish | None = None


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


class TaskSpec(Message, frozen=True, kw_only=True):
    """What all tasks of a job have in common for one structure: a blob of its own, fetched once.

    No kind of message: its content address stands in signed tasks, `frame.encode_spec` writes it.

    Attributes:
        codec: name of the sparse method that updates are made with.
        seed: of shuffling, augmentation and drawing.
        deadline_s: seconds from the opening of a round.
        trained_share: share of every large tensor that is trained; drawn with `part_seed`.
        residual_decay: what is left of a residual per round that the device missed.
        residual_limit: rounds missed after which nothing of it is left.
    """

    job: Name
    structure: Structure
    data: DataContract
    codec: Annotated[str, Meta(max_length=32)] = "topk"
    training: Training = Training()
    seed: Counter = 0
    deadline_s: Seconds = 600.0
    share_class_counts: bool = False
    trained_share: Fraction = 1.0
    residual_decay: Annotated[float, Meta(ge=0, le=1)] = 1.0
    residual_limit: Version = limits.MAX_ROUND


class _Path(Message, frozen=True, kw_only=True, array_like=True):
    """Base of messages that lead a device to weights: from what it holds, or from a keyframe."""

    def _require_held(self, held: bytes) -> None:
        if len(held) not in (0, limits.DIGEST_BYTES):
            raise SchemaError(f"held: {len(held)} bytes, wanted {limits.DIGEST_BYTES} or none")


class Task(_Path, frozen=True, kw_only=True, array_like=True):
    """Retained, one slot per device: train on this version until the deadline.

    Attributes:
        task_id: names this assignment; equals `update_id(device, job, round, base, run)` of the answer.
        epoch: generation of the coordinator that gave it (fencing): lower ones are ignored.
        spec: the TaskSpec.
        density: share of the parameters that the update may carry.
        held: name of weights that the device holds already, from which `steps` go on; empty: the first step
            is a keyframe. A device that does not hold them says so (E_BASE).
        steps: what leads from there to the base, in order; none if the device is there already.
        run: drawn when the job was created; empty in jobs of a release that did not draw it.
    """

    task_id: UpdateId
    epoch: Counter
    coordinator: DeviceId
    device: DeviceId
    job: Name
    round: Round
    spec: BlobRef
    density: Fraction
    held: Annotated[bytes, Meta(max_length=limits.DIGEST_BYTES)] = b""
    steps: Annotated[tuple[Step, ...], Meta(max_length=limits.MAX_CHAIN)] = ()
    run: Annotated[bytes, Meta(max_length=RUN_BYTES)] = b""

    def __post_init__(self) -> None:
        """Refuse a task that leads nowhere."""
        super().__post_init__()
        self._require_held(self.held)
        if not self.held and not self.steps:
            raise SchemaError("steps: none, and nothing is held")

    @property
    def base(self) -> bytes:
        """Name of the weights that training starts from."""
        return self.steps[-1].digest if self.steps else self.held


class Cancel(_Path, frozen=True, kw_only=True, array_like=True):
    """Takes the task slot: the round is over for this device; nothing is to be trained.

    Attributes:
        held: as in a Task, for `final`.
        final: what leads to the finished job's last version; the agent fetches it, so that the device ends
            up with the model that it helped to make.
    """

    device: DeviceId
    epoch: Counter
    coordinator: DeviceId
    job: Name
    round: Version
    held: Annotated[bytes, Meta(max_length=limits.DIGEST_BYTES)] = b""
    final: Annotated[tuple[Step, ...], Meta(max_length=limits.MAX_CHAIN)] = ()

    def __post_init__(self) -> None:
        """Refuse a name that is none."""
        super().__post_init__()
        self._require_held(self.held)


class BlobManifest(Message, frozen=True, kw_only=True, array_like=True):
    """Retained manifest of a blob that comes in several chunks; a smaller blob is its own chunk 0.

    The content's SHA-256 gives `blob`, so nothing here needs to be believed but the cut.
    """

    blob: BlobId
    size_bytes: Annotated[int, Meta(ge=1, le=limits.MAX_OBJECT_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=2 * limits.CHUNK_BYTES)] = limits.CHUNK_BYTES


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
    8: EpochSeen,
    11: CertificateRequest,
    9: Have,
    10: Answer,
    16: Task,
    17: Cancel,
    18: Credit,
    19: Receipt,
    20: SessionSeen,
    23: CertificateReply,
    21: Request,
    22: Want,
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
    Want: limits.MAX_SINGLE_BYTES,
    Have: 8192,
    Request: 1024,
    BlobManifest: 1024,
    State: 4096,
    Report: 4096,
    Receipt: 4096,
    Credit: 2048,
    EpochSeen: 2048,
    SessionSeen: 1024,
    CertificateRequest: 4096,
    CertificateReply: 28_672,
    CoordinatorState: 1024,
}
"""Largest body per kind, checked before the signature. A Text of 512 characters may take 2048 bytes."""
