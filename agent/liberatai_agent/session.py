"""What happens on a device, as a pure function: `step(session, event) -> (session, actions)`.

No clock, no sockets, no files: time is `Tick(now_s)`, everything else that happens is an event, everything
that shall be done is an action. `service.py` makes it happen. The rules:

- A task or word of a coordinator with a lower epoch than the highest seen is ignored (fencing).
- The same task is never started twice; if its update waits in the outbox, that one is sent again.
- A task for other work stops the training that runs.
- The device keeps the path of files that leads to the weights it last worked from. A task goes on from any
  point of it; one that goes on from elsewhere, or grows beyond the storage, is answered with E_BASE until the
  whole path comes. The end of a job, which brings the finished model, is treated alike.
- An update is sent until a receipt comes: at once, when the link or the coordinator comes back, and on a
  timer that doubles. Only a receipt makes the device forget it.
- A refused update was not counted: its content goes back into what is left over (error feedback), unless
  another update of this device was counted in its place.
"""

import math
from typing import Literal, get_args

from msgspec.structs import replace

from liberatai_agent.actions import (
    Action,
    DropBlobs,
    Emit,
    FetchBlobs,
    Forget,
    KeepPath,
    PublishReport,
    PublishState,
    ReadSpec,
    RememberEpoch,
    RestoreResidual,
    SendChunks,
    SendUpdate,
    StartTraining,
    StopTraining,
    StoreUpdate,
    WarmTrainer,
)
from liberatai_agent.events import (
    BlobFailed,
    BlobStored,
    CancelArrived,
    CoordinatorChanged,
    CreditArrived,
    GateChanged,
    Happened,
    LeftoverDropped,
    LinkDown,
    LinkUp,
    MachineChanged,
    OutboxStored,
    ReceiptArrived,
    SpecRead,
    Started,
    StoreFailed,
    TaskArrived,
    Tick,
    Tier,
    Trained,
    TrainingFailed,
    TrainingResult,
    UpdateDropped,
    Value,
)
from liberatai_core.contract.messages import (
    BlobRef,
    Cancel,
    Receipt,
    SparseMethod,
    Step,
    Task,
    TaskSpec,
    update_id,
)

Stage = Literal["none", "baseless", "fetching", "ready", "training", "storing", "failed"]

CODECS: tuple[str, ...] = get_args(SparseMethod)
"""Sparse methods that this agent knows (`sparsifier.methods.METHODS`); a task with another one is refused."""
RETRY_FIRST_S = 5.0
RETRY_MAX_S = 120.0
"""Pauses double from 5 s to 2 min: a restarting coordinator is found soon, a dead one is not hammered."""
FINAL_RETRY_MAX_S = 3600.0
"""For the path to a finished model: no round waits, nothing ends the questions, and each has 200 bytes."""
MAX_ATTEMPTS = 3
"""Trainings of one task that may die of a cause outside the task (killed, disk full)."""
MAX_FINISHED = 256
"""Finished tasks that are remembered: far more than a broker ever repeats."""
RETRYABLE = frozenset({"E_BUSY", "E_DISK", "E_INTERNAL", "E_LINK"})
"""Causes outside the task, which may go away."""


# --- the state ---------------------------------------------------------------------------------


class Pending(Value, frozen=True, kw_only=True):
    """An update without a receipt: sent `attempts` times, due again at `next_s`."""

    update_id: bytes
    job: str
    round: int
    attempts: int = 0
    next_s: float = 0.0


