"""The connection of a simulated device to the broker: made anew as `link` does it, over its line."""

from collections.abc import Callable
from random import Random
from typing import Final, Protocol

from liberatai_coordinator.sim.line import Line
from liberatai_coordinator.sim.virtual.surroundings import Surroundings
from liberatai_core.errors import LiberataiError
from liberatai_core.link.link import Will
from liberatai_core.link.memory import Connection, Packet
from liberatai_core.link.mqtt.reconnect import Loss, Reconnect
from liberatai_core.link.packet import publish_bytes

HANDSHAKE_BYTES: Final = 3000
"""TCP, TLS 1.3 with certificates of both sides, CONNECT: what a connection takes before its first message."""
SUBSCRIBE_BYTES: Final = 8


class End(Protocol):
    """Whose wire it is."""

    id: str
    running: bool

    @property
    def urgent(self) -> bool:
        """Whether something is at stake: the next connection shall come soon."""

    def will(self) -> bytes:
        """Return what the broker says if the connection breaks."""

    def linked(self, *, known: bool) -> None:
        """Go on with a connection; `known`: the broker kept the session."""

    def unlinked(self, reason: str) -> None:
        """Go on without one."""

    def arrived(self, packet: Packet) -> None:
        """Take a packet."""

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back, unless the device has ended in the meantime."""

    def note(self, what: str, text: str = "") -> None:
        """Note what happens."""


class Wire:
    """One connection after another.

    Attributes:
        connection: that stands; None: none does.
    """

    __slots__ = ("_connected_s", "_end", "_random", "_reconnect", "_world", "connection", "line")

    def __init__(self, world: Surroundings, end: End, line: Line, random: Random) -> None:
        self._world, self._end, self.line, self._random = world, end, line, random
        self.connection: Connection | None = None
        self._connected_s = 0.0
        self._reconnect = Reconnect(
            client_id=end.id, secure=False, cap_s=120.0, urgent_cap_s=10.0, spread_s=5.0
        )

    def connect(self) -> None:
        """Connect, and try again until it stands."""
        if not self._end.running or self.connection is not None:
            return
        away = self._world.broker.away(self._end.id)
        if away is not None:
            self._retry(Loss(away), 0.0)
            return
        self.line.send(self._world.loop.time(), HANDSHAKE_BYTES // 2)
        arrived_s = self.line.receive(self._world.loop.time(), HANDSHAKE_BYTES // 2)
        self._world.loop.call_at(arrived_s + 2 * self.line.rtt_s, self._connected)

    def _connected(self) -> None:
        end, broker, topics = self._end, self._world.broker, self._world.topics
        if not end.running or self.connection is not None or broker.away(end.id) is not None:
            if end.running and self.connection is None:
                self._retry(Loss("no answer"), 0.0)
            return
        will = Will(topic=topics.up(end.id, "state"), payload=end.will())

        def receive(packet: Packet, token: int) -> None:
            self._receive(connection, packet, token)

        connection = Connection(end.id, will, receive)
        known = broker.connect(connection)
        self.connection = connection
        self._connected_s = self._world.loop.time()
        self._reconnect.welcomed()
        connection.lost.add_done_callback(lambda lost: self._lost(connection, lost.result()))
        broker.resume(connection)
        for topic_filter in topics.to_device(end.id):
            self.line.send(self._world.loop.time(), SUBSCRIBE_BYTES + len(topic_filter))
            broker.subscribe(connection, topic_filter)
        end.linked(known=known)

    def _lost(self, connection: Connection, reason: str) -> None:
        if connection is not self.connection:
            return
        self.connection = None
        self.line.cut()
        self._end.unlinked(reason)
        self._retry(
            Loss(reason, code=0x8E if "taken over" in reason else 0),
            self._world.loop.time() - self._connected_s,
        )

    def _retry(self, loss: Loss, lasted_s: float) -> None:
        self._reconnect.urgent = self._end.urgent
        pause = self._reconnect.lost(loss, lasted_s, self._random.uniform)
        self._end.later(pause.seconds, self.connect)

    def _receive(self, connection: Connection, packet: Packet, token: int) -> None:
        size = publish_bytes(packet.topic, len(packet.payload), qos=packet.qos)
        arrives_s = self.line.receive(self._world.loop.time(), size)
        self._world.loop.call_at(arrives_s, self._arrived, connection, packet, token)

    def _arrived(self, connection: Connection, packet: Packet, token: int) -> None:
        if connection is not self.connection:
            return  # it comes again with the next connection
        self._end.arrived(packet)
        if token and connection is self.connection:
            self._world.broker.acknowledge(connection, token)

    def send(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish; without a connection nothing is sent, the next one says it again."""
        connection = self.connection
        if connection is None:
            return
        arrives_s = self.line.send(self._world.loop.time(), publish_bytes(topic, len(payload), qos=qos))
        self._world.loop.call_at(arrives_s, self._delivered, connection, Packet(topic, payload, qos), retain)

    def _delivered(self, connection: Connection, packet: Packet, retain: bool) -> None:
        if not connection.lost.done():
            try:
                self._world.broker.publish(connection, packet, retain=retain)
            except LiberataiError as error:
                self._end.note("refused", f"{error.code}: {error}")
