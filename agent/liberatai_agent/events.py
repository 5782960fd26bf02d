"""What can happen on a device, as values: what `session.step` is told."""

from typing import Literal

import msgspec

from liberatai_core.contract.limits import MAX_PACKET_BYTES
from liberatai_core.contract.messages import Cancel, Capability, Receipt, Step, Task, TaskSpec

Tier = Literal["full", "head", "observe"]


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events, actions and states: a Struct costs a device a tenth of a dataclass's memory."""


class Returned(Value, frozen=True, kw_only=True):
    """An update that was refused, so its content goes into a later training.

    Attributes:
        update_id: its id.
        round: that it was made in; coordinates that are drawn per round follow from it.
        body: encoded sparse difference.
    """

    update_id: bytes
    round: int
    body: bytes


class ResidualFile(Value, frozen=True, kw_only=True):
    """A sparsifier's state on disk, and the SHA-256 that it must have."""

    path: str
    sha256: bytes


class TrainingResult(Value, frozen=True, kw_only=True):
    """What one training gave.

    Attributes:
        body: encoded sparse difference.
        residual: the sparsifier's state after it; only inside one process.
        residual_file: where it is otherwise.
        returned: ids of the refused updates whose content went into `body` or `residual`, or cannot be used.
        dropped: (code, text) of the left-overs that could not be used and are gone; None: there were none.
        samples: samples trained on.
        class_counts: the same per class, only if the task asks for it.
        evaluation: (correct, total) of the base model on the local hold-out.
        train_seconds: wall time from asking the trainer to its answer, its start included.
        loss: mean training loss of the last epoch.
    """

    body: bytes
    residual: bytes = b""
    residual_file: ResidualFile | None = None
    returned: tuple[bytes, ...] = ()
    dropped: tuple[str, str] | None = None
    samples: int
    class_counts: tuple[int, ...] | None = None
    evaluation: tuple[int, int] | None = None
    train_seconds: float = 0.0
    loss: float | None = None


class Unsent(Value, frozen=True, kw_only=True):
    """An update that waits in the outbox.

    Attributes:
        update_id, job, round: of the update.
        transfer: blob id of its frame.
        size_bytes: length of its frame.
    """

    update_id: bytes
    job: str
    round: int
    transfer: str = ""
    size_bytes: int = 0


class Started(Value, frozen=True, kw_only=True):
    """The agent starts; all of this was read from disk or measured.

    Attributes:
        number: of this start.
        unsent: updates without a receipt.
        finished: ids of tasks whose update was stored, oldest first.
        epoch: highest coordinator epoch seen.
        path: files on disk, in order, of the weights that the last update started from.
        tier, storage_bytes: of the machine.
        fault: why there is nothing to train on ("E_DATA: …"), "" if there is.
        note: a warning for the operator, shown while the device is idle.
        measured: whether that is known yet; before it is, nothing is said.
    """

    number: int = 0
    unsent: tuple[Unsent, ...] = ()
    finished: tuple[bytes, ...] = ()
    epoch: int = 0
    path: tuple[Step, ...] = ()
    tier: Tier = "full"
    storage_bytes: int = 1 << 62
    fault: str = ""
    note: str = ""
    measured: bool = True


class MachineChanged(Value, frozen=True, kw_only=True):
    """The machine and its data were looked at.

    Attributes:
        tier, storage_bytes, fault, note: as in Started.
        capability: what the coordinator is told of it, if it is news.
    """

    tier: Tier
    storage_bytes: int
    fault: str = ""
    note: str = ""
    capability: Capability | None = None


class LinkUp(Value, frozen=True, kw_only=True):
    """The broker is there, all subscriptions are in force.

    Attributes:
        session_present: the broker kept what it had for us.
        packet_bytes: the largest packet that it takes.
    """

    session_present: bool = False
    packet_bytes: int = MAX_PACKET_BYTES


class LinkDown(Value, frozen=True, kw_only=True):
    """The broker is gone."""


