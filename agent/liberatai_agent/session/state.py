"""What the agent has to know between two events. The work under way is one of nine states, and no mixture."""

import math
from typing import TypeVar

from msgspec.structs import replace

from liberatai_agent.actions import Action, Emit, PublishReport
from liberatai_agent.events import Tier, TrainingResult, Value
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobRef, Capability, Step, Task, TaskSpec, update_id

RETRY_FIRST_S = 5.0
RETRY_MAX_S = 120.0
"""Pauses double from 5 s to 2 min: a restarting coordinator is found soon, a dead one is not hammered."""
FINAL_RETRY_MAX_S = 3600.0
"""For the path to a finished model: no round waits, nothing ends the questions, and each has 200 bytes."""
MAX_ATTEMPTS = 3
"""Trainings of one task that may die of a cause outside the task (killed, disk full)."""
MAX_FINISHED = 256
"""Finished tasks that are remembered: far more than a broker ever repeats."""
MAX_EPOCH = 2**52
"""Half of what the protocol carries. A higher one is believed and leaves the fence where it is: whatever was
signed once, its coordinator can still speak above the fence."""
MAX_REFUSED = 8
"""Topics that a broker refuses and that are remembered: a device has no more."""
SHOW_S = 10.0
"""Between two words about a coordinator's higher epoch."""
HEADROOM_BYTES = 512
"""Topic and properties of a packet."""


# --- the work ----------------------------------------------------------------------------------


class Retry(Value, frozen=True, kw_only=True):
    """Something failed for this reason ("E_DISK: full"), and is tried again at `at_s`."""

    at_s: float
    reason: str


class Assignment(Value, frozen=True, kw_only=True):
    """A task that was taken on.

    Attributes:
        task: it.
        began_s: when; its deadline counts from there, once the spec is known.
        refetched: the whole path was fetched a second time, because a digest was wrong.
    """

    task: Task
    began_s: float
    refetched: bool = False


class Idle(Value, frozen=True, kw_only=True):
    """Nothing to do; `final` leads to the finished model, if there is one."""

    final: tuple[Step, ...] = ()


class FetchingFinal(Value, frozen=True, kw_only=True):
    """A job is over, and files of its finished model are not here yet."""

    final: tuple[Step, ...]
    missing: tuple[BlobRef, ...]
    attempts: int = 0
    retry: Retry | None = None

    def __post_init__(self) -> None:
        """Refuse a download of nothing."""
        _require_missing(self.missing)


class AskingForPath(Value, frozen=True, kw_only=True):
    """What a task, or (None) a finished model, goes on from is not here: the whole path is asked for.

    `final` is an earlier finished model, which stays.
    """

    assignment: Assignment | None
    attempts: int
    retry: Retry
    final: tuple[Step, ...] = ()


class Fetching(Value, frozen=True, kw_only=True):
    """Files of a task are not here yet. `chain` leads to the weights that it starts from."""

    assignment: Assignment
    chain: tuple[Step, ...]
    missing: tuple[BlobRef, ...]
    attempts: int = 0
    retry: Retry | None = None

    def __post_init__(self) -> None:
        """Refuse a download of nothing."""
        _require_missing(self.missing)


class ReadingSpec(Value, frozen=True, kw_only=True):
    """All files of a task are here; what it is for is being read."""

    assignment: Assignment
    chain: tuple[Step, ...]


class Ready(Value, frozen=True, kw_only=True):
    """A task could be trained, and waits for the gate or for another try."""

    assignment: Assignment
    chain: tuple[Step, ...]
    spec: TaskSpec
    attempts: int = 0
    retry: Retry | None = None


class Training(Value, frozen=True, kw_only=True):
    """A task is trained. `attempts` trainings of it have died already."""

    assignment: Assignment
    chain: tuple[Step, ...]
    spec: TaskSpec
    attempts: int = 0


class Storing(Value, frozen=True, kw_only=True):
    """A training's result goes to the disk."""

    assignment: Assignment
    chain: tuple[Step, ...]
    spec: TaskSpec
    result: TrainingResult
    attempts: int = 0
    retry: Retry | None = None


class Failed(Value, frozen=True, kw_only=True):
    """A task cannot be done ("E_DATA: no labels"); it ends with the round."""

    assignment: Assignment
    reason: str


OnTask = Fetching | ReadingSpec | Ready | Training | Storing | Failed
Work = Idle | FetchingFinal | AskingForPath | OnTask


def _require_missing(missing: tuple[BlobRef, ...]) -> None:
    if not missing:
        raise ValueError("missing: nothing is fetched in this state")


def assignment_of(work: Work) -> Assignment | None:
    """Return the task under way with what is known about it."""
    return None if isinstance(work, Idle | FetchingFinal) else work.assignment


def final_of(work: Work) -> tuple[Step, ...]:
    """Return the path of the finished model that is here, or on its way."""
    return work.final if isinstance(work, Idle | FetchingFinal | AskingForPath) else ()


def missing_of(work: Work) -> tuple[BlobRef, ...]:
    """Return what is not on disk yet."""
    return work.missing if isinstance(work, FetchingFinal | Fetching) else ()


