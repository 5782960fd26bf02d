"""The process of the embedded broker: `python -m liberatai_coordinator.brokers.amqtt_broker FILE`.

amqtt 0.12 with five of its habits changed:

- it reads the properties of an MQTT 5 CONNECT as a client id and waits for more instead of refusing;
- it forgets a message that was not acknowledged when the connection broke, or within 5 s; here such a message
  is sent again in the next session, as MQTT 3.1.1 section 4.4 demands;
- it serves no SUBSCRIBE of a client before that client has acknowledged all stored messages of the last one;
- at a reconnect it sends a client the retained messages of everybody's subscriptions, not only of its own;
- its access list has no settings for subscriptions and receipts outside of its old configuration format.
"""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import amqtt.broker
from amqtt.mqtt.connect import ConnectPacket, ConnectPayload
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.plugins.topic_checking import TopicAccessControlListPlugin

MQTT_311 = 4  # the protocol level in a CONNECT
HEADER_BYTES = 10  # of a CONNECT before its payload: name 6, level 1, flags 1, keepalive 2
MAX_CONNECT_BYTES = 1 << 16  # a longer one is none of ours

_background: set[asyncio.Task[Any]] = set()  # the event loop holds tasks weakly


def _in_background(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_finished)


def _finished(task: asyncio.Task[Any]) -> None:
    _background.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logging.getLogger(__name__).warning("delivery failed: %r", task.exception())


class AccessList(TopicAccessControlListPlugin):  # type: ignore[misc]
    """amqtt's access list with all three lists."""

    @dataclass
    class Config:
        """Topic filters by user name."""

        publish_acl: dict[str, list[str]] = field(default_factory=dict)
        subscribe_acl: dict[str, list[str]] = field(default_factory=dict)
        receive_acl: dict[str, list[str]] = field(default_factory=dict)


class HonestConnect(ConnectPayload):  # type: ignore[misc]
    """The rest of a CONNECT, read by its length only if it is not MQTT 3.1.1, so that it gets its refusal."""

    @classmethod
    async def from_stream(cls, reader: Any, fixed_header: Any, variable_header: Any) -> Any:
        """Read the payload of a CONNECT packet."""
        if variable_header.proto_level == MQTT_311:
            return await super().from_stream(reader, fixed_header, variable_header)
        rest = min(max(fixed_header.remaining_length - HEADER_BYTES, 0), MAX_CONNECT_BYTES)
        await reader.read(rest)
        return cls(client_id="refused", will_topic="refused", will_message=b"")


class PatientHandler(BrokerProtocolHandler):  # type: ignore[misc]
    """A connection that keeps a message until it is acknowledged, however long that takes."""

    async def _handle_qos1_message_flow(self, app_message: Any) -> None:
        session = self.session
        if app_message.direction != amqtt.session.OUTGOING or session is None:
            await super()._handle_qos1_message_flow(app_message)
            return
        number = app_message.packet_id
        session.inflight_out[number] = app_message
        self._puback_waiters[number] = waiter = asyncio.get_running_loop().create_future()
        packet = app_message.build_publish_packet(dup=app_message.publish_packet is not None)
        app_message.publish_packet = packet
        try:
            await self._send_packet(packet)
            app_message.puback_packet = await waiter  # cancelled when the connection ends
        finally:
            if self._puback_waiters.get(number) is waiter:
                del self._puback_waiters[number]
        session.inflight_out.pop(number, None)

    async def _retry_deliveries(self) -> None:
        for message in list(self.session.inflight_out.values()):
            _in_background(self._handle_message_flow(message))


class EmbeddedBroker(amqtt.broker.Broker):  # type: ignore[misc]
    """A broker whose deliveries do not hold up the client's next request."""

    async def _publish_session_retained_messages(self, session: Any) -> None:
        _in_background(super()._publish_session_retained_messages(session))

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Any
    ) -> None:
        subscribers = self._subscriptions.get(subscription[0], ())
        if any(subscriber.client_id == session.client_id for subscriber, _ in subscribers):
            _in_background(super()._publish_retained_messages_for_subscription(subscription, session))


def main(config_file: Path) -> None:
    """Be the broker until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = json.loads(config_file.read_text())
    amqtt.broker.BrokerProtocolHandler = PatientHandler
    ConnectPacket.PAYLOAD = HonestConnect

    async def serve() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        broker = EmbeddedBroker(config)
        await broker.start()
        await stop.wait()
        await broker.shutdown()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
