"""Traps of MQTT libraries and brokers that were met in practice, each with a scripted or a real broker."""

import asyncio
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from liberatai_core.errors import LinkError, TooLargeError
from liberatai_core.link.link import Connected, Disconnected, Received, Will
from liberatai_core.link.mqtt import MqttLink, MqttSettings, client, connection

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 12, 14
WELCOME = b"\x20\x03\x00\x00\x00"  # CONNACK of MQTT 5: no session, success, no properties


class Client:
    """One connection to the scripted broker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self) -> tuple[int, bytes]:
        """Return type and body of the next packet."""
        first = (await self.reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return first >> 4, await self.reader.readexactly(length)

    async def until(self, kind: int) -> bytes:
        while True:
            found, body = await self.read()
            if found == kind:
                return body

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def scripted(script: Callable[[Client, int], Any]) -> AsyncIterator[int]:
    """Run a broker whose every connection follows the script (given the connection's number)."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        try:
            await script(Client(reader, writer), count)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def settings(port: int, **changes: Any) -> MqttSettings:
    return MqttSettings(
        host="127.0.0.1", port=port, client_id="dev-a", **({"reconnect_cap_s": 0.2} | changes)
    )


def publish_id(body: bytes) -> int:
    (topic_bytes,) = struct.unpack_from("!H", body)
    return int(struct.unpack_from("!H", body, 2 + topic_bytes)[0])


@pytest.mark.parametrize(("allowed", "expected"), [(None, 8), (5, 5), (20, 8)])
async def test_no_more_messages_are_in_flight_than_the_broker_takes(
    peer_of: Any, allowed: int | None, expected: int
) -> None:
    """Paho sends 20 against a Receive Maximum of 5, and its whole queue after a reconnect."""
    seen: dict[int, list[int]] = {}
    cut, answer = asyncio.Event(), asyncio.Event()

    async def script(client: Client, number: int) -> None:
        await client.until(CONNECT)
        client.write(b"\x20\x06\x00\x00\x03\x21" + struct.pack("!H", allowed) if allowed else WELCOME)
        seen[number] = []

        async def collect() -> None:
            while True:
                mid = publish_id(await client.until(PUBLISH))
                seen[number].append(mid)
                if answer.is_set():
                    client.write(b"\x40\x02" + struct.pack("!H", mid))

        task = asyncio.create_task(collect())
        await cut.wait() if number == 1 else await task
        task.cancel()

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        await peer.next(Connected)
        sends = [asyncio.create_task(peer.link.publish("t", b"x" * 100)) for _ in range(30)]
        while len(seen[1]) < expected:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # time for one too many
        assert len(seen[1]) == expected
        cut.set()
        await peer.next(Disconnected)
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert all(isinstance(result, LinkError) for result in results)
        await peer.next(Connected)
        again = [asyncio.create_task(peer.link.publish("t", b"new")) for _ in range(30)]
        while len(seen[2]) < expected:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert len(seen[2]) == expected
        for task in again:
            task.cancel()
        await asyncio.sleep(0.05)
        extra = asyncio.create_task(peer.link.publish("t", b"one more"))
        await asyncio.sleep(0.2)
        assert len(seen[2]) == expected  # a caller that gave up leaves its message in flight
        extra.cancel()
        await peer.link.close()


async def test_a_message_is_sent_once_even_if_the_connection_breaks(peer_of: Any) -> None:
    """Paho would send it again by itself after the reconnect."""
    bodies: list[bytes] = []

    async def script(client: Client, number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        bodies.append(await client.until(PUBLISH))
        if number == 2:
            client.write(b"\x40\x02" + struct.pack("!H", publish_id(bodies[-1])))
            await client.until(DISCONNECT)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        await peer.next(Connected)
        with pytest.raises(LinkError, match="connection lost"):
            await peer.link.publish("t", b"first")
        await peer.next(Connected)
        await peer.link.publish("t", b"second")
        assert [body[-5:] for body in bodies] == [b"first", b"econd"]
        await peer.link.close()


async def test_a_packet_over_the_brokers_limit_is_not_sent(peer_of: Any) -> None:
    """The broker would disconnect, and paho send the same packet again for ever."""
    published: list[bytes] = []

    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(b"\x20\x08\x00\x00\x05\x27" + struct.pack("!I", 2000))
        while True:
            published.append(await client.until(PUBLISH))
            client.write(b"\x40\x02" + struct.pack("!H", publish_id(published[-1])))

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        assert (await peer.next(Connected)).max_packet_bytes == 2000
        overhead = 1 + 2 + 3 + 2 + 1  # header, length, topic, identifier, properties
        with pytest.raises(TooLargeError, match="2000"):
            await peer.link.publish("t", bytes(2000 - overhead + 1))
        assert published == []
        await peer.link.publish("t", bytes(2000 - overhead))
        assert len(published) == 1
        await peer.link.close()


@pytest.mark.parametrize(
    "answer", [None, b"", b"\x20\x02\x00\x01"], ids=["silence", "closed", "refusal of MQTT 3.1.1 times"]
)
async def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(
    peer_of: Any, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    monkeypatch.setattr(connection, "TRIAL_TIMEOUT_S", 0.3)
    levels = []

    async def script(client: Client, _number: int) -> None:
        levels.append((await client.until(CONNECT))[6])
        if levels[-1] == 4:
            client.write(b"\x20\x02\x00\x00")
            await client.until(DISCONNECT)
        elif answer is None:
            await client.reader.read()
        else:
            client.write(answer)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port, keepalive_s=1))).open()
        assert (await peer.next(Connected)).protocol == "MQTT 3.1.1"
        peer.link._newest.break_off("again")
        assert (await peer.next(Connected)).protocol == "MQTT 3.1.1"
        assert levels == [5, 4, 4]
        await peer.link.close()