class Session(Value, frozen=True, kw_only=True):
    """Everything that the agent has to know between two events.

    Attributes:
        device: own name.
        away: the coordinator said goodbye or was lost.
        task, stage, attempts: the work under way. "baseless" without a task: it asks for the path to the
            finished model.
        began_s: when it began; its deadline counts from there, once the spec is known.
        spec: what the newest task's spec says, with the id of its blob.
        path: files on disk that lead to the weights of the last update, or of the finished model.
        chain: files that lead to the weights of `task`.
        refetched: the whole path was fetched a second time, because a digest was wrong.
        result: a training's result that the disk did not take yet.
        missing: blobs that are not on disk yet, for `task` or `final`.
        retry_at_s: when to try again what failed; None: nothing waits.
        reason: why it failed or waits.
        final: path of the finished model.
        reported: the last report that was published on this connection.
        events: number of events emitted.
        refusals: refused updates per code.
    """

    device: str
    now_s: float = 0.0
    connected: bool = False
    away: bool = False
    epoch: int = 0
    tier: Tier = "full"
    storage_bytes: int = 1 << 62
    fault: str = ""
    note: str = ""
    gate_open: bool = True
    gate_reason: str = ""
    task: Task | None = None
    stage: Stage = "none"
    began_s: float = 0.0
    spec: tuple[str, TaskSpec] | None = None
    path: tuple[Step, ...] = ()
    chain: tuple[Step, ...] = ()
    attempts: int = 0
    refetched: bool = False
    result: TrainingResult | None = None
    missing: tuple[BlobRef, ...] = ()
    retry_at_s: float | None = None
    reason: str = ""
    final: tuple[Step, ...] = ()
    pending: tuple[Pending, ...] = ()
    finished: tuple[bytes, ...] = ()
    reported: PublishReport | None = None
    events: int = 0
    refusals: tuple[tuple[str, int], ...] = ()

    @property
    def update_id(self) -> bytes:
        """Id of the update that the current task will give, empty without a task."""
        task = self.task
        return b"" if task is None else update_id(self.device, task.job, task.round, task.base, task.run)


Stepped = tuple[Session, tuple[Action, ...]]


def step(session: Session, event: Happened) -> Stepped:
    """Return the next state and what shall be done now, in this order."""
    session, actions = _react(session, event)
    report = report_of(session)
    if session.connected and report != session.reported:
        session, actions = replace(session, reported=report), (*actions, report)
    return session, actions


def report_of(session: Session) -> PublishReport:
    """Return what the device is doing, for people and for the coordinator."""
    s = session
    job, number = (s.task.job, s.task.round) if s.task else ("", 0)
    match s.stage:
        case "failed":
            return PublishReport(phase="failed", job=job, round=number, reason=s.reason[:512])
        case "training":
            return PublishReport(phase="training", job=job, round=number)
        case "storing":
            return PublishReport(phase="sending", job=job, round=number, reason=s.reason[:512])
        case "baseless":
            return PublishReport(phase="fetching", job=job, round=number, reason=s.reason[:512])
        case "ready":
            reason = s.reason if s.gate_open else s.gate_reason
            return PublishReport(phase="gated", job=job, round=number, reason=reason[:512])
    if s.missing or s.stage == "fetching":
        # A used-up link quota holds downloads too; its reason is the gate's.
        reason = s.reason or ("" if s.gate_open else s.gate_reason)
        return PublishReport(phase="fetching", job=job, round=number, reason=reason[:512])
    if s.pending:
        first = s.pending[0]
        return PublishReport(phase="sending", job=first.job, round=first.round)
    if not s.gate_open:
        return PublishReport(phase="gated", reason=s.gate_reason[:512])
    if s.fault:
        return PublishReport(phase="failed", reason=s.fault[:512])
    return PublishReport(phase="idle", reason=s.note[:512])


