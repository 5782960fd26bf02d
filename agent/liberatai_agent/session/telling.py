"""What is told of a device, and when: reports of what lasts, capabilities that are news."""

from msgspec.structs import replace

from liberatai_agent.actions import PublishReport
from liberatai_agent.session.state import (
    AskingForPath,
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
)
from liberatai_core.contract.messages import Capability

REPORT_HOLD_S = 0.5
"""What people wait for (a fault, a closed gate, the first word) is said unless it is over at once."""
ROUTINE_HOLD_S = 20.0
"""A phase of an ordinary round is told when it lasts: a report takes as many bytes as a small update, and a
round that is over by then needs none."""
DISK_SHARE = 0.25
"""Of the free space that was told: less is no news. Measured from what was told, so that a value that moves
around a boundary is told once."""
STORAGE_SHARE = 0.1
"""The same for what a model may take: a plan looks at it, and it may follow the free space."""


def report_of(s: Session) -> PublishReport:
    """Return what the device is doing, for people and for the coordinator."""
    task, work = s.task, s.work
    job, number = (task.job, task.round) if task else ("", 0)
    match work:
        case Failed(reason=reason):
            return PublishReport(phase="failed", job=job, round=number, reason=reason[:512])
        case Training():
            return PublishReport(phase="training", job=job, round=number)
        case Storing(retry=retry):
            return PublishReport(phase="sending", job=job, round=number, reason=retry.reason if retry else "")
        case AskingForPath(retry=retry):
            return PublishReport(phase="fetching", job=job, round=number, reason=retry.reason)
        case Ready(retry=retry):
            reason = waits_for(s) or (retry.reason if retry else "")
            return PublishReport(phase="gated", job=job, round=number, reason=reason[:512])
        case Fetching(retry=retry) | FetchingFinal(retry=retry):
            # A used-up link quota holds downloads too.
            reason = (retry.reason if retry else "") or waits_for(s)
            return PublishReport(phase="fetching", job=job, round=number, reason=reason[:512])
        case ReadingSpec():
            return PublishReport(phase="fetching", job=job, round=number)
        case Idle():
            return _report_without_work(s)


def _report_without_work(s: Session) -> PublishReport:
    if s.pending:
        first = s.pending[0]
        return PublishReport(phase="sending", job=first.job, round=first.round)
    if waits_for(s):
        return PublishReport(phase="gated", reason=waits_for(s)[:512])
    if s.fault:
        return PublishReport(phase="failed", reason=s.fault[:512])
    if s.refused:
        return PublishReport(phase="gated", reason=f"E_BROKER: {s.refused[0][1]}"[:512])
    if s.stale:
        reason = f"E_REPLAY: the coordinator speaks with epoch {s.stale}, {s.epoch} was seen: a copy of it?"
        return PublishReport(phase="gated", reason=reason)
    return PublishReport(phase="idle", reason=s.note[:512])


def waits_for(s: Session) -> str:
    """Return why no training may begin, "" if it may."""
    reasons = (s.gate_reason or "the gate is closed") if not s.gate_open else "", s.quota
    return "; ".join(reason for reason in reasons if reason)


def tell(s: Session) -> Stepped:
    """Publish what the device is doing when it has lasted for its hold, and is not what was said last."""
    if not s.connected or not s.measured:
        return s, ()
    report = report_of(s)
    if report == s.said:
        return (s if s.wished is None else replace(s, wished=None)), ()
    if report != s.wished:
        s = replace(s, wished=report, say_at_s=s.now_s + _hold_s(s.said, report))
    if s.now_s < s.say_at_s:
        return s, ()
    return replace(s, said=report, wished=None), (report,)


def _hold_s(said: PublishReport | None, report: PublishReport) -> float:
    routine = said is not None and _is_routine(said) and _is_routine(report)
    return ROUTINE_HOLD_S if routine else REPORT_HOLD_S


def _is_routine(report: PublishReport) -> bool:
    return report.phase not in ("failed", "gated") and not report.reason


def is_news(found: Capability, told: Capability | None) -> bool:
    """Whether a capability says something that plans or people would miss."""
    if told is None:
        return True
    steady = replace(
        found,
        disk_free_bytes=_unless_moved(found.disk_free_bytes, told.disk_free_bytes, DISK_SHARE),
        storage_bytes=_unless_moved(found.storage_bytes, told.storage_bytes, STORAGE_SHARE),
    )
    return steady != told


def _unless_moved(found: int, told: int, share: float) -> int:
    return told if abs(found - told) <= share * told else found
