"""The port to the broker: what a service may ask of a link, and what it hears back.

Both implementations (`memory.py`, `mqtt.py`) keep these rules; one test suite holds them:

- A link reconnects by itself until `close`, and restores its subscriptions before it says `Connected`.
- `publish` returns when the broker has acknowledged (QoS 1), or raises LinkError when the connection is
  lost or was never there; nothing is queued while disconnected. **An acknowledgement is not storage.**
- What the broker refuses is an error for the caller and a `Refused` for the consumer, who says it in words.
- Every incoming QoS 1 message waits for `ack`: the broker repeats it to the next session otherwise.
- Events come in one order from one queue. No user code ever runs in a network callback.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What the broker says for this link when the connection dies without a goodbye (QoS 1)."""

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The connection stands and all subscriptions are in force.

    Attributes:
        protocol: "MQTT 5", "MQTT 3.1.1" or "memory".
        session_present: the broker kept the session; if not, retained state of our own may be gone too.
        max_packet_bytes: the largest packet that the broker takes.
    """

    protocol: str
    session_present: bool
    max_packet_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection is gone, or could not be made; the link tries again after `retry_in_s`."""

    reason: str
    retry_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message of a subscription.

    Attributes:
        topic: where it was published.
        payload: its bytes, at most 1 MiB.
        retained: the broker had it in store (amqtt says so of messages that waited for us, too).
        token: what `ack` takes; 0: nothing to acknowledge.
    """

    topic: str
    payload: bytes
    retained: bool
    token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker does not do what was asked of it: it said so, or the connection broke of it again and again.

    Attributes:
        what: "publish"; "subscribe"; or "size": the message is longer than the broker takes.
        topic: of the message, or the filters.
        reason: in words.
        size_bytes: of the whole packet; 0 for a subscription.
        max_packet_bytes: with "size": the largest packet that is sent from now on, also in what follows.
    """

    what: Literal["publish", "subscribe", "size"]
    topic: str
    reason: str
    size_bytes: int = 0
    max_packet_bytes: int = 0

    @property
    def words(self) -> str:
        """One line for logs and status."""
        match self.what:
            case "subscribe":
                return f"the broker refuses the subscription to {self.topic}: {self.reason}"
            case "size":
                return (
                    f"the broker takes no message of {self.size_bytes} bytes ({self.topic}): {self.reason}; "
                    f"packets have at most {self.max_packet_bytes} bytes from now on"
                )
            case _:
                return f"the broker refuses messages to {self.topic}: {self.reason}"


LinkEvent = Connected | Disconnected | Received | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes through the socket so far, over all connections: whole MQTT packets, before encryption."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Link(Protocol):
    """A connection to a broker (see the rules above). Used from one asyncio event loop."""

    async def open(self) -> None:
        """Start connecting in the background; returns at once, even if no broker is there."""

    async def close(self) -> None:
        """Say goodbye (the broker discards the will) and stop; idempotent."""

    def events(self) -> AsyncIterator[LinkEvent]:
        """Yield events until the link is closed; one consumer."""

    async def renew(self) -> None:
        """Connect anew at once, with what now lies in the files that say who we are; the session stays."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Send one message.

        Raises:
            TooLargeError: larger than the broker's or our own packet limit.
            BrokerRefusedError: the broker does not want it; it is a LinkError.
            LinkError: not connected, or connection lost before the acknowledgement.
        """

    async def subscribe(self, *filters: str) -> None:
        """Ask for these topic filters at QoS 1, now and after every reconnect.

        While disconnected the filters are only remembered; no error.
        """

    async def unsubscribe(self, *filters: str) -> None:
        """Forget these topic filters."""

    def ack(self, token: int) -> None:
        """Tell the broker that the message is safe with us."""

    def urgent(self, on: bool) -> None:
        """Say whether something is at stake (an open round, a waiting update): pauses are shorter then."""

    @property
    def max_packet_bytes(self) -> int:
        """The largest packet that is sent now; it may shrink while a connection stands (see `Refused`)."""

    @property
    def traffic(self) -> Traffic:
        """Bytes through the socket since `open`."""
