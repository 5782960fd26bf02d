"""The work of a device: what each state of it makes of each event. The table is at the end."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from liberatai_agent.actions import (
    Action,
    DropBlobs,
    FetchBlobs,
    KeepPath,
    ReadSpec,
    StartTraining,
    StopTraining,
    StoreUpdate,
    WarmTrainer,
)
from liberatai_agent.events import (
    BlobFailed,
    BlobStored,
    GateChanged,
    OutboxStored,
    QuotaChanged,
    SpecRead,
    StoreFailed,
    Trained,
    TrainingFailed,
)
from liberatai_agent.session.fits import Limits, require_fits, trainer_of
from liberatai_agent.session.paths import joined, kept, refs, size_bytes, with_room
from liberatai_agent.session.sending import pending_of, send, with_pending
from liberatai_agent.session.state import (
    FINAL_RETRY_MAX_S,
    MAX_ATTEMPTS,
    RETRY_MAX_S,
    AskingForPath,
    Assignment,
    Failed,
    Fetching,
    FetchingFinal,
    Idle,
    ReadingSpec,
    Ready,
    Session,
    Stepped,
    Storing,
    Training,
    assignment_of,
    emit,
    final_of,
    later,
    retry_of,
    with_work,
)
from liberatai_agent.session.telling import waits_for
from liberatai_core.contract.messages import SPARSE_METHODS, BlobRef, Cancel, Step, Task, TaskSpec, update_id
from liberatai_core.errors import LiberataiError
from liberatai_core.structure import trains_head

RETRYABLE = frozenset({"E_BUSY", "E_DISK", "E_INTERNAL", "E_LINK"})
"""Causes outside the task, which may go away."""
NOT_HERE = "what it goes on from is not here"


# --- a task begins -----------------------------------------------------------------------------


def assigned(s: Session, task: Task) -> Stepped:
    """Take on a task, unless it is done or under way already."""
    wanted = update_id(s.device, task.job, task.round, task.base, task.run)
    if pending_of(s, wanted) is not None:
        s, stopped = (s, ()) if s.update_id == wanted else stop(s, "its update waits to be sent")
        s, sends = send(s, wanted)
        return s, (*stopped, *sends)
    if task.task_id in s.finished:
        return s, ()
    work, known = s.work, assignment_of(s.work)
    is_known = known is not None and s.update_id == wanted
    if known is not None and is_known:
        # A restarted coordinator gives the same work again: it need not be done twice.
        if isinstance(work, Ready | Training | Storing):
            newer = replace(known, task=task, began_s=s.now_s)
            return (
                s if task.epoch == known.task.epoch else with_work(s, replace(work, assignment=newer))
            ), ()
        if task == known.task and not isinstance(work, AskingForPath):
            return s, ()
    s, stopped = stop(s, f"task for round {task.round} of {task.job}")
    again = known is not None and is_known and known.refetched
    s, begun = _begin(s, Assignment(task=task, began_s=s.now_s, refetched=again))
    return s, (*stopped, *begun)


def _begin(s: Session, assignment: Assignment) -> Stepped:
    task = assignment.task
    if s.tier == "observe":
        return _fail(s, assignment, "E_TIER", f"this device is of tier {s.tier} and cannot train")
    chain = joined(s.path, task.held, task.steps)
    if chain is None:
        return _ask_for_path(s, assignment, NOT_HERE)
    if (size := size_bytes(chain)) > s.storage_bytes:
        much = f"the model's files take {size} bytes, {s.storage_bytes} are allowed"
        # Keyframe and deltas from the start may be shorter than what has gathered here.
        return _ask_for_path(s, assignment, much) if task.held else _fail(s, assignment, "E_QUOTA", much)
    s = replace(s, path=with_room(s.path, chain, s.storage_bytes))
    missing = (*refs(task.steps), *(() if s.spec and s.spec[0] == task.spec.blob else (task.spec,)))
    if missing:
        s = with_work(s, Fetching(assignment=assignment, chain=chain, missing=missing))
        return s, (DropBlobs(keep=kept(s)), WarmTrainer(), *_fetch(s, missing))
    s = with_work(s, ReadingSpec(assignment=assignment, chain=chain))
    drop = DropBlobs(keep=kept(s))
    s, on = _read_spec(s, ReadingSpec(assignment=assignment, chain=chain))
    return s, (drop, WarmTrainer(), *on)


def _fetch(s: Session, missing: tuple[BlobRef, ...]) -> tuple[Action, ...]:
    """Ask for files, unless the day's quota is used up: they are asked for when it is not."""
    return () if s.quota else (FetchBlobs(refs=missing),)


