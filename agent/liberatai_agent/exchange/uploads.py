"""Sends updates: whole, as an offer, or chunk by chunk. One sender per update, one message at once."""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from liberatai_agent.actions import SendChunks, SendOffer, SendUpdate
from liberatai_agent.events import ChunksSent, UpdateDropped
from liberatai_agent.exchange.link_meter import LinkMeter
from liberatai_agent.membership.identity import Identity
from liberatai_agent.store.outbox import Outbox
from liberatai_core.contract.frame import seal
from liberatai_core.contract.messages import Offer
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.errors import DigestError, LiberataiError, LinkError, NotFoundError
from liberatai_core.link.link import Link

log = logging.getLogger(__name__)

Send = SendUpdate | SendOffer | SendChunks
Run = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Uploads:
    """Sends the updates of one device.

    Args:
        device: its name.
        identity: signs offers.
        topics: of the fleet.
        link: gives the link of now.
        outbox: has the updates.
        meter: measures what is sent.
        happened: told when chunks have gone, and of updates that cannot be read any more.
        failed: told (code, text) of what could not be sent for another reason than the link.
        run: runs a coroutine, and sees to its end.
    """

    def __init__(
        self,
        device: str,
        identity: Identity,
        topics: Topics,
        link: Callable[[], Link],
        outbox: Outbox,
        meter: LinkMeter,
        happened: Callable[[ChunksSent | UpdateDropped], None],
        failed: Callable[[str, str], None],
        run: Run,
    ) -> None:
        self._start = run
        self._device, self._identity, self._topics, self._link = device, identity, topics, link
        self._outbox, self._meter, self._happened, self._failed = outbox, meter, happened, failed
        self._waiting: dict[bytes, deque[Send]] = {}
        self._senders: dict[bytes, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()

    def send(self, action: Send) -> None:
        """Send something of an update, after what is under way of it; a doubled wish is one."""
        waiting = self._waiting.setdefault(action.update_id, deque())
        if action not in waiting:
            waiting.append(action)
        if action.update_id not in self._senders:
            self._senders[action.update_id] = self._start(self._run(action.update_id))

    async def close(self) -> None:
        """Stop all."""
        senders = list(self._senders.values())
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)

    async def _run(self, uid: bytes) -> None:
        waiting = self._waiting[uid]
        try:
            while waiting:
                # It stays in the queue while it goes, so that a repetition adds nothing.
                await self._send(waiting[0])
                waiting.popleft()
        finally:
            del self._waiting[uid], self._senders[uid]

    async def _send(self, action: Send) -> None:
        try:
            async with self._one_at_a_time:
                await self._publish(action)
        except (LinkError, NotFoundError) as error:
            # The next connection, or the timer, sends it again; or its receipt came while it waited here.
            log.debug("%s", error)
        except DigestError as error:
            self._failed(error.code, str(error))
            self._drop(action.update_id, error)
        except LiberataiError as error:
            self._failed(error.code, str(error))
        if isinstance(action, SendChunks):
            self._happened(ChunksSent(update_id=action.update_id))

    async def _publish(self, action: Send) -> None:
        uid = action.update_id
        match action:
            case SendUpdate():
                frame = self._outbox.frame(uid)
                await self._put(self._topics.upload(self._device, blob_id(frame)), frame)
            case SendOffer(chunk_bytes=size):
                # The whole frame is read and checked here, in a thread; of its chunks one after the other.
                offer = await asyncio.to_thread(self._offer, uid, size)
                await self._put(self._topics.upload(self._device, offer.transfer), self._sealed(offer))
            case SendChunks(chunk_bytes=size, numbers=numbers):
                for number in numbers:
                    transfer, chunk = self._outbox.part(uid, number * size, size)
                    await self._put(self._topics.upload(self._device, transfer, number), chunk)

    async def _put(self, topic: str, payload: bytes) -> None:
        with self._meter.sending(len(payload)):
            await self._link().publish(topic, payload)

    def _offer(self, uid: bytes, chunk_bytes: int) -> Offer:
        update = next((one for one in self._outbox.unsent() if one.update_id == uid), None)
        if update is None:
            raise NotFoundError(f"update {uid.hex()}: not in the outbox")
        frame = self._outbox.frame(uid)
        return Offer(
            device=self._device,
            transfer=update.transfer,
            size_bytes=len(frame),
            chunk_bytes=chunk_bytes,
            sha256=hashlib.sha256(frame).digest(),
            update_id=uid,
            job=update.job,
            round=update.round,
        )

    def _sealed(self, offer: Offer) -> bytes:
        return seal(offer, self._identity.signer)

    def _drop(self, uid: bytes, error: DigestError) -> None:
        """Let an update go that is not what was stored: nobody would take it."""
        try:
            self._outbox.forget(uid)
        except LiberataiError as second:
            self._failed(second.code, str(second))
        self._happened(UpdateDropped(update_id=uid, code=error.code, reason=str(error)))
