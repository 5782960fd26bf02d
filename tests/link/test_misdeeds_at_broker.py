"""What a broker with mutual TLS refuses before the coordinator hears of it; others are not disturbed."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from tests.link.test_production_broker import Production, foreign

from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Disconnected, Received
from liberatai_core.link.mqtt import MqttLink

FORBIDDEN = {
    "writing as another device": "up/dev-b/ev",
    "giving itself a task": "dn/dev-a/task",
    "giving another device a task": "dn/dev-b/task",
    "putting a model where all fetch it": "pub/head/job",
    "putting a file where all fetch it": "pub/b/abcdefghijklmnopqrstuvwxyz/0",
    "speaking as the coordinator": "co/co1/state",
    "a request for a certificate of another name": "prov/dev-b/csr",
    "giving itself a certificate": "prov/dev-a/crt",
}
DEAF = {
    "hearing everything": "#",
    "hearing what is meant for another device": "lai/v1/default/dn/dev-b/#",
    "hearing what other devices say": "lai/v1/default/up/+/+",
}
STRANGERS = (
    "no certificate",
    "a certificate of a foreign authority",
    "a certificate that has ended",
    "a certificate that was revoked",
    "a claim at the door of devices",
)
OTHERS = {
    "a packet that is too long": "disconnected",
    "the session of another device": "its own session",
    "plain text on the port for TLS": "no connection",
}
AT_BROKER = {
    **dict.fromkeys(FORBIDDEN, "not authorized"),
    **dict.fromkeys(DEAF, "nothing delivered"),
    **dict.fromkeys(STRANGERS, "no connection"),
    **OTHERS,
}
"""By name: what the broker does. SECURITY.md has the same table."""


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    folder = tmp_path_factory.mktemp("broker")
    authority = Authority.create(folder / "ca", "default")
    key = new_key()
    der = authority.issue(key.public_key(), "device", "dev-r", 86_400.0)
    (folder / "revoked.pem").write_bytes(certificate_pem(der) + key_pem(key))
    authority.revoke("dev-r", "test")
    made = Production(folder)
    made.files["dev-r"] = folder / "revoked.pem"
    yield made
    made.broker.stop()


@asynccontextmanager
async def undisturbed(production: Production, peer_of: Any) -> AsyncIterator[Any]:
    """Another device is heard before and after, over one connection."""
    listener = MqttLink(production.settings("co1"))
    await listener.subscribe("lai/v1/default/up/dev-b/ev")
    hearing = await peer_of(listener).open()
    friend = await peer_of(MqttLink(production.settings("dev-b"))).open()
    await hearing.next(Connected)
    await friend.next(Connected)
    await friend.link.publish("lai/v1/default/up/dev-b/ev", b"before")
    assert (await hearing.next(Received)).payload == b"before"
    yield hearing
    await friend.link.publish("lai/v1/default/up/dev-b/ev", b"after")
    assert (await hearing.next(Received)).payload == b"after"
    assert friend.queue.empty()
    await friend.link.close()
    await listener.close()


@pytest.mark.parametrize("name", FORBIDDEN)
async def test_what_a_device_may_not_write_is_refused(
    production: Production, peer_of: Any, name: str
) -> None:
    async with undisturbed(production, peer_of):
        device = await peer_of(MqttLink(production.settings("dev-a"))).open()
        await device.next(Connected)
        with pytest.raises(LinkError, match="Not authorized") as caught:
            await device.link.publish(f"lai/v1/default/{FORBIDDEN[name]}", b"forged", retain=True)
        assert caught.value.code == "E_BROKER"
        await device.link.close()


@pytest.mark.parametrize("name", DEAF)
async def test_what_a_device_may_not_hear_is_not_delivered(
    production: Production, peer_of: Any, name: str
) -> None:
    async with undisturbed(production, peer_of) as hearing:
        link = MqttLink(production.settings("dev-a"))
        await link.subscribe(DEAF[name], "lai/v1/default/dn/dev-a/task")
        device = await peer_of(link).open()
        await device.next(Connected)
        await hearing.link.publish("lai/v1/default/dn/dev-b/task", b"secret")
        await hearing.link.publish("lai/v1/default/dn/dev-a/task", b"own")
        assert (await device.next(Received)).payload == b"own"
        await link.close()


@pytest.mark.parametrize("name", STRANGERS)
async def test_who_has_no_good_certificate_is_not_let_in(
    production: Production, peer_of: Any, tmp_path: Path, name: str
) -> None:
    authority = production.broker.authority
    if name == "no certificate":
        pem = None
    elif name == "a certificate of a foreign authority":
        pem = foreign(tmp_path / "other", "dev-c")
    elif name == "a claim at the door of devices":
        pem = production.files["claim-a"]
    elif name == "a certificate that has ended":
        key = new_key()
        der = authority.issue(key.public_key(), "device", "dev-c", 60.0, now_s=1_600_000_000.0)
        pem = tmp_path / "ended.pem"
        pem.write_bytes(certificate_pem(der) + key_pem(key))
    else:  # revoked before any broker reads the list: the reloading is tested with shutting out
        pem = production.files["dev-r"]
    async with undisturbed(production, peer_of):
        peer = await peer_of(MqttLink(production.settings(None, pem=pem))).open()
        assert isinstance(await peer.next(Connected | Disconnected), Disconnected)
        await peer.link.close()


async def test_a_packet_that_is_too_long_ends_the_connection_of_its_sender(
    production: Production, peer_of: Any
) -> None:
    """A client that does not care about limits, unlike our own."""
    ended, there = threading.Event(), threading.Event()
    pem, ca = str(production.files["dev-a"]), str(production.broker.ca_file)
    client = paho.Client(CallbackAPIVersion.VERSION2, "dev-a", protocol=paho.MQTTv5)
    client.tls_set(ca, pem, pem)
    client.on_connect = lambda *_: there.set()
    client.on_disconnect = lambda *_: ended.set()
    async with undisturbed(production, peer_of):
        client.connect(production.broker.host, production.broker.port)
        client.loop_start()
        assert await asyncio.to_thread(there.wait, 30)
        client.publish("lai/v1/default/up/dev-a/ev", bytes(2_000_000), qos=1)
        assert await asyncio.to_thread(ended.wait, 30)
        client.loop_stop()


async def test_a_certificate_is_worth_its_own_session_only(production: Production, peer_of: Any) -> None:
    """The client id is the certificate's name, whatever the client asks for."""
    async with undisturbed(production, peer_of):
        thief = await peer_of(MqttLink(production.settings("dev-a", client_id="dev-b"))).open()
        await thief.next(Connected)
        with pytest.raises(LinkError, match="Not authorized"):
            await thief.link.publish("lai/v1/default/up/dev-b/ev", b"forged")
        await thief.link.close()


async def test_plain_text_on_the_port_for_tls_is_no_connection(production: Production, peer_of: Any) -> None:
    async with undisturbed(production, peer_of):

        def greet() -> bytes:
            with socket.create_connection((production.broker.host, production.broker.port), 10) as plain:
                plain.sendall(bytes.fromhex("101000044d5154540402003c00046465762d"))
                plain.settimeout(10)
                try:
                    return plain.recv(16)
                except OSError:
                    return b""

        answer = await asyncio.to_thread(greet)
        assert answer[:1] != b"\x20"  # no CONNACK