def _ask_for_path(s: Session, assignment: Assignment | None, text: str, attempts: int = 0) -> Stepped:
    """Ask for the whole path; the coordinator gives the task, or the end of the job, again with it."""
    longest_s = FINAL_RETRY_MAX_S if assignment is None else RETRY_MAX_S
    retry = later(s, attempts, f"E_BASE: {text}"[:512], longest_s)
    final = final_of(s.work) if assignment is None else ()
    work = AskingForPath(assignment=assignment, attempts=attempts + 1, retry=retry, final=final)
    return emit(with_work(s, work), "base_missing", "E_BASE", text)


def _fail(s: Session, assignment: Assignment, code: str, text: str) -> Stepped:
    stopping = (StopTraining(reason=text),) if isinstance(s.work, Training) else ()
    s, told = emit(
        with_work(s, Failed(assignment=assignment, reason=f"{code}: {text}")), "task_failed", code, text
    )
    return s, (*stopping, *told)


def stop(s: Session, reason: str) -> Stepped:
    """Let go of the task under way."""
    if assignment_of(s.work) is None:
        return s, ()
    stopping = (StopTraining(reason=reason),) if isinstance(s.work, Training) else ()
    return with_work(s, Idle()), stopping


# --- a job ends --------------------------------------------------------------------------------


def cancelled(s: Session, cancel: Cancel) -> Stepped:
    """End a round for this device, and bring the finished model if there is one."""
    task = s.task
    if task is not None and (task.job != cancel.job or task.round > cancel.round):
        return s, ()
    s, stopped = stop(s, "the round is over")
    if not cancel.final and not cancel.held:
        return s, stopped
    s, fetched = _fetch_final(s, cancel)
    return s, (*stopped, *fetched)


def _fetch_final(s: Session, cancel: Cancel) -> Stepped:
    chain = joined(s.path, cancel.held, cancel.final)
    if chain is None:
        return _ask_for_path(_without_half_a_final(s), None, NOT_HERE)
    if chain == final_of(s.work):
        return (with_work(s, Idle(final=chain)) if isinstance(s.work, AskingForPath) else s), ()
    if (size := size_bytes(chain)) > s.storage_bytes:
        much = f"the finished model's files take {size} bytes, {s.storage_bytes} are allowed"
        if cancel.held:
            return _ask_for_path(_without_half_a_final(s), None, much)
        settled = with_work(s, Idle(final=final_of(s.work))) if isinstance(s.work, AskingForPath) else s
        return emit(settled, "final_model", "E_QUOTA", much)
    s = replace(s, path=with_room(s.path, chain, s.storage_bytes))
    missing = refs(cancel.final)
    if missing:
        s = with_work(s, FetchingFinal(final=chain, missing=missing))
        return s, (DropBlobs(keep=kept(s)), *_fetch(s, missing))
    s, stored = _final_is_here(s, chain)
    return s, (DropBlobs(keep=kept(s)), *stored)


def _without_half_a_final(s: Session) -> Session:
    """Let a finished model go that is still being fetched."""
    return with_work(s, Idle()) if isinstance(s.work, FetchingFinal) else s


def _final_is_here(s: Session, final: tuple[Step, ...]) -> Stepped:
    return replace(s, path=final, work=Idle(final=final)), (_keep(s, final),)


def _keep(s: Session, path: tuple[Step, ...]) -> KeepPath:
    return KeepPath(path=path, spec=None if s.spec is None else s.spec[1])


def _final_blob_stored(s: Session, work: FetchingFinal, event: BlobStored) -> Stepped:
    left = tuple(ref for ref in work.missing if ref.blob != event.blob)
    if not left:
        return _final_is_here(s, work.final)
    return (with_work(s, replace(work, missing=left)) if left != work.missing else s), ()


# --- files -------------------------------------------------------------------------------------


def _blob_stored(s: Session, work: Fetching, event: BlobStored) -> Stepped:
    left = tuple(ref for ref in work.missing if ref.blob != event.blob)
    if left:
        return (with_work(s, replace(work, missing=left)) if left != work.missing else s), ()
    return _read_spec(s, ReadingSpec(assignment=work.assignment, chain=work.chain))


def _blob_failed(s: Session, work: Fetching | FetchingFinal, event: BlobFailed) -> Stepped:
    if all(ref.blob != event.blob for ref in work.missing):
        return s, ()
    if isinstance(work, Fetching) and event.code in ("E_QUOTA", "E_SCHEMA"):
        return _fail(s, work.assignment, event.code, event.text)
    retry = later(s, work.attempts, f"{event.code}: {event.text}"[:512])
    return with_work(s, replace(work, attempts=work.attempts + 1, retry=retry)), ()