def _react(s: Session, event: Happened) -> Stepped:
    match event:
        case Tick(now_s=now):
            return _ticked(replace(s, now_s=max(now, s.now_s)))
        case LinkUp():
            return _linked(s)
        case LinkDown():
            return replace(s, connected=False, reported=None), ()
        case TaskArrived(task=task):
            return _assigned(s, task)
        case CancelArrived(cancel=cancel):
            return _cancelled(s, cancel)
        case CoordinatorChanged():
            return _coordinator(s, event)
        case BlobStored(blob=blob):
            return _stored_blob(s, blob)
        case BlobFailed():
            return _failed_blob(s, event)
        case SpecRead():
            return _spec_read(replace(s, spec=(event.blob, event.spec)))
        case Trained(update_id=uid, result=result):
            return _trained(s, uid, result)
        case TrainingFailed():
            return _training_failed(s, event)
        case LeftoverDropped(code=code, text=text):
            return _emit(s, "residual_dropped", code, text)
        case OutboxStored(update_id=uid):
            return _outboxed(s, uid)
        case StoreFailed():
            return _store_failed(s, event)
        case UpdateDropped():
            return _dropped(s, event)
        case ReceiptArrived(receipt=receipt):
            return _receipt(s, receipt)
        case CreditArrived():
            return _credit(s, event)
        case GateChanged(open=is_open, reason=reason):
            return _gate(replace(s, gate_open=is_open, gate_reason=reason))
        case MachineChanged():
            return _machine(s, event), ()
        case Started():
            pending = tuple(Pending(update_id=u.update_id, job=u.job, round=u.round) for u in event.unsent)
            finished = event.finished[-MAX_FINISHED:]
            s = replace(_machine(s, event), epoch=event.epoch, path=event.path)
            return replace(s, pending=pending, finished=finished), ()


def _machine(s: Session, event: Started | MachineChanged) -> Session:
    return replace(s, tier=event.tier, storage_bytes=event.storage_bytes, fault=event.fault, note=event.note)


# --- link and coordinator ----------------------------------------------------------------------


def _linked(s: Session) -> Stepped:
    s = replace(s, connected=True, reported=None)
    s, sends = _send_all(s)
    if s.missing and s.retry_at_s is not None:
        s = replace(s, retry_at_s=s.now_s)
    return s, (PublishState(), *sends)


def _coordinator(s: Session, event: CoordinatorChanged) -> Stepped:
    if event.epoch < s.epoch:
        return _emit(s, "stale_coordinator", "E_REPLAY", f"epoch {event.epoch}, {s.epoch} was seen")
    s, remember = _fence(s, event.epoch)
    was_away, s = s.away, replace(s, away=event.state != "online")
    if s.away or not (was_away or remember):
        return s, remember
    s, sends = _send_all(s)
    return s, (*remember, *sends)


def _fence(s: Session, epoch: int) -> Stepped:
    if epoch == s.epoch:
        return s, ()
    return replace(s, epoch=epoch), (RememberEpoch(epoch=epoch),)


def _emit(s: Session, name: str, code: str = "", text: str = "") -> Stepped:
    number = s.events + 1
    return replace(s, events=number), (Emit(number=number, name=name, code=code, text=text[:512]),)


LOCAL_ONLY = frozenset({"E_DATA", "E_TRAIN", "E_NONFINITE", "E_INTERNAL"})
"""Codes whose text may quote the data: a label, a row, a path, what a library says about a batch."""


def outward(code: str, text: str) -> str:
    """Return what may be told about a fault outside the device: never words about its data (promise P9).

    The whole text stays in the device's log, in `status` and in `doctor`.
    """
    if code not in LOCAL_ONLY:
        return text
    return f"{code}: the device's log and `liberatai-agent doctor` there say why"


# --- tasks -------------------------------------------------------------------------------------


def _assigned(s: Session, task: Task) -> Stepped:
    if task.epoch < s.epoch:
        return _emit(s, "stale_task", "E_REPLAY", f"epoch {task.epoch}, {s.epoch} was seen")
    s, remember = _fence(s, task.epoch)
    s, actions = _newest_task(s, task)
    return s, (*remember, *actions)


def _newest_task(s: Session, task: Task) -> Stepped:
    wanted = update_id(s.device, task.job, task.round, task.base, task.run)
    if any(p.update_id == wanted for p in s.pending):
        s, stopped = (s, ()) if s.update_id == wanted else _stop(s, "its update waits to be sent")
        s, sends = _send(s, wanted)
        return s, (*stopped, *sends)
    if task.task_id in s.finished:
        return s, ()
    if s.update_id == wanted and s.task is not None:
        # A restarted coordinator gives the same work again: it need not be done twice.
        if s.stage in ("ready", "training", "storing"):
            return (s if task.epoch == s.task.epoch else replace(s, task=task, began_s=s.now_s)), ()
        if task == s.task and s.stage != "baseless":
            return s, ()
    again = s.refetched and s.update_id == wanted
    s, stopped = _stop(s, f"task for round {task.round} of {task.job}")
    s, begun = _begin(replace(s, refetched=again), task)
    return s, (*stopped, *begun)


