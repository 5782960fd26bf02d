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
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobManifest, BlobRef, Message
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import BrokerRefusedError, LinkError, TooLargeError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)

HEADROOM_BYTES = 512
"""Topic and headers of a packet."""


@dataclass(slots=True)
class Publisher:
    """Seals, remembers and sends."""

    link: Link
    signer: Signer
    topics: Topics
    retained: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _cutting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def retain(self, topic: str, message: Message) -> None:
        """Let `message` stand on a topic from now on."""
        await self._stand(topic, seal(message, self.signer))

    async def send(self, topic: str, message: Message) -> None:
        """Send once; lost without a connection (the other side repeats its question)."""
        try:
            await self.link.publish(topic, seal(message, self.signer))
        except (LinkError, TooLargeError) as error:
            log.info("not sent to %s: %s", topic, error)

    async def clear(self, topic: str) -> None:
        """Take a retained message away."""
        self.retained.pop(topic, None)
        await self._try(topic, b"")

    async def add_blob(self, content: bytes) -> BlobRef:
        """Let a blob stand at the broker: one upload for all devices, named by its content."""
        name = blob_id(content)
        ref = BlobRef(blob=name, size_bytes=len(content))
        if name not in self.blobs:
            await self._stand_blob(name, content)
        return ref

    async def _stand_blob(self, name: str, content: bytes) -> None:
        """Let a blob stand in pieces that the broker takes, which may turn out while they are sent."""
        while True:
            piece = self._piece_bytes
            if len(content) <= min(MAX_SINGLE_BYTES, piece):
                # Its own chunk 0: a signature would be longer than many a delta, and its name vouches for it.
                self.blobs[name] = (self.topics.blob(name, 0),)
                parts = {self.topics.blob(name, 0): content}
            else:
                piece = min(CHUNK_BYTES, piece)
                number = chunks.count(len(content), piece)
                parts = {self.topics.blob(name, n): chunks.cut(content, n, piece) for n in range(number)}
                self.blobs[name] = (self.topics.blob(name), *parts)
            # Chunks first: whoever sees the manifest finds all of them.
            await asyncio.gather(*(self._stand(topic, data) for topic, data in parts.items()))
            if self._piece_bytes >= max(map(len, parts.values())) or name not in self.blobs:
                break
        if len(self.blobs.get(name, ())) > 1:
            manifest = BlobManifest(blob=name, size_bytes=len(content), chunk_bytes=piece)
            await self.retain(self.topics.blob(name), manifest)

    async def drop_blobs(self, names: set[str]) -> None:
        """Take away blobs that nobody needs any more."""
        for name in names & set(self.blobs):
            for topic in self.blobs.pop(name):
                await self.clear(topic)

    async def republish(self) -> None:
        """Say everything again, after a connect."""
        await asyncio.gather(*(self._try(topic, payload) for topic, payload in list(self.retained.items())))
        await self.cut_anew()

    async def cut_anew(self) -> None:
        """Cut blobs smaller whose pieces are longer than what the broker takes."""
        async with self._cutting:
            for name, places in list(self.blobs.items()):
                parts = [self.retained.get(topic) for topic in places]
                if None in parts or max(len(part or b"") for part in parts) <= self._piece_bytes:
                    continue
                pieces = [part or b"" for part in (parts if len(parts) == 1 else parts[1:])]
                await self._stand_blob(name, b"".join(pieces))

    @property
    def _piece_bytes(self) -> int:
        """The longest piece of a blob that the broker takes, as far as is known."""
        return max(1024, min(self.link.max_packet_bytes, MAX_PACKET_BYTES) - HEADROOM_BYTES)

    async def _stand(self, topic: str, payload: bytes) -> None:
        self.retained[topic] = payload
        await self._try(topic, payload)

    async def _try(self, topic: str, payload: bytes) -> None:
        try:
            await self.link.publish(topic, payload, retain=True)
        except TooLargeError as error:
            is_blob = any(
                topic in places for places in self.blobs.values()
            )  # which follows in smaller pieces
            log.log(logging.DEBUG if is_blob else logging.WARNING, "%s: %s", error.code, error)
        except BrokerRefusedError as error:
            log.debug("%s", error)  # the service says it in words, once
        except LinkError as error:
            log.info("stands when the broker is back: %s (%s)", topic, error)
