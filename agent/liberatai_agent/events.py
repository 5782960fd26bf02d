"""What can happen on a device, as values: what `session.step` is told."""

from typing import Literal

import msgspec

from liberatai_core.contract.messages import Cancel, Receipt, Step, Task, TaskSpec

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


class TrainingResult(Value, frozen=True, kw_only=True):
    """What one training gave.

    Attributes:
        body: encoded sparse difference.
        residual: the sparsifier's state after it, as it is stored.
        returned: ids of the refused updates whose content went into `body` or `residual`, or cannot be used.
        dropped: (code, text) of the left-overs that could not be used and are gone; None: there were none.
        samples: samples trained on.
        class_counts: the same per class, only if the task asks for it.
        evaluation: (correct, total) of the base model on the local hold-out.
        train_seconds: wall time from asking the trainer to its answer, its start included.
        loss: mean training loss of the last epoch.
    """

    body: bytes
    residual: bytes
    returned: tuple[bytes, ...] = ()
    dropped: tuple[str, str] | None = None
    samples: int
    class_counts: tuple[int, ...] | None = None
    evaluation: tuple[int, int] | None = None
    train_seconds: float = 0.0
    loss: float | None = None


class Unsent(Value, frozen=True, kw_only=True):
    """An update that waits in the outbox."""

    update_id: bytes
    job: str
    round: int


class Started(Value, frozen=True, kw_only=True):
    """The agent starts; all of this was read from disk or measured.

    Attributes:
        unsent: updates without a receipt.
        finished: ids of tasks whose update was stored, oldest first.
        epoch: highest coordinator epoch seen.
        path: files on disk, in order, of the weights that the last update started from.
        tier, storage_bytes: of the machine.
        fault: why there is nothing to train on ("E_DATA: …"), "" if there is.
        note: a warning for the operator, shown while the device is idle.
    """

    unsent: tuple[Unsent, ...] = ()
    finished: tuple[bytes, ...] = ()
    epoch: int = 0
    path: tuple[Step, ...] = ()
    tier: Tier = "full"
    storage_bytes: int = 1 << 62
    fault: str = ""
    note: str = ""


class MachineChanged(Value, frozen=True, kw_only=True):
    """A new probe or new data."""

    tier: Tier
    storage_bytes: int
    fault: str = ""
    note: str = ""


class LinkUp(Value, frozen=True, kw_only=True):
    """The broker is there, all subscriptions are in force."""

    session_present: bool = False


class LinkDown(Value, frozen=True, kw_only=True):
    """The broker is gone."""


class TaskArrived(Value, frozen=True, kw_only=True):
    """A verified task for this device."""

    task: Task


class CancelArrived(Value, frozen=True, kw_only=True):
    """A verified end of a round for this device."""

    cancel: Cancel


class CoordinatorChanged(Value, frozen=True, kw_only=True):
    """A coordinator came or went."""

    state: Literal["online", "offline", "lost"]
    epoch: int


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


class OutboxStored(Value, frozen=True, kw_only=True):
    """Update and residual are durable."""

    update_id: bytes


class StoreFailed(Value, frozen=True, kw_only=True):
    """Update and residual could not be stored."""

    update_id: bytes
    code: str
    text: str


class UpdateDropped(Value, frozen=True, kw_only=True):
    """The outbox was full and dropped an update."""

    update_id: bytes
    reason: str


class ReceiptArrived(Value, frozen=True, kw_only=True):
    """A verified receipt for this device."""

    receipt: Receipt


class CreditArrived(Value, frozen=True, kw_only=True):
    """A verified credit for an upload of this update."""

    update_id: bytes
    have: bytes
    chunks: int


class GateChanged(Value, frozen=True, kw_only=True):
    """Training is allowed now, or not any more."""

    open: bool
    reason: str = ""


class Tick(Value, frozen=True, kw_only=True):
    """The time, seconds of a clock that never goes back."""

    now_s: float


Happened = (
    Started
    | MachineChanged
    | LinkUp
    | LinkDown
    | TaskArrived
    | CancelArrived
    | CoordinatorChanged
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
    | GateChanged
    | Tick
)
