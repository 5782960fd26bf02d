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
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.limits import CHUNK_BYTES, MAX_PACKET_BYTES, MAX_SINGLE_BYTES
from liberatai_core.contract.messages import BlobManifest, BlobRef, Message
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import BrokerRefusedError, LinkError, TooLargeError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)

Item = TypeVar("Item")

HEADROOM_BYTES = 512
"""Topic and headers of a packet."""

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
        holders: jobs that need a blob, by its name: two that start alike share files.
        barred: devices that are shut out: nothing is left standing for them.
    """

    link: Link
    signer: Signer
    topics: Topics
    retained: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    holders: dict[str, set[str]] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    _turns: dict[str, _Turn] = field(default_factory=dict)
    _cutting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def retain(self, topic: str, message: Message) -> None:
        """Let `message` stand on a topic from now on, unless it is of a device that is shut out."""
        if self.barred and is_barred(topic, self.barred):
            return
        await self._stand(topic, seal(message, self.signer))

    async def retain_all(self, messages: Iterable[tuple[str, Message]]) -> None:
        """Let many messages stand, each on its topic; other work goes on in between."""
        for batch in _batches(list(messages)):
            await asyncio.gather(*(self.retain(topic, message) for topic, message in batch))

    async def send(self, topic: str, message: Message) -> None:
        """Send once; lost without a connection (the other side repeats its question)."""
        try:
            await self.link.publish(topic, seal(message, self.signer))
        except (LinkError, TooLargeError) as error:
            log.info("not sent to %s: %s", topic, error)

    async def clear(self, topic: str) -> None:
        """Take a retained message away."""
        self.retained.pop(topic, None)
        await self._try(topic)

    async def add_blob(self, content: bytes, holder: str) -> BlobRef:
        """Let a blob stand at the broker: one upload for all devices, named by its content.

        It stands until every job that holds it has dropped it.
        """
        name = blob_id(content)
        ref = BlobRef(blob=name, size_bytes=len(content))
        self.hold({name}, holder)
        if name not in self.blobs:
            await self._stand_blob(name, content)
        return ref

    def hold(self, names: Iterable[str], holder: str) -> None:
        """Note that a job needs blobs, whoever let them stand."""
        for name in names:
            self.holders.setdefault(name, set()).add(holder)

    async def _stand_blob(self, name: str, content: bytes) -> None:
        """Let a blob stand in pieces that the broker takes, which may turn out while they are sent."""
        while True:
            piece = self._piece_bytes
            self.blobs[name] = self._places(name, len(content))
            if len(self.blobs[name]) == 1:
                # Its own chunk 0: a signature would be longer than many a delta, and its name vouches for it.
                parts = {self.topics.blob(name, 0): content}
            else:
                piece = min(CHUNK_BYTES, piece)
                number = chunks.count(len(content), piece)
                parts = {self.topics.blob(name, n): chunks.cut(content, n, piece) for n in range(number)}
            # Chunks first: whoever sees the manifest finds all of them.
            await asyncio.gather(*(self._stand(topic, data) for topic, data in parts.items()))
            if self._piece_bytes >= max(map(len, parts.values())) or name not in self.blobs:
                break
        if len(self.blobs.get(name, ())) > 1:
            manifest = BlobManifest(blob=name, size_bytes=len(content), chunk_bytes=piece)
            await self.retain(self.topics.blob(name), manifest)

    def _places(self, name: str, size_bytes: int) -> tuple[str, ...]:
        """Return the topics of a blob of this length, its manifest first if it has one."""
        if size_bytes <= min(MAX_SINGLE_BYTES, self._piece_bytes):
            return (self.topics.blob(name, 0),)
        number = chunks.count(size_bytes, min(CHUNK_BYTES, self._piece_bytes))
        return (self.topics.blob(name), *(self.topics.blob(name, part) for part in range(number)))

    async def drop_blobs(self, names: Iterable[str], holder: str) -> None:
        """Take away blobs that a job does not need any more, and no other one either."""
        gone: list[str] = []
        for name in names:
            self.holders.get(name, set()).discard(holder)
            if not self.holders.get(name):
                self.holders.pop(name, None)
                gone += self.blobs.pop(name, ())
        await self._clear_all(gone)

    async def forget_blobs(self, left: Mapping[str, int]) -> None:
        """Take away blobs (name -> bytes) of an earlier start, which this one did not put there."""
        gone = [
            topic
            for name, size_bytes in left.items()
            if name not in self.blobs
            for topic in self._places(name, size_bytes)
        ]
        await self._clear_all(gone)

    async def _clear_all(self, topics: Sequence[str]) -> None:
        """Take messages away; whoever lets one stand again meanwhile is not undone."""
        for topic in topics:
            self.retained.pop(topic, None)
        for topic in topics:
            await self._try(topic)

    async def republish(self) -> None:
        """Say everything again, after a connect."""
        for batch in _batches(list(self.retained)):
            await asyncio.gather(*(self._try(topic) for topic in batch if topic in self.retained))
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
        await self._try(topic)

    async def _try(self, topic: str) -> None:
        """Send what stands on a topic when its turn comes; nothing stands there: take it away."""
        async with self._turn(topic):
            payload = self.retained.get(topic, b"")
            try:
                await self.link.publish(topic, payload, retain=True)
            except TooLargeError as error:
                # A blob follows in smaller pieces.
                is_blob = any(topic in places for places in self.blobs.values())
                log.log(logging.DEBUG if is_blob else logging.WARNING, "%s: %s", error.code, error)
            except BrokerRefusedError as error:
                log.debug("%s", error)  # the service says it in words, once
            except LinkError as error:
                log.info("%s; it stands when the broker is back", error)

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


def is_barred(topic: str, barred: Collection[str]) -> bool:
    """Whether a topic is read by one of these devices only."""
    place = topic.split("/")
    return len(place) > 4 and place[3] == "dn" and place[4] in barred


def _batches(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
