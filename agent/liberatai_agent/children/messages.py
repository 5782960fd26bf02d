"""What agent and training process say to each other: length-prefixed msgpack over a socket."""

import struct

import msgspec

from liberatai_agent.events import ResidualFile, Returned, TrainingResult
from liberatai_core.contract.limits import MAX_OBJECT_BYTES, MAX_ROUND, MAX_SECONDS
from liberatai_core.contract.messages import Training
from liberatai_core.errors import TooLargeError
from liberatai_core.profile import Trainer
from liberatai_core.structure import DataContract, Structure

LENGTH = struct.Struct(">I")
HELLO = struct.Struct(">I")
"""What a training process that a service manager started says first: its process id."""
MAX_MESSAGE_BYTES = 16 * MAX_OBJECT_BYTES
"""1 GiB: the residual of the largest structure. Both ends are ours; this bounds a bug, not an enemy."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A blob on disk, and the name of the weights that it leads to (16 bytes of their SHA-256)."""

    path: str
    digest: bytes


class Work(msgspec.Struct, frozen=True, kw_only=True, tag="work"):
    """One training.

    Attributes:
        path: files that lead to the base weights: a keyframe, then deltas.
        codec: name of the sparse method.
        trained_share: share of every large tensor that is trained (`sparsifier.subspace`).
        rounds_away: rounds that the device missed since `residual` was made.
        residual_decay, residual_limit: what that leaves of the residual, see `sparsifier.schedule.decay`.
        data_path: private .npz.
        residual: the sparsifier's state, None before the first round; only inside one process.
        residual_from, residual_to: files that it is read from, and that the next one is written to.
        returned: refused updates: their content is added to the difference.
        check: nothing is trained: the weights are restored, verified and scored on the hold-out.
        memory_bytes: what the process may take in all.
        cpu_seconds: processor time that this training may take.
        runtime: what computes.
    """

    device: str
    job: str
    round: int
    structure: Structure
    data: DataContract
    training: Training
    seed: int
    density: float
    path: tuple[File, ...]
    data_path: str
    codec: str = "topk"
    residual: bytes | None = None
    residual_from: ResidualFile | None = None
    residual_to: str = ""
    returned: tuple[Returned, ...] = ()
    share_class_counts: bool = False
    trained_share: float = 1.0
    rounds_away: int = 0
    residual_decay: float = 1.0
    residual_limit: int = MAX_ROUND
    check: bool = False
    memory_bytes: int = 1 << 62
    cpu_seconds: float = MAX_SECONDS
    runtime: Trainer = "torch"


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Work will come: import what it needs. Nothing is answered."""

    runtime: Trainer = "torch"


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The training ended well."""

    result: TrainingResult


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The training ended badly; `code` is of `errors.py`."""

    code: str
    text: str


Answer = Done | Failed

_ENCODER = msgspec.msgpack.Encoder()
_REQUEST: "msgspec.msgpack.Decoder[Work | Prepare]" = msgspec.msgpack.Decoder(Work | Prepare)
_ANSWER = msgspec.msgpack.Decoder(Answer)


def encode(message: Work | Prepare | Answer) -> bytes:
    """Return length and body of a message."""
    body = _ENCODER.encode(message)
    require_length(len(body))
    return LENGTH.pack(len(body)) + body


def decode_request(body: bytes) -> Work | Prepare:
    """Return what the agent asks for in a body; raises msgspec.MsgspecError."""
    return _REQUEST.decode(body)


def decode_answer(body: bytes) -> Answer:
    """Return the answer in a body; raises msgspec.MsgspecError."""
    answer: Answer = _ANSWER.decode(body)
    return answer


def require_length(size: int) -> None:
    """Raise TooLargeError for a length that no message has."""
    if size > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"message of {size} bytes to or from the trainer, at most {MAX_MESSAGE_BYTES}")
