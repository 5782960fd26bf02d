"""What the broker holds for us: retained state that is published again whenever a connection is made.

A broker may lose everything it was given (a PUBACK is not storage). So the coordinator remembers every
retained message it wants to stand, and says it all again after each connect. Receipts and credits are
not remembered: the device asks again.

Words of one topic are sent one after the other, and what is sent is the newest one at that moment: saying
everything again after a connect never puts an older word over a newer one.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobManifest, BlobRef, Message
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import LinkError, TooLargeError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)

Item = TypeVar("Item")

BATCH = 64
"""Messages that are sealed and sent together: some 4 ms of signing, then the event loop has its turn."""


@dataclass(slots=True)
class _Turn:
    """Whose turn it is to send to a topic, and how many wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


@dataclass(slots=True)
class Publisher:
    """Seals, remembers and sends.

    Attributes:
        retained: what shall stand, by topic.
        blobs: topics of every blob that stands, by its name.
    """

    link: Link
    signer: Signer
    topics: Topics
    retained: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _turns: dict[str, _Turn] = field(default_factory=dict)

    async def retain(self, topic: str, message: Message) -> None:
        """Let `message` stand on a topic from now on."""
        await self._stand(topic, seal(message, self.signer))

    async def retain_all(self, messages: Iterable[tuple[str, Message]]) -> None:
        """Let many messages stand, each on its topic; other work goes on in between."""
        for batch in _batches(list(messages)):
            await asyncio.gather(*(self.retain(topic, message) for topic, message in batch))

    async def send(self, topic: str, message: Message) -> None:
        """Send once; lost without a connection (the other side repeats its question)."""
        try:
            await self.link.publish(topic, seal(message, self.signer))
        except LinkError as error:
            log.info("not sent to %s: %s", topic, error)

    async def clear(self, topic: str) -> None:
        """Take a retained message away."""
        self.retained.pop(topic, None)
        await self._try(topic)

    async def add_blob(self, content: bytes) -> BlobRef:
        """Let a blob stand at the broker: one upload for all devices, named by its content."""
        name = blob_id(content)
        ref = BlobRef(blob=name, size_bytes=len(content))
        if name in self.blobs:
            return ref
        self.blobs[name] = blob_topics(self.topics, ref)
        if len(content) <= MAX_SINGLE_BYTES:
            # Its own chunk 0: a signature would be longer than many a delta, and its name vouches for it.
            await self._stand(self.topics.blob(name, 0), content)
            return ref
        parts = self._parts(name, content)
        # Chunks first: whoever sees the manifest finds all of them.
        await asyncio.gather(*(self._stand(topic, data) for topic, data in parts.items()))
        manifest = BlobManifest(blob=name, size_bytes=len(content), chunk_bytes=CHUNK_BYTES)
        await self.retain(self.topics.blob(name), manifest)
        return ref

    async def drop_blobs(self, names: set[str]) -> None:
        """Take away blobs that nobody needs any more."""
        for name in names & set(self.blobs):
            for topic in self.blobs.pop(name):
                await self.clear(topic)

    async def forget_blobs(self, left: Mapping[str, int]) -> None:
        """Take away blobs (name -> bytes) of an earlier start, which this one did not put there."""
        for name, size_bytes in left.items():
            if name not in self.blobs:
                for topic in blob_topics(self.topics, BlobRef(blob=name, size_bytes=size_bytes)):
                    await self.clear(topic)

    async def republish(self) -> None:
        """Say everything again, after a connect."""
        for batch in _batches(list(self.retained)):
            await asyncio.gather(*(self._try(topic) for topic in batch if topic in self.retained))

    def _parts(self, name: str, content: bytes) -> dict[str, bytes]:
        number = chunks.count(len(content), CHUNK_BYTES)
        return {
            self.topics.blob(name, part): chunks.cut(content, part, CHUNK_BYTES) for part in range(number)
        }

    async def _stand(self, topic: str, payload: bytes) -> None:
        self.retained[topic] = payload
        await self._try(topic)

    async def _try(self, topic: str) -> None:
        """Send what stands on a topic when its turn comes; nothing stands there: take it away."""
        async with self._turn(topic):
            payload = self.retained.get(topic, b"")
            try:
                await self.link.publish(topic, payload, retain=True)
            except TooLargeError:
                log.exception("the broker takes no message of %d bytes (%s)", len(payload), topic)
            except LinkError as error:
                log.info("stands when the broker is back: %s (%s)", topic, error)

    @contextlib.asynccontextmanager
    async def _turn(self, topic: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(topic, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                self._turns.pop(topic, None)


def blob_topics(topics: Topics, ref: BlobRef) -> tuple[str, ...]:
    """Return the topics of a blob, its manifest first if it has one."""
    if ref.size_bytes <= MAX_SINGLE_BYTES:
        return (topics.blob(ref.blob, 0),)
    number = chunks.count(ref.size_bytes, CHUNK_BYTES)
    return (topics.blob(ref.blob), *(topics.blob(ref.blob, part) for part in range(number)))


def _batches(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
