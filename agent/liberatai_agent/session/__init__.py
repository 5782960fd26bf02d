"""What happens on a device, as a pure function: `step(session, event) -> (session, actions)`.

No clock, no sockets, no files: time is `Tick(now_s)`, everything else that happens is an event, everything
that shall be done is an action. `service` makes it happen, and tells the time when `due_s` says. The rules:

- A task or word of a coordinator with a lower epoch than the highest seen is ignored (fencing).
- The same task is never started twice; if its update waits in the outbox, that one is sent again.
- A task for other work stops the training that runs.
- The device keeps the path of files that leads to the weights it last worked from. A task goes on from any
  point of it; one that goes on from elsewhere, or grows beyond the storage, is answered with E_BASE until the
  whole path comes. The end of a job, which brings the finished model, is treated alike.
- An update is sent until a receipt comes (`sending`). Only a receipt makes the device forget it.
- A refused update was not counted: its content goes back into what is left over (error feedback), unless
  another update of this device was counted in its place.
- When the day's quota of the link is used up, nothing new is fetched or trained. A training that runs is
  finished and sent: its bytes are spent already.

`state` has the data, `work` the task under way as a table of state and event, `sending` the updates without a
receipt, `telling` what is said of all that and when, `paths` the files that lead to weights.
"""

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from liberatai_agent.actions import PublishCapability, PublishState, RaiseSession, RememberEpoch, ShowEpoch
from liberatai_agent.events import (
    BlobFailed,
    BlobStored,
    BrokerRefused,
    CancelArrived,
    ChunksSent,
    CoordinatorChanged,
    CreditArrived,
    GateChanged,
    Happened,
    LeftoverDropped,
    LinkDown,
    LinkUp,
    MachineChanged,
    OutboxStored,
    QuotaChanged,
    ReceiptArrived,
    Renumbered,
    SessionBehind,
    SpecRead,
    Started,
    StateDamaged,
    StoreFailed,
    TaskArrived,
    Tick,
    Trained,
    TrainingFailed,
    UpdateDropped,
)
from liberatai_agent.session.sending import (
    chunks_sent,
    credited,
    dropped,
    pending_from,
    pending_of,
    quota_renewed,
    receipted,
    send,
    send_all,
    send_due,
    with_pending,
)
from liberatai_agent.session.state import (
    MAX_EPOCH,
    MAX_FINISHED,
    MAX_REFUSED,
    SHOW_S,
    Session,
    Stepped,
    Storing,
    emit,
    retry_of,
)
from liberatai_agent.session.telling import is_news, report_of, tell
from liberatai_agent.session.work import assigned, cancelled, deadline_s, link_returned, work_due, worked

__all__ = ["Session", "due_s", "report_of", "step"]


def step(session: Session, event: Happened) -> Stepped:
    """Return the next state and what shall be done now, in this order."""
    session, actions = _react(session, event)
    session, told = tell(session)
    return session, (*actions, *told)


def due_s(s: Session) -> float:
    """Return when time alone brings something; infinity if it does not."""
    retry = retry_of(s.work)
    # The deadline itself is in time.
    times = [deadline_s(s) + 0.001]
    if retry is not None:
        times.append(retry.at_s)
    if s.connected and s.measured:
        times += [one.next_s for one in s.pending]
        if s.wished is not None:
            times.append(s.say_at_s)
    return min(times)


def _react(s: Session, event: Happened) -> Stepped:
    match event:
        case Tick(now_s=now):
            return _ticked(replace(s, now_s=max(now, s.now_s)))
        case LinkUp(packet_bytes=size):
            s = replace(s, connected=True, packet_bytes=size, said=None, wished=None, told=None)
            return _introduced(s) if s.measured else (s, ())
        case LinkDown():
            return replace(s, connected=False, said=None, wished=None, refused=()), ()
        case BrokerRefused():
            return _refused(s, event)
        case TaskArrived(task=task):
            return _stale(s, "stale_task", task.epoch) or _in_epoch(s, task.epoch, assigned, task)
        case CancelArrived(cancel=cancel):
            if cancel.epoch < s.epoch and (s.task is None or s.task.job != cancel.job):
                # The end of a job that is long over stands at the broker, where every connection finds it.
                return s, ()
            return _stale(s, "stale_cancel", cancel.epoch) or _in_epoch(s, cancel.epoch, cancelled, cancel)
        case CoordinatorChanged():
            return _stale(s, "stale_coordinator", event.epoch) or _coordinator(s, event)
        case SessionBehind(session=known):
            return s, ((RaiseSession(known=known),) if known > s.number else ())
        case Renumbered(number=number):
            return replace(s, number=number), ()
        case BlobStored() | BlobFailed() | SpecRead() | Trained() | TrainingFailed():
            return worked(s, event)
        case OutboxStored():
            return _stored(s, event)
        case StoreFailed():
            return worked(s, event)
        case LeftoverDropped(code=code, text=text):
            return emit(s, "residual_dropped", code, text)
        case StateDamaged(what=what):
            return emit(s, "state_damaged", "E_DAMAGED", what)
        case UpdateDropped():
            return dropped(s, event)
        case ReceiptArrived(receipt=receipt):
            return receipted(s, receipt)
        case CreditArrived():
            return credited(s, event)
        case ChunksSent(update_id=uid):
            return chunks_sent(s, uid)
        case GateChanged():
            return _gate(s, event)
        case QuotaChanged(words=words):
            s = replace(s, quota=words)
            return worked(s if words else quota_renewed(s), event)
        case MachineChanged():
            return _machine(s, event)
        case Started():
            return _started(s, event)