def _begin(s: Session, task: Task) -> Stepped:
    s = replace(s, task=task, began_s=s.now_s, final=(), missing=(), retry_at_s=None, attempts=0)
    if s.tier != "full":
        return _fail(s, "E_TIER", f"this device is of tier {s.tier} and cannot train")
    chain = joined(s.path, task.held, task.steps)
    if chain is None:
        return _baseless(s, NOT_HERE)
    if (size := _bytes(chain)) > s.storage_bytes:
        much = f"the model's files take {size} bytes, {s.storage_bytes} are allowed"
        # Keyframe and deltas from the start may be shorter than what has gathered here.
        return _baseless(s, much) if task.held else _fail(s, "E_QUOTA", much)
    s = replace(_making_room(s, chain), stage="fetching", chain=chain, reason="")
    refs = (*_refs(task.steps), *(() if s.spec and s.spec[0] == task.spec.blob else (task.spec,)))
    s = replace(s, missing=refs)
    s, on = (s, ()) if refs else _all_there(s)
    fetch = (FetchBlobs(refs=refs),) if refs else ()
    return s, (DropBlobs(keep=_kept(s)), WarmTrainer(), *fetch, *on)


def joined(path: tuple[Step, ...], held: bytes, steps: tuple[Step, ...]) -> tuple[Step, ...] | None:
    """Return the path to where `steps` lead, None if the device does not hold what they go on from."""
    if not held:
        return steps
    for number, one in enumerate(path):
        if one.digest == held:
            return (*path[: number + 1], *steps)
    return None


NOT_HERE = "what it goes on from is not here"


def _baseless(s: Session, text: str) -> Stepped:
    """Ask for the whole path; the coordinator gives the task, or the end of the job, again with it."""
    longest_s = FINAL_RETRY_MAX_S if s.task is None else RETRY_MAX_S
    s = _wait(replace(s, stage="baseless", missing=()), "E_BASE", text, longest_s)
    return _emit(s, "base_missing", "E_BASE", text)


def _making_room(s: Session, chain: tuple[Step, ...]) -> Session:
    """Keep the old path until the new one is worked from, unless both together are too much."""
    both = {one.blob.blob: one.blob.size_bytes for one in (*s.path, *chain)}
    if sum(both.values()) <= s.storage_bytes:
        return s
    shared = 0
    while shared < min(len(s.path), len(chain)) and s.path[shared] == chain[shared]:
        shared += 1
    return replace(s, path=s.path[:shared])


def _kept(s: Session) -> frozenset[str]:
    """Return the blobs that must stay on disk."""
    specs = [s.task.spec.blob] if s.task is not None else [] if s.spec is None else [s.spec[0]]
    return frozenset([*(one.blob.blob for one in (*s.path, *s.chain, *s.final)), *specs])


def _refs(steps: tuple[Step, ...]) -> tuple[BlobRef, ...]:
    return tuple({one.blob.blob: one.blob for one in steps}.values())


def _bytes(path: tuple[Step, ...]) -> int:
    return sum(ref.size_bytes for ref in _refs(path))


def _stop(s: Session, reason: str) -> Stepped:
    if s.task is None:
        return s, ()
    stopping = (StopTraining(reason=reason),) if s.stage == "training" else ()
    idle = replace(s, task=None, stage="none", chain=(), missing=(), retry_at_s=None, reason="")
    return replace(idle, result=None, attempts=0, refetched=False), stopping


