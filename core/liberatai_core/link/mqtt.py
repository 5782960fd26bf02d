"""The link over MQTT; the only module that imports paho.

Every connection has a paho client and a thread of its own and is thrown away afterwards. paho would otherwise
send its whole queue again on reconnect, past the broker's Receive Maximum, and an oversize packet for ever.
The thread alone calls paho; it takes work from a deque and hands results to the event loop. It keeps the
connection alive while the event loop, or the consumer, is busy with something else.

MQTT 5 is tried first; a broker that refuses it is spoken to in MQTT 3.1.1 from then on. Some brokers do not
refuse but fall silent (amqtt takes the properties for a client id and waits for more): after such an attempt
the other version is tried, until one was answered.
"""

import asyncio
import contextlib
import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from liberatai_core.link import light  # noqa: F401 - loads paho without the modules it never uses here

# isort: split
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from liberatai_core.errors import ConfigError, LiberataiError, LinkError, TooLargeError
from liberatai_core.link.keepalive import Keepalive
from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Traffic, Will
from liberatai_core.link.mailbox import Mailbox
from liberatai_core.link.packet import check_filter, check_topic, publish_bytes

log = logging.getLogger(__name__)

MAX_INCOMING_BYTES = 1 << 20  # four of the largest chunks; a hostile broker may announce 256 MB
READ_BYTES = 1 << 16  # one read: `recv` reserves what it is asked for before a byte has come
MAX_PACKET_BYTES = 266_240  # the largest chunk (256 KiB) and 4 KiB of headers
IN_FLIGHT = 8  # unacknowledged messages: 8 chunks of 128 KiB are 1 MiB of memory
PAUSE_MESSAGES, PAUSE_BYTES = 64, 2 << 20  # unread messages that stop the reading
GIVE_UP_MESSAGES, GIVE_UP_BYTES = 1024, 16 << 20  # ... and the connection, when acknowledgements are awaited
FILTERS_PER_PACKET = 64  # 64 filters of 100 bytes fit every broker's packet limit
CONNACK_TIMEOUT_S = 10.0  # a port that accepts and says nothing
TRIAL_TIMEOUT_S = 4.0  # the same while the version is not known: the other one may be answered at once
ACK_TIMEOUT_S = 120.0  # no acknowledgement at all for so long: 8 chunks of 256 KiB need 67 s at 250 kbit/s
GOODBYE_TIMEOUT_S = 2.0  # for the last packets
LINGER_S = 1.0  # of it for the broker to close its side
FIRST_RETRY_S = 0.1  # the shortest pause: a restarting broker needs some
STABLE_S = 60.0  # a connection that lasted so long resets the backoff
CUT_IN_A_ROW = 3  # short connections without a reason: Mosquitto 2.0 says nothing to a client it throws out
REFUSED_IN_A_ROW, REFUSED_RETRY_S = (
    5,
    900.0,
)  # TLS 1.3 shows a refused certificate only as a closed connection
UNSUPPORTED_VERSION, TAKEN_OVER, FAILURE = 0x84, 0x8E, 0x80  # MQTT 5 reason codes
NEEDED = ("MaximumQoS", "RetainAvailable")  # a broker that announces 0 for one of them is unusable
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}

