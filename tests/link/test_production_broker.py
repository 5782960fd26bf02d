"""The files in `broker_config/` work: Mosquitto starts with them, and mutual TLS keeps devices apart."""

import asyncio
import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_core.errors import LinkError
from liberatai_core.link.link import Connected, Disconnected, Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings

CONFIG = Path(__file__).parents[2] / "broker_config"
INSTALLED = "/etc/mosquitto/liberatai"


def make_certs(folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(CONFIG / "make_certs.py"), str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True)


class Production:
    """A Mosquitto with the shipped files; only paths, port and user are those of the test."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.certs = folder / "certs"
        make_certs(self.certs, "init")
        make_certs(self.certs, "server", "localhost", "127.0.0.1")
        make_certs(self.certs, "client", "coordinator", "dev-a", "dev-b")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        text = (CONFIG / "mosquitto.conf").read_text()
        for shipped, here in (
            (INSTALLED, str(folder)),
            ("/var/lib/mosquitto/", f"{folder}/"),
            ("listener 8883", f"listener {self.port} 127.0.0.1"),
            ("user mosquitto", f"user {getpass.getuser()}"),
        ):
            assert shipped in text
            text = text.replace(shipped, here)
        (folder / "mosquitto.conf").write_text(text)
        (folder / "acl").write_text((CONFIG / "acl").read_text())
        self.log = (folder / "broker.log").open("wb")
        command = [str(program), "-c", str(folder / "mosquitto.conf")]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def settings(self, name: str | None, **changes: Any) -> MqttSettings:
        pair = (
            {"cert_file": self.certs / f"{name}.crt", "key_file": self.certs / f"{name}.key"} if name else {}
        )
        settings = MqttSettings.from_url(
            f"mqtts://localhost:{self.port}",
            client_id=name or "nobody",
            tls=TlsSettings(ca_file=self.certs / "ca.crt", **pair),
        )
        return replace(settings, **{"reconnect_cap_s": 0.2, "protocol": "5", **changes})

    def reload(self) -> None:
        os.kill(self.process.pid, signal.SIGHUP)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()


@pytest.fixture
def production(tmp_path: Path) -> Iterator[Production]:
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    broker = Production(program, tmp_path)
    yield broker
    broker.stop()


async def test_devices_are_kept_apart_by_their_certificates(production: Production, peer_of: Any) -> None:
    coordinator = MqttLink(production.settings("coordinator"))
    await coordinator.subscribe("lai/v1/default/up/#")
    seen = await peer_of(coordinator).open()
    await seen.next(Connected)
    device = await peer_of(MqttLink(production.settings("dev-a"))).open()
    connected = await device.next(Connected)
    assert (connected.protocol, connected.max_packet_bytes) == ("MQTT 5", 266_240)
    with pytest.raises(LinkError, match="Not authorized"):
        await device.link.publish("lai/v1/default/up/dev-b/ev", b"forged")
    with pytest.raises(LinkError, match="Not authorized"):
        await device.link.publish("lai/v1/default/dn/dev-a/task", b"forged")
    with pytest.raises(LinkError, match="Not authorized"):
        await device.link.publish("lai/v1/default/pub/head/job", b"forged", retain=True)
    payload = bytes(262_144)
    await device.link.publish("lai/v1/default/up/dev-a/x/1/0", payload)
    event = await seen.next(Received)
    assert (event.topic, event.payload) == ("lai/v1/default/up/dev-a/x/1/0", payload)
    await device.link.close()
    await coordinator.close()


async def test_a_device_hears_only_what_is_meant_for_it(production: Production, peer_of: Any) -> None:
    source = await peer_of(MqttLink(production.settings("coordinator"))).open()
    link = MqttLink(production.settings("dev-a"))
    await link.subscribe("lai/v1/default/#", "lai/v1/default/dn/dev-b/#")
    device = await peer_of(link).open()
    await source.next(Connected)
    await device.next(Connected)
    await source.link.publish("lai/v1/default/dn/dev-b/task", b"secret")
    await source.link.publish("lai/v1/default/dn/dev-a/task", b"own")
    await source.link.publish("lai/v1/default/pub/head/job", b"public")
    payloads = {(await device.next(Received)).payload for _ in range(2)}
    assert payloads == {b"own", b"public"}
    await link.close()
    await source.link.close()


async def test_a_certificate_cannot_borrow_another_devices_session(
    production: Production, peer_of: Any
) -> None:
    """The client id is the certificate's name, whatever the client asks for."""
    victim = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await victim.next(Connected)
    thief = await peer_of(MqttLink(production.settings("dev-b", client_id="dev-a"))).open()
    await thief.next(Connected)
    with pytest.raises(LinkError, match="Not authorized"):
        await thief.link.publish("lai/v1/default/up/dev-a/ev", b"forged")
    await victim.link.publish("lai/v1/default/up/dev-a/ev", b"own")
    assert victim.queue.empty()
    await thief.link.close()
    await victim.link.close()


