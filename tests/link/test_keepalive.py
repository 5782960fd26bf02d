"""An idle connection is kept by pings, and only a peer that was asked and stayed silent counts as dead."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Disconnected
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.link.mqtt.keepalive import Keepalive

K = 60.0


def run(
    until_s: float, own_s: list[float], answer: Callable[[float], float | None]
) -> list[tuple[str, float]]:
    """Play one connection: own QoS 0 messages at these times, and a peer that answers pings (or never)."""
    alive = Keepalive(K, 0.0, 0.0)
    seen: list[tuple[str, float]] = []
    answers: list[float] = []
    own, now = sorted(own_s), 0.0
    while now < until_s:
        due = alive.due_s
        assert due is not None
        now = min([due, *own[:1], *answers[:1]])
        if own[:1] == [now]:
            own.pop(0)
            alive.sent(now)
        if answers[:1] == [now]:
            answers.pop(0)
            alive.heard(now)
        if alive.is_dead(now):
            return [*seen, ("dead", now)]
        if alive.is_ping_due(now):
            alive.asked(now)
            seen.append(("ping", now))
            when = answer(now)
            answers += [] if when is None else [when]
            assert not alive.is_dead(now), "judged in the pass that asks"
    return seen


@given(own=st.lists(st.floats(0, 1000), max_size=30), late=st.floats(0, K - 1))
def test_a_peer_that_answers_is_never_dead(own: list[float], late: float) -> None:
    seen = run(1000.0, own, lambda now: now + late)
    assert "dead" not in [what for what, _ in seen]
    words = sorted([0.0, *own, *(when for _, when in seen), 1000.0])
    assert max(after - before for before, after in itertools.pairwise(words)) <= K


@given(own=st.lists(st.floats(0, 1000), max_size=200))
def test_a_peer_that_never_answers_is_dead_within_two_keepalives(own: list[float]) -> None:
    seen = run(1000.0, own, lambda _: None)
    assert seen[-1][0] == "dead"
    assert seen[-1][1] <= 2 * K


def test_an_idle_connection_costs_one_ping_in_36_seconds() -> None:
    assert [when for _, when in run(110.0, [], lambda now: now)] == pytest.approx([36.0, 72.0, 108.0, 144.0])


def test_a_machine_that_slept_looks_into_the_socket_before_it_judges() -> None:
    alive = Keepalive(K, 0.0, 0.0)
    alive.asked(36.0)
    assert not alive.is_dead(looked_s=37.0)  # it is 5000 by now, but nobody has looked since
    alive.heard(5000.0)
    assert not alive.is_dead(looked_s=5001.0)


def test_without_a_keepalive_nothing_is_ever_due() -> None:
    alive = Keepalive(0.0, 0.0, 0.0)
    assert alive.due_s is None
    assert not alive.is_ping_due(1e9)


@pytest.mark.parametrize("chatty", [False, True])
async def test_a_peer_whose_cable_is_cut_is_noticed(peer_of: Any, chatty: bool) -> None:
    """It accepts everything and says nothing, as a half-open connection does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"\x20\x03\x00\x00\x00")
        while await reader.read(1000):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = MqttSettings(host="127.0.0.1", port=port, client_id="dev-a", keepalive_s=1)
    peer = await peer_of(MqttLink(settings)).open()
    try:
        await peer.next(Connected)
        lost = asyncio.create_task(peer.next(Disconnected, timeout_s=60))
        with contextlib.suppress(LinkError):
            while chatty and not lost.done():
                await peer.link.publish("t", b"x", qos=0)
                await asyncio.sleep(0.1)
        assert "no sign of life for 1 s" in (await lost).reason
    finally:
        await peer.link.close()
        server.close()


async def test_a_message_of_our_own_does_not_shorten_the_time_for_an_answer(mosquitto_world: Any) -> None:
    """paho judged the next ping by the age of the last byte that came in, in the pass that sent it."""
    peer = await mosquitto_world.peer("dev-a", keepalive_s=4)
    await peer.link.publish(mosquitto_world.up("ev"), b"heard: the acknowledgement")
    await asyncio.sleep(1.8)  # 0.45 of the keepalive: the next ping is due after the age of 4 s
    await peer.link.publish(mosquitto_world.up("tele"), b"x", qos=0)
    connection = peer.link._newest
    await asyncio.sleep(3.6)
    assert peer.link._newest is connection
    assert not connection.lost.done()
    await peer.link.close()
