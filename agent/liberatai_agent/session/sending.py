"""Updates without a receipt: when each is sent, how, and what an answer to it means.

Each is sent until a receipt comes: at once when the link or the coordinator comes back, and on a timer that
doubles. A long one is offered, and its chunks follow as credit allows: never more under way than the credit
says, each at most once per offer. When the day's quota is used up, each byte of an update goes at most once
more until the next day: it is small, and without it what it cost was spent for nothing.
"""

import math

from msgspec.structs import replace

from liberatai_agent.actions import Action, Forget, RestoreResidual, SendChunks, SendOffer, SendUpdate
from liberatai_agent.events import CreditArrived, OutboxStored, Unsent, UpdateDropped
from liberatai_agent.session.state import MAX_FINISHED, RETRY_MAX_S, Pending, Session, Stepped, emit, pause_s
from liberatai_core.contract import chunks
from liberatai_core.contract.limits import MAX_CHUNKS, WINDOW_CHUNKS
from liberatai_core.contract.messages import Receipt

WHOLE = 0
"""Number that stands for an update in one message."""


def pending_of(s: Session, uid: bytes) -> Pending | None:
    """Return the update that waits under this id."""
    return next((waiting for waiting in s.pending if waiting.update_id == uid), None)


def pending_from(stored: Unsent | OutboxStored) -> Pending:
    """Return an update of the outbox as one that waits to be sent."""
    return Pending(
        update_id=stored.update_id,
        job=stored.job,
        round=stored.round,
        transfer=stored.transfer,
        size_bytes=stored.size_bytes,
    )


def with_pending(s: Session, stored: OutboxStored) -> Session:
    """Return the session with one more update to send; its task is done."""
    finished = (*s.finished, stored.update_id)[-MAX_FINISHED:]
    return replace(s, finished=finished, pending=(*s.pending, pending_from(stored)))


def send_all(s: Session) -> Stepped:
    """Send everything at once, as if for the first time: something came back."""
    actions: tuple[Action, ...] = ()
    for waiting in s.pending:
        s = _changed(s, replace(waiting, attempts=0))
        s, sends = send(s, waiting.update_id)
        actions += sends
    return s, actions


def send_due(s: Session) -> Stepped:
    """Send what its timer says."""
    actions: tuple[Action, ...] = ()
    for waiting in s.pending:
        if waiting.next_s <= s.now_s:
            s, sends = send(s, waiting.update_id, even_if_away=True)
            actions += sends
    return s, actions


def send(s: Session, uid: bytes, *, even_if_away: bool = False) -> Stepped:
    """Send or offer one update now, unless nobody is there."""
    waiting = pending_of(s, uid)
    if waiting is None or not s.connected or not s.measured:
        return s, ()
    if s.away and not even_if_away:
        return _changed(s, replace(waiting, next_s=s.now_s + RETRY_MAX_S)), ()
    pause = RETRY_MAX_S if s.away else pause_s(waiting.attempts)
    waiting = replace(waiting, attempts=waiting.attempts + 1, next_s=s.now_s + pause, sent=frozenset())
    if waiting.size_bytes > s.single_bytes:
        offered = replace(waiting, chunk_bytes=s.chunk_bytes)
        return _changed(s, offered), (SendOffer(update_id=uid, chunk_bytes=s.chunk_bytes),)
    if s.quota and WHOLE in waiting.over_quota:
        return _changed(s, waiting), ()
    over = waiting.over_quota | {WHOLE} if s.quota else waiting.over_quota
    return _changed(s, replace(waiting, over_quota=over)), (SendUpdate(update_id=uid),)


def credited(s: Session, event: CreditArrived) -> Stepped:
    """Send the next chunks of an upload."""
    waiting = next((one for one in s.pending if one.transfer == event.transfer), None)
    if waiting is None or not s.connected:
        return s, ()
    if not 0 < waiting.size_bytes <= waiting.chunk_bytes * MAX_CHUNKS:
        return s, ()
    lacking = chunks.missing(event.have, chunks.count(waiting.size_bytes, waiting.chunk_bytes))
    under_way = waiting.sent.intersection(lacking)
    unsent = [n for n in lacking if n not in waiting.sent and not (s.quota and n in waiting.over_quota)]
    numbers = tuple(unsent[: max(0, min(event.chunks, WINDOW_CHUNKS) - len(under_way))])
    if not numbers:
        # A repetition, or no credit: the timer that offers it anew goes on.
        return s, ()
    over = waiting.over_quota.union(numbers) if s.quota else waiting.over_quota
    # Until the link has taken them, which may be long: see `chunks_sent`.
    moved = replace(waiting, attempts=1, next_s=math.inf, sent=waiting.sent.union(numbers))
    s = _changed(s, replace(moved, over_quota=over))
    uid, size = waiting.update_id, waiting.chunk_bytes
    return s, (SendChunks(update_id=uid, chunk_bytes=size, numbers=numbers),)


def chunks_sent(s: Session, uid: bytes) -> Stepped:
    """Start the timer that offers an upload anew: its next credit is due."""
    waiting = pending_of(s, uid)
    if waiting is None or waiting.next_s != math.inf:
        return s, ()
    return _changed(s, replace(waiting, next_s=s.now_s + pause_s(1))), ()


def quota_renewed(s: Session) -> Session:
    """Let everything be sent again: a new day."""
    return replace(s, pending=tuple(replace(one, over_quota=frozenset()) for one in s.pending))


def receipted(s: Session, receipt: Receipt) -> Stepped:
    """Forget an update, keep its content, or try it later."""
    uid = receipt.update_id
    waiting = pending_of(s, uid)
    if waiting is None:
        return s, ()
    if receipt.accepted or receipt.code == "E_DUP":
        return without(s, uid), (Forget(update_id=uid),)
    if receipt.retry:
        pause = pause_s(waiting.attempts)
        return _changed(s, replace(waiting, attempts=waiting.attempts + 1, next_s=s.now_s + pause)), ()
    counts = dict(s.refusals)
    counts[receipt.code] = counts.get(receipt.code, 0) + 1
    s = replace(without(s, uid), refusals=tuple(sorted(counts.items())))
    s, told = emit(s, "update_refused", receipt.code, f"round {waiting.round}: {receipt.text}")
    # E_DUP_CONFLICT: another update of this round was counted, which holds the same learning.
    counted = receipt.code == "E_DUP_CONFLICT"
    return s, (Forget(update_id=uid) if counted else RestoreResidual(update_id=uid), *told)


def dropped(s: Session, event: UpdateDropped) -> Stepped:
    """Say that an update is lost."""
    if pending_of(s, event.update_id) is None:
        return s, ()
    return emit(without(s, event.update_id), "update_dropped", event.code, event.reason)


def without(s: Session, uid: bytes) -> Session:
    """Return the session without an update."""
    return replace(s, pending=tuple(one for one in s.pending if one.update_id != uid))


def _changed(s: Session, changed: Pending) -> Session:
    pending = tuple(changed if one.update_id == changed.update_id else one for one in s.pending)
    return replace(s, pending=pending)
