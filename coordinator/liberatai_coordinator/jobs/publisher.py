"""What the broker holds for us: retained state that is published again whenever a connection is made.

A broker may lose everything it was given (a PUBACK is not storage). So the coordinator remembers every
retained message it wants to stand, and says it all again after each connect. Receipts and credits are
not remembered: the device asks again.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobManifest, BlobRef, Message
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import LinkError, TooLargeError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Publisher:
    """Seals, remembers and sends."""

    link: Link
    signer: Signer
    topics: Topics
    retained: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    async def retain(self, topic: str, message: Message) -> None:
        """Let `message` stand on a topic from now on."""
        await self._stand(topic, seal(message, self.signer))

    async def send(self, topic: str, message: Message) -> None:
        """Send once; lost without a connection (the other side repeats its question)."""
        try:
            await self.link.publish(topic, seal(message, self.signer))
        except LinkError as error:
            log.info("not sent to %s: %s", topic, error)

    async def clear(self, topic: str) -> None:
        """Take a retained message away."""
        self.retained.pop(topic, None)
        await self._try(topic, b"")

    async def add_blob(self, content: bytes) -> BlobRef:
        """Let a blob stand at the broker: one upload for all devices, named by its content."""
        name = blob_id(content)
        ref = BlobRef(blob=name, size_bytes=len(content))
        if name in self.blobs:
            return ref
        if len(content) <= MAX_SINGLE_BYTES:
            # Its own chunk 0: a signature would be longer than many a delta, and its name vouches for it.
            topic = self.topics.blob(name, 0)
            self.blobs[name] = (topic,)
            await self._stand(topic, content)
            return ref
        parts = self._parts(name, content)
        self.blobs[name] = (self.topics.blob(name), *parts)
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

    async def republish(self) -> None:
        """Say everything again, after a connect."""
        await asyncio.gather(*(self._try(topic, payload) for topic, payload in list(self.retained.items())))

    def _parts(self, name: str, content: bytes) -> dict[str, bytes]:
        number = chunks.count(len(content), CHUNK_BYTES)
        return {
            self.topics.blob(name, part): chunks.cut(content, part, CHUNK_BYTES) for part in range(number)
        }

    async def _stand(self, topic: str, payload: bytes) -> None:
        self.retained[topic] = payload
        await self._try(topic, payload)

    async def _try(self, topic: str, payload: bytes) -> None:
        try:
            await self.link.publish(topic, payload, retain=True)
        except TooLargeError:
            log.exception("the broker takes no message of %d bytes (%s)", len(payload), topic)
        except LinkError as error:
            log.info("stands when the broker is back: %s (%s)", topic, error)
