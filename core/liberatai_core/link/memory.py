"""A broker inside one process, and the link to it: the rules of MQTT without sockets.

For unit tests, and for simulations with more devices than a machine has sockets. It keeps what the design
relies on (retained messages, sessions per client id, wills, QoS 1 with redelivery) and also what the design
must survive: a full queue drops messages although they were acknowledged, as real brokers do.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from liberatai_core.errors import BrokerRefusedError, LinkError, TooLargeError
from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Refused, Traffic, Will
from liberatai_core.link.mailbox import Mailbox
from liberatai_core.link.packet import check_filter, check_topic, publish_bytes
from liberatai_core.link.topic_tree import TopicTree

MAX_PACKET_BYTES = (
    266_240  # the largest chunk (256 KiB) and 4 KiB of headers: what agents announce to brokers
)
MAX_INFLIGHT = 20  # unacknowledged messages per session: Mosquitto's default
MAX_QUEUED = 1000  # waiting messages per session, then silent loss: Mosquitto's default
PUBACK_BYTES = 4  # fixed header 2, packet identifier 2
SUBSCRIBE_BYTES = 8  # fixed header 2, identifier 2, properties 1, length of the filter 2, options 1
TAKEOVER_RETRY_S = 0.1  # two links with one identity would otherwise throw each other out without a pause


@dataclass(frozen=True, slots=True)
class Packet:
    """One message on its way."""

    topic: str
    payload: bytes
    qos: int
    retained: bool = False


@dataclass(slots=True)
class _Session:
    """What the broker remembers of one client id, connected or not."""

    filters: dict[str, None] = field(default_factory=dict)
    unacknowledged: dict[int, Packet] = field(default_factory=dict)
    waiting: deque[Packet] = field(default_factory=deque)
    last_token: int = 0
    lost_messages: int = 0

    def pump(self, connection: "Connection | None", max_inflight: int) -> None:
        """Hand over what waits, as far as acknowledgements allow; without a connection it goes on waiting."""
        while connection is not None and self.waiting and len(self.unacknowledged) < max_inflight:
            message = self.waiting.popleft()
            self.last_token += 1
            self.unacknowledged[self.last_token] = message
            connection.receive(message, self.last_token)


class Connection:
    """One live connection of one client."""

    def __init__(self, client_id: str, will: Will | None, receive: Callable[[Packet, int], None]) -> None:
        self.client_id, self.will, self.receive = client_id, will, receive
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class MemoryBroker:
    """A broker for links of one event loop.

    Faults for tests: `kill`, `block`/`unblock`, `stop`/`start`, and three hooks, each called with client id
    and topic: `drop` (a delivery to this client is lost), `duplicate` (it arrives twice), `lose_puback` (the
    message of this client arrives, but its connection breaks before the acknowledgement).
    `allow(client_id, "publish" | "subscribe", topic)` is the access list.

    Args:
        max_packet_bytes: larger packets are refused.
        max_inflight: unacknowledged messages per session.
        max_queued: waiting messages per session; more are lost silently.
    """

    def __init__(
        self,
        *,
        max_packet_bytes: int = MAX_PACKET_BYTES,
        max_inflight: int = MAX_INFLIGHT,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self.max_packet_bytes = max_packet_bytes
        self.drop: Callable[[str, str], bool] | None = None
        self.duplicate: Callable[[str, str], bool] | None = None
        self.lose_puback: Callable[[str, str], bool] | None = None
        self.allow: Callable[[str, Literal["publish", "subscribe"], str], bool] | None = None
        self._max_inflight, self._max_queued = max_inflight, max_queued
        self._retained: TopicTree[bytes] = TopicTree()
        self._subscribers: TopicTree[dict[str, None]] = TopicTree()
        self._sessions: dict[str, _Session] = {}
        self._connections: dict[str, Connection] = {}
        self._blocked: set[str] = set()
        self._running = True
        self._changed = asyncio.Event()

    # --- faults and views for tests ------------------------------------------------------------

    def kill(self, client_id: str, reason: str = "connection lost") -> None:
        """Break a client's connection as a cut cable does: its will is published."""
        connection = self._connections.get(client_id)
        if connection is not None:
            self.end(connection, reason)
            if connection.will is not None:
                will = connection.will
                self._route(Packet(will.topic, will.payload, 1), retain=will.retain)

    def block(self, client_id: str) -> None:
        """Cut a client off until `unblock`."""
        self._blocked.add(client_id)
        self.kill(client_id)

    def unblock(self, client_id: str) -> None:
        """Let a client in again."""
        self._blocked.discard(client_id)
        self._changed.set()

    def stop(self, *, forget: bool = False) -> None:
        """Take the broker down without any will; with `forget`, sessions and retained messages are gone."""
        self._running = False
        for connection in list(self._connections.values()):
            self.end(connection, "broker stopped")
        if forget:
            self._sessions.clear()
            self._subscribers.clear()
            self._retained.clear()

    def start(self) -> None:
        """Bring the broker back."""
        self._running = True
        self._changed.set()

    @property
    def retained(self) -> dict[str, bytes]:
        """A copy of all retained messages by topic."""
        return dict(self._retained.items())

    @property
    def connected(self) -> set[str]:
        """The ids of all connected clients."""
        return set(self._connections)

    def lost_messages(self, client_id: str) -> int:
        """Count the acknowledged messages that a full queue has lost for this client."""
        return self._sessions[client_id].lost_messages if client_id in self._sessions else 0

    # --- what MemoryLink calls -----------------------------------------------------------------

    async def reachable(self, client_id: str) -> None:
        """Wait until this client may connect."""
        while self.away(client_id) is not None:
            self._changed.clear()
            await self._changed.wait()

    def away(self, client_id: str) -> str | None:
        """Say why this client cannot connect now; None: it can."""
        if not self._running:
            return "the broker is down"
        return "the broker is out of reach" if client_id in self._blocked else None

    def connect(self, connection: Connection) -> bool:
        """Open a connection; True: the session was known. An older connection of the same id ends."""
        older = self._connections.get(connection.client_id)
        if older is not None:
            self.end(older, "session taken over: another link uses this client id")
        known = connection.client_id in self._sessions
        self._sessions.setdefault(connection.client_id, _Session())
        self._connections[connection.client_id] = connection
        return known

    def resume(self, connection: Connection) -> None:
        """Send again what was never acknowledged, then what waited."""
        session = self._sessions[connection.client_id]
        for token, message in list(session.unacknowledged.items()):
            connection.receive(message, token)
        self._sessions[connection.client_id].pump(connection, self._max_inflight)

    def end(self, connection: Connection, reason: str) -> None:
        """Close a connection; without a will, as on request of its client."""
        if self._connections.get(connection.client_id) is connection:
            del self._connections[connection.client_id]
        if not connection.lost.done():
            connection.lost.set_result(reason)

    def subscribe(self, connection: Connection, topic_filter: str) -> None:
        """Add a subscription and deliver what is retained for it."""
        if self.allow is not None and not self.allow(connection.client_id, "subscribe", topic_filter):
            raise BrokerRefusedError(f"{topic_filter}: subscription refused: Not authorized")
        client = connection.client_id
        self._sessions[client].filters[topic_filter] = None
        clients = self._subscribers.get(topic_filter)
        if clients is None:
            self._subscribers.put(topic_filter, {client: None})
        else:
            clients[client] = None
        for topic, payload in list(self._retained.selected(topic_filter)):
            self._deliver(client, Packet(topic, payload, 1, retained=True))

    def unsubscribe(self, connection: Connection, topic_filter: str) -> None:
        """Remove a subscription."""
        self._sessions[connection.client_id].filters.pop(topic_filter, None)
        clients = self._subscribers.get(topic_filter)
        if clients is not None:
            clients.pop(connection.client_id, None)
            if not clients:
                self._subscribers.pop(topic_filter)

    def publish(self, connection: Connection, message: Packet, *, retain: bool) -> None:
        """Route one message; raises LinkError when the access list forbids it."""
        if self.allow is not None and not self.allow(connection.client_id, "publish", message.topic):
            raise BrokerRefusedError(f"{message.topic}: refused by the broker: Not authorized")
        self._route(message, retain=retain)
        if self.lose_puback is not None and self.lose_puback(connection.client_id, message.topic):
            self.kill(connection.client_id)

    def acknowledge(self, connection: Connection, token: int) -> None:
        """Forget a message that its client holds now."""
        if self._sessions[connection.client_id].unacknowledged.pop(token, None) is not None:
            self._sessions[connection.client_id].pump(connection, self._max_inflight)

    # --- inside --------------------------------------------------------------------------------

    def _route(self, message: Packet, *, retain: bool) -> None:
        if retain and message.payload:
            self._retained.put(message.topic, message.payload)
        elif retain:
            self._retained.pop(message.topic)
        found: dict[str, None] = {}
        for clients in list(self._subscribers.selecting(message.topic)):
            found |= clients  # once each, whatever its filters have in common
        for client_id in found:
            self._deliver(client_id, message)

    def _deliver(self, client_id: str, message: Packet) -> None:
        if self.drop is not None and self.drop(client_id, message.topic):
            return
        twice = self.duplicate is not None and self.duplicate(client_id, message.topic)
        session, connection = self._sessions[client_id], self._connections.get(client_id)
        for _ in range(2 if twice else 1):
            if message.qos == 0:
                if connection is not None:
                    connection.receive(message, 0)
            elif len(session.waiting) >= self._max_queued:
                session.lost_messages += 1
            else:
                session.waiting.append(message)
        session.pump(connection, self._max_inflight)