def _fail(s: Session, code: str, text: str) -> Stepped:
    stopping = (StopTraining(reason=text),) if s.stage == "training" else ()
    s = replace(s, stage="failed", reason=f"{code}: {text}", missing=(), retry_at_s=None, result=None)
    s, told = _emit(s, "task_failed", code, text)
    return s, (*stopping, *told)


def _cancelled(s: Session, cancel: Cancel) -> Stepped:
    if cancel.epoch < s.epoch:
        return _emit(s, "stale_cancel", "E_REPLAY", f"epoch {cancel.epoch}, {s.epoch} was seen")
    s, actions = _fence(s, cancel.epoch)
    task = s.task
    if task is not None and (task.job != cancel.job or task.round > cancel.round):
        return s, actions
    s, stopped = _stop(s, "the round is over") if task is not None else (s, ())
    if not cancel.final and not cancel.held:
        return s, (*actions, *stopped)
    s, fetched = _fetch_final(s, cancel)
    return s, (*actions, *stopped, *fetched)


def _fetch_final(s: Session, cancel: Cancel) -> Stepped:
    chain = joined(s.path, cancel.held, cancel.final)
    if chain is None:
        return _baseless(_without_half_a_final(s), NOT_HERE)
    if chain == s.final:
        return _settled(s), ()
    if (size := _bytes(chain)) > s.storage_bytes:
        much = f"the finished model's files take {size} bytes, {s.storage_bytes} are allowed"
        if cancel.held:
            return _baseless(_without_half_a_final(s), much)
        return _emit(_settled(s), "final_model", "E_QUOTA", much)
    s = replace(_making_room(_settled(s), chain), final=chain, missing=_refs(cancel.final))
    drop = DropBlobs(keep=_kept(s))
    if s.missing:
        return s, (drop, FetchBlobs(refs=s.missing))
    s, kept = _final_there(s)
    return s, (drop, *kept)


def _settled(s: Session) -> Session:
    """Return the session without a question for the path to a finished model."""
    if s.stage != "baseless":
        return s
    return replace(s, stage="none", retry_at_s=None, reason="", attempts=0)


def _without_half_a_final(s: Session) -> Session:
    """Let a finished model go that is still being fetched: nothing is missing while a path is asked for."""
    return replace(s, final=()) if s.missing else s


def _final_there(s: Session) -> Stepped:
    return replace(s, path=s.final), (KeepPath(path=s.final),)


# --- blobs and training ------------------------------------------------------------------------


def _stored_blob(s: Session, blob: str) -> Stepped:
    left = tuple(ref for ref in s.missing if ref.blob != blob)
    if len(left) == len(s.missing):
        return s, ()
    s = replace(s, missing=left)
    if left:
        return s, ()
    if s.stage == "fetching":
        return _all_there(s)
    return _final_there(s) if s.final else (s, ())


def _all_there(s: Session) -> Stepped:
    s = replace(s, retry_at_s=None, reason="", attempts=0)
    if s.task is not None and (s.spec is None or s.spec[0] != s.task.spec.blob):
        return s, (ReadSpec(blob=s.task.spec.blob),)
    return _spec_read(s)


def _spec_read(s: Session) -> Stepped:
    """Go on with a task whose files are here, now that it is known what they are for."""
    task = s.task
    if s.stage != "fetching" or s.missing or task is None or s.spec is None or s.spec[0] != task.spec.blob:
        return s, ()
    spec = s.spec[1]
    if spec.codec not in CODECS:
        return _fail(s, "E_CODEC", f"unknown sparse method {spec.codec}")
    if spec.job != task.job:
        return _fail(s, "E_SCHEMA", f"a spec of job {spec.job}")
    return _start(replace(s, stage="ready"))


def _failed_blob(s: Session, event: BlobFailed) -> Stepped:
    task = s.task
    unread = task is not None and s.stage == "fetching" and event.blob == task.spec.blob
    if task is not None and unread and not s.missing:
        s = replace(s, missing=(task.spec,))  # it was there, and cannot be read any more
    elif all(ref.blob != event.blob for ref in s.missing):
        return s, ()
    if event.code in ("E_QUOTA", "E_SCHEMA") and s.stage == "fetching":
        return _fail(s, event.code, event.text)
    return _wait(s, event.code, event.text), ()


