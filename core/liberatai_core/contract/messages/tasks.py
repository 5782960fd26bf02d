"""What a device is asked to train, and the names and seeds that follow from it."""

import hashlib
from typing import Annotated, Literal, get_args

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import (
    Counter,
    DeviceId,
    Fraction,
    Message,
    Name,
    Round,
    Seconds,
    UpdateId,
    Version,
)
from liberatai_core.contract.messages.blobs import BlobRef, Step
from liberatai_core.errors import SchemaError
from liberatai_core.structure import DataContract, Structure

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
