"""A broker between two processes without MQTT, for benchmarks with more devices than a machine has sockets.

`Exchange` is the broker, in the process that plays all devices; `SocketLink` is the coordinator's link to it,
over a Unix socket. The rules are MQTT's with QoS 1: an acknowledgement for every message, both ways; at most
`window` messages to the coordinator that it has not acknowledged; what was not acknowledged is sent again at
the next connection; then what waited, then what is retained.
"""

import asyncio
import contextlib
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Traffic, Will
from liberatai_core.link.mailbox import Mailbox

WINDOW: Final = 64
"""As the coordinator tells an MQTT broker (`link_settings.RECEIVE_MAXIMUM`)."""

MAX_PACKET_BYTES: Final = 266_240
RETRY_S: Final = 0.05

PUBLISH: Final = 1
PUBLISH_RETAINED: Final = 2
ACKNOWLEDGE: Final = 3

_HEAD: Final = struct.Struct("<IBQH")  # bytes of topic and payload, kind, number, bytes of the topic


class Records(asyncio.Protocol):
    """Records over a stream: what is sent within one turn of the loop is written at once."""

    def __init__(self, receive: Callable[[int, int, str, bytes], None], lost: Callable[[], None]) -> None:
        self._receive, self._lost = receive, lost
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the stream."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        """Tell the owner."""
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        """Hand on every record that is complete."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            size, kind, number, topic_bytes = _HEAD.unpack_from(self._buffer, at)
            end = at + _HEAD.size + size
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[at + _HEAD.size : end])
            at = end
            self._receive(kind, number, body[:topic_bytes].decode(), body[topic_bytes:])
        del self._buffer[:at]

    def send(self, kind: int, number: int, topic: str = "", payload: bytes = b"") -> None:
        """Send one record; lost if the stream has ended."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        name = topic.encode()
        self._out += (_HEAD.pack(len(name) + len(payload), kind, number, len(name)), name, payload)

    def close(self) -> None:
        """End the stream."""
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        data, self._out = b"".join(self._out), []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


class SocketLink:
    """The coordinator's link to an `Exchange` (see `liberatai_core.link.link.Link` for the rules)."""

    def __init__(self, path: Path, will: Will | None = None) -> None:
        self._path, self._will = path, will
        self._mailbox = Mailbox()
        self._records: Records | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._last = self._generation = 0
        self._sent = self._received = 0
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start connecting in the background."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Stop; idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._mailbox.close()

    async def renew(self) -> None:
        """Nothing: this link has no certificate."""

    def events(self) -> AsyncIterator[LinkEvent]:
        """Yield events until the link is closed; one consumer."""
        return self._mailbox.events()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Send one message; returns when the exchange has acknowledged it."""
        del qos  # everything is acknowledged
        if self._records is None:
            raise LinkError(f"{topic}: not sent: not connected")
        self._last += 1
        number = self._last
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._sent += len(payload)
        self._records.send(PUBLISH_RETAINED if retain else PUBLISH, number, topic, payload)
        await done

    async def subscribe(self, *filters: str) -> None:
        """Do nothing: the exchange sends everything that devices say."""

    async def unsubscribe(self, *filters: str) -> None:
        """Do nothing, as above."""

    @property
    def max_packet_bytes(self) -> int:
        """What an agent announces."""
        return MAX_PACKET_BYTES

    def urgent(self, on: bool) -> None:
        """Nothing: this link never tries again."""

    def ack(self, token: int) -> None:
        """Tell the exchange that the message is safe; a token of an older connection is ignored."""
        generation, number = divmod(token, 1 << 32)
        if self._records is not None and generation == self._generation and number:
            self._records.send(ACKNOWLEDGE, number)

    @property
    def traffic(self) -> Traffic:
        """The bytes of all payloads."""
        return Traffic(sent_bytes=self._sent, received_bytes=self._received)

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            lost = asyncio.Event()

            def records(lost: asyncio.Event = lost) -> Records:
                return Records(self._receive, lost.set)

            try:
                _, made = await loop.create_unix_connection(records, str(self._path))
            except OSError as error:
                self._mailbox.put(Disconnected(reason=str(error), retry_in_s=RETRY_S))
                await asyncio.sleep(RETRY_S)
                continue
            self._generation += 1
            self._mailbox.put(
                Connected(protocol="socket", session_present=True, max_packet_bytes=MAX_PACKET_BYTES)
            )
            self._records = made
            try:
                await lost.wait()
            finally:
                self._records = None
                made.close()
                for done in self._waiting.values():
                    if not done.done():
                        done.set_exception(LinkError("not acknowledged: the exchange is gone"))
                self._waiting.clear()
            self._mailbox.put(Disconnected(reason="the exchange is gone", retry_in_s=RETRY_S))

    def _receive(self, kind: int, number: int, topic: str, payload: bytes) -> None:
        if kind == ACKNOWLEDGE:
            done = self._waiting.pop(number, None)
            if done is not None and not done.done():
                done.set_result(None)
            return
        self._received += len(payload)
        token = (self._generation << 32) + number
        retained = kind == PUBLISH_RETAINED
        self._mailbox.put(Received(topic=topic, payload=payload, retained=retained, token=token))


class Exchange:
    """The broker's side, for one coordinator at a time.

    Args:
        receive: called with topic and payload of everything that the coordinator publishes.
        window: messages to the coordinator that wait for its acknowledgement.
    """

    def __init__(self, receive: Callable[[str, bytes], None], window: int = WINDOW) -> None:
        self._receive, self._window = receive, window
        self._retained: dict[str, bytes] = {}
        self._waiting: deque[tuple[str, bytes, bool]] = deque()
        self._unacknowledged: dict[int, tuple[str, bytes, bool]] = {}
        self._last = 0
        self._records: Records | None = None
        self._server: asyncio.Server | None = None
        self.connected = asyncio.Event()
        self._all_taken = asyncio.Event()
        self.connected_s = 0.0

    async def open(self, path: Path) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._made, str(path))

    async def close(self) -> None:
        """Stop listening and end the connection."""
        if self._server is not None:
            self._server.close()
        if self._records is not None:
            self._records.close()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Take one message of a device; it waits while no coordinator is there."""
        if retain:
            self._retained[topic] = payload
        self._waiting.append((topic, payload, False))
        self._pump()

    def forget(self) -> None:
        """Lose what has not been acknowledged, as a broker that is killed; what is retained comes again."""
        self._waiting.clear()
        self._unacknowledged.clear()

    async def all_taken(self) -> None:
        """Wait until the coordinator has acknowledged everything."""
        while self._waiting or self._unacknowledged:
            self._all_taken.clear()
            await self._all_taken.wait()

    def _made(self) -> Records:
        records: Records | None = None

        def receive(kind: int, number: int, topic: str, payload: bytes) -> None:
            if records is not self._records or records is None:
                return
            if kind == ACKNOWLEDGE:
                self._unacknowledged.pop(number, None)
                self._pump()
                if not self._waiting and not self._unacknowledged:
                    self._all_taken.set()
                return
            self._receive(topic, payload)
            records.send(ACKNOWLEDGE, number)

        def lost() -> None:
            if records is self._records:
                self._records = None
                self.connected.clear()

        records = Records(receive, lost)
        asyncio.get_running_loop().call_soon(self._welcome, records)
        return records

    def _welcome(self, records: Records) -> None:
        self._records = records
        self.connected_s = time.monotonic()
        waiting = [*self._unacknowledged.values(), *self._waiting]
        self._unacknowledged.clear()
        # What is retained comes anew with every subscription.
        self._waiting = deque(message for message in waiting if not message[2])
        self._waiting.extend((topic, payload, True) for topic, payload in self._retained.items())
        self._pump()
        self.connected.set()

    def _pump(self) -> None:
        while self._records is not None and self._waiting and len(self._unacknowledged) < self._window:
            topic, payload, retained = message = self._waiting.popleft()
            self._last += 1
            self._unacknowledged[self._last] = message
            self._records.send(PUBLISH_RETAINED if retained else PUBLISH, self._last, topic, payload)