async def test_a_silent_broker_is_given_up(peer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNACK_TIMEOUT_S", 0.3)

    async def script(client: Client, _number: int) -> None:
        await client.reader.read()

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port, protocol="5", keepalive_s=1))).open()
        assert "said nothing" in (await peer.next(Disconnected)).reason
        await peer.link.close()


async def test_a_broker_that_stops_acknowledging_is_given_up(
    peer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ACK_TIMEOUT_S", 0.3)

    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        await client.reader.read()

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port, keepalive_s=1))).open()
        await peer.next(Connected)
        with pytest.raises(LinkError, match="acknowledged nothing"):
            await peer.link.publish("t", b"x")
        await peer.link.close()


@pytest.mark.parametrize(
    ("code", "words"), [(0x87, "Not authorized"), (0x97, "Quota exceeded"), (0x83, "Implementation specific")]
)
async def test_the_reason_of_a_refused_message_is_told(peer_of: Any, code: int, words: str) -> None:
    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        mid = publish_id(await client.until(PUBLISH))
        client.write(b"\x40\x03" + struct.pack("!HB", mid, code))
        mid = publish_id(await client.until(PUBLISH))
        client.write(b"\x40\x03" + struct.pack("!HB", mid, 0x10))  # no subscriber: a success
        await client.until(DISCONNECT)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        await peer.next(Connected)
        with pytest.raises(LinkError, match=words):
            await peer.link.publish("t", b"x")
        await peer.link.publish("t", b"x")
        await peer.link.close()


async def test_a_refused_subscription_is_told(peer_of: Any) -> None:
    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        while True:
            body = await client.until(SUBSCRIBE)
            client.write(b"\x90\x04" + body[:2] + b"\x00\x87")

    async with scripted(script) as port:
        link = MqttLink(settings(port))
        await link.subscribe("secret/#")
        peer = await peer_of(link).open()
        reason = (await peer.next(Disconnected)).reason
        assert "secret/#" in reason
        assert "Not authorized" in reason
        await link.unsubscribe("secret/#")
        await peer.next(Connected)
        with pytest.raises(LinkError, match="Not authorized"):
            await link.subscribe("secret/#")
        await link.close()


async def test_a_second_device_with_this_identity_is_suspected(peer_of: Any) -> None:
    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME + b"\xe0\x02\x8e\x00")

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        assert "taken over" in (await peer.next(Disconnected)).reason
        assert "2 times: do two devices use it?" in (await peer.next(Disconnected)).reason
        await peer.link.close()


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"\x30\xff\xff\xff\x7f" + bytes(1000), id="268 MB announced"),
        pytest.param(b"\x30\x81\x80\x40" + bytes(1000), id="1 byte over the limit"),
        pytest.param(b"\x30\xff\xff\xff\xff\xff\xff", id="endless length"),
        pytest.param(b"\x34\x06\x00\x01t\x00\x01\x00", id="QoS 2"),
        pytest.param(b"\x36\x06\x00\x01t\x00\x01\x00", id="QoS 3"),
        pytest.param(b"\x32\x01\x00", id="PUBLISH without a topic"),
        pytest.param(b"\x32\x04\x00\x20ab", id="topic longer than the packet"),
        pytest.param(b"\x32\x06\x00\x01\xff\x00\x01\x00", id="topic that is not UTF-8"),
        pytest.param(b"\x32\x05\x00\x00\x00\x01\x00", id="empty topic without alias"),
        pytest.param(b"\x32\x08\x00\x01t\x00\x01\x02\xff\xff", id="unknown property"),
        pytest.param(b"\xf0\x00", id="AUTH"),
        pytest.param(b"\x00\x00", id="reserved type"),
        pytest.param(b"\x20\x00", id="empty CONNACK"),
        pytest.param(b"\x40\x00", id="empty PUBACK"),
        pytest.param(b"\x90\x01\x00", id="short SUBACK"),
    ],
)
async def test_a_hostile_broker_gains_nothing(peer_of: Any, packet: bytes) -> None:
    """It is left within bounded memory, and the link tries again."""

    async def script(client: Client, number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        if number == 1:
            client.write(packet)
        await client.until(DISCONNECT)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        tracemalloc.start()
        try:
            await peer.next(Disconnected)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20
        await peer.next(Connected)
        await peer.link.close()


async def test_an_acknowledgement_for_nothing_is_ignored(peer_of: Any) -> None:
    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME + b"\x40\x02\x00\x63" + b"\x90\x04\x00\x63\x00\x00")
        mid = publish_id(await client.until(PUBLISH))
        client.write(2 * (b"\x40\x02" + struct.pack("!H", mid)))
        await client.until(DISCONNECT)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        await peer.next(Connected)
        await peer.link.publish("t", b"x")
        await peer.link.close()


