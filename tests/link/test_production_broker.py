"""A Mosquitto as `liberatai broker init` sets it up: mutual TLS keeps devices apart, claims have a door of their own."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.authority import broker_files
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.mosquitto import MosquittoPlan, mosquitto_conf
from liberatai_coordinator.brokers.check import BrokerCheck, Finding
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.brokers.start import find_mosquitto
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.errors import ConfigError, LinkError
from liberatai_core.link.link import Connected, Disconnected, Received
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings


class Production:
    """The broker, and how its clients reach it."""

    def __init__(self, folder: Path) -> None:
        self.broker: SecureBroker = start_secure_broker(folder)
        roles = {"co1": "coordinator", "claim-a": "claim", "dev-a": "device", "dev-b": "device"}
        self.files = {name: self.broker.credential(name, role) for name, role in roles.items()}

    def settings(self, name: str | None, *, pem: Path | None = None, **changes: Any) -> MqttSettings:
        file = pem or (self.files[name] if name else None)
        settings = MqttSettings.from_url(
            self.broker.url,
            client_id=name or "nobody",
            tls=TlsSettings(ca_file=self.broker.ca_file, cert_file=file, key_file=file),
        )
        return replace(settings, **{"reconnect_cap_s": 0.2, "protocol": "5", **changes})

    def claims(self, name: str) -> MqttSettings:
        return self.settings(name, port=self.broker.claim_port)


@pytest.fixture
def production(tmp_path: Path) -> Iterator[Production]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    made = Production(tmp_path)
    yield made
    made.broker.stop()


async def test_devices_are_kept_apart_by_their_certificates(production: Production, peer_of: Any) -> None:
    coordinator = MqttLink(production.settings("co1"))
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
    source = await peer_of(MqttLink(production.settings("co1"))).open()
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


@pytest.mark.parametrize("how", ["no certificate", "server's certificate", "foreign authority", "a claim"])
async def test_strangers_are_not_let_in(
    production: Production, peer_of: Any, tmp_path: Path, how: str
) -> None:
    friend = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await friend.next(Connected)  # the broker is there: a refusal is no absence
    pems = {
        "no certificate": None,
        "server's certificate": production.broker.files / "certs" / "server.pem",
        "foreign authority": foreign(tmp_path / "other", "dev-b"),
        "a claim": production.files["claim-a"],
    }
    peer = await peer_of(MqttLink(production.settings(None, pem=pems[how]))).open()
    for _ in range(3):
        assert isinstance(await peer.next(Connected | Disconnected), Disconnected)
    await peer.link.close()
    await friend.link.close()


async def test_a_false_broker_is_not_trusted(production: Production, peer_of: Any, tmp_path: Path) -> None:
    Authority.create(tmp_path / "other", "default")
    settings = production.settings("dev-a")
    assert settings.tls is not None
    link = MqttLink(replace(settings, tls=replace(settings.tls, ca_file=tmp_path / "other" / "ca.crt")))
    peer = await peer_of(link).open()
    assert "not trusted" in (await peer.next(Disconnected)).reason
    await link.close()


async def test_a_revoked_certificate_is_refused_and_suspected(production: Production, peer_of: Any) -> None:
    peer = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await peer.next(Connected)
    await peer.link.close()
    authority = production.broker.authority
    authority.revoke("dev-a", "stolen")
    assert broker_files.sync(production.broker.files, authority, "default", "co1", ())
    production.broker.reload()
    while True:  # the signal is handled some time
        peer = await peer_of(MqttLink(production.settings("dev-a", reconnect_cap_s=0.1))).open()
        event = await peer.next(Connected | Disconnected)
        if isinstance(event, Disconnected):
            break
        await peer.link.close()
    while "revoked" not in event.reason:
        event = await peer.next(Connected | Disconnected)
        assert isinstance(event, Disconnected)
    other = await peer_of(MqttLink(production.settings("dev-b"))).open()
    await other.next(Connected)
    await other.link.close()
    await peer.link.close()


async def test_a_claim_can_ask_for_a_certificate_and_do_nothing_else(
    production: Production, peer_of: Any
) -> None:
    coordinator = MqttLink(production.settings("co1"))
    await coordinator.subscribe("lai/v1/default/prov/+/csr")
    seen = await peer_of(coordinator).open()
    await seen.next(Connected)
    link = MqttLink(production.claims("claim-a"))
    await link.subscribe("#", "lai/v1/default/pub/#", "lai/v1/default/prov/+/crt")
    claim = await peer_of(link).open()
    await claim.next(Connected)
    for topic in ("up/claim-a/ev", "up/dev-a/ev", "dn/dev-a/task", "prov/claim-b/csr", "prov/claim-a/crt"):
        with pytest.raises(LinkError, match="Not authorized"):
            await link.publish(f"lai/v1/default/{topic}", b"forged")
    await link.publish("lai/v1/default/prov/claim-a/csr", b"please")
    assert (await seen.next(Received)).payload == b"please"
    for topic in ("pub/head/job", "dn/claim-a/task", "co/co1/state", "prov/claim-b/crt"):
        await coordinator.publish(f"lai/v1/default/{topic}", b"secret")
    await coordinator.publish("lai/v1/default/prov/claim-a/crt", b"here")
    assert (await claim.next(Received)).payload == b"here"  # and nothing before it
    await link.close()
    await coordinator.close()


async def test_a_device_cannot_use_the_door_for_claims(production: Production, peer_of: Any) -> None:
    settings = production.settings("dev-a", port=production.broker.claim_port)
    peer = await peer_of(MqttLink(settings)).open()
    for _ in range(2):
        assert isinstance(await peer.next(Connected | Disconnected), Disconnected)
    await peer.link.close()


async def test_a_device_that_is_shut_out_loses_its_rights_in_the_open_connection(
    production: Production, peer_of: Any
) -> None:
    peer = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await peer.next(Connected)
    await peer.link.publish("lai/v1/default/up/dev-a/ev", b"own")
    broker_files.sync(production.broker.files, production.broker.authority, "default", "co1", ["dev-a"])
    production.broker.reload()
    with pytest.raises(LinkError, match="Not authorized"):
        await publish_for_ever(peer.link, "lai/v1/default/up/dev-a/ev")  # the signal is handled some time
    await peer.link.close()


async def test_a_new_certificate_takes_the_old_ones_place_after_a_connect_and_the_session_stays(
    production: Production, peer_of: Any
) -> None:
    pem = production.files["dev-a"]
    beside = pem.with_name("dev-a.next.pem")
    link = MqttLink(production.settings("dev-a", session_expiry_s=600))
    await link.subscribe("lai/v1/default/dn/dev-a/+")
    peer = await peer_of(link).open()
    await peer.next(Connected)
    new = another(production, "dev-a")
    beside.write_bytes(new)
    await link.renew()
    assert (await peer.next(Connected)).session_present
    assert (pem.read_bytes(), beside.exists()) == (new, False)
    await link.close()


async def test_a_new_certificate_that_the_broker_refuses_costs_one_attempt(
    production: Production, peer_of: Any, tmp_path: Path
) -> None:
    pem = production.files["dev-a"]
    beside = pem.with_name("dev-a.next.pem")
    link = MqttLink(production.settings("dev-a"))
    peer = await peer_of(link).open()
    await peer.next(Connected)
    beside.write_bytes(foreign(tmp_path / "other", "dev-a").read_bytes())
    before = pem.read_bytes()
    await link.renew()
    reasons = []
    while not isinstance(event := await peer.next(Connected | Disconnected), Connected):
        reasons.append(event.reason)
    assert any("not signed by the authority" in reason for reason in reasons)
    assert (pem.read_bytes(), beside.exists()) == (before, True)
    await link.close()


async def test_a_certificate_of_another_name_is_refused_before_it_throws_anybody_out(
    production: Production, peer_of: Any
) -> None:
    real = await peer_of(MqttLink(production.settings("dev-a"))).open()
    await real.next(Connected)
    files = {"ca_file": str(production.broker.ca_file)} | dict.fromkeys(
        ("cert_file", "key_file"), str(production.files["dev-a"])
    )
    with pytest.raises(ConfigError, match="the certificate of 'dev-a', wanted 'dev-b'"):
        MqttSettings.from_files(
            production.broker.url, client_id="dev-b", username=None, password_file=None, **files
        )
    await real.link.publish("lai/v1/default/up/dev-a/ev", b"own")
    assert real.queue.empty()
    await real.link.close()


def test_a_sync_without_changes_touches_nothing(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "default")
    folder = tmp_path / "broker"
    broker_files.init(MosquittoPlan(folder=folder), authority, "co1", ["localhost"])
    stamp = (folder / "reload").read_bytes()
    assert not broker_files.sync(folder, authority, "default", "co1", ())
    assert (folder / "reload").read_bytes() == stamp
    assert broker_files.sync(folder, authority, "default", "co1", ["dev-a"])
    assert broker_files.denied(folder) == ("dev-a",)
    assert (folder / "reload").read_bytes() != stamp


def test_the_brokers_certificate_is_renewed_for_the_same_hosts(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "default")
    folder = tmp_path / "broker"
    broker_files.init(MosquittoPlan(folder=folder), authority, "co1", ["localhost", "192.0.2.7"])
    end_s = broker_files.server_end_s(folder)
    assert end_s is not None
    assert not broker_files.renew_server(folder, authority, end_s - 200 * 86_400)
    before = (folder / "certs" / "server.pem").read_bytes()
    assert broker_files.renew_server(folder, authority, end_s - 100 * 86_400)
    assert (folder / "certs" / "server.pem").read_bytes() != before


def test_both_forms_have_the_same_doors_and_limits() -> None:
    old, new = (
        set(mosquitto_conf(MosquittoPlan(folder=Path("/etc/x"), release=release)).splitlines())
        for release in ("2.0", "2.1")
    )
    settings = {line.split()[0] for line in new - old if line and not line.startswith("#")}
    assert settings == {"plugin_load", "plugin_opt_acl_file", "plugin_use", "listener_allow_anonymous"}
    gone = {line.split()[0] for line in old - new if line and not line.startswith("#")}
    assert gone == {"per_listener_settings", "acl_file", "allow_anonymous"}


def test_the_broker_takes_every_line_of_its_settings_without_a_warning(tmp_path: Path) -> None:
    """A word that Mosquitto does not know, or says is obsolete, would be in its log."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    broker = start_secure_broker(tmp_path)
    broker.stop()
    log = (tmp_path / "broker.log").read_text()
    known = "does not contain", "should not be run as root"
    odd = [line for line in log.splitlines() if "Warning" in line and not any(word in line for word in known)]
    assert odd == []