def _wait(s: Session, code: str, text: str, longest_s: float = RETRY_MAX_S) -> Session:
    """Plan another try of whatever failed."""
    return replace(
        s,
        attempts=s.attempts + 1,
        reason=f"{code}: {text}",
        retry_at_s=s.now_s + _pause(s.attempts, longest_s),
    )


def _pause(attempts: int, longest_s: float = RETRY_MAX_S) -> float:
    return min(longest_s, RETRY_FIRST_S * 2.0 ** min(attempts, 16))


def _start(s: Session) -> Stepped:
    if s.stage != "ready" or not s.gate_open or s.task is None or s.retry_at_s is not None:
        return s, ()
    if s.spec is None:
        return s, ()
    start = StartTraining(task=s.task, spec=s.spec[1], path=s.chain, update_id=s.update_id)
    return replace(s, stage="training", reason=""), (start,)


def _gate(s: Session) -> Stepped:
    if s.gate_open:
        return _start(s)
    if s.stage != "training":
        return s, ()
    return replace(s, stage="ready"), (StopTraining(reason=s.gate_reason),)


def _trained(s: Session, uid: bytes, result: TrainingResult) -> Stepped:
    task, spec = s.task, s.spec
    if s.stage != "training" or task is None or spec is None or s.update_id != uid:
        return s, ()
    s = replace(s, stage="storing", result=result, attempts=0)
    return s, (StoreUpdate(task=task, spec=spec[1], update_id=uid, result=result),)


def _training_failed(s: Session, event: TrainingFailed) -> Stepped:
    task = s.task
    if s.stage != "training" or task is None or s.update_id != event.update_id:
        return s, ()
    if event.code == "E_DIGEST" and not s.refetched:
        # A file may have rotted on the card: fetch the whole path again, once.
        s = replace(s, path=(), refetched=True)
        drop = DropBlobs(keep=frozenset({task.spec.blob}))
        if task.held:
            s, asked = _baseless(replace(s, chain=()), NOT_HERE)
            return s, (drop, *asked)
        refs = _refs(s.chain)
        return replace(s, stage="fetching", missing=refs), (drop, FetchBlobs(refs=refs))
    if event.code in RETRYABLE and s.attempts + 1 < MAX_ATTEMPTS:
        return _wait(replace(s, stage="ready"), event.code, event.text), ()
    return _fail(replace(s, stage="ready"), event.code, event.text)


def _store_failed(s: Session, event: StoreFailed) -> Stepped:
    if s.stage != "storing" or s.update_id != event.update_id:
        return s, ()
    return _wait(s, event.code, event.text), ()


# --- sending -----------------------------------------------------------------------------------


def _outboxed(s: Session, uid: bytes) -> Stepped:
    task = s.task
    if s.stage != "storing" or task is None or s.update_id != uid:
        return s, ()
    finished = (*s.finished, task.task_id)[-MAX_FINISHED:]
    pending = (*s.pending, Pending(update_id=uid, job=task.job, round=task.round))
    # On disk before the update is sent: the coordinator goes on from what it was made from.
    keep = () if s.path == s.chain else (KeepPath(path=s.chain),)
    s, _ = _stop(replace(s, path=s.chain), "")
    s, sends = _send(replace(s, finished=finished, pending=pending), uid)
    return s, (*keep, DropBlobs(keep=_kept(s)), *sends)


def _send_all(s: Session) -> Stepped:
    """Send everything at once, as if for the first time: something came back."""
    actions: tuple[Action, ...] = ()
    for waiting in s.pending:
        s = _with_pending(s, replace(waiting, attempts=0))
        s, sends = _send(s, waiting.update_id)
        actions += sends
    return s, actions


