"""One connection's paho client with what paho lacks; the only module that imports paho.

Everything here runs in the connection's thread. What paho reports is handed to a `Handler` in plain values.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from liberatai_core.link.mqtt import light  # noqa: F401 - loads paho without the modules it never uses here

# isort: split
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from liberatai_core.link.link import Will
from liberatai_core.link.mqtt.keepalive import Keepalive
from liberatai_core.link.mqtt.refusals import REASONS
from liberatai_core.link.mqtt.settings import IN_FLIGHT, MAX_INCOMING_BYTES, MqttSettings

READ_BYTES = 1 << 16  # one read: `recv` reserves what it is asked for before a byte has come
PAUSE_MESSAGES, PAUSE_BYTES = 64, 2 << 20  # unread messages that stop the reading
GIVE_UP_MESSAGES, GIVE_UP_BYTES = 1024, 16 << 20  # ... and the connection, when acknowledgements are awaited
LINGER_S = 1.0  # for the broker to close its side after a goodbye
FAILURE = 0x80  # MQTT 5 reason codes from here on are failures
ALERTS = {
    "ALERT_CERTIFICATE_EXPIRED": "it has expired, says the broker's clock",
    "ALERT_CERTIFICATE_REVOKED": "it was revoked",
    "ALERT_UNKNOWN_CA": "it is not signed by the authority that the broker trusts",
    "ALERT_CERTIFICATE_REQUIRED": "it has shown none (cert_file, key_file)",
    "ALERT_BAD_CERTIFICATE": "it is damaged, or not valid yet",
    "ALERT_UNSUPPORTED_CERTIFICATE": "it is not made for a client",
    "ALERT_CERTIFICATE_UNKNOWN": "the broker does not say why",
}
"""Alerts of TLS (RFC 8446, 6.2) about our own certificate."""
NEEDED = ("MaximumQoS", "RetainAvailable")  # a broker that announces 0 for one of them is unusable


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the CONNACK said."""

    session_present: bool
    max_packet_bytes: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The broker's word on a message or a subscription; `code` 0: done."""

    code: int = 0
    reason: str = ""


class Handler(Protocol):
    """Who hears what a client has heard, in the client's thread."""

    def welcomed(self, welcome: Welcome) -> None:
        """The CONNACK came."""

    def ended(self, reason: str, code: int = 0) -> None:
        """The connection ends for this reason; the first one counts."""

    def closed(self, reason: str, alert: str = "") -> None:
        """The socket was closed or broke; the reason may be empty. `alert`: what TLS said before."""

    def heard(self, message: MQTTMessage, topic: str) -> None:
        """A message came."""

    def answered(self, mid: int, answer: Answer) -> None:
        """The broker answered a packet of ours."""


class Counters:
    """Bytes of all connections of a link, and what its consumer has not read yet; shared by two threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.sent = self.received = 0
        self.unread_messages = self.unread_bytes = 0

    def moved(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes of the socket."""
        with self._lock:
            self.sent += sent
            self.received += received

    def handed_over(self, messages: int, payload_bytes: int) -> None:
        """Count what the consumer has to read; negative: it has."""
        with self._lock:
            self.unread_messages += messages
            self.unread_bytes += payload_bytes

    @property
    def full(self) -> bool:
        """Whether nothing more should be read from the socket."""
        return self.unread_messages >= PAUSE_MESSAGES or self.unread_bytes >= PAUSE_BYTES

    @property
    def overfull(self) -> bool:
        """Whether the connection is given up: the broker repeats what was not acknowledged."""
        return self.unread_messages >= GIVE_UP_MESSAGES or self.unread_bytes >= GIVE_UP_BYTES


class _RefusedPacketError(ConnectionError):
    """The broker sent what no honest broker sends; a ConnectionError, because that is what paho expects."""