class BrokerRefused(Value, frozen=True, kw_only=True):
    """The broker does not do what was asked.

    Attributes:
        topic: of what.
        words: one line for people.
        packet_bytes: the largest packet that it takes from now on; 0: that is not the matter.
    """

    topic: str
    words: str
    packet_bytes: int = 0


class TaskArrived(Value, frozen=True, kw_only=True):
    """A verified task for this device."""

    task: Task


class CancelArrived(Value, frozen=True, kw_only=True):
    """A verified end of a round for this device."""

    cancel: Cancel


class CoordinatorChanged(Value, frozen=True, kw_only=True):
    """A coordinator came or went; `word` is the frame that says so."""

    state: Literal["online", "offline", "lost"]
    epoch: int
    word: bytes = b""


class SessionBehind(Value, frozen=True, kw_only=True):
    """The coordinator has heard a higher session of this device: it was put back from a copy."""

    session: int


class BlobStored(Value, frozen=True, kw_only=True):
    """A blob is complete, verified and on disk."""

    blob: str


class BlobFailed(Value, frozen=True, kw_only=True):
    """A blob could not be fetched for now."""

    blob: str
    code: str
    text: str


class SpecRead(Value, frozen=True, kw_only=True):
    """What a task's spec says; it was on disk."""

    blob: str
    spec: TaskSpec


class Trained(Value, frozen=True, kw_only=True):
    """The training ended well."""

    update_id: bytes
    result: TrainingResult


class TrainingFailed(Value, frozen=True, kw_only=True):
    """The training ended badly (never said after StopTraining)."""

    update_id: bytes
    code: str
    text: str


class LeftoverDropped(Value, frozen=True, kw_only=True):
    """What earlier rounds left over cannot be used, and is gone; the training goes on without it."""

    code: str
    text: str


class Renumbered(Value, frozen=True, kw_only=True):
    """The device goes on with this session number."""

    number: int


class OutboxStored(Value, frozen=True, kw_only=True):
    """Update and residual are durable; fields as in Unsent."""

    update_id: bytes
    job: str = ""
    round: int = 0
    transfer: str = ""
    size_bytes: int = 0


class StoreFailed(Value, frozen=True, kw_only=True):
    """Update and residual could not be stored."""

    update_id: bytes
    code: str
    text: str


class UpdateDropped(Value, frozen=True, kw_only=True):
    """The outbox had to drop an update: it was full, or cannot read it any more."""

    update_id: bytes
    code: str = "E_QUOTA"
    reason: str


class StateDamaged(Value, frozen=True, kw_only=True):
    """A file of the agent's own was damaged, and was set aside at the start."""

    what: str


class ReceiptArrived(Value, frozen=True, kw_only=True):
    """A verified receipt for this device."""

    receipt: Receipt


class CreditArrived(Value, frozen=True, kw_only=True):
    """A verified credit for an upload."""

    transfer: str
    have: bytes
    chunks: int


class ChunksSent(Value, frozen=True, kw_only=True):
    """The chunks of an update that were to be sent went to the broker, or could not go."""

    update_id: bytes


class GateChanged(Value, frozen=True, kw_only=True):
    """Training is allowed now, or not any more.

    Attributes:
        open, reason: whether it is, and why not.
        resting: the device wants no part in anything for a while.
    """

    open: bool
    reason: str = ""
    resting: bool = False


class QuotaChanged(Value, frozen=True, kw_only=True):
    """The day's quota of the link is used up ("words" say so), or is not any more ("")."""

    words: str = ""


class Tick(Value, frozen=True, kw_only=True):
    """The time, seconds of a clock that never goes back."""

    now_s: float


Happened = (
    Started
    | MachineChanged
    | LinkUp
    | LinkDown
    | BrokerRefused
    | TaskArrived
    | CancelArrived
    | CoordinatorChanged
    | SessionBehind
    | Renumbered
    | BlobStored
    | BlobFailed
    | SpecRead
    | Trained
    | TrainingFailed
    | LeftoverDropped
    | OutboxStored
    | StoreFailed
    | UpdateDropped
    | ReceiptArrived
    | CreditArrived
    | ChunksSent
    | GateChanged
    | QuotaChanged
    | StateDamaged
    | Tick
)
