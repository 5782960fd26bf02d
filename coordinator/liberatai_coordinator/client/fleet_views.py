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


Role = Literal["viewer", "operator", "admin"]


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