def _gate(s: Session, event: GateChanged) -> Stepped:
    news = event.resting != s.resting and s.connected and s.measured
    s = replace(s, gate_open=event.open, gate_reason=event.reason, resting=event.resting)
    s, actions = worked(s, event)
    # Whoever rests is not invited, and is not waited for.
    return s, (*actions, PublishState(resting=s.resting)) if news else actions


def _refused(s: Session, event: BrokerRefused) -> Stepped:
    """Remember what the broker does not want; what is too long for it goes in smaller pieces from now on."""
    if event.packet_bytes:
        return send_all(replace(s, packet_bytes=min(s.packet_bytes, event.packet_bytes)))
    others = tuple(one for one in s.refused if one[0] != event.topic)
    return replace(s, refused=(*others, (event.topic, event.words))[-MAX_REFUSED:]), ()


def _ticked(s: Session) -> Stepped:
    s, work = work_due(s)
    s, sends = send_due(s)
    return s, (*work, *sends)


def _started(s: Session, event: Started) -> Stepped:
    s = replace(s, pending=tuple(map(pending_from, event.unsent)), number=event.number)
    s = replace(s, tier=event.tier, storage_bytes=event.storage_bytes, fault=event.fault, note=event.note)
    s = replace(s, measured=event.measured, epoch=event.epoch, path=event.path)
    return replace(s, finished=event.finished[-MAX_FINISHED:]), ()


def _machine(s: Session, event: MachineChanged) -> Stepped:
    was_measured, found = s.measured, event.capability
    s = replace(s, tier=event.tier, storage_bytes=event.storage_bytes, fault=event.fault, note=event.note)
    s = replace(s, measured=True, found=found)
    if not s.connected or found is None:
        return s, ()
    if not was_measured:
        return _introduced(s)
    if not is_news(found, s.told):
        return s, ()
    return replace(s, told=found), (PublishCapability(capability=found),)


def _introduced(s: Session) -> Stepped:
    """Say who is there, and send everything: the connection is new, or the first look is over."""
    s, sends = send_all(link_returned(s))
    return replace(s, told=s.found), (PublishState(capability=s.found, resting=s.resting), *sends)


def _stored(s: Session, event: OutboxStored) -> Stepped:
    """Send what is on disk now, whatever has come in between."""
    if isinstance(s.work, Storing) and s.update_id == event.update_id:
        return worked(s, event)
    if pending_of(s, event.update_id) is not None:
        return s, ()
    s, sends = send(with_pending(s, event), event.update_id)
    return s, sends


def _stale(s: Session, name: str, epoch: int) -> Stepped | None:
    """Return what is said to a coordinator whose epoch is over, None if it is not."""
    if epoch >= s.epoch:
        return None
    show = name == "stale_coordinator" and s.now_s >= s.shown_s + SHOW_S
    s, told = emit(replace(s, stale=epoch), name, "E_REPLAY", f"epoch {epoch}, {s.epoch} was seen")
    return (replace(s, shown_s=s.now_s), (*told, ShowEpoch())) if show else (s, told)


def _in_epoch(s: Session, epoch: int, handle: Callable[[Session, Any], Stepped], word: Any) -> Stepped:
    s, remember = _fenced(s, epoch)
    s, actions = handle(s, word)
    return s, (*remember, *actions)


def _fenced(s: Session, epoch: int, word: bytes = b"") -> Stepped:
    """Believe nothing below this epoch any more."""
    s = replace(s, stale=0)
    if epoch == s.epoch or epoch > MAX_EPOCH:
        return s, ()
    return replace(s, epoch=epoch), (RememberEpoch(epoch=epoch, word=word),)


def _coordinator(s: Session, event: CoordinatorChanged) -> Stepped:
    s, remember = _fenced(s, event.epoch, event.word)
    was_away, s = s.away, replace(s, away=event.state != "online", coordinator=event.state)
    if s.away or not (was_away or remember):
        return s, remember
    s, sends = send_all(s)
    return s, (*remember, *sends)