async def test_an_old_token_acknowledges_nothing_of_the_new_connection(peer_of: Any) -> None:
    """Packet identifiers start again with every session: the old token names a new message there."""
    acknowledged: list[bytes] = []

    async def script(client: Client, number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME + b"\x32\x07\x00\x01t\x00\x07\x00" + str(number).encode())
        if number == 2:
            acknowledged.append(await client.until(PUBACK))
            await client.until(DISCONNECT)
        await client.until(PUBLISH)

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port))).open()
        old = await peer.next(Received, ack=False)
        with pytest.raises(LinkError):
            await peer.link.publish("t", b"end of the first connection")
        new = await peer.next(Received, ack=False)
        peer.link.ack(old.token)
        await asyncio.sleep(0.1)
        assert acknowledged == []
        peer.link.ack(new.token)
        peer.link.ack(new.token)
        await peer.link.close()
        assert acknowledged == [b"\x00\x07"]


async def test_a_stalled_consumer_neither_loses_messages_nor_looks_dead(mqtt_world: Any) -> None:
    """Pings go on while nothing is read: no will, and afterwards every message is there.

    Amqtt sends any number of unacknowledged messages; Mosquitto only does so if none is wanted.
    """
    qos = 1 if mqtt_world.kind == "amqtt" else 0
    watcher = await mqtt_world.peer("coordinator", mqtt_world.up("state"))
    will = Will(topic=mqtt_world.up("state"), payload=b"lost")
    link = mqtt_world.link("dev-a", will, keepalive_s=2)
    await link.subscribe(mqtt_world.down("#"))
    await link.open()
    events = link.events()
    assert isinstance(await anext(events), Connected)
    wanted = [str(number).encode() for number in range(200)]
    for payload in wanted:
        await watcher.link.publish(mqtt_world.down("req"), payload, qos=qos)
    time.sleep(7)  # the event loop stalls, too; Mosquitto looks for the dead every 5 s
    received: list[bytes] = []
    async with asyncio.timeout(15):
        while len(received) < len(wanted):
            event = await anext(events)
            assert isinstance(event, Received)
            received.append(event.payload)
            link.ack(event.token)
    assert received == wanted
    await link.close()
    await watcher.link.publish(mqtt_world.up("state"), b"mark")
    assert (await watcher.next(Received)).payload == b"mark"
    await watcher.link.close()


async def test_a_consumer_that_waits_for_its_own_message_is_not_starved(mqtt_world: Any) -> None:
    """While the box is full nothing would be read, the awaited acknowledgement neither."""
    source = await mqtt_world.peer("coordinator")
    link = mqtt_world.link("dev-a", protocol="3.1.1")
    await link.subscribe(mqtt_world.down("#"))
    await link.open()
    events = link.events()
    assert isinstance(await anext(events), Connected)
    for number in range(300):
        await source.link.publish(mqtt_world.down("req"), bytes(1000), qos=number % 2)
    async with asyncio.timeout(10):
        await link.publish(mqtt_world.up("ev"), b"between")
    await link.close()
    await source.link.close()


async def test_an_idle_link_pings_in_time_and_seldom(peer_of: Any) -> None:
    """Before the keepalive has passed (amqtt waits no longer), and not again with every answer."""
    times: list[float] = []

    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)
        while True:
            await client.until(PINGREQ)
            times.append(time.monotonic())
            client.write(b"\xd0\x00")

    async with scripted(script) as port:
        peer = await peer_of(MqttLink(settings(port, keepalive_s=1))).open()
        await peer.next(Connected)
        times.append(time.monotonic())
        while len(times) < 4:
            await asyncio.sleep(0.05)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert all(0.4 < gap < 1 for gap in gaps), gaps
        await peer.link.close()


