"""Pauses after a lost connection."""

import asyncio
import random
import socket
from typing import Any

import pytest

from liberatai_core.link.link import Connected, Disconnected
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.link.mqtt.reconnect import FIRST_RETRY_S, TAKEN_OVER, Loss, Pause, Reconnect


def made(**changes: object) -> Reconnect:
    values = {"client_id": "dev-a", "secure": False, "cap_s": 120.0, "urgent_cap_s": 15.0, "spread_s": 5.0}
    return Reconnect(**(values | changes))  # type: ignore[arg-type]


def latest(_low: float, high: float) -> float:
    return high


def test_windows_double_up_to_the_cap() -> None:
    reconnect = made()
    assert [reconnect.lost(Loss("x"), 1.0, latest).seconds for _ in range(7)] == [5, 10, 20, 40, 80, 120, 120]


def test_a_fleet_does_not_come_back_in_one_second() -> None:
    draw = random.Random(1).uniform
    pauses = [made().lost(Loss("broker restarted"), 3600.0, draw).seconds for _ in range(10_000)]
    fullest = max(sum(second <= pause < second + 1 for pause in pauses) for second in range(6))
    assert fullest < 2500
    assert min(pauses) >= FIRST_RETRY_S


def test_while_something_is_at_stake_no_pause_is_longer_than_its_cap() -> None:
    reconnect = made(urgent=True)
    assert max(reconnect.lost(Loss("x"), 1.0, latest).seconds for _ in range(20)) == 15.0


def test_a_long_pause_is_cut_when_something_comes_to_be_at_stake() -> None:
    reconnect = made(urgent=True)
    assert reconnect.hurried(Pause("x", 120.0), 90.0, latest) == 15.0
    assert reconnect.hurried(Pause("x", 120.0), 2.0, latest) == 2.0
    assert reconnect.hurried(Pause("a refused certificate", 900.0, in_vain=True), 800.0, latest) == 800.0


def test_a_connection_that_lasted_starts_the_windows_anew() -> None:
    reconnect = made()
    for _ in range(6):
        reconnect.lost(Loss("x"), 1.0, latest)
    assert reconnect.lost(Loss("x"), 60.0, latest).seconds == 5.0


def test_a_small_cap_holds_for_the_first_try_too() -> None:
    assert made(cap_s=0.2).lost(Loss("x"), 1.0, latest).seconds == 0.2


@pytest.mark.parametrize(
    ("loss", "count", "words"),
    [
        (Loss("gone", TAKEN_OVER), 2, "2 times: do two devices use it?"),
        (Loss("gone", unexplained=True), 3, "do two devices use the id 'dev-a'?"),
        (Loss("silent", unanswered=True), 5, "certificate refused or revoked?"),
    ],
)
def test_what_repeats_is_explained(loss: Loss, count: int, words: str) -> None:
    reconnect = made(secure=True)
    found = [reconnect.lost(loss, 1.0, latest).reason for _ in range(count)]
    assert words in found[-1]
    assert words not in found[-2]


def test_a_loss_with_messages_under_way_accuses_no_second_device() -> None:
    reconnect = made()
    loss = Loss("gone", unexplained=True, under_way=(("t", 20_000),))
    assert "two devices" not in [reconnect.lost(loss, 1.0, latest) for _ in range(5)][-1].reason


async def test_an_outage_ends_soon_once_something_is_at_stake(peer_of: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = MqttSettings(
        host="127.0.0.1",
        port=port,
        client_id="dev-a",
        protocol="5",
        reconnect_cap_s=1e6,
        spread_s=1e6,
        urgent_cap_s=0.2,
    )
    peer = await peer_of(MqttLink(settings)).open()
    assert (await peer.next(Disconnected)).retry_in_s > 60  # but for one case in 15 000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"\x20\x03\x00\x00\x00")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    peer.link.urgent(True)
    await peer.next(Connected, timeout_s=60)
    await peer.link.close()
    server.close()