Command = Callable[[], None]
Done = asyncio.Future[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Files for TLS; `cert_file` and `key_file` make it mutual; no `ca_file`: the system's roots count."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Read the files; raises OSError (ssl.SSLError is one) when they are missing or wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttSettings:
    """How to reach a broker.

    Attributes:
        host: name or address; with TLS the certificate must carry it.
        port: TCP port.
        client_id: identity of the session; two links with one id throw each other out.
        username: for brokers that know no certificates; amqtt loses messages of nameless clients.
        password: belongs to `username`.
        keepalive_s: the broker publishes the will after 1.5 times this silence.
        tls: None for plain TCP.
        session_expiry_s: how long the broker keeps the session while we are away; 0 starts clean each time.
        receive_maximum: unacknowledged messages that the broker may send us (MQTT 5).
        max_packet_bytes: the largest packet, both ways.
        will_delay_s: MQTT 5: the broker waits so long with the will, so that short drops stay unseen.
        protocol: "auto" tries MQTT 5, then 3.1.1.
        reconnect_cap_s: upper end of the reconnect pause.
        connect_timeout_s: for name, TCP and TLS.
    """

    host: str
    port: int = 1883
    client_id: str
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 60
    tls: TlsSettings | None = None
    session_expiry_s: int = 86_400
    receive_maximum: int = IN_FLIGHT
    max_packet_bytes: int = MAX_PACKET_BYTES
    will_delay_s: int = 0
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    reconnect_cap_s: float = 120.0
    connect_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        rules = {
            "host: must not be empty": bool(self.host),
            "port: must be 1 to 65535": 0 < self.port < 1 << 16,
            "client_id: must have 1 to 128 characters": 0 < len(self.client_id) <= 128,
            "password: needs a username": self.password is None or self.username is not None,
            "keepalive_s: must be 1 to 65535": 0 < self.keepalive_s < 1 << 16,
            "session_expiry_s: must be 0 to 4294967295": 0 <= self.session_expiry_s < 1 << 32,
            "receive_maximum: must be 1 to 65535": 0 < self.receive_maximum < 1 << 16,
            "max_packet_bytes: must be 1024 to 1048576": 1024 <= self.max_packet_bytes <= MAX_INCOMING_BYTES,
            "will_delay_s: must be 0 to 4294967295": 0 <= self.will_delay_s < 1 << 32,
            "protocol: must be auto, 5 or 3.1.1": self.protocol in ("auto", "5", "3.1.1"),
            "reconnect_cap_s: must be positive": self.reconnect_cap_s > 0,
            "connect_timeout_s: must be positive": self.connect_timeout_s > 0,
        }
        faults = [fault for fault, kept in rules.items() if not kept]
        if faults:
            raise ConfigError("broker", faults)

    def __repr__(self) -> str:
        """Show where it leads, never the password."""
        user = f"{self.username}@" if self.username else ""
        scheme = "mqtt" if self.tls is None else "mqtts"
        return f"MqttSettings({scheme}://{user}{self.host}:{self.port}, client_id={self.client_id!r})"

    @classmethod
    def from_url(cls, url: str, *, client_id: str, tls: TlsSettings | None = None) -> "MqttSettings":
        """Read `mqtt://user:password@host:port` or `mqtts://...` (TLS with the system's roots unless given).

        Use `dataclasses.replace` for everything else.

        Raises:
            ConfigError: another scheme, no host, a bad port, or `tls` with `mqtt://`.
        """
        where = "broker url"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(where, [f"{error}; write mqtt://host:port"]) from error
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ConfigError(where, ["write mqtt://host:port or mqtts://host:port"])
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(where, ["nothing may follow the port"])
        if parts.scheme == "mqtt" and tls is not None:
            raise ConfigError(where, ["certificates are given, but mqtt:// is plain TCP: write mqtts://"])
        if parts.scheme == "mqtts" and tls is None:
            tls = TlsSettings()
        return cls(
            host=parts.hostname,
            port=port if port is not None else DEFAULT_PORTS[parts.scheme],
            client_id=client_id,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=tls,
        )


@dataclass(frozen=True, slots=True)
class _Welcome:
    """What the CONNACK said."""

    session_present: bool
    max_packet_bytes: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class _Loss:
    """Why a connection ended; `code` is the MQTT 5 reason code if the broker gave one.

    `unanswered`: TCP and TLS stood, and no CONNACK came. `unexplained`: it broke after that without a word.
    """

    reason: str
    code: int = 0
    unanswered: bool = False
    unexplained: bool = False


class _Counters:
    """Bytes of all connections of a link, and what its consumer has not read yet; shared by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent = self.received = 0
        self.unread_messages = self.unread_bytes = 0

    def moved(self, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.received += received

    def handed_over(self, messages: int, payload_bytes: int) -> None:
        with self._lock:
            self.unread_messages += messages
            self.unread_bytes += payload_bytes

    @property
    def full(self) -> bool:
        return self.unread_messages >= PAUSE_MESSAGES or self.unread_bytes >= PAUSE_BYTES

    @property
    def overfull(self) -> bool:
        return self.unread_messages >= GIVE_UP_MESSAGES or self.unread_bytes >= GIVE_UP_BYTES


class _RefusedPacketError(ConnectionError):
    """The broker sent what no honest broker sends; a ConnectionError, because that is what paho expects."""


class _Paho(Client):
    """paho's client with what it lacks. All use of paho's inside is in this class."""

    counters: _Counters
    alive: Keepalive
    refused = ""
    lingering = False

    def _sock_recv(self, bufsize: int) -> bytes:
        """Count, never reserve more than one read, and refuse a packet by its announced length."""
        if bufsize > MAX_INCOMING_BYTES:
            self.refused = f"the broker announced a packet of {bufsize} bytes"
            raise _RefusedPacketError(self.refused)
        data = super()._sock_recv(min(bufsize, READ_BYTES))
        self.counters.moved(received=len(data))
        if data:
            self.alive.heard(time.monotonic())
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        """Count, and note the time."""
        sent = super()._sock_send(buf)
        self.counters.moved(sent=sent)
        self.alive.sent(time.monotonic())
        return sent

    def _packet_handle(self) -> MQTTErrorCode:
        """Refuse QoS 2 and 3: never asked for, and paho would store such messages without a limit."""
        command = self._in_packet["command"]
        if command & 0xF0 == PacketTypes.PUBLISH << 4 and command & 0x04:
            self.refused = "the broker sent a message of QoS 2"
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        return super()._packet_handle()

    def agreed(self) -> None:
        """Take over the keepalive that holds since the CONNACK: MQTT 5 lets the broker set it."""
        self.alive.keepalive_s = self._keepalive

    def tend(self, looked_s: float, *, reading: bool) -> bool:
        """Ping when it is time; False: the peer is dead. While nothing is read, no answer is awaited.

        paho's own rule (`loop_misc`) is not used: it judges a ping in the pass that sends it, by the age of
        the last byte that came in.
        """
        now_s = time.monotonic()
        if not self.is_connected():
            return True
        if not reading:
            self.alive.heard(now_s)
        if self.alive.is_ping_due(now_s):
            self.alive.asked(now_s)
            self._send_pingreq()
        return not self.alive.is_dead(looked_s)

    def break_off(self) -> None:
        """Close the socket without a goodbye."""
        self.lingering = False
        self._sock_close()

    def _sock_close(self) -> None:
        """After a goodbye, wait for the broker to close first.

        Closing with unread bytes resets the connection, and a DISCONNECT on its way dies: the will is said.
        """
        sock = self._sock
        if self.lingering and isinstance(sock, socket.socket):
            self.lingering = False
            with contextlib.suppress(OSError):
                sock.settimeout(LINGER_S)
                sock.shutdown(socket.SHUT_WR)
                until = time.monotonic() + LINGER_S
                while sock.recv(READ_BYTES) and time.monotonic() < until:
                    pass
        super()._sock_close()


class _Connection:
    """One connection from TCP to its end: a thread, a paho client, and the futures that wait for it.

    Methods without underscore belong to the event loop, `_net_*` to the thread. `lost` is the end.
    """

    def __init__(
        self,
        settings: MqttSettings,
        will: Will | None,
        protocol: MQTTProtocolVersion,
        counters: _Counters,
        receive: Callable[["_Connection", MQTTMessage, str], None],
        answer_s: float,
    ) -> None:
        self.mqtt5 = protocol == MQTTProtocolVersion.MQTTv5
        self._settings, self._will, self._protocol = settings, will, protocol
        self._counters, self._receive, self._answer_s = counters, receive, answer_s
        self._loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[_Welcome] = self._loop.create_future()
        self.lost: asyncio.Future[_Loss] = self._loop.create_future()
        self.unacknowledged: set[int] = set()
        self.limit = settings.max_packet_bytes
        self._windows = {0: asyncio.Semaphore(IN_FLIGHT), 1: asyncio.Semaphore(1)}
        self._pending: set[Done] = set()
        self._commands: deque[Command] = deque()
        self._wake_lock = threading.Lock()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._ended = False  # the sockets of _wake are closed
        self._loss: _Loss | None = None
        self._waiting: dict[int, tuple[Done, str]] = {}
        self._progress_s = 0.0
        self._answered = False  # a CONNACK came
        self._stop = self._polite = False
        self._client = self._make_client()
        name = f"mqtt-{settings.client_id}"
        self._thread = threading.Thread(target=self._net_run, name=name, daemon=True)

    # --- called from the event loop ------------------------------------------------------------

    def start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread left for us: try again later
            self._lose(_Loss(str(error)))

    def wake(self) -> None:
        with self._wake_lock, contextlib.suppress(BlockingIOError):
            if not self._ended:
                self._wake_in.send(b"\0")

    async def established(self) -> _Welcome:
        """Wait for the CONNACK; raises LinkError with the broker's or the system's reason."""
        first: set[asyncio.Future[Any]] = {self.welcome, self.lost}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self.welcome.done():
            raise LinkError(self.lost.result().reason)
        welcome = self.welcome.result()
        self.limit = min(self.limit, welcome.max_packet_bytes)
        self._windows[1] = asyncio.Semaphore(welcome.in_flight)
        return welcome

    async def publish(self, topic: str, payload: bytes, *, retain: bool, qos: int) -> None:
        """Send one message and wait: for the acknowledgement (QoS 1) or the socket (QoS 0)."""
        window = self._windows[qos]
        await window.acquire()
        # The place in the window is the message's, not the caller's: a cancelled caller leaves it in flight.
        done = self._future(lambda _: window.release())
        self._command(partial(self._net_publish, done, topic, payload, retain, qos))
        await asyncio.shield(done)

    async def subscribe(self, filters: list[str]) -> None:
        done = self._future()
        self._command(partial(self._net_subscribe, done, filters))
        await asyncio.shield(done)

    async def unsubscribe(self, filters: list[str]) -> None:
        done = self._future()
        self._command(partial(self._net_unsubscribe, done, filters))
        await asyncio.shield(done)

    def ack(self, mid: int) -> None:
        if mid in self.unacknowledged:
            self.unacknowledged.discard(mid)
            self._command(partial(self._net_ack, mid))

    async def goodbye(self) -> None:
        """Send what was handed over, then DISCONNECT; give up after a while."""
        self._polite = True
        self._command(self._net_goodbye)
        await asyncio.wait({self.lost}, timeout=GOODBYE_TIMEOUT_S)
        self.break_off("closed")

    def break_off(self, reason: str) -> None:
        """End without a goodbye: every waiting future fails now, the thread follows."""
        self._stop = True
        self.wake()
        self._lose(_Loss(reason))

    # --- inside the event loop -----------------------------------------------------------------

    def _future(self, after: Callable[[Done], object] | None = None) -> Done:
        done: Done = self._loop.create_future()
        self._pending.add(done)
        done.add_done_callback(self._pending.discard)
        done.add_done_callback(_look_at)
        if after is not None:
            done.add_done_callback(after)
        if self.lost.done():
            done.set_exception(LinkError(f"connection lost: {self.lost.result().reason}"))
        return done

    def _command(self, command: Command) -> None:
        if not self.lost.done():
            self._commands.append(command)
            self.wake()

    def _lose(self, loss: _Loss) -> None:
        if self.lost.done():
            return
        self.lost.set_result(loss)
        for done in list(self._pending):
            _settle(done, LinkError(f"connection lost: {loss.reason}"))

    def _hear(self, message: MQTTMessage, topic: str) -> None:
        if message.qos:
            self.unacknowledged.add(message.mid)
        self._receive(self, message, topic)

    # --- inside the thread ---------------------------------------------------------------------

    def _post(self, function: Callable[..., object], *args: Any) -> None:
        # The loop may be closed already when a process ends without `close`: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _make_client(self) -> _Paho:
        settings = self._settings
        client = _Paho(
            CallbackAPIVersion.VERSION2,
            settings.client_id,
            clean_session=None if self.mqtt5 else settings.session_expiry_s == 0,
            protocol=self._protocol,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.counters = self._counters
        client.alive = Keepalive(settings.keepalive_s, time.monotonic(), time.monotonic())
        client.connect_timeout = settings.connect_timeout_s
        client.max_inflight_messages = IN_FLIGHT
        client.on_connect = self._net_on_connect
        client.on_disconnect = self._net_on_disconnect
        client.on_message = self._net_on_message
        client.on_publish = self._net_on_publish
        client.on_subscribe = self._net_on_subscribe
        client.on_unsubscribe = self._net_on_unsubscribe
        client.on_socket_open = _no_delay
        # With this callback paho leaves all writing to our loop.
        client.on_socket_register_write = _leave_to_the_loop
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.password)
        if self._will is not None:
            delay = None
            if self.mqtt5:
                delay = _properties(PacketTypes.WILLMESSAGE)
                delay.WillDelayInterval = settings.will_delay_s
            client.will_set(self._will.topic, self._will.payload, 1, self._will.retain, delay)
        return client

    def _net_run(self) -> None:
        try:
            self._net_connect()
            self._net_pump()
        except (OSError, ValueError) as error:
            self._net_lose(_explain(error))
        except Exception as error:  # a hostile broker must not kill the link's thread silently
            log.exception("the connection's thread failed")
            self._net_lose(f"internal fault: {error!r}")
        finally:
            self._client.break_off()
            with self._wake_lock:
                self._ended = True
                self._wake_in.close()
                self._wake_out.close()
            self._post(self._lose, self._loss or _Loss("closed" if self._stop else "connection lost"))

    def _net_lose(
        self, reason: str, code: int = 0, *, unanswered: bool = False, unexplained: bool = False
    ) -> None:
        self._loss = self._loss or _Loss(reason, code, unanswered, unexplained)

    def _net_connect(self) -> None:
        settings, client = self._settings, self._client
        if settings.tls is not None:
            client.tls_set_context(settings.tls.context())
        if not self.mqtt5:
            client.connect(settings.host, settings.port, settings.keepalive_s)
            return
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.receive_maximum
        properties.MaximumPacketSize = settings.max_packet_bytes
        clean = settings.session_expiry_s == 0
        client.connect(
            settings.host, settings.port, settings.keepalive_s, clean_start=clean, properties=properties
        )

    def _net_pump(self) -> None:
        """Serve the socket until it is closed."""
        client, sock = self._client, self._client.socket()
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        connect_until = time.monotonic() + self._answer_s
        while sock is not None and client.socket() is sock and not self._stop:
            self._net_run_commands()
            if client.socket() is not sock:
                break
            reading = not self._counters.full or bool(self._waiting) or not client.is_connected()
            poller.register(
                sock,
                (select.POLLIN if reading else 0) | (select.POLLOUT if client.want_write() else 0),
            )
            # What TLS has decrypted already does not make the socket readable.
            buffered = reading and isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
            looked_s = time.monotonic()
            events = dict(poller.poll(0 if buffered else self._net_sleep_ms(looked_s, connect_until)))
            self._net_drain(events)
            seen = events.get(sock.fileno(), 0)
            if reading and (buffered or seen & ~select.POLLOUT):
                client.loop_read()
            elif seen & ~select.POLLOUT:
                self._net_lose("connection lost")
                return
            if seen & select.POLLOUT:
                client.loop_write()
            if not client.tend(looked_s, reading=reading):
                self._net_lose(f"the broker gave no sign of life for {client.alive.keepalive_s:g} s")
            self._net_check_time(connect_until)

    def _net_sleep_ms(self, now_s: float, connect_until: float) -> float:
        """Return how long the thread may sleep: until something is due; a socket and `wake` end it."""
        due = [] if self._answered else [connect_until]
        if self._client.is_connected() and self._client.alive.due_s is not None:
            due.append(self._client.alive.due_s)
        if self._waiting:
            due.append(self._progress_s + ACK_TIMEOUT_S)
        # A whole millisecond more: a poll that ends too early would be repeated.
        return max(0.0, min(due, default=now_s + 3600.0) - now_s) * 1000 + 1

    def _net_drain(self, events: dict[int, int]) -> None:
        if self._wake_out.fileno() in events:
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(4096)

    def _net_check_time(self, connect_until: float) -> None:
        now = time.monotonic()
        if self._loss is not None:
            self._stop = True  # a callback found a reason to end
        elif not self._answered and now >= connect_until:
            self._net_lose("the broker accepted the connection and said nothing", unanswered=True)
            self._stop = True
        elif self._waiting and now - self._progress_s >= ACK_TIMEOUT_S:
            self._net_lose(f"the broker acknowledged nothing for {ACK_TIMEOUT_S:.0f} s")
            self._stop = True

    def _net_run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _net_wait(self, done: Done, what: str, code: MQTTErrorCode, mid: int | None) -> None:
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            self._post(_settle, done, LinkError(f"{what}: not sent: {error_string(code)}"))
            return
        if not self._waiting:
            self._progress_s = time.monotonic()
        self._waiting[mid] = (done, what)

    def _net_finish(self, mid: int, fault: Callable[[str], str | None]) -> None:
        self._progress_s = time.monotonic()
        done, what = self._waiting.pop(mid, (None, ""))
        if done is not None:
            text = fault(what)
            self._post(_settle, done, LinkError(text) if text else None)

    def _net_publish(self, done: Done, topic: str, payload: bytes, retain: bool, qos: int) -> None:
        info = self._client.publish(topic, payload, qos, retain)
        self._net_wait(done, topic, info.rc, info.mid)

    def _net_subscribe(self, done: Done, filters: list[str]) -> None:
        code, mid = self._client.subscribe([(topic_filter, 1) for topic_filter in filters])
        self._net_wait(done, " ".join(filters), code, mid)

    def _net_unsubscribe(self, done: Done, filters: list[str]) -> None:
        code, mid = self._client.unsubscribe(filters)
        self._net_wait(done, " ".join(filters), code, mid)

    def _net_ack(self, mid: int) -> None:
        self._client.ack(mid, 1)

    def _net_goodbye(self) -> None:
        self._client.lingering = True
        self._client.disconnect()

    # --- paho's callbacks: they only hand over --------------------------------------------------

    def _net_on_connect(
        self,
        _client: Client,
        _data: Any,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._answered = True
        self._client.agreed()
        if reason.is_failure:
            self._net_lose(f"refused by the broker: {reason}", reason.value)
            return
        missing = [name for name in NEEDED if getattr(properties, name, 1) == 0]
        if missing:
            self._net_lose(f"unusable broker: it announces {' and '.join(missing)} = 0")
            return
        welcome = _Welcome(
            flags.session_present,
            getattr(properties, "MaximumPacketSize", MAX_INCOMING_BYTES),
            max(1, min(getattr(properties, "ReceiveMaximum", IN_FLIGHT), IN_FLIGHT)),
        )
        self._post(_settle_with, self.welcome, welcome)

    def _net_on_disconnect(
        self, client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if self._polite:
            self._net_lose("closed")
        elif isinstance(client, _Paho) and client.refused:
            self._net_lose(client.refused)
        elif flags.is_disconnect_packet_from_server:
            self._net_lose(f"the broker ended the session: {reason}", reason.value)
        elif not self.welcome.done():
            self._net_lose("the broker closed the connection before it answered", unanswered=True)
        else:
            bare = reason.value == FAILURE
            self._net_lose("connection lost" if bare else f"connection lost: {reason}", unexplained=bare)

    def _net_on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        if not topic:
            self._net_lose("the broker sent a message without a readable topic")
            return
        if self._counters.full and message.qos == 0:
            log.warning("%s: dropped: the consumer does not keep up", topic)
            return
        if self._counters.overfull:
            # Not acknowledged, so the broker repeats it in the next session.
            self._net_lose("the consumer does not keep up")
            return
        self._counters.handed_over(1, len(message.payload))
        self._post(self._hear, message, topic)

    def _net_on_publish(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any
    ) -> None:
        refusal = f"refused by the broker: {reason}" if reason.is_failure else None
        self._net_finish(mid, lambda topic: refusal and f"{topic}: {refusal}")

    def _net_on_subscribe(
        self, _client: Client, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.value >= FAILURE]
        self._net_finish(
            mid, lambda names: f"{names}: subscription refused: {refused[0]}" if refused else None
        )

    def _net_on_unsubscribe(
        self, _client: Client, _data: Any, mid: int, _reasons: Any, _properties: Any
    ) -> None:
        self._net_finish(mid, lambda _: None)


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
        self._counters = _Counters()
        self._mailbox = Mailbox(self._taken)
        self._filters: dict[str, None] = {}
        self._forgotten: dict[str, None] = {}
        self._newest: _Connection | None = None  # also while it is being made
        self._current: _Connection | None = None  # announced by Connected
        self._held: list[Received] = []
        self._generation = 0
        self._old_protocol = settings.protocol == "3.1.1"
        self._version_known = settings.protocol != "auto"
        self._takeovers = self._cuts = self._unanswered = 0
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
        limit = connection.limit if connection is not None else self._settings.max_packet_bytes
        size = publish_bytes(topic, len(payload), qos=qos, mqtt5=mqtt5)
        if size > limit:
            raise TooLargeError(f"{topic}: {size} bytes, the packet limit is {limit}")
        if connection is None:
            raise LinkError(f"{topic}: not sent: not connected")
        await connection.publish(topic, payload, retain=retain, qos=qos)

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
            await _subscribe(connection, list(filters))
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
            await self._current.unsubscribe(known)
        except LinkError:
            self._forgotten |= dict.fromkeys(topic for topic in known if topic not in self._filters)

    def ack(self, token: int) -> None:
        """Tell the broker that the message is safe; a token of an older connection is ignored."""
        generation, mid = divmod(token, 1 << 16)
        if self._newest is not None and generation == self._generation:
            self._newest.ack(mid)

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

    def _receive(self, connection: _Connection, message: MQTTMessage, topic: str) -> None:
        token = (self._generation << 16) + message.mid if message.qos else 0
        payload = bytes(message.payload)
        event = Received(topic=topic, payload=payload, retained=message.retain, token=token)
        if connection is not self._newest:
            self._counters.handed_over(-1, -len(payload))  # the broker repeats it to the next session
        elif connection is self._current:
            self._mailbox.put(event)
        else:
            self._held.append(event)

    async def _keep_connected(self) -> None:
        failures = 0
        while True:
            started_s = time.monotonic()
            loss = await self._connect_once()
            if self._closed:
                return
            if not self._version_known and (loss.unanswered or loss.code == UNSUPPORTED_VERSION):
                self._old_protocol = not self._old_protocol
                log.info("trying MQTT %s", "3.1.1" if self._old_protocol else "5")
                if self._old_protocol:
                    continue
            if time.monotonic() - started_s >= STABLE_S:
                failures = self._takeovers = self._cuts = 0
            reason, pause_s = self._judge(loss, failures)
            failures += 1
            self._mailbox.put(Disconnected(reason=reason, retry_in_s=pause_s))
            await asyncio.sleep(pause_s)

    async def _connect_once(self) -> _Loss:
        protocol = MQTTProtocolVersion.MQTTv311 if self._old_protocol else MQTTProtocolVersion.MQTTv5
        self._generation += 1
        answer_s = CONNACK_TIMEOUT_S if self._version_known else TRIAL_TIMEOUT_S
        connection = _Connection(
            self._settings, self._will, protocol, self._counters, self._receive, answer_s
        )
        self._newest = connection
        connection.start()
        try:
            welcome = await connection.established()
            self._unanswered, self._version_known = 0, True
            await self._restore(connection, session_present=welcome.session_present)
            self._announce(connection, welcome)
            return await asyncio.shield(connection.lost)
        except LinkError as error:
            return connection.lost.result() if connection.lost.done() else _Loss(str(error))
        except Exception as error:  # the link outlives its own faults: it tries again
            log.exception("the link failed")
            return _Loss(f"internal fault: {error!r}")
        finally:
            self._current = self._newest = None
            for event in self._held:
                self._counters.handed_over(-1, -len(event.payload))
            self._held = []
            connection.break_off("closed")

    async def _restore(self, connection: _Connection, *, session_present: bool) -> None:
        if session_present and self._forgotten:
            await connection.unsubscribe(list(self._forgotten))
        self._forgotten.clear()
        restored: set[str] = set()
        while missing := [name for name in self._filters if name not in restored]:
            await _subscribe(connection, missing)
            restored.update(missing)

    def _announce(self, connection: _Connection, welcome: _Welcome) -> None:
        self._mailbox.put(
            Connected(
                protocol="MQTT 5" if connection.mqtt5 else "MQTT 3.1.1",
                session_present=welcome.session_present,
                max_packet_bytes=connection.limit,
            )
        )
        self._current = connection
        held, self._held = self._held, []
        for event in held:
            self._mailbox.put(event)

    def _judge(self, loss: _Loss, failures: int) -> tuple[str, float]:
        """Return the reason in words and the pause before the next attempt (full jitter)."""
        cap_s = self._settings.reconnect_cap_s
        pause_s = random.uniform(0, min(cap_s, 2.0 ** min(failures, 30)))  # noqa: S311 - spreads load, no secret
        pause_s = min(cap_s, max(FIRST_RETRY_S, pause_s))
        client_id = self._settings.client_id
        self._takeovers += loss.code == TAKEN_OVER
        self._cuts = self._cuts + 1 if loss.unexplained else 0
        if loss.code == TAKEN_OVER:
            again = f", {self._takeovers} times: do two devices use it?" if self._takeovers > 1 else ""
            return f"session taken over: another client has connected as {client_id!r}{again}", pause_s
        if self._cuts >= CUT_IN_A_ROW:
            return f"{loss.reason}, {self._cuts} times: do two devices use the id {client_id!r}?", pause_s
        if self._settings.tls is not None and loss.unanswered:
            self._unanswered += 1
            if self._unanswered >= REFUSED_IN_A_ROW:
                slow_s = min(REFUSED_RETRY_S, max(pause_s, REFUSED_RETRY_S * random.uniform(0.5, 1)))  # noqa: S311
                return f"{loss.reason}, {self._unanswered} times: certificate refused or revoked?", slow_s
        return loss.reason, pause_s


async def _subscribe(connection: _Connection, filters: list[str]) -> None:
    for start in range(0, len(filters), FILTERS_PER_PACKET):
        await connection.subscribe(filters[start : start + FILTERS_PER_PACKET])


def _properties(packet_type: int) -> Properties:
    make: Callable[[int], Properties] = Properties  # paho's constructor has no annotations
    return make(packet_type)


def _settle(done: Done, fault: LiberataiError | None) -> None:
    if done.done():
        return
    if fault is None:
        done.set_result(None)
    else:
        done.set_exception(fault)


def _settle_with(future: asyncio.Future[_Welcome], welcome: _Welcome) -> None:
    if not future.done():
        future.set_result(welcome)


def _look_at(done: Done) -> None:
    """Take the exception, so that a future whose caller has gone does not complain."""
    if not done.cancelled():
        done.exception()


def _no_delay(_client: Client, _data: Any, sock: Any) -> None:
    """Send small packets at once: an acknowledgement must not wait for the peer's delayed ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_the_loop(_client: Client, _data: Any, _sock: Any) -> None:
    """Nothing to do: the loop asks `want_write` before every poll."""


def _explain(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return f"cannot reach the broker: {error}"
