"""What a device publishes about itself: the newest word per retained topic, events, now and then a sample.

Nothing is queued for a broker that is away: the next connection says everything again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from liberatai_agent.actions import Emit, PublishReport
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.membership.identity import Identity
from liberatai_agent.privacy import outward
from liberatai_core import __version__
from liberatai_core.contract.frame import seal
from liberatai_core.contract.messages import (
    Answer,
    Capability,
    EpochSeen,
    Event,
    Have,
    Message,
    Report,
    State,
    Telemetry,
)
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LiberataiError, LinkError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)

MAX_EVENTS = 64
"""Events that may wait to be sent; older ones are only in the log."""
Presence = Literal["online", "draining", "offline", "lost"]


def presence(device: str, identity: Identity, state: Presence) -> bytes:
    """Return the frame that says what the device is; also its last will."""
    fields = {"device": device, "state": state, "session": identity.session, "version": __version__}
    return seal(msgspec.convert(fields, State), identity.signer)


class Saying:
    """Publishes for one device.

    Args:
        device: its name.
        identity: signs, and numbers the start.
        topics: of the fleet.
        link: gives the link of now.
        meter: measures what is sent.
        failed: told (code, text) of what could not be published for another reason than the link.
    """

    def __init__(
        self,
        device: str,
        identity: Identity,
        topics: Topics,
        link: Callable[[], Link],
        meter: LinkMeter,
        failed: Callable[[str, str], None],
    ) -> None:
        self._device, self._identity, self._topics = device, identity, topics
        self._link, self._meter, self._failed = link, meter, failed
        self._retained: dict[str, bytes] = {}
        self._standing: dict[str, bytes] = {}
        self._events: deque[tuple[str, bytes]] = deque(maxlen=MAX_EVENTS)
        self._there, self._online = asyncio.Event(), asyncio.Event()
        self.publishing_since: float | None = None

    def connected(self, is_up: bool) -> None:
        """Publish, or let everything wait. Of what stands at the broker a new connection says all again."""
        if is_up:
            self._retained.clear()
            self._online.set()
        else:
            self._online.clear()

    def state(self, state: Presence) -> None:
        """Say what the device is."""
        self._keep("state", presence(self._device, self._identity, state))

    def capability(self, capability: Capability) -> None:
        """Say what the device can do."""
        self._keep("caps", self._seal(capability))

    def report(self, action: PublishReport) -> None:
        """Say what the device is doing."""
        report = Report(
            device=self._device,
            session=self._identity.session,
            phase=action.phase,
            job=action.job,
            round=action.round,
            reason=outward(action.reason.partition(":")[0], action.reason),
        )
        self._keep("rep", self._seal(report))

    def have(self, have: Have) -> None:
        """Say what the device is like, by what it shall be."""
        self._keep("have", self._seal(msgspec.structs.replace(have, session=self._identity.session)))

    def answer(self, answer: Answer) -> None:
        """Answer a request once."""
        told = msgspec.structs.replace(answer, session=self._identity.session)
        self._events.append((self._topic("rsp"), self._seal(told)))
        self._there.set()

    def event(self, action: Emit) -> None:
        """Say what happened once."""
        event = Event(
            device=self._device,
            session=self._identity.session,
            number=action.number,
            name=action.name,
            code=action.code,
            text=outward(action.code, action.text),
        )
        self._events.append((self._topic("ev"), self._seal(event)))
        self._there.set()

    def show_epoch(self, word: bytes) -> None:
        """Show the coordinator the presence with the highest epoch that its own key has signed."""
        if word:
            seen = EpochSeen(device=self._device, session=self._identity.session, word=word)
            self._events.append((self._topic("ev"), self._seal(seen)))
            self._there.set()

    def again(self) -> None:
        """Say anew all that stands at the broker: it may have been taken away there."""
        self._retained.update(self._standing)
        self._there.set()

    async def telemetry(self, sample: Telemetry) -> None:
        """Send a sample of load and traffic; a lost one is lost.

        Raises:
            LiberataiError: it could not be sent.
        """
        await self._link().publish(self._topic("tele"), self._seal(sample), qos=0)

    async def goodbye(self) -> None:
        """Say that the device leaves; it is said when this returns.

        Raises:
            LiberataiError: it could not be said.
        """
        payload = presence(self._device, self._identity, "offline")
        await self._link().publish(self._topic("state"), payload, retain=True)

    async def run(self) -> None:
        """Publish what waits, for ever: capability and state first, in the order in which they were said."""
        while True:
            await self._there.wait()
            self._there.clear()
            while self._retained or self._events:
                await self._online.wait()
                # What waited may have been cleared in between.
                if self._retained:
                    topic = next(iter(self._retained))
                    await self._publish(topic, self._retained.pop(topic), retain=True)
                elif self._events:
                    await self._publish(*self._events.popleft(), retain=False)

    async def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        self.publishing_since = time.monotonic()
        try:
            with self._meter.sending(len(payload)):
                await self._link().publish(topic, payload, retain=retain)
        except LinkError as error:
            # The next connection says everything again.
            log.debug("%s", error)
        except LiberataiError as error:
            self._failed(error.code, str(error))
        finally:
            self.publishing_since = None

    def _keep(self, leaf: str, payload: bytes) -> None:
        """Publish a retained message, unless a newer one for the topic comes first."""
        self._retained[self._topic(leaf)] = self._standing[self._topic(leaf)] = payload
        self._there.set()

    def _topic(self, leaf: str) -> str:
        return self._topics.up(self._device, leaf)

    def _seal(self, message: Message) -> bytes:
        return seal(message, self._identity.signer)
