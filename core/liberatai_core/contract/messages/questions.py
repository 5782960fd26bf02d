"""Questions to a device, and its answers."""

from typing import Annotated, Literal

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import Counter, DeviceId, Message, Text


class Request(Message, frozen=True, kw_only=True, array_like=True):
    """A question to a device, answered once (Answer); lost if the device is not there.

    Attributes:
        number: grows within an epoch: an older one is not answered again.
        lines: of the log that are wanted.
    """

    device: DeviceId
    epoch: Counter
    number: Counter
    what: Literal["ping", "probe", "logs"]
    lines: Annotated[int, Meta(ge=0, le=limits.MAX_LINES)] = 0


class Answer(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to a Request.

    Attributes:
        epoch, number: of the request.
        code: "" or why it was not done.
        lines: of the device's log, the oldest first.
    """

    device: DeviceId
    session: Counter
    epoch: Counter
    number: Counter
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    lines: Annotated[tuple[Text, ...], Meta(max_length=limits.MAX_LINES)] = ()