async def test_a_goodbye_arrives_even_if_much_was_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket closed with unread bytes throws away what it was to send, and the broker says the will."""
    monkeypatch.setattr(
        connection, "GOODBYE_TIMEOUT_S", 60.0
    )  # the machine may be busy: nothing depends on its speed
    monkeypatch.setattr(client, "LINGER_S", 50.0)
    heard: list[int] = []
    over = asyncio.Event()

    async def script(client: Client, _number: int) -> None:
        await client.until(CONNECT)
        client.write(WELCOME)

        async def flood() -> None:
            while True:
                client.write(b"\x30\x94\x4e\x00\x01t\x00" + bytes(10_000))
                await client.writer.drain()

        task = asyncio.create_task(flood())
        try:
            await asyncio.sleep(0.5)  # what the client sends stays with it meanwhile
            task.cancel()  # else this loop's time goes to the flood; what is under way is much enough
            while True:
                kind, _body = await client.read()
                heard.append(kind)
        finally:
            task.cancel()
            over.set()

    async with scripted(script) as port:
        link = MqttLink(settings(port))
        await link.open()
        assert isinstance(await anext(link.events()), Connected)
        while not link._counters.full:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(link.publish("t", bytes(200_000), qos=0) for _ in range(5)))
        await link.close()
        async with asyncio.timeout(60):
            await over.wait()
    assert heard == [*5 * [PUBLISH], DISCONNECT]


CONSUMER = """
import asyncio, sys
from liberatai_core.link.link import Received, Will
from liberatai_core.link.mqtt import MqttLink, MqttSettings

async def main(url, up, down):
    link = MqttLink(MqttSettings.from_url(url, client_id="dev-a"), Will(topic=up, payload=b"lost"))
    await link.subscribe(down)
    await link.open()
    async for event in link.events():
        print(event.payload.decode() if isinstance(event, Received) else type(event).__name__, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_process_leaves_its_will_and_its_unfinished_message(
    mqtt_world: Any, users: Any
) -> None:
    watcher = await mqtt_world.peer("coordinator", mqtt_world.up("state"))
    url = mqtt_world.broker.url.replace("://", f"://dev-a:{users['dev-a']}@")
    arguments = [sys.executable, "-c", CONSUMER, url, mqtt_world.up("state"), mqtt_world.down("#")]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"Connected\n"
        await watcher.link.publish(mqtt_world.down("req"), b"work")
        assert await process.stdout.readline() == b"work\n"
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert (await watcher.next(Received)).payload == b"lost"
    again = await mqtt_world.peer("dev-a", mqtt_world.down("#"))
    assert (await again.next(Received)).payload == b"work"
    await again.link.close()
    await watcher.link.close()


async def test_nobody_is_anonymous(mqtt_world: Any, peer_of: Any) -> None:
    for changes in ({"username": None, "password": None}, {"password": "wrong-password"}):
        peer = await peer_of(mqtt_world.link("dev-a", **changes)).open()
        assert "refused by the broker" in (await peer.next(Disconnected)).reason
        await peer.link.close()


async def test_a_device_cannot_speak_for_another(mqtt_world: Any) -> None:
    watcher = await mqtt_world.peer("coordinator", mqtt_world.up("#", "dev-a"), mqtt_world.up("#", "dev-b"))
    device = await mqtt_world.peer("dev-a")
    if mqtt_world.kind == "mosquitto":
        with pytest.raises(LinkError, match="Not authorized"):
            await device.link.publish(mqtt_world.up("ev", "dev-b"), b"forged")
    else:
        await device.link.publish(mqtt_world.up("ev", "dev-b"), b"forged")
    await device.link.publish(mqtt_world.up("ev", "dev-a"), b"own")
    assert (await watcher.next(Received)).payload == b"own"
    await device.link.close()
    await watcher.link.close()


async def test_a_device_cannot_listen_to_another(mqtt_world: Any) -> None:
    source = await mqtt_world.peer("coordinator")
    device = await mqtt_world.peer("dev-a", mqtt_world.down("#", "dev-a"))
    try:
        await device.link.subscribe(mqtt_world.down("#", "dev-b"))  # Mosquitto grants it and delivers nothing
    except LinkError:
        assert mqtt_world.kind == "amqtt"
    await source.link.publish(mqtt_world.down("req", "dev-b"), b"secret", retain=True)
    await source.link.publish(mqtt_world.down("req", "dev-a"), b"own")
    assert (await device.next(Received)).payload == b"own"
    await device.link.publish(mqtt_world.up("ev"), b"")  # answered after the acknowledgement has arrived
    mqtt_world.cut(device.link)
    await device.next(Connected)
    await source.link.publish(mqtt_world.down("req", "dev-a"), b"own 2")
    assert (await device.next(Received)).payload == b"own 2"
    await device.link.close()
    await source.link.close()


def test_paho_is_imported_by_the_link_over_mqtt_only() -> None:
    code = "import sys, liberatai_core.link.memory; sys.exit('paho' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