def _fetch_again(s: Session, work: Fetching | FetchingFinal) -> Stepped:
    return s, _fetch(s, work.missing)


def _read_spec(s: Session, work: ReadingSpec) -> Stepped:
    s, blob = with_work(s, work), work.assignment.task.spec.blob
    if s.spec is None or s.spec[0] != blob:
        return s, (ReadSpec(blob=blob),)
    return _spec_known(s, work, s.spec[1])


def _spec_read(s: Session, work: ReadingSpec, event: SpecRead) -> Stepped:
    if event.blob != work.assignment.task.spec.blob:
        return s, ()
    return _spec_known(replace(s, spec=(event.blob, event.spec)), work, event.spec)


def _spec_known(s: Session, work: ReadingSpec, spec: TaskSpec) -> Stepped:
    """Go on with a task whose files are here, now that it is known what they are for."""
    if spec.codec not in SPARSE_METHODS:
        return _fail(s, work.assignment, "E_CODEC", f"unknown sparse method {spec.codec}")
    if spec.job != work.assignment.task.job:
        return _fail(s, work.assignment, "E_SCHEMA", f"a spec of job {spec.job}")
    if s.tier == "head" and not trains_head(spec.structure):
        return _fail(s, work.assignment, "E_TIER", "this device trains the heads of networks only")
    if s.found is not None:
        given = Limits(
            memory_bytes=s.found.memory_bytes or 1 << 62,
            runtimes=s.found.runtimes or ("torch",),
            samples=s.found.samples,
        )
        try:
            require_fits(spec, work.assignment.task.density, given, trainer_of(spec, given))
        except LiberataiError as error:
            return _fail(s, work.assignment, error.code, str(error))
    return _try_start(s, Ready(assignment=work.assignment, chain=work.chain, spec=spec))


def _spec_unreadable(s: Session, work: ReadingSpec, event: BlobFailed) -> Stepped:
    if event.blob != work.assignment.task.spec.blob:
        return s, ()
    missing = (work.assignment.task.spec,)
    fetching = Fetching(assignment=work.assignment, chain=work.chain, missing=missing)
    return _blob_failed(with_work(s, fetching), fetching, event)


# --- training ----------------------------------------------------------------------------------


def _try_start(s: Session, work: Ready) -> Stepped:
    s = with_work(s, work)
    if waits_for(s) or work.retry is not None:
        return s, ()
    task = work.assignment.task
    start = StartTraining(task=task, spec=work.spec, path=work.chain, update_id=s.update_id)
    training = Training(assignment=work.assignment, chain=work.chain, spec=work.spec, attempts=work.attempts)
    return with_work(s, training), (start,)


def _gate_moved(s: Session, work: Ready, _: GateChanged | QuotaChanged) -> Stepped:
    return _try_start(s, work)


def _gate_while_training(s: Session, work: Training, _: GateChanged) -> Stepped:
    if s.gate_open:
        return s, ()
    ready = Ready(assignment=work.assignment, chain=work.chain, spec=work.spec, attempts=work.attempts)
    return with_work(s, ready), (StopTraining(reason=s.gate_reason),)


def _quota_moved(s: Session, work: Fetching | FetchingFinal, _: QuotaChanged) -> Stepped:
    # What waits for another try after a failure is asked for then.
    return s, (() if work.retry is not None else _fetch(s, work.missing))


def _trained(s: Session, work: Training, event: Trained) -> Stepped:
    if s.update_id != event.update_id:
        return s, ()
    storing = Storing(assignment=work.assignment, chain=work.chain, spec=work.spec, result=event.result)
    return _store(with_work(s, storing), storing)


def _store(s: Session, work: Storing) -> Stepped:
    task = work.assignment.task
    return s, (StoreUpdate(task=task, spec=work.spec, update_id=s.update_id, result=work.result),)


def _training_failed(s: Session, work: Training, event: TrainingFailed) -> Stepped:
    if s.update_id != event.update_id:
        return s, ()
    ready = Ready(assignment=work.assignment, chain=work.chain, spec=work.spec)
    if event.code == "E_DIGEST" and not work.assignment.refetched:
        return _fetch_whole_path(with_work(s, ready), ready)
    if event.code in RETRYABLE and work.attempts + 1 < MAX_ATTEMPTS:
        retry = later(s, work.attempts, f"{event.code}: {event.text}"[:512])
        return with_work(s, replace(ready, attempts=work.attempts + 1, retry=retry)), ()
    return _fail(with_work(s, ready), work.assignment, event.code, event.text)


