"""The link of one device: made with its last will, listened to, made anew with a higher session number.

A device that was put back from a copy takes a number above the one that its coordinator has heard. Its last
will carries the number too, so that needs a new link.
"""

import logging
import time
from collections.abc import Callable

from liberatai_agent.events import BrokerRefused, LinkDown, LinkUp, Renumbered
from liberatai_agent.exchange.saying import presence
from liberatai_agent.membership.identity import Identity
from liberatai_agent.store.faults import Faults
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LiberataiError
from liberatai_core.link.link import (
    Connected,
    Disconnected,
    Link,
    LinkEvent,
    Received,
    Refused,
    Traffic,
    Will,
)

log = logging.getLogger(__name__)

NEXT_NUMBER_S = 30.0
"""Between two session numbers that a coordinator asks for: two devices with one identity must not race."""

LinkFactory = Callable[[Will], Link]
Happened = Callable[[LinkUp | LinkDown | BrokerRefused | Renumbered], None]


def _nothing(_reason: str) -> None:
    """Hear a reason that nobody asked for."""


class Connection:
    """Owns the link.

    Args:
        device: its name.
        broker: words for it, for the log.
        identity: numbers the start.
        topics: of the fleet.
        make_link: gives a link with this last will.
        faults: remembers why there is no connection.
        happened: told when the link comes and goes.
        received: told every message.

    Attributes:
        link: the one of now.
        connected: what the broker said; None: there is no connection.
        retry_s: what the link waits before it tries again, when there is none.
        lost: told why there is no connection, each time.
        moved_s: when bytes moved, or the link said something, last (`time.monotonic`).
    """

    def __init__(
        self,
        device: str,
        broker: str,
        identity: Identity,
        topics: Topics,
        make_link: LinkFactory,
        faults: Faults,
        happened: Happened,
        received: Callable[[Received], None],
    ) -> None:
        self._device, self._broker, self._identity, self._topics = device, broker, identity, topics
        self._make_link, self._faults = make_link, faults
        self._happened, self._received = happened, received
        self.lost: Callable[[str], None] = _nothing
        self._before, self._seen = Traffic(), Traffic()
        self._renumbered_s = -NEXT_NUMBER_S
        self.connected: Connected | None = None
        self.retry_s = 0.0
        self.moved_s = time.monotonic()
        self.link = self._new_link()

    def _new_link(self) -> Link:
        payload = presence(self._device, self._identity, "lost")
        return self._make_link(Will(topic=self._topics.up(self._device, "state"), payload=payload))

    @property
    def traffic(self) -> Traffic:
        """Bytes since the start, over all links."""
        now = self.link.traffic
        return Traffic(
            sent_bytes=self._before.sent_bytes + now.sent_bytes,
            received_bytes=self._before.received_bytes + now.received_bytes,
        )

    def look(self) -> None:
        """Notice whether bytes have moved."""
        if self.traffic != self._seen:
            self._seen, self.moved_s = self.traffic, time.monotonic()

    async def subscribe(self) -> None:
        """Ask for everything that is said to this device."""
        try:
            await self.link.subscribe(*self._topics.to_device(self._device))
        except LiberataiError as error:
            self._faults.note(error.code, f"nothing can be heard: {error}")

    async def listen(self) -> None:
        """Hear, until the link is closed and no new one took its place."""
        link: Link | None = None
        while link is not self.link:
            link = self.link
            async for event in link.events():
                if link is self.link:
                    self.moved_s = time.monotonic()
                    self._heard(event)

    def _heard(self, event: LinkEvent) -> None:
        match event:
            case Connected():
                log.info("connected to %s (%s)", self._broker, event.protocol)
                self.connected = event
                self._faults.heal("E_LINK")
                size = event.max_packet_bytes
                self._happened(LinkUp(session_present=event.session_present, packet_bytes=size))
            case Disconnected(reason=reason, retry_in_s=retry):
                if self.connected is not None or f"E_LINK: {reason}" != self._faults.last:
                    log.warning("no connection to %s: %s (next try in %.1f s)", self._broker, reason, retry)
                self._faults.note("E_LINK", reason, quiet=True)
                self.connected, self.retry_s = None, retry
                self.lost(reason)
                self._happened(LinkDown())
            case Refused():
                size = event.max_packet_bytes if event.what == "size" else 0
                log.warning("%s: %s", "E_SIZE" if size else "E_BROKER", event.words)
                self._happened(BrokerRefused(topic=event.topic, words=event.words, packet_bytes=size))
            case Received():
                self._received(event)

    async def renumber(self, known: int) -> bool:
        """Go on with a session number above one that was used before; False if it was raised just now.

        The new link is not opened yet.
        """
        if time.monotonic() < self._renumbered_s + NEXT_NUMBER_S:
            return False
        self._renumbered_s = time.monotonic()
        self._identity.raise_session(known)
        number = self._identity.next_session()
        log.warning("E_REPLAY: session %d was used before: going on with %d", known, number)
        before, self._before = self.link, self.traffic
        self.link = self._new_link()
        await before.close()
        self.connected = None
        self._happened(LinkDown())
        self._happened(Renumbered(number=number))
        await self.subscribe()
        return True