@pytest.mark.parametrize("how", ["no certificate", "server's certificate", "foreign authority"])
async def test_strangers_are_not_let_in(
    production: Production, peer_of: Any, tmp_path: Path, how: str
) -> None:
    friend = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await friend.next(Connected)  # the broker is there: a refusal is no absence
    settings = production.settings({"server's certificate": "server"}.get(how))
    if how == "foreign authority":
        make_certs(tmp_path / "other", "init")
        make_certs(tmp_path / "other", "client", "dev-b")
        assert settings.tls is not None
        pair = {"cert_file": tmp_path / "other" / "dev-b.crt", "key_file": tmp_path / "other" / "dev-b.key"}
        settings = replace(settings, tls=replace(settings.tls, **pair))
    peer = await peer_of(MqttLink(settings)).open()
    for _ in range(3):
        assert isinstance(await peer.next(Connected | Disconnected), Disconnected)
    await peer.link.close()
    await friend.link.close()


async def test_a_false_broker_is_not_trusted(production: Production, peer_of: Any, tmp_path: Path) -> None:
    make_certs(tmp_path / "other", "init")
    settings = production.settings("dev-a")
    assert settings.tls is not None
    link = MqttLink(replace(settings, tls=replace(settings.tls, ca_file=tmp_path / "other" / "ca.crt")))
    peer = await peer_of(link).open()
    while "not trusted" not in (await peer.next(Disconnected)).reason:
        pass  # until the broker listens
    await link.close()


async def test_a_revoked_certificate_is_refused_and_suspected(production: Production, peer_of: Any) -> None:
    peer = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await peer.next(Connected)
    await peer.link.close()
    await asyncio.to_thread(make_certs, production.certs, "revoke", "dev-a")
    production.reload()
    while True:  # the signal is handled some time
        peer = await peer_of(MqttLink(production.settings("dev-a", reconnect_cap_s=0.1))).open()
        event = await peer.next(Connected | Disconnected)
        if isinstance(event, Disconnected):
            break
        await peer.link.close()
    while "refused or revoked?" not in event.reason:
        event = await peer.next(Connected | Disconnected)
        assert isinstance(event, Disconnected)
    assert event.retry_in_s > 100
    other = await peer_of(MqttLink(production.settings("dev-b"))).open()
    await other.next(Connected)
    await other.link.close()
    await peer.link.close()


def test_a_second_authority_is_never_made_over_the_first(tmp_path: Path) -> None:
    make_certs(tmp_path, "init")
    key = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(subprocess.CalledProcessError):
        make_certs(tmp_path, "init")
    assert (tmp_path / "ca.key").read_bytes() == key
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["a/b", "+", "Dev", "ca", "server", "x" * 33])
def test_a_name_that_is_no_topic_level_gets_no_certificate(tmp_path: Path, name: str) -> None:
    make_certs(tmp_path, "init")
    with pytest.raises(subprocess.CalledProcessError):
        make_certs(tmp_path, "client", name)
