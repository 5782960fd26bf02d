"""What a broker does not take is found out, said once, and not sent for ever."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from liberatai_core.errors import BrokerRefusedError, LinkError, TooLargeError
from liberatai_core.link.link import Connected, Refused
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.link.mqtt.refusals import (
    ASIDE_S,
    GOOD_MESSAGES,
    SIZE_LOSSES,
    SMALLEST_LIMIT,
    TOO_LARGE,
    TOPIC_LOSSES,
    Evidence,
)

LIMIT = 266_240


def test_a_long_message_is_blamed_after_some_losses_and_the_limit_is_halved() -> None:
    evidence = Evidence(limit=LIMIT)
    said = [evidence.lost([("b/0", 20_000), ("state", 300)], 0.0) for _ in range(SIZE_LOSSES)]
    assert said[:-1] == [None] * (SIZE_LOSSES - 1)
    assert said[-1] is not None
    assert (said[-1].what, said[-1].size_bytes, said[-1].max_packet_bytes) == ("size", 20_000, 10_000)
    assert evidence.limit == 10_000
    again = evidence.lost([("b/0", 10_000)], 0.0)  # now one loss is enough
    assert again is not None
    assert evidence.limit == 5_000


def test_what_the_broker_took_is_never_forbidden() -> None:
    evidence = Evidence(limit=LIMIT)
    evidence.acknowledged("b/0", 19_000)
    for _ in range(20):
        assert evidence.lost([("b/1", 19_000)], 0.0) is None or evidence.limit == LIMIT
    for _ in range(SIZE_LOSSES):
        evidence.lost([("b/2", 20_000)], 0.0)
    assert evidence.limit == 19_000


def test_a_poor_line_is_forgiven_and_a_real_limit_costs_ever_fewer_losses() -> None:
    evidence = Evidence(limit=LIMIT)
    for _ in range(SIZE_LOSSES):
        evidence.lost([("b/0", 100_000)], 0.0)
    assert evidence.limit == 50_000
    for _ in range(GOOD_MESSAGES):
        evidence.acknowledged("b/0", 50_000)
    assert evidence.limit == 100_000  # it was the line: larger ones go again
    assert evidence.lost([("b/0", 90_000)], 0.0) is not None  # it was the broker: one loss is enough
    assert evidence.limit == 50_000
    losses = 0
    for _ in range(10_000):
        evidence.acknowledged("b/0", 50_000)
        if evidence.limit > 50_000:
            losses += 1
            evidence.lost([("b/0", evidence.limit)], 0.0)
    assert losses < 10


def test_what_the_broker_said_itself_is_not_tried_again() -> None:
    evidence = Evidence(limit=LIMIT)
    evidence.refused("b/0", 100_000, TOO_LARGE, "Packet too large")
    for _ in range(10_000):
        evidence.acknowledged("b/0", 50_000)
    assert evidence.limit == 50_000


def test_several_parts_that_were_sent_together_lower_the_limit_once() -> None:
    evidence = Evidence(limit=LIMIT)
    said = [evidence.refused(f"b/{n}", 131_000, TOO_LARGE, "Packet too large") for n in range(8)]
    assert [one is not None for one in said] == [True] + 7 * [False]
    assert evidence.limit == 65_500


def test_the_limit_has_a_floor() -> None:
    evidence = Evidence(limit=LIMIT)
    size = LIMIT
    for _ in range(20):
        evidence.refused("b/0", size, TOO_LARGE, "Packet too large")
        size = evidence.limit
    assert evidence.limit == SMALLEST_LIMIT
    said = evidence.refused("state", 300, TOO_LARGE, "Packet too large")
    assert said is not None
    assert said.what == "publish"


def test_a_short_message_is_set_aside_for_a_while() -> None:
    evidence = Evidence(limit=LIMIT)
    said = [evidence.lost([("caps", 900)], 0.0) for _ in range(TOPIC_LOSSES)]
    assert said[-1] is not None
    assert (said[-1].what, said[-1].topic) == ("publish", "caps")
    assert evidence.is_aside("caps", ASIDE_S - 1)
    assert not evidence.is_aside("state", 0.0)
    assert not evidence.is_aside("caps", ASIDE_S)
    assert evidence.limit == LIMIT


def test_only_what_was_under_way_every_time_is_blamed() -> None:
    evidence = Evidence(limit=LIMIT)
    for number in range(50):
        assert evidence.lost([(f"ev/{number}", 300)], 0.0) is None
        assert evidence.lost([], 0.0) is None


def test_an_acknowledged_topic_is_innocent() -> None:
    evidence = Evidence(limit=LIMIT)
    for _ in range(30):
        assert evidence.lost([("state", 300)], 0.0) is None
        assert evidence.lost([("state", 300)], 0.0) is None
        evidence.acknowledged("state", 300)


# --- over sockets ------------------------------------------------------------------------------


@asynccontextmanager
async def broker(limit: int, *, says_so: bool, forbidden: str = "") -> AsyncIterator[tuple[int, list[int]]]:
    """Run a broker with a limit that it does not announce; yields its port and the sizes that it saw."""
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                body = await reader.readexactly(length)
                if first >> 4 == 1:
                    writer.write(b"\x20\x03\x00\x00\x00")
                if first >> 4 == 3:
                    seen.append(length)
                    (topic_bytes,) = struct.unpack_from("!H", body)
                    mid = body[2 + topic_bytes : 4 + topic_bytes]
                    is_bad = length > limit or body[2 : 2 + topic_bytes].decode() == forbidden
                    if is_bad and not says_so:
                        return
                    writer.write(b"\x40\x03" + mid + b"\x95" if is_bad else b"\x40\x02" + mid)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
    finally:
        server.close()


def link_to(port: int) -> MqttLink:
    return MqttLink(MqttSettings(host="127.0.0.1", port=port, client_id="dev-a", reconnect_cap_s=0.1))


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_limit_that_was_not_announced_is_learnt(peer_of: Any, says_so: bool) -> None:
    async with broker(20_000, says_so=says_so) as (port, seen):
        link = link_to(port)
        peer = await peer_of(link).open()
        try:
            limit = (await peer.next(Connected)).max_packet_bytes
            refusals = []
            size = 100_000
            for _ in range(50):
                try:
                    await link.publish("b/0", bytes(min(size, limit - 100)))
                    break
                except TooLargeError:
                    assert says_so
                except LinkError:
                    assert not says_so
                    limit = (await peer.next(Connected)).max_packet_bytes
                if says_so:
                    refusals.append(await peer.next(Refused))
                    limit = refusals[-1].max_packet_bytes
            assert 10_000 <= limit <= 20_100
            assert sum(length > 20_000 for length in seen) <= 3 + 2
            if says_so:
                assert refusals[0].what == "size"
                assert "Packet too large" in refusals[0].words
                assert link._generation == 1  # the connection stood
            with pytest.raises(TooLargeError):
                await link.publish("b/0", bytes(100_000))
        finally:
            await link.close()


async def test_a_topic_that_breaks_the_connection_is_set_aside_and_the_rest_works(peer_of: Any) -> None:
    """What a broker of MQTT 3.1.1 does with those who may not publish."""
    async with broker(10**9, says_so=False, forbidden="caps") as (port, seen):
        link = link_to(port)
        peer = await peer_of(link).open()
        try:
            for _ in range(TOPIC_LOSSES):
                await peer.next(Connected)
                with pytest.raises(LinkError, match="connection lost"):
                    await link.publish("caps", b"x")
            refused = await peer.next(Refused)
            assert (refused.what, refused.topic) == ("publish", "caps")
            await peer.next(Connected)
            with pytest.raises(BrokerRefusedError):
                await link.publish("caps", b"x")
            await link.publish("state", b"x")
            assert len(seen) == TOPIC_LOSSES + 1
        finally:
            await link.close()


async def test_what_mosquitto_does_not_take_is_named_and_the_connection_stands(
    mosquitto_world: Any, peer_of: Any
) -> None:
    broker = mosquitto_world.broker
    broker.kill()
    conf = next(broker.folder.rglob("mosquitto.conf"))
    conf.write_text(conf.read_text() + "\nmessage_size_limit 5000\n")
    broker.restart()
    peer = await mosquitto_world.peer("dev-a")
    with pytest.raises(TooLargeError, match="Packet too large"):
        await peer.link.publish(mosquitto_world.up("ev"), bytes(8000))
    assert (await peer.next(Refused)).size_bytes > 8000
    with pytest.raises(BrokerRefusedError, match="Not authorized"):
        await peer.link.publish(mosquitto_world.up("ev", "dev-b"), b"forged")
    assert (await peer.next(Refused)).words.endswith("Not authorized")
    await peer.link.publish(mosquitto_world.up("ev"), bytes(3000))
    assert peer.link._generation == 1
    await peer.link.close()
