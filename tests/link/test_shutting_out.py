"""A device is shut out of a real broker with mutual TLS: refused at once, deaf to what waits for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.control.broker_lists import BrokerLists
from liberatai_coordinator.service import Service
from liberatai_coordinator.wiring import build
from liberatai_core.contract.frame import Signer, seal
from liberatai_core.contract.messages import Capability, SessionSeen, State
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Disconnected, Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
FLEET = "default"
TOPICS = Topics(fleet=FLEET)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SecureBroker]:
    made = start_secure_broker(tmp_path / "broker")
    yield made
    made.stop()


@asynccontextmanager
async def coordinator(broker: SecureBroker, folder: Path) -> AsyncIterator[Service]:
    pem = str(broker.credential("co1", "coordinator"))
    config = CoordinatorConfig(
        fleet=FLEET,
        broker=broker.url,
        ca_file=str(broker.ca_file),
        cert_file=pem,
        key_file=pem,
        state_dir=str(folder),
        enrolment="open",
        ca_dir=str(broker.authority.folder),
        broker_dir=str(broker.files),
    )
    with build(config) as service:
        lists = service.doors.broker
        assert isinstance(lists, BrokerLists)
        service.doors.broker = replace(lists, written=broker.reload)
        await service.restore()
        running = asyncio.create_task(service.run())
        try:
            yield service
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def link(broker: SecureBroker, name: str, pem: Path) -> MqttLink:
    settings = MqttSettings.from_url(
        broker.url,
        client_id=name,
        tls=TlsSettings(ca_file=broker.ca_file, cert_file=pem, key_file=pem),
    )
    return MqttLink(replace(settings, reconnect_cap_s=0.2, protocol="5", session_expiry_s=600))


async def introduce(peer: Any, name: str) -> Signer:
    signer = Signer.from_seed(name.encode().ljust(32, b"-"), FLEET)
    caps = Capability(
        device=name, public_key=signer.public_key, session=1, agent_version="test", tier="full", samples=1
    )
    await peer.link.publish(TOPICS.up(name, "caps"), seal(caps, signer), retain=True)
    state = State(device=name, state="online", session=1)
    await peer.link.publish(TOPICS.up(name, "state"), seal(state, signer), retain=True)
    return signer


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def refused(peer: Any, topic: str) -> None:
    """Publish until the broker does not take it any more."""
    async with asyncio.timeout(60):
        while True:
            try:
                await peer.link.publish(topic, b"still here")
            except LinkError as error:
                if "Not authorized" in str(error):
                    return
            await asyncio.sleep(0.02)


async def test_a_connected_device_is_refused_by_coordinator_and_broker(
    broker: SecureBroker, tmp_path: Path, peer_of: Any
) -> None:
    async with coordinator(broker, tmp_path / "state") as service:
        device, friend = (
            link(broker, "dev-a", broker.credential("dev-a")),
            link(broker, "dev-b", broker.credential("dev-b")),
        )
        await device.subscribe(*TOPICS.to_device("dev-a"))
        peer, other = await peer_of(device).open(), await peer_of(friend).open()
        await peer.next(Connected)
        await other.next(Connected)
        await introduce(peer, "dev-a")
        await introduce(other, "dev-b")
        await until(lambda: service.fleet.ready_names == {"dev-a", "dev-b"})
        await Operations.of(service).devices.quarantine("dev-a", "odd")
        assert service.fleet.ready_names == {"dev-b"}
        await refused(peer, TOPICS.up("dev-a", "ev"))
        await service.doors.settled()
        while not peer.queue.empty():
            peer.queue.get_nowait()
        await service.publisher.send(TOPICS.down("dev-a", "xa"), SessionSeen(device="dev-a", session=7))
        await other.link.publish(TOPICS.up("dev-b", "ev"), b"friend")  # others are not disturbed
        heard = [peer.queue.get_nowait() for _ in range(peer.queue.qsize())]
        assert not [event for event in heard if isinstance(event, Received)]
        await Operations.of(service).devices.release("dev-a")
        await service.doors.settled()
        await until(lambda: "user dev-a" not in (broker.files / "acl").read_text())
        async with asyncio.timeout(60):
            while True:
                try:
                    await introduce(peer, "dev-a")
                except LinkError:
                    await asyncio.sleep(0.02)
                else:
                    break
        await until(lambda: "dev-a" in service.fleet.ready_names)
        await device.close()
        await friend.close()


@pytest.mark.parametrize("how", ["quarantine", "decommission", "nothing"])
async def test_what_waits_for_a_device_is_not_read_after_it_was_shut_out(
    broker: SecureBroker, tmp_path: Path, peer_of: Any, how: str
) -> None:
    async with coordinator(broker, tmp_path / "state") as service:
        pem = broker.credential("dev-a")
        first = link(broker, "dev-a", pem)
        await first.subscribe(*TOPICS.to_device("dev-a"))
        peer = await peer_of(first).open()
        await peer.next(Connected)
        await introduce(peer, "dev-a")
        await until(lambda: "dev-a" in service.fleet.ready_names)
        await first.close()
        seen = SessionSeen(device="dev-a", session=7)
        await service.publisher.send(TOPICS.down("dev-a", "xa"), seen)  # waits in its session
        await service.publisher.retain(TOPICS.down("dev-a", "want"), seen)  # stands
        if how != "nothing":
            await getattr(Operations.of(service).devices, how)("dev-a", "stolen")
        await service.doors.settled()
        again = link(broker, "dev-a", pem)
        await again.subscribe(*TOPICS.to_device("dev-a"))
        peer = await peer_of(again).open()
        event = await peer.next(Connected | Disconnected)
        if how == "quarantine":
            await refused(peer, TOPICS.up("dev-a", "ev"))
        while how == "decommission" and isinstance(event, Connected):  # the signal takes some time
            await again.close()
            again = link(broker, "dev-a", pem)
            peer = await peer_of(again).open()
            event = await peer.next(Connected | Disconnected)
        got: set[str] = set()
        if how == "nothing":  # what is not read otherwise is there to be read
            while got != {TOPICS.down("dev-a", "xa"), TOPICS.down("dev-a", "want")}:
                got |= {(await peer.next(Received)).topic} - {TOPICS.coordinator("co1")}
        while not peer.queue.empty():
            found = peer.queue.get_nowait()
            if isinstance(found, Received) and found.payload and how != "nothing":
                got.add(found.topic)
        assert bool(got) == (how == "nothing")
        assert isinstance(event, Disconnected) == (how == "decommission")
        await again.close()