class MemoryLink:
    """A link to a MemoryBroker (see `link.Link` for the rules).

    Args:
        broker: the broker of this process.
        client_id: the identity; two open links with one id throw each other out.
        will: published by the broker if the connection dies.
        retry_s: pause before a new connection.
    """

    def __init__(
        self, broker: MemoryBroker, client_id: str, will: Will | None = None, *, retry_s: float = 0.0
    ) -> None:
        self._broker, self._client_id, self._will, self._retry_s = broker, client_id, will, retry_s
        self._mailbox = Mailbox()
        self._filters: dict[str, None] = {}
        self._forgotten: dict[str, None] = {}
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._sent = self._received = 0
        self._generation = 0
        self._held: list[Received] | None = None  # messages that came before Connected was said

    async def open(self) -> None:
        """Start connecting in the background."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Say goodbye and stop; idempotent."""
        self._closed = True
        if self._connection is not None:
            self._broker.end(self._connection, "closed")
            self._connection = None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._mailbox.close()

    def events(self) -> AsyncIterator[LinkEvent]:
        """Yield events until the link is closed; one consumer."""
        return self._mailbox.events()

    async def renew(self) -> None:
        """Connect anew; the session stays."""
        if self._connection is not None:
            self._broker.end(self._connection, "connecting anew")
        await asyncio.sleep(0)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Send one message (see `link.Link.publish`)."""
        check_topic(topic)
        size = publish_bytes(topic, len(payload), qos=qos)
        if size > self._broker.max_packet_bytes:
            raise TooLargeError(f"{topic}: {size} bytes, the packet limit is {self._broker.max_packet_bytes}")
        connection = self._connection
        if connection is None:
            raise LinkError(f"{topic}: not sent: not connected")
        self._sent += size
        await asyncio.sleep(0)  # a broker answers later, never at once
        if not connection.lost.done():
            try:
                self._broker.publish(connection, Packet(topic, bytes(payload), qos), retain=retain)
            except BrokerRefusedError:
                self._refused("publish", topic, size)
                raise
        if connection.lost.done() and qos:
            raise LinkError(f"{topic}: not acknowledged: {connection.lost.result()}")
        self._received += PUBACK_BYTES if qos else 0

    async def subscribe(self, *filters: str) -> None:
        """Ask for these topic filters, now and after every reconnect."""
        for topic_filter in filters:
            check_filter(topic_filter)
        for topic_filter in filters:
            self._filters[topic_filter] = None
            self._forgotten.pop(topic_filter, None)
            if self._connection is not None:
                try:
                    self._subscribe(self._connection, topic_filter)
                except LinkError:
                    self._filters.pop(topic_filter, None)
                    raise
        await asyncio.sleep(0)

    async def unsubscribe(self, *filters: str) -> None:
        """Forget these topic filters."""
        for topic_filter in filters:
            self._filters.pop(topic_filter, None)
            if self._connection is not None:
                self._broker.unsubscribe(self._connection, topic_filter)
            else:
                self._forgotten[topic_filter] = None
        await asyncio.sleep(0)

    def ack(self, token: int) -> None:
        """Tell the broker that the message is safe; a token of an older connection is ignored."""
        generation, number = divmod(token, 1 << 32)
        if self._connection is not None and generation == self._generation and number:
            self._sent += PUBACK_BYTES
            self._broker.acknowledge(self._connection, number)

    def urgent(self, on: bool) -> None:
        """Nothing: this link waits for its broker without pauses of its own."""

    @property
    def max_packet_bytes(self) -> int:
        """What the broker takes."""
        return self._broker.max_packet_bytes

    @property
    def traffic(self) -> Traffic:
        """The bytes of the packets that MQTT 5 would have carried."""
        return Traffic(sent_bytes=self._sent, received_bytes=self._received)

    def _subscribe(self, connection: Connection, topic_filter: str) -> None:
        self._sent += SUBSCRIBE_BYTES + len(topic_filter.encode())
        try:
            self._broker.subscribe(connection, topic_filter)
        except BrokerRefusedError:
            self._refused("subscribe", topic_filter)
            raise

    def _refused(self, what: Literal["publish", "subscribe"], topic: str, size: int = 0) -> None:
        self._mailbox.put(Refused(what=what, topic=topic, reason="Not authorized", size_bytes=size))

    def _receive(self, message: Packet, number: int) -> None:
        self._received += publish_bytes(message.topic, len(message.payload), qos=message.qos)
        token = (self._generation << 32) + number if number else 0
        event = Received(topic=message.topic, payload=message.payload, retained=message.retained, token=token)
        if self._held is None:
            self._mailbox.put(event)
        else:
            self._held.append(event)

    async def _keep_connected(self) -> None:
        while True:
            away = self._broker.away(self._client_id)
            if away is not None:
                self._mailbox.put(Disconnected(reason=away, retry_in_s=self._retry_s))
                await self._broker.reachable(self._client_id)
            reason = await self._connect_once()
            pause = max(self._retry_s, TAKEOVER_RETRY_S) if "taken over" in reason else self._retry_s
            self._mailbox.put(Disconnected(reason=reason, retry_in_s=pause))
            await asyncio.sleep(pause)

    async def _connect_once(self) -> str:
        self._generation += 1
        connection = Connection(self._client_id, self._will, self._receive)
        held: list[Received] = []
        self._held = held
        try:
            known = self._broker.connect(connection)
            self._restore(connection)
        except LinkError as error:
            self._broker.kill(self._client_id, str(error))
            return str(error)
        finally:
            self._held = None
        limit = self._broker.max_packet_bytes
        self._mailbox.put(Connected(protocol="memory", session_present=known, max_packet_bytes=limit))
        for event in held:
            self._mailbox.put(event)
        self._connection = connection
        try:
            return await connection.lost
        finally:
            self._connection = None

    def _restore(self, connection: Connection) -> None:
        for topic_filter in self._forgotten:
            self._broker.unsubscribe(connection, topic_filter)
        self._forgotten.clear()
        self._broker.resume(connection)
        for topic_filter in self._filters:
            self._subscribe(connection, topic_filter)
