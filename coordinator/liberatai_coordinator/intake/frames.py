"""Signed frames are opened beside the event loop: many at once, in the order in which they came.

A signature takes 0.1 ms to verify and an update longer to decode. On the loop ten thousand of them would be
seconds of silence; here they are work of one thread, and the loop hears of a batch when it is done.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from liberatai_coordinator.fleet.devices import Fleet
from liberatai_core.contract.frame import key_id, open_frame
from liberatai_core.contract.messages import Capability, Message
from liberatai_core.contract.topics import Place
from liberatai_core.errors import FrameError, LiberataiError, SignatureError, TopicError

log = logging.getLogger(__name__)

BATCH = 64
"""Frames that are opened together: some 10 ms of work, so that the first one does not wait for the last."""


BUSY, LINGER_S = 4, 0.02
"""After so many updates together more are on their way. A pause lets them come: many at once cost a third."""

MAX_WAITING = 10_000
"""Frames that wait, beyond which those without an acknowledgement (QoS 0) are lost. The others are bounded by
what the broker may have under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame as it came.

    Attributes:
        place: what its topic says.
        token: what acknowledges it at the broker.
        retained: the broker had it in store.
    """

    place: Place
    topic: str
    payload: bytes
    token: int
    retained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A frame that was looked into.

    Attributes:
        message: what it says, None: it could not be opened.
        public_key: that signed it.
        error: why it is refused.
        found: what a closer look at the message found, see `Frames.look`.
    """

    frame: Frame
    message: Message | None = None
    public_key: bytes = b""
    error: LiberataiError | None = None
    found: object = None


def require_own(fleet: Fleet, message: Message, key: bytes, place: Place) -> None:
    """Refuse what one device signs in another's name, or sends on another's topic.

    The broker's access rules do the same, but the broker is not trusted.

    Raises:
        RevokedError: the key was buried. TopicError: another device's topic. SignatureError: another's name.
    """
    device = getattr(message, "device", None)
    fleet.buried.require_alive(key)
    if device != place.owner:
        raise TopicError(f"a message of {device} on the topic of {place.owner}")
    owner = fleet.owner(key_id(key))
    if owner != device and not isinstance(message, Capability):
        raise SignatureError(f"{owner} signed in the name of {device}")


@dataclass(slots=True, kw_only=True)
class Frames:
    """Opens what comes in, batch by batch.

    Attributes:
        fleet: whose signatures count.
        key: returns the public key with a key id, None for a stranger; called from a thread.
        look: looks closer at what was opened, in the thread: sets `found` or `error`.
        handle: takes what was opened, on the event loop.
    """

    fleet: str
    key: Callable[[bytes], bytes | None]
    look: Callable[[list[Opened]], list[Opened]]
    handle: Callable[[list[Opened]], Awaitable[None]]
    _waiting: deque[Frame] = field(default_factory=deque)
    _there: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, frame: Frame) -> None:
        """Let a frame be opened when its turn comes; a sample that floods the queue is lost."""
        if not frame.token and len(self._waiting) >= MAX_WAITING:
            return
        self._waiting.append(frame)
        self._there.set()

    async def run(self) -> None:
        """Open frames until cancelled, in a thread of their own: long work of jobs takes all the others."""
        with ThreadPoolExecutor(1, "frames") as thread:
            while True:
                await self._there.wait()
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                if not self._waiting:
                    self._there.clear()
                looked_at = await self._open_batch(batch, thread)
                if looked_at >= BUSY and len(self._waiting) < BATCH:
                    await asyncio.sleep(LINGER_S)

    async def _open_batch(self, batch: list[Frame], thread: Executor) -> int:
        """Open and handle frames; returns how many were worth a closer look."""
        if not batch:
            return 0
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(thread, self._open_all, batch)
        await self.handle(opened)
        return sum(one.found is not None for one in opened)

    def _open_all(self, batch: list[Frame]) -> list[Opened]:
        introduced: dict[bytes, bytes] = {}

        def key(wanted: bytes) -> bytes | None:
            return self.key(wanted) or introduced.get(wanted)

        opened = []
        for frame in batch:
            opened.append(_open(frame, self.fleet, key))
            if isinstance(opened[-1].message, Capability):
                # What it says next may be in this batch, too; whether it is let in, `handle` decides.
                introduced[key_id(opened[-1].public_key)] = opened[-1].public_key
        try:
            return self.look(opened)
        except Exception as error:
            # A bug: these frames are refused, the coordinator lives on.
            log.exception("fault while looking at %d messages", len(opened))
            fault = FrameError(f"{type(error).__name__}: {error}")
            return [replace(one, error=one.error or fault) for one in opened]


def _open(frame: Frame, fleet: str, key: Callable[[bytes], bytes | None]) -> Opened:
    if frame.place.part is not None:
        return Opened(frame=frame)  # a chunk is signed as a part of the whole; it only keeps its place
    try:
        opened = open_frame(frame.payload, fleet, key)
    except LiberataiError as error:
        return Opened(frame=frame, error=error)
    except Exception as error:
        log.exception("fault while opening a message on %s", frame.topic)
        return Opened(frame=frame, error=FrameError(f"{type(error).__name__}: {error}"))
    return Opened(frame=frame, message=opened.message, public_key=opened.public_key)