def _send(s: Session, uid: bytes, *, even_if_away: bool = False) -> Stepped:
    waiting = next((p for p in s.pending if p.update_id == uid), None)
    if waiting is None or not s.connected:
        return s, ()
    if s.away and not even_if_away:
        return _with_pending(s, replace(waiting, next_s=s.now_s + RETRY_MAX_S)), ()
    pause = RETRY_MAX_S if s.away else _pause(waiting.attempts)
    s = _with_pending(s, replace(waiting, attempts=waiting.attempts + 1, next_s=s.now_s + pause))
    return s, (SendUpdate(update_id=uid),)


def _with_pending(s: Session, changed: Pending) -> Session:
    return replace(s, pending=tuple(changed if p.update_id == changed.update_id else p for p in s.pending))


def _without(s: Session, uid: bytes) -> Session:
    return replace(s, pending=tuple(p for p in s.pending if p.update_id != uid))


def _receipt(s: Session, receipt: Receipt) -> Stepped:
    uid = receipt.update_id
    waiting = next((p for p in s.pending if p.update_id == uid), None)
    if waiting is None:
        return s, ()
    if receipt.accepted or receipt.code == "E_DUP":
        return _without(s, uid), (Forget(update_id=uid),)
    if receipt.retry:
        pause = _pause(waiting.attempts)
        return _with_pending(s, replace(waiting, attempts=waiting.attempts + 1, next_s=s.now_s + pause)), ()
    counts = dict(s.refusals)
    counts[receipt.code] = counts.get(receipt.code, 0) + 1
    s = replace(_without(s, uid), refusals=tuple(sorted(counts.items())))
    s, told = _emit(s, "update_refused", receipt.code, f"round {waiting.round}: {receipt.text}")
    # E_DUP_CONFLICT: another update of this round was counted, which holds the same learning.
    counted = receipt.code == "E_DUP_CONFLICT"
    return s, (Forget(update_id=uid) if counted else RestoreResidual(update_id=uid), *told)


def _credit(s: Session, event: CreditArrived) -> Stepped:
    waiting = next((p for p in s.pending if p.update_id == event.update_id), None)
    if waiting is None:
        return s, ()
    # The upload moves: the timer that would offer it anew starts over.
    s = _with_pending(s, replace(waiting, attempts=1, next_s=s.now_s + _pause(1)))
    if event.chunks == 0:
        return s, ()
    return s, (SendChunks(update_id=event.update_id, have=event.have, chunks=event.chunks),)


def _dropped(s: Session, event: UpdateDropped) -> Stepped:
    if all(p.update_id != event.update_id for p in s.pending):
        return s, ()
    return _emit(_without(s, event.update_id), "update_dropped", "E_QUOTA", event.reason)


# --- time --------------------------------------------------------------------------------------


def _ticked(s: Session) -> Stepped:
    actions: tuple[Action, ...] = ()
    if s.now_s > _deadline_s(s) and s.stage in ("baseless", "fetching", "ready", "training", "storing"):
        s, failed = _fail(s, "E_TRAIN", "the deadline passed")
        actions += failed
    if s.retry_at_s is not None and s.now_s >= s.retry_at_s:
        s, tried = _retry(replace(s, retry_at_s=None))
        actions += tried
    for waiting in s.pending:
        if waiting.next_s <= s.now_s:
            s, sends = _send(s, waiting.update_id, even_if_away=True)
            actions += sends
    return s, actions


def _deadline_s(s: Session) -> float:
    if s.task is None or s.spec is None or s.spec[0] != s.task.spec.blob:
        return math.inf
    return s.began_s + s.spec[1].deadline_s


def _retry(s: Session) -> Stepped:
    if s.stage == "storing" and s.task is not None and s.spec is not None and s.result is not None:
        return s, (StoreUpdate(task=s.task, spec=s.spec[1], update_id=s.update_id, result=s.result),)
    if s.stage == "baseless":
        return _baseless(s, s.reason.partition(": ")[2])
    if s.missing:
        return s, (FetchBlobs(refs=s.missing),)
    return _start(s)
