"""One connection from TCP to its end: a thread with a client, and the futures that wait for it.

The thread alone calls the client; it takes work from a deque and hands results to the event loop. It keeps
the connection alive while the event loop, or the consumer, is busy with something else, and sleeps until
something is due. A connection is thrown away after its end: paho would otherwise send its whole queue again
on reconnect, past the broker's Receive Maximum, and an oversize packet for ever.
"""

import asyncio
import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from liberatai_core.errors import BrokerRefusedError, ConfigError, LiberataiError, LinkError
from liberatai_core.link.link import Will
from liberatai_core.link.mqtt.client import Answer, Counters, PahoClient, Welcome
from liberatai_core.link.mqtt.reconnect import Loss
from liberatai_core.link.mqtt.settings import IN_FLIGHT, MqttSettings
from liberatai_core.link.packet import publish_bytes

if TYPE_CHECKING:
    from paho.mqtt.client import MQTTMessage

log = logging.getLogger(__name__)

FILTERS_PER_PACKET = 64  # 64 filters of 100 bytes fit every broker's packet limit
CONNACK_TIMEOUT_S = 10.0  # a port that accepts and says nothing
TRIAL_TIMEOUT_S = 4.0  # the same while the version is not known: the other one may be answered at once
ACK_TIMEOUT_S = 120.0  # no acknowledgement at all for so long: 8 chunks of 256 KiB need 67 s at 250 kbit/s
GOODBYE_TIMEOUT_S = 2.0  # for the last packets

Command = Callable[[], None]
Done = asyncio.Future[None]


class PacketRefusedError(BrokerRefusedError):
    """What the broker said no to, with the number for it."""

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(slots=True)
class _Sent:
    """A packet that waits for its answer; `size` is 0 for what is no message."""

    done: Done
    what: str
    size: int


class Connection:
    """The event loop's side of one connection. `lost` is the end."""

    def __init__(
        self,
        settings: MqttSettings,
        will: Will | None,
        counters: Counters,
        receive: Callable[["Connection", "MQTTMessage", str], None],
        *,
        mqtt5: bool,
        answer_s: float,
    ) -> None:
        self.mqtt5 = mqtt5
        self.limit = settings.max_packet_bytes
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self.lost: asyncio.Future[Loss] = self._loop.create_future()
        self._unacknowledged: set[int] = set()
        self._windows = {0: asyncio.Semaphore(IN_FLIGHT), 1: asyncio.Semaphore(1)}
        self._pending: set[Done] = set()
        self._pump = _Pump(self, self._loop, settings, will, counters, mqtt5=mqtt5, answer_s=answer_s)

    def start(self) -> None:
        """Begin to connect."""
        try:
            self._pump.start()
        except RuntimeError as error:  # the system has no thread left for us: try again later
            self.ended(Loss(str(error)))

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        self._pump.wake()

    async def established(self) -> Welcome:
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
        self._command(partial(self._pump.publish, done, topic, payload, retain, qos))
        await asyncio.shield(done)

    async def ask(self, filters: Sequence[str], *, wanted: bool) -> None:
        """Subscribe to these filters, or unsubscribe, and wait; raises LinkError."""
        for start in range(0, len(filters), FILTERS_PER_PACKET):
            done = self._future()
            some = filters[start : start + FILTERS_PER_PACKET]
            self._command(partial(self._pump.ask, done, some, wanted))
            await asyncio.shield(done)

    def ack(self, mid: int) -> None:
        """Acknowledge a message, once."""
        if mid in self._unacknowledged:
            self._unacknowledged.discard(mid)
            self._command(partial(self._pump.ack, mid))

    async def goodbye(self) -> None:
        """Send what was handed over, then DISCONNECT; give up after a while."""
        self._pump.polite = True
        self._command(self._pump.goodbye)
        await asyncio.wait({self.lost}, timeout=GOODBYE_TIMEOUT_S)
        self.break_off("closed")

    def break_off(self, reason: str) -> None:
        """End without a goodbye: every waiting future fails now, the thread follows."""
        self._pump.stop()
        self.ended(Loss(reason))

    # --- inside the event loop; the thread posts here ---------------------------------------------

    def ended(self, loss: Loss) -> None:
        """Note the end; only the first counts."""
        if self.lost.done():
            return
        self.lost.set_result(loss)
        for done in list(self._pending):
            settle(done, LinkError(f"connection lost: {loss.reason}"))

    def welcomed(self, welcome: Welcome) -> None:
        """Note the CONNACK."""
        if not self.welcome.done():
            self.welcome.set_result(welcome)

    def heard(self, message: "MQTTMessage", topic: str) -> None:
        """Hand on a message."""
        if message.qos:
            self._unacknowledged.add(message.mid)
        self._receive(self, message, topic)

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
            self._pump.commands.append(command)
            self._pump.wake()