def another(production: Production, name: str) -> bytes:
    """Return a further certificate of the same holder, with a key of its own."""
    key = new_key()
    der = production.broker.authority.issue(key.public_key(), "device", name, 3600)
    return certificate_pem(der) + key_pem(key)


async def publish_for_ever(link: MqttLink, topic: str) -> None:
    while True:
        await link.publish(topic, b"own")


def foreign(folder: Path, name: str) -> Path:
    """Return a certificate of another authority."""
    authority = Authority.create(folder, "default")
    key = new_key()
    pem = folder / f"{name}.pem"
    pem.write_bytes(certificate_pem(authority.issue(key.public_key(), "device", name, 3600)) + key_pem(key))
    return pem


def test_a_broker_as_it_is_set_up_passes_every_check(production: Production, tmp_path: Path) -> None:
    found = checked(production, tmp_path)
    assert [(one.check, one.text) for one in found if not one.ok] == []
    assert len(found) >= 20
    authority = production.broker.authority
    assert all(one.revoked_s for one in authority.issued() if one.name.startswith(("check-", "claim-check")))


@pytest.mark.system  # five brokers
@pytest.mark.parametrize(
    ("line", "instead", "fails"),
    [
        ("use_username_as_clientid true", "", "another certificate asks for a device's session"),
        ("/acl\n", "/certs/all\n", "a device writes a model"),
        ("/certs/claims.", "/certs/ca.", "a device at the door for claims"),
        ("max_packet_size 1048576", "max_packet_size 200000", "packets"),
        ("/acl-claims\n", "/acl\n", "a claim writes its own words"),
    ],
)
def test_a_broker_that_lets_too_much_through_is_found_out(
    production: Production, tmp_path: Path, line: str, instead: str, fails: str
) -> None:
    conf = production.broker.files / "mosquitto.conf"
    (production.broker.files / "certs" / "all").write_text("pattern readwrite #\n")
    text = conf.read_text()
    assert line in text
    conf.write_text(text.replace(line, instead))
    production.broker.restart()
    found = checked(production, tmp_path)
    assert fails in [one.check for one in found if not one.ok]


def checked(production: Production, folder: Path) -> list[Finding]:
    broker = production.broker
    check = BrokerCheck(broker.url, broker.claim_url, broker.authority, broker.ca_file, folder)
    return asyncio.run(check.run())
