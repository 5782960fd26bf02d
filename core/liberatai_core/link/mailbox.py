"""The one queue between a link and its consumer."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from liberatai_core.link.link import Disconnected, LinkEvent


class Mailbox:
    """Events in one order for one consumer; used from one event loop.

    Of several `Disconnected` in a row only the last is kept, so that an unread box does not grow while a
    broker is away. Everything else is kept: the link stops reading from its socket instead.

    Args:
        taken: called with every event that the consumer has taken.
    """

    def __init__(self, taken: Callable[[LinkEvent], None] | None = None) -> None:
        self._events: deque[LinkEvent] = deque()
        self._changed = asyncio.Event()
        self._taken = taken
        self._closed = False

    def put(self, event: LinkEvent) -> None:
        """Add one event; without effect once closed."""
        if self._closed:
            return
        if isinstance(event, Disconnected) and self._events and isinstance(self._events[-1], Disconnected):
            self._events.pop()
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """End every iteration; what was not taken is thrown away."""
        self._closed = True
        self._events.clear()
        self._changed.set()

    async def events(self) -> AsyncIterator[LinkEvent]:
        """Yield the events in order until the box is closed."""
        while not self._closed:
            if not self._events:
                self._changed.clear()
                await self._changed.wait()
                continue
            event = self._events.popleft()
            if self._taken is not None:
                self._taken(event)
            yield event
