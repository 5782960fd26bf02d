"""The link over MQTT: one connection after another, until `close`.

MQTT 5 is tried first; a broker that refuses it is spoken to in MQTT 3.1.1 from then on. Some brokers do not
refuse but fall silent (amqtt takes the properties for a client id and waits for more): after such an attempt
the other version is tried, until one was answered.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from liberatai_core.errors import BrokerRefusedError, LinkError, TooLargeError
from liberatai_core.files import sync_folder
from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Refused, Traffic, Will
from liberatai_core.link.mailbox import Mailbox
from liberatai_core.link.mqtt import connection as made
from liberatai_core.link.mqtt.client import Counters, Welcome
from liberatai_core.link.mqtt.connection import Connection, PacketRefusedError
from liberatai_core.link.mqtt.reconnect import Loss, Pause, Reconnect
from liberatai_core.link.mqtt.refusals import TOO_LARGE, Evidence
from liberatai_core.link.mqtt.settings import MqttSettings
from liberatai_core.link.packet import check_filter, check_topic, publish_bytes

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage

log = logging.getLogger(__name__)

UNSUPPORTED_VERSION = 0x84  # MQTT 5 reason code


class MqttLink:
    """A link to an MQTT broker (see `link.Link` for the rules).

    Args:
        settings: where the broker is and who we are.
        will: published by the broker if the connection dies.
    """

    def __init__(self, settings: MqttSettings, will: Will | None = None) -> None:
        if will is not None:
            check_topic(will.topic)
        self._settings, self._will = settings, will
        self._counters = Counters()
        self._mailbox = Mailbox(self._taken)
        self._filters: dict[str, None] = {}
        self._forgotten: dict[str, None] = {}
        self._newest: Connection | None = None  # also while it is being made
        self._current: Connection | None = None  # announced by Connected
        self._held: list[Received] = []
        self._generation = 0
        self._old_protocol = settings.protocol == "3.1.1"
        self._version_known = settings.protocol != "auto"
        self._evidence = Evidence(limit=settings.max_packet_bytes)
        self._reconnect = Reconnect(
            client_id=settings.client_id,
            secure=settings.tls is not None,
            cap_s=settings.reconnect_cap_s,
            urgent_cap_s=settings.urgent_cap_s,
            spread_s=settings.spread_s,
        )
        self._hurry = asyncio.Event()
        self._at_once = False
        self._beside = False  # the attempt uses the new certificate
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Start connecting in the background; returns at once, even if no broker is there."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Say goodbye and stop; idempotent."""
        self._closed = True
        self._current = None
        if self._newest is not None and self._newest.welcome.done():
            await self._newest.goodbye()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._mailbox.close()

    async def abandon(self) -> None:
        """Break off without a goodbye, as a cut cable does: the broker says the will."""
        self._closed = True
        if self._newest is not None:
            self._newest.break_off("abandoned")

    async def renew(self) -> None:
        """Connect anew at once, with a certificate that lies beside the old one, if there is one."""
        connection = self._newest
        if connection is not None and connection.welcome.done() and not connection.lost.done():
            self._at_once, self._beside = True, False
            await connection.goodbye()

    def events(self) -> AsyncIterator[LinkEvent]:
        """Yield events until the link is closed; one consumer."""
        return self._mailbox.events()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Send one message (see `link.Link.publish`); QoS 0 returns when the socket has taken it."""
        if qos not in (0, 1):
            raise ValueError(f"qos {qos}: only 0 and 1 are used")
        check_topic(topic)
        connection = self._current
        mqtt5 = connection.mqtt5 if connection is not None else not self._old_protocol
        limit = self.max_packet_bytes
        size = publish_bytes(topic, len(payload), qos=qos, mqtt5=mqtt5)
        if size > limit:
            raise TooLargeError(f"{topic}: {size} bytes, the packet limit is {limit}")
        if connection is None:
            raise LinkError(f"{topic}: not sent: not connected")
        if self._evidence.is_aside(topic, time.monotonic()):
            raise BrokerRefusedError(f"{topic}: not sent: the connection broke after it, again and again")
        try:
            await connection.publish(topic, payload, retain=retain, qos=qos)
        except PacketRefusedError as refusal:
            answer = refusal.answer
            self._say(self._evidence.refused(topic, size, answer.code, answer.reason))
            if answer.code == TOO_LARGE:
                raise TooLargeError(f"{topic}: {size} bytes: {answer.reason}") from None
            raise
        if qos:
            self._evidence.acknowledged(topic, size)

    async def subscribe(self, *filters: str) -> None:
        """Ask for these topic filters at QoS 1, now and after every reconnect.

        Raises:
            TopicError: malformed filter.
            LinkError: the broker refuses; the filters are forgotten again.
        """
        for topic_filter in filters:
            check_filter(topic_filter)
        for topic_filter in filters:
            self._filters[topic_filter] = None
            self._forgotten.pop(topic_filter, None)
        connection = self._current
        if connection is None:
            return
        try:
            await self._ask(connection, list(filters))
        except LinkError:
            if connection.lost.done():
                return  # the next connection restores them
            for topic_filter in filters:
                self._filters.pop(topic_filter, None)
            raise

    async def unsubscribe(self, *filters: str) -> None:
        """Forget these topic filters."""
        known = [topic_filter for topic_filter in filters if topic_filter in self._filters]
        for topic_filter in known:
            del self._filters[topic_filter]
        if self._current is None or not known:
            self._forgotten |= dict.fromkeys(known)
            return
        try:
            await self._current.ask(known, wanted=False)
        except LinkError:
            self._forgotten |= dict.fromkeys(topic for topic in known if topic not in self._filters)

    def ack(self, token: int) -> None:
        """Tell the broker that the message is safe; a token of an older connection is ignored."""
        generation, mid = divmod(token, 1 << 16)
        if self._newest is not None and generation == self._generation:
            self._newest.ack(mid)

    def urgent(self, on: bool) -> None:
        """Say whether something is at stake: an outage is then ended sooner (see `Reconnect`)."""
        changed, self._reconnect.urgent = on and not self._reconnect.urgent, on
        if changed:
            self._hurry.set()

    @property
    def max_packet_bytes(self) -> int:
        """The smallest of our own limit, the broker's word, and what was found out about it."""
        announced = self._current.limit if self._current is not None else self._settings.max_packet_bytes
        return min(announced, self._evidence.limit)

    @property
    def traffic(self) -> Traffic:
        """Bytes of all packets since `open`, before encryption (TLS adds about 22 B per 16 KiB record)."""
        return Traffic(sent_bytes=self._counters.sent, received_bytes=self._counters.received)

    # --- inside --------------------------------------------------------------------------------

    def _taken(self, event: LinkEvent) -> None:
        if isinstance(event, Received):
            was_full = self._counters.full
            self._counters.handed_over(-1, -len(event.payload))
            if was_full and self._newest is not None:
                self._newest.wake()

    def _receive(self, connection: Connection, message: "MQTTMessage", topic: str) -> None:
        token = (self._generation << 16) + message.mid if message.qos else 0
        payload = bytes(message.payload)
        event = Received(topic=topic, payload=payload, retained=message.retain, token=token)
        if connection is not self._newest:
            self._counters.handed_over(-1, -len(payload))  # the broker repeats it to the next session
        elif connection is self._current:
            self._mailbox.put(event)
        else:
            self._held.append(event)

    def _say(self, refused: Refused | None) -> None:
        if refused is not None:
            self._mailbox.put(refused)

    async def _ask(self, connection: Connection, filters: list[str]) -> None:
        try:
            await connection.ask(filters, wanted=True)
        except PacketRefusedError as refusal:
            names = " ".join(filters)
            self._say(Refused(what="subscribe", topic=names, reason=refusal.answer.reason))
            raise

    async def _keep_connected(self) -> None:
        while True:
            started_s = time.monotonic()
            loss = await self._connect_once()
            if self._closed:
                return
            if not self._version_known and (
                (loss.unanswered and not loss.certificate) or loss.code == UNSUPPORTED_VERSION
            ):
                self._old_protocol = not self._old_protocol
                log.info("trying MQTT %s", "3.1.1" if self._old_protocol else "5")
                if self._old_protocol:
                    continue
            now_s = time.monotonic()
            if loss.unexplained or loss.code == TOO_LARGE:
                self._say(self._evidence.lost(loss.under_way, now_s, code=loss.code))
            pause = self._reconnect.lost(loss, now_s - started_s, random.uniform)
            if self._at_once or (self._beside and loss.certificate):
                # Of a new certificate that is refused the old one knows nothing: it is its turn.
                self._at_once, pause = False, Pause("connecting anew" if self._at_once else loss.reason, 0.0)
            self._mailbox.put(Disconnected(reason=pause.reason, retry_in_s=pause.seconds))
            await self._rest(pause)

    async def _rest(self, pause: Pause) -> None:
        """Wait before the next attempt; less if something comes to be at stake meanwhile."""
        until_s = time.monotonic() + pause.seconds
        self._hurry.clear()
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._hurry.wait()
            except TimeoutError:
                return
            self._hurry.clear()
            left_s = self._reconnect.hurried(pause, until_s - time.monotonic(), random.uniform)
            until_s = time.monotonic() + left_s

    async def _connect_once(self) -> Loss:
        self._generation += 1
        settings = self._for_attempt()
        connection = Connection(
            settings,
            self._will,
            self._counters,
            self._receive,
            mqtt5=not self._old_protocol,
            answer_s=made.CONNACK_TIMEOUT_S if self._version_known else made.TRIAL_TIMEOUT_S,
        )
        self._newest = connection
        connection.start()
        try:
            welcome = await connection.established()
            self._reconnect.welcomed()
            self._version_known = True
            self._prove()
            await self._restore(connection, session_present=welcome.session_present)
            self._announce(connection, welcome)
            return await asyncio.shield(connection.lost)
        except LinkError as error:
            return connection.lost.result() if connection.lost.done() else Loss(str(error))
        except Exception as error:  # the link outlives its own faults: it tries again
            log.exception("the link failed")
            return Loss(f"internal fault: {error!r}")
        finally:
            self._current = self._newest = None
            for event in self._held:
                self._counters.handed_over(-1, -len(event.payload))
            self._held = []
            connection.break_off("closed")

    def _for_attempt(self) -> MqttSettings:
        """Return the settings of this attempt: a new certificate and the old one are tried in turn."""
        tls = self._settings.tls
        if tls is None:
            return self._settings
        chosen = tls.choose(beside=not self._beside)
        self._beside = chosen is not tls
        return replace(self._settings, tls=chosen)

    def _prove(self) -> None:
        """Put the new certificate in the place of the old one, once the broker has let it in."""
        tls = self._settings.tls
        if not self._beside or tls is None or tls.beside is None or tls.cert_file is None:
            return
        try:
            tls.beside.replace(tls.cert_file)
            sync_folder(tls.cert_file.parent)
        except OSError as error:
            log.warning("E_DISK: %s: %s", tls.cert_file, error.strerror)
        else:
            log.info("the broker took the new certificate: %s", tls.cert_file)

    async def _restore(self, connection: Connection, *, session_present: bool) -> None:
        if session_present and self._forgotten:
            await connection.ask(list(self._forgotten), wanted=False)
        self._forgotten.clear()
        restored: set[str] = set()
        while missing := [name for name in self._filters if name not in restored]:
            await self._ask(connection, missing)
            restored.update(missing)

    def _announce(self, connection: Connection, welcome: Welcome) -> None:
        self._current = connection
        self._mailbox.put(
            Connected(
                protocol="MQTT 5" if connection.mqtt5 else "MQTT 3.1.1",
                session_present=welcome.session_present,
                max_packet_bytes=self.max_packet_bytes,
            )
        )
        held, self._held = self._held, []
        for event in held:
            self._mailbox.put(event)