def _fetch_whole_path(s: Session, work: Ready) -> Stepped:
    """Fetch all files again, once: one may have rotted on the card."""
    assignment = replace(work.assignment, refetched=True)
    drop = DropBlobs(keep=frozenset({assignment.task.spec.blob}))
    s = replace(s, path=())
    if assignment.task.held:
        s, asked = _ask_for_path(s, assignment, NOT_HERE)
        return s, (drop, *asked)
    missing = refs(work.chain)
    s = with_work(s, Fetching(assignment=assignment, chain=work.chain, missing=missing))
    return s, (drop, *_fetch(s, missing))


def _store_failed(s: Session, work: Storing, event: StoreFailed) -> Stepped:
    if s.update_id != event.update_id:
        return s, ()
    if event.code not in RETRYABLE:
        # It can never be stored: it breaks a bound, say. The next task begins afresh.
        return _fail(s, work.assignment, event.code, event.text)
    retry = later(s, work.attempts, f"{event.code}: {event.text}"[:512])
    return with_work(s, replace(work, attempts=work.attempts + 1, retry=retry)), ()


def _stored(s: Session, work: Storing, event: OutboxStored) -> Stepped:
    task = work.assignment.task
    event = replace(event, job=task.job, round=task.round)
    # On disk before the update is sent: the coordinator goes on from what it was made from.
    keep = () if s.path == work.chain else (_keep(s, work.chain),)
    s = with_pending(replace(s, path=work.chain, work=Idle()), event)
    drop = DropBlobs(keep=kept(s))
    s, sends = send(s, event.update_id)
    return s, (*keep, drop, *sends)


# --- time --------------------------------------------------------------------------------------


def deadline_s(s: Session) -> float:
    """Return when the task under way has taken too long; infinity if nothing says so."""
    assignment = assignment_of(s.work)
    if assignment is None or isinstance(s.work, Failed):
        return math.inf
    if s.spec is None or s.spec[0] != assignment.task.spec.blob:
        return math.inf
    return assignment.began_s + s.spec[1].deadline_s


def work_due(s: Session) -> Stepped:
    """Do what time alone brings: the end of a deadline, another try."""
    actions: tuple[Action, ...] = ()
    assignment = assignment_of(s.work)
    if assignment is not None and s.now_s > deadline_s(s):
        s, actions = _fail(s, assignment, "E_TRAIN", "the deadline passed")
    retry = retry_of(s.work)
    if retry is None or s.now_s < retry.at_s:
        return s, actions
    s, tried = _try_again(s)
    return s, (*actions, *tried)


def link_returned(s: Session) -> Session:
    """Ask for files that failed at once: the new connection may have them."""
    retry = retry_of(s.work)
    if retry is None or not isinstance(s.work, Fetching | FetchingFinal):
        return s
    return with_work(s, replace(s.work, retry=replace(retry, at_s=s.now_s)))


def _try_again(s: Session) -> Stepped:
    match s.work:
        case AskingForPath(assignment=assignment, attempts=attempts, retry=retry):
            return _ask_for_path(s, assignment, retry.reason.partition(": ")[2], attempts)
        case Fetching() | FetchingFinal() as work:
            work = replace(work, retry=None)
            return _fetch_again(with_work(s, work), work)
        case Ready() as work:
            return _try_start(s, replace(work, retry=None))
        case Storing() as work:
            work = replace(work, retry=None)
            return _store(with_work(s, work), work)
        case _:
            return s, ()


# --- the table ---------------------------------------------------------------------------------

Handler = Callable[[Session, Any, Any], Stepped]

TABLE: Mapping[type, Mapping[type, Handler]] = {
    Idle: {},
    FetchingFinal: {
        BlobStored: _final_blob_stored,
        BlobFailed: _blob_failed,
        QuotaChanged: _quota_moved,
    },
    AskingForPath: {},
    Fetching: {BlobStored: _blob_stored, BlobFailed: _blob_failed, QuotaChanged: _quota_moved},
    ReadingSpec: {SpecRead: _spec_read, BlobFailed: _spec_unreadable},
    Ready: {GateChanged: _gate_moved, QuotaChanged: _gate_moved},
    Training: {Trained: _trained, TrainingFailed: _training_failed, GateChanged: _gate_while_training},
    Storing: {OutboxStored: _stored, StoreFailed: _store_failed},
    Failed: {},
}
"""What each state makes of each event. What is not here changes nothing: a word about work that is over."""


def worked(s: Session, event: Any) -> Stepped:
    """Return what the work under way makes of an event."""
    handler = TABLE[type(s.work)].get(type(event))
    return (s, ()) if handler is None else handler(s, s.work, event)
