"""What a device shall do, as values: what `session.step` returns and the service makes happen."""

from typing import Literal

from liberatai_agent.events import TrainingResult, Value
from liberatai_core.contract.messages import BlobRef, Capability, Step, Task, TaskSpec

Phase = Literal["idle", "gated", "fetching", "training", "sending", "failed"]


class PublishState(Value, frozen=True, kw_only=True):
    """Say what the device can do, and that it is there (both retained, in this order).

    The capability carries the key that verifies everything else; None: it was said before.
    """

    capability: Capability | None = None
    resting: bool = False


class PublishCapability(Value, frozen=True, kw_only=True):
    """Say what the device can do (retained)."""

    capability: Capability


class PublishReport(Value, frozen=True, kw_only=True):
    """Say what the device is doing (retained)."""

    phase: Phase
    job: str = ""
    round: int = 0
    reason: str = ""


class FetchBlobs(Value, frozen=True, kw_only=True):
    """Bring these blobs to the disk; each one is answered with BlobStored or BlobFailed."""

    refs: tuple[BlobRef, ...]


class ReadSpec(Value, frozen=True, kw_only=True):
    """Read a TaskSpec from the disk; answered with SpecRead, or BlobFailed if it cannot be read."""

    blob: str


class WarmTrainer(Value, frozen=True, kw_only=True):
    """Training is near: start its process now, so that its imports overlap with the download."""


class StartTraining(Value, frozen=True, kw_only=True):
    """Train on the weights that `path` leads to; answered with Trained or TrainingFailed."""

    task: Task
    spec: TaskSpec
    path: tuple[Step, ...]
    update_id: bytes


class StopTraining(Value, frozen=True, kw_only=True):
    """Kill the training that runs; not answered."""

    reason: str


class StoreUpdate(Value, frozen=True, kw_only=True):
    """Put update and residual on disk, in one transaction."""

    task: Task
    spec: TaskSpec
    update_id: bytes
    result: TrainingResult


class SendUpdate(Value, frozen=True, kw_only=True):
    """Send an update of the outbox in one message."""

    update_id: bytes


class SendOffer(Value, frozen=True, kw_only=True):
    """Offer an update of the outbox, which is too long for one message, in chunks of this length."""

    update_id: bytes
    chunk_bytes: int


class SendChunks(Value, frozen=True, kw_only=True):
    """Send these chunks of an update that was offered."""

    update_id: bytes
    chunk_bytes: int
    numbers: tuple[int, ...]


class Forget(Value, frozen=True, kw_only=True):
    """The coordinator has the update: delete it."""

    update_id: bytes


class RestoreResidual(Value, frozen=True, kw_only=True):
    """The coordinator refused the update: delete it, and keep its content for the next training."""

    update_id: bytes


class DropBlobs(Value, frozen=True, kw_only=True):
    """Delete all blobs but these."""

    keep: frozenset[str]


class KeepPath(Value, frozen=True, kw_only=True):
    """Store which files, in which order, lead to the weights that the device holds.

    Attributes:
        spec: what they are weights of; None: as before.
    """

    path: tuple[Step, ...]
    spec: TaskSpec | None = None


class RememberEpoch(Value, frozen=True, kw_only=True):
    """Store the highest epoch seen; `word` is the presence that said so, empty if something else did."""

    epoch: int
    word: bytes = b""


class ShowEpoch(Value, frozen=True, kw_only=True):
    """Show the coordinator the highest epoch that its own key has signed."""


class RaiseSession(Value, frozen=True, kw_only=True):
    """Take a session number above this one, and connect with it."""

    known: int


class Emit(Value, frozen=True, kw_only=True):
    """Tell the coordinator and the log about something that happened once."""

    number: int
    name: str
    code: str = ""
    text: str = ""


Action = (
    PublishState
    | PublishCapability
    | PublishReport
    | FetchBlobs
    | ReadSpec
    | WarmTrainer
    | StartTraining
    | StopTraining
    | StoreUpdate
    | SendUpdate
    | SendOffer
    | SendChunks
    | Forget
    | RestoreResidual
    | DropBlobs
    | KeepPath
    | RememberEpoch
    | ShowEpoch
    | RaiseSession
    | Emit
)
