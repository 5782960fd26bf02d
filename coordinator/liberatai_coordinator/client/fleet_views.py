"""What the API shows of a fleet beside its devices: groups, events, changes by operators."""

from typing import Literal

from liberatai_coordinator.client.views import View


class GroupView(View, frozen=True, kw_only=True):
    """A question about devices that has a name, and who it is true of now."""

    name: str
    query: str
    created_s: float
    count: int = 0
    devices: tuple[str, ...] = ()


class EventView(View, frozen=True, kw_only=True):
    """Something that happened once.

    Attributes:
        number: grows by one with every event, over all starts of the coordinator.
        device: that it is about; "" for the fleet.
        code: stable, if it is a fault.
    """

    number: int
    at_s: float
    device: str
    name: str
    code: str = ""
    text: str = ""


class ShadowView(View, frozen=True, kw_only=True):
    """What a device shall be like, and what it is like by its own word.

    Attributes:
        version: of what is wished; 0: nothing was.
        since_s: when it was wished (Unix seconds).
        state: done, working, failed, refused; "not heard": it has not answered this version yet.
        desired, reported: settings by name; those that are not wished are the device's own.
        limited: settings that the device's own limits hold tighter than was wished.
        model, model_reported: name and version, "digits:12"; "" for none.
        evaluation, before: (correct, total) of the model and of the one before it, on the device's hold-out.
        differs: what is not as wished.
    """

    device: str
    version: int
    since_s: float = 0.0
    state: str = ""
    code: str = ""
    text: str = ""
    desired: dict[str, bool | float]
    reported: dict[str, bool | float]
    limited: tuple[str, ...] = ()
    model: str = ""
    model_reported: str = ""
    agent: str = ""
    agent_reported: str = ""
    evaluation: tuple[int, int] | None = None
    before: tuple[int, int] | None = None
    differs: tuple[str, ...] = ()


class RolloutPartView(View, frozen=True, kw_only=True):
    """One device of a rollout.

    Attributes:
        evaluation, before: (correct, total) of the new and the old model on its hold-out.
    """

    device: str
    state: str
    stage: int
    since_s: float
    reason: str = ""
    evaluation: tuple[int, int] | None = None
    before: tuple[int, int] | None = None


class RolloutView(View, frozen=True, kw_only=True):
    """One rollout.

    Attributes:
        what: a model's version, a release of the agent, or settings.
        who: the group or selector.
        stage: from 1.
        members: of the group now.
        counts: devices by where they stand.
        accuracy, accuracy_before: over the devices that told both, on what they hold out.
        answers: behind these figures.
        parts: its devices; only where one rollout is asked for.
    """

    name: str
    state: str
    what: str
    who: str
    stage: int
    stages: tuple[float, ...]
    since_s: float
    created_s: float
    reason: str = ""
    members: int = 0
    counts: dict[str, int]
    accuracy: float | None = None
    accuracy_before: float | None = None
    answers: int = 0
    parts: tuple[RolloutPartView, ...] = ()


class PingView(View, frozen=True, kw_only=True):
    """A device's answer.

    Attributes:
        seconds: from the question to the answer.
        session: of its present start.
    """

    device: str
    seconds: float
    session: int


class LogView(View, frozen=True, kw_only=True):
    """The newest lines of a device's log, the oldest first."""

    device: str
    lines: tuple[str, ...]


Role = Literal["viewer", "operator", "admin"]
"""Viewers look; operators run the fleet; admins decide who may, and do what cannot be undone."""


class TokenView(View, frozen=True, kw_only=True):
    """A token for the API from another machine.

    Attributes:
        expires_at, used_at: Unix seconds; 0: never.
        token: itself, only when it was made just now.
    """

    name: str
    role: str
    created_s: float
    expires_at: float = 0.0
    used_at: float = 0.0
    token: str = ""


class AuditView(View, frozen=True, kw_only=True):
    """A change that somebody asked for, whether it was made or not.

    Attributes:
        actor: name of the token; "local" for whoever uses the Unix socket.
        code: "" if it was made, else that of the refusal.
    """

    number: int
    at_s: float
    actor: str
    role: str
    action: str
    target: str
    code: str = ""
    detail: str = ""