def retry_of(work: Work) -> Retry | None:
    """Return why something waits, and until when."""
    return None if isinstance(work, Idle | ReadingSpec | Training | Failed) else work.retry


# --- what is sent ------------------------------------------------------------------------------


class Pending(Value, frozen=True, kw_only=True):
    """An update without a receipt: sent `attempts` times, due again at `next_s`.

    Attributes:
        update_id, job, round, transfer, size_bytes: as in Unsent.
        chunk_bytes: how it was cut when it was offered last; 0: it was not.
        sent: chunks that went since the last offer; its timer stands still while they go.
        over_quota: chunks (0: the whole, if it is short) that went since the day's quota is used up.
    """

    update_id: bytes
    job: str
    round: int
    transfer: str = ""
    size_bytes: int = 0
    attempts: int = 0
    next_s: float = 0.0
    chunk_bytes: int = 0
    sent: frozenset[int] = frozenset()
    over_quota: frozenset[int] = frozenset()


# --- all of it ---------------------------------------------------------------------------------


class Session(Value, frozen=True, kw_only=True):
    """Everything that the agent has to know between two events.

    Attributes:
        device: own name.
        packet_bytes: the largest packet that the broker takes.
        refused: (topic, words) of what the broker refuses on this connection.
        away: the coordinator said goodbye or was lost.
        coordinator: what it is, as it last said.
        epoch: highest of this coordinator.
        stale: the lower epoch that it speaks with now, 0 if it does not; the device waits for a higher one.
        shown_s: when it was last shown the higher one.
        number: of this start, as the coordinator knows it.
        tier, storage_bytes, fault, note, measured: of the machine and its data, as in `events.Started`.
        found: what was measured of the machine last, as it is told.
        told: what was told of it last on this connection; None: nothing yet.
        gate_open, gate_reason: whether the machine may train.
        resting: it takes part in nothing for a while, and should not be invited.
        quota: words about the day's quota of the link if it is used up, else "".
        work: what is under way.
        spec: what the newest task's spec says, with the id of its blob.
        path: files on disk that lead to the weights of the last update, or of the finished model.
        pending: updates without a receipt.
        finished: tasks whose update was stored, oldest first.
        said: the last report that was published on this connection.
        wished, say_at_s: the report that is published at that time, unless another comes before.
        events: number of events emitted.
        refusals: refused updates per code.
    """

    device: str
    now_s: float = 0.0
    connected: bool = False
    packet_bytes: int = MAX_PACKET_BYTES
    refused: tuple[tuple[str, str], ...] = ()
    away: bool = False
    coordinator: str = "unknown"
    epoch: int = 0
    stale: int = 0
    shown_s: float = -math.inf
    number: int = 0
    tier: Tier = "full"
    storage_bytes: int = 1 << 62
    fault: str = ""
    note: str = ""
    measured: bool = True
    found: Capability | None = None
    told: Capability | None = None
    gate_open: bool = True
    gate_reason: str = ""
    resting: bool = False
    quota: str = ""
    work: Work = Idle()
    spec: tuple[str, TaskSpec] | None = None
    path: tuple[Step, ...] = ()
    pending: tuple[Pending, ...] = ()
    finished: tuple[bytes, ...] = ()
    said: PublishReport | None = None
    wished: PublishReport | None = None
    say_at_s: float = 0.0
    events: int = 0
    refusals: tuple[tuple[str, int], ...] = ()

    @property
    def task(self) -> Task | None:
        """The task under way."""
        assignment = assignment_of(self.work)
        return None if assignment is None else assignment.task

    @property
    def update_id(self) -> bytes:
        """Id of the update that the current task will give, empty without a task."""
        task = self.task
        return b"" if task is None else update_id(self.device, task.job, task.round, task.base, task.run)

    @property
    def single_bytes(self) -> int:
        """The longest update that goes in one message."""
        return min(MAX_SINGLE_BYTES, self._room_bytes)

    @property
    def chunk_bytes(self) -> int:
        """How a longer one is cut."""
        return min(CHUNK_BYTES, self._room_bytes)

    @property
    def _room_bytes(self) -> int:
        return max(1024, min(self.packet_bytes, MAX_PACKET_BYTES) - HEADROOM_BYTES)


Stepped = tuple[Session, tuple[Action, ...]]
AnyWork = TypeVar("AnyWork", bound=Work)


def with_work(s: Session, work: Work) -> Session:
    """Return the session with other work under way."""
    return replace(s, work=work)


def pause_s(attempts: int, longest_s: float = RETRY_MAX_S) -> float:
    """Return how long to wait after so many failures."""
    return min(longest_s, RETRY_FIRST_S * 2.0 ** min(attempts, 16))


def later(s: Session, attempts: int, reason: str, longest_s: float = RETRY_MAX_S) -> Retry:
    """Return the next try of what failed after `attempts` earlier failures."""
    return Retry(at_s=s.now_s + pause_s(attempts, longest_s), reason=reason)


def emit(s: Session, name: str, code: str = "", text: str = "") -> Stepped:
    """Tell the coordinator and the log about something that happened once."""
    number = s.events + 1
    return replace(s, events=number), (Emit(number=number, name=name, code=code, text=text[:512]),)