class _Wake:
    """Ends a poll from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in, self.out = socket.socketpair()
        self._in.setblocking(False)
        self.out.setblocking(False)
        self._closed = False

    def set(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                self._in.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.out.recv(4096)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._in.close()
            self.out.close()


class _Pump:
    """The thread's side: it serves the socket and the client, and posts to the event loop what happened.

    `start`, `wake`, `stop` and `polite` belong to the event loop.
    """

    def __init__(
        self,
        owner: Connection,
        loop: asyncio.AbstractEventLoop,
        settings: MqttSettings,
        will: Will | None,
        counters: Counters,
        *,
        mqtt5: bool,
        answer_s: float,
    ) -> None:
        self._owner, self._loop, self._counters, self._answer_s = owner, loop, counters, answer_s
        self._mqtt5 = mqtt5
        self.commands: deque[Command] = deque()
        self.polite = False
        self._stop = False
        self._wake = _Wake()
        self._answered = False  # a CONNACK came
        self._loss: Loss | None = None
        self._waiting: dict[int, _Sent] = {}
        self._progress_s = 0.0
        self._client = PahoClient(settings, will, self, counters, mqtt5=mqtt5)
        name = f"mqtt-{settings.client_id}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stop = True
        self._wake.set()

    # --- commands ---------------------------------------------------------------------------------

    def publish(self, done: Done, topic: str, payload: bytes, retain: bool, qos: int) -> None:
        size = publish_bytes(topic, len(payload), qos=qos, mqtt5=self._mqtt5)
        self._await(_Sent(done, topic, size), self._client.send(topic, payload, retain=retain, qos=qos))

    def ask(self, done: Done, filters: Sequence[str], wanted: bool) -> None:
        self._await(_Sent(done, " ".join(filters), 0), self._client.ask(filters, wanted=wanted))

    def ack(self, mid: int) -> None:
        self._client.ack(mid, 1)

    def goodbye(self) -> None:
        self._client.goodbye()

    def _await(self, sent: _Sent, mid: int | str) -> None:
        if isinstance(mid, str):
            self._post(settle, sent.done, LinkError(f"{sent.what}: not sent: {mid}"))
            return
        if not self._waiting:
            self._progress_s = time.monotonic()
        self._waiting[mid] = sent

    # --- what the client reports ------------------------------------------------------------------

    def welcomed(self, welcome: Welcome) -> None:
        self._answered = True
        self._post(self._owner.welcomed, welcome)

    def ended(self, reason: str, code: int = 0) -> None:
        self._loss = self._loss or (Loss("closed") if self.polite else Loss(reason, code))

    def closed(self, reason: str, alert: str = "") -> None:
        if self.polite or self._loss is not None:
            self.ended("closed")
        elif self._answered:
            text = f"connection lost: {reason}" if reason else "connection lost"
            self._loss = Loss(text, unexplained=not reason)
        else:
            text = alert or "the broker closed the connection before it answered"
            self._loss = Loss(text, unanswered=True, certificate=bool(alert))

    def heard(self, message: "MQTTMessage", topic: str) -> None:
        if self._counters.full and message.qos == 0:
            log.warning("%s: dropped: the consumer does not keep up", topic)
        elif self._counters.overfull:
            # Not acknowledged, so the broker repeats it in the next session.
            self.ended("the consumer does not keep up")
        else:
            self._counters.handed_over(1, len(message.payload))
            self._post(self._owner.heard, message, topic)

    def answered(self, mid: int, answer: Answer) -> None:
        self._progress_s = time.monotonic()
        sent = self._waiting.pop(mid, None)
        if sent is None:
            return
        fault = None
        if answer.code:
            what = "refused by the broker" if sent.size else "subscription refused"
            fault = PacketRefusedError(f"{sent.what}: {what}: {answer.reason}", answer)
        self._post(settle, sent.done, fault)

    # --- the thread -------------------------------------------------------------------------------

    def _post(self, function: Callable[..., object], *args: Any) -> None:
        # The loop may be closed already when a process ends without `close`: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            self._client.begin()
            self._serve()
        except ConfigError as error:
            self.ended(f"{error.code}: {'; '.join(error.faults)}")
        except (OSError, ValueError) as error:
            self.ended(_explain(error))
        except Exception as error:  # a hostile broker must not kill the link's thread silently
            log.exception("the connection's thread failed")
            self.ended(f"internal fault: {error!r}")
        finally:
            self._client.break_off()
            self._wake.close()
            loss = self._loss or Loss("closed" if self._stop else "connection lost")
            under_way = tuple((sent.what, sent.size) for sent in self._waiting.values() if sent.size)
            self._post(self._owner.ended, replace(loss, under_way=under_way))

    def _serve(self) -> None:
        """Serve the socket until it is closed."""
        client, sock = self._client, self._client.socket()
        poller = select.poll()
        poller.register(self._wake.out, select.POLLIN)
        connect_until = time.monotonic() + self._answer_s
        while sock is not None and client.socket() is sock and not self._stop:
            while self.commands:
                self.commands.popleft()()
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
            events = dict(poller.poll(0 if buffered else self._sleep_ms(looked_s, connect_until)))
            if self._wake.out.fileno() in events:
                self._wake.clear()
            seen = events.get(sock.fileno(), 0)
            if reading and (buffered or seen & ~select.POLLOUT):
                client.loop_read()
            elif seen & ~select.POLLOUT:
                self.ended("connection lost")
            if seen & select.POLLOUT:
                client.loop_write()
            if not client.tend(looked_s, reading=reading) or self._loss is not None:
                return
            self._check_time(connect_until)

    def _sleep_ms(self, now_s: float, connect_until: float) -> float:
        """Return how long the thread may sleep: until something is due; a socket and `wake` end it."""
        due = [] if self._answered else [connect_until]
        if self._client.due_s is not None:
            due.append(self._client.due_s)
        if self._waiting:
            due.append(self._progress_s + ACK_TIMEOUT_S)
        # A whole millisecond more: a poll that ends too early would be repeated.
        return max(0.0, min(due, default=now_s + 3600.0) - now_s) * 1000 + 1

    def _check_time(self, connect_until: float) -> None:
        now_s = time.monotonic()
        if not self._answered and now_s >= connect_until:
            self._loss = Loss("the broker accepted the connection and said nothing", unanswered=True)
            self._stop = True
        elif self._waiting and now_s >= self._progress_s + ACK_TIMEOUT_S:
            self.ended(f"the broker acknowledged nothing for {ACK_TIMEOUT_S:.0f} s")
            self._stop = True


def settle(done: Done, fault: LiberataiError | None) -> None:
    """End a wait."""
    if done.done():
        return
    if fault is None:
        done.set_result(None)
    else:
        done.set_exception(fault)


def _look_at(done: Done) -> None:
    """Take the exception, so that a future whose caller has gone does not complain."""
    if not done.cancelled():
        done.exception()


def _explain(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return f"cannot reach the broker: {error}"
