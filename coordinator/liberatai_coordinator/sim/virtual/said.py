"""What a simulated device says of itself. Pure."""

from typing import Literal

from liberatai_agent import actions as do
from liberatai_agent.privacy import outward
from liberatai_core import __version__
from liberatai_core.contract.messages import Event, Report, State


def state(device: str, session: int, what: Literal["online", "offline", "lost"]) -> State:
    """Return whether it is there."""
    return State(device=device, state=what, session=session, version=__version__)


def report(device: str, session: int, action: do.PublishReport) -> Report:
    """Return what it is doing."""
    return Report(
        device=device,
        session=session,
        phase=action.phase,
        job=action.job,
        round=action.round,
        reason=outward(action.reason.partition(":")[0], action.reason),
    )


def event(device: str, session: int, action: do.Emit) -> Event:
    """Return what happened to it."""
    return Event(
        device=device,
        session=session,
        number=action.number,
        name=action.name,
        code=action.code,
        text=outward(action.code, action.text),
    )