class PahoClient(Client):
    """One connection. All use of paho's inside is in this class."""

    def __init__(
        self, settings: MqttSettings, will: Will | None, handler: Handler, counters: Counters, *, mqtt5: bool
    ) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            settings.client_id,
            clean_session=None if mqtt5 else settings.session_expiry_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if mqtt5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._mqtt5, self._settings, self._handler, self._counters = mqtt5, settings, handler, counters
        self._alive = Keepalive(settings.keepalive_s, time.monotonic(), time.monotonic())
        self._refused = self._alert = ""
        self._strange_code = 0
        self._lingering = False
        self.connect_timeout = settings.connect_timeout_s
        self.max_inflight_messages = IN_FLIGHT
        self.on_connect = self._connected
        self.on_disconnect = self._disconnected
        self.on_message = self._message
        self.on_publish = self._published
        self.on_subscribe = self._subscribed
        self.on_unsubscribe = lambda _client, _data, mid, _reasons, _properties: handler.answered(
            mid, Answer()
        )
        self.on_socket_open = _no_delay
        # With this callback paho leaves all writing to our loop, which asks `want_write` before every poll.
        self.on_socket_register_write = lambda _client, _data, _sock: None
        if will is not None:
            delay = None
            if mqtt5:
                delay = _properties(PacketTypes.WILLMESSAGE)
                delay.WillDelayInterval = settings.will_delay_s
            self.will_set(will.topic, will.payload, 1, will.retain, delay)

    # --- what the connection asks for -----------------------------------------------------------

    def begin(self) -> None:
        """Read the files and send CONNECT; raises ConfigError and OSError."""
        settings = self._settings
        if settings.username is not None:
            self.username_pw_set(settings.username, settings.secret())
        if settings.tls is not None:
            self.tls_set_context(settings.tls.context())
        if not self._mqtt5:
            self.connect(settings.host, settings.port, settings.keepalive_s)
            return
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.receive_maximum
        properties.MaximumPacketSize = settings.max_packet_bytes
        clean = settings.session_expiry_s == 0
        self.connect(
            settings.host, settings.port, settings.keepalive_s, clean_start=clean, properties=properties
        )

    def tend(self, looked_s: float, *, reading: bool) -> bool:
        """Ping when it is time; False: the peer is dead. While nothing is read, no answer is awaited.

        paho's own rule (`loop_misc`) is not used: it judges a ping in the pass that sends it, by the age of
        the last byte that came in.
        """
        now_s = time.monotonic()
        if not self.is_connected():
            return True
        if not reading:
            self._alive.heard(now_s)
        if self._alive.is_ping_due(now_s):
            self._alive.asked(now_s)
            self._send_pingreq()
        if self._alive.is_dead(looked_s):
            self._handler.ended(f"the broker gave no sign of life for {self._alive.keepalive_s:g} s")
            return False
        return True

    @property
    def due_s(self) -> float | None:
        """When `tend` has something to do."""
        return self._alive.due_s if self.is_connected() else None

    def send(self, topic: str, payload: bytes, *, retain: bool, qos: int) -> int | str:
        """Hand over a message; return its identifier, or why there is none."""
        info = self.publish(topic, payload, qos, retain)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else error_string(info.rc)

    def ask(self, filters: Sequence[str], *, wanted: bool) -> int | str:
        """Subscribe or unsubscribe; return the packet's identifier, or why there is none."""
        if wanted:
            code, mid = self.subscribe([(topic_filter, 1) for topic_filter in filters])
        else:
            code, mid = self.unsubscribe(list(filters))
        return mid if code == MQTTErrorCode.MQTT_ERR_SUCCESS and mid is not None else error_string(code)

    def goodbye(self) -> None:
        """Send DISCONNECT, after what was handed over before."""
        self._lingering = True
        self.disconnect()

    def break_off(self) -> None:
        """Close the socket without a goodbye."""
        self._lingering = False
        self._sock_close()

    # --- paho's inside --------------------------------------------------------------------------

    def _sock_recv(self, bufsize: int) -> bytes:
        """Count, never reserve more than one read, and refuse a packet by its announced length."""
        if bufsize > MAX_INCOMING_BYTES:
            self._refused = f"the broker announced a packet of {bufsize} bytes"
            raise _RefusedPacketError(self._refused)
        try:
            data = super()._sock_recv(min(bufsize, READ_BYTES))
        except ssl.SSLError as error:
            self._alert = alert_words(error)
            raise ConnectionError(self._alert) from error
        self._counters.moved(received=len(data))
        if data:
            self._alive.heard(time.monotonic())
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        """Count, and note the time."""
        sent = super()._sock_send(buf)
        self._counters.moved(sent=sent)
        self._alive.sent(time.monotonic())
        return sent

    def _packet_handle(self) -> MQTTErrorCode:
        """Refuse QoS 2 and 3: never asked for, and paho would store such messages without a limit.

        And read a refusal whose code MQTT 5 does not provide for a PUBACK: Mosquitto says "packet too large",
        and paho takes that for a broken packet and ends the connection.
        """
        command, packet = self._in_packet["command"], self._in_packet["packet"]
        if command & 0xF0 == PacketTypes.PUBLISH << 4 and command & 0x04:
            self._refused = "the broker sent a message of QoS 2"
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._strange_code = 0
        if command & 0xF0 == PacketTypes.PUBACK << 4 and self._mqtt5 and len(packet) > 2:
            code = packet[2]
            if code >= FAILURE and code not in _PUBACK_CODES:
                self._strange_code = code
                self._in_packet["packet"] = bytearray(packet[:2]) + bytes([FAILURE]) + packet[3:]
        return super()._packet_handle()

    def _sock_close(self) -> None:
        """After a goodbye, wait for the broker to close first.

        Closing with unread bytes resets the connection, and a DISCONNECT on its way dies: the will is said.
        """
        sock = self._sock
        if self._lingering and isinstance(sock, socket.socket):
            self._lingering = False
            with contextlib.suppress(OSError):
                sock.settimeout(LINGER_S)
                sock.shutdown(socket.SHUT_WR)
                until = time.monotonic() + LINGER_S
                while sock.recv(READ_BYTES) and time.monotonic() < until:
                    pass
        super()._sock_close()

    # --- paho's callbacks: they only hand over ---------------------------------------------------

    def _connected(
        self,
        _client: Client,
        _data: Any,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._alive.keepalive_s = self._keepalive  # MQTT 5 lets the broker set it
        missing = [name for name in NEEDED if getattr(properties, name, 1) == 0]
        if reason.is_failure:
            self._handler.ended(f"refused by the broker: {reason}", reason.value)
        elif missing:
            self._handler.ended(f"unusable broker: it announces {' and '.join(missing)} = 0")
        else:
            welcome = Welcome(
                flags.session_present,
                getattr(properties, "MaximumPacketSize", MAX_INCOMING_BYTES),
                max(1, min(getattr(properties, "ReceiveMaximum", IN_FLIGHT), IN_FLIGHT)),
            )
            self._handler.welcomed(welcome)

    def _disconnected(
        self, _client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if self._refused:
            self._handler.ended(self._refused)
        elif flags.is_disconnect_packet_from_server:
            self._handler.ended(f"the broker ended the session: {reason}", reason.value)
        else:
            self._handler.closed("" if reason.value == FAILURE else str(reason), self._alert)

    def _message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        if topic:
            self._handler.heard(message, topic)
        else:
            self._handler.ended("the broker sent a message without a readable topic")

    def _published(self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        code = self._strange_code or (reason.value if reason.is_failure else 0)
        self._handler.answered(mid, Answer(code, REASONS.get(code, str(reason))))

    def _subscribed(
        self, _client: Client, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [reason for reason in reasons if reason.value >= FAILURE]
        self._handler.answered(mid, Answer(refused[0].value, str(refused[0])) if refused else Answer())


def alert_words(error: ssl.SSLError) -> str:
    """Return what a TLS alert means for whoever set up this program."""
    alert = error.reason or ""
    for part, words in ALERTS.items():
        if part in alert:
            return f"the broker refuses this program's certificate: {words}"
    return f"TLS failed: {alert or error}"


def _known_codes(packet_type: int) -> frozenset[int]:
    table: Any = ReasonCode(packet_type).names
    return frozenset(
        code for code, names in table.items() if any(packet_type in types for types in names.values())
    )


def _properties(packet_type: int) -> Properties:
    make: Any = Properties  # paho's constructor has no annotations
    made: Properties = make(packet_type)
    return made


def _no_delay(_client: Client, _data: Any, sock: Any) -> None:
    """Send small packets at once: an acknowledgement must not wait for the peer's delayed ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_PUBACK_CODES = _known_codes(PacketTypes.PUBACK)
