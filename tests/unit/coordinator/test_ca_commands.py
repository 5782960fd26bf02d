"""`liberatai ca` and `liberatai broker init`: what an operator types, and the files that follow."""

import json
from pathlib import Path
from typing import Any

import pytest

from liberatai_coordinator.authority import broker_files
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.cli import main
from liberatai_coordinator.cli.invite import seconds_of
from liberatai_coordinator.cli.kit import coordinator_config
from liberatai_core.certificate_file import read_dates
from liberatai_core.certificates import facts
from liberatai_core.errors import CertificateError, ConfigError
from liberatai_core.link.mqtt import MqttSettings


def ca(folder: Path, *words: str) -> int:
    return main(["ca", *words, "--ca", str(folder)])


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert ca(folder, "list", "--all", "-o", "json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_certificates_life_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pem = tmp_path / "ca", tmp_path / "dev.pem"
    assert ca(folder, "list") == 4
    assert "liberatai ca init" in capsys.readouterr().err
    assert ca(folder, "init", "--fleet", "hall") == 0
    assert ca(folder, "init") == 1
    assert ca(folder, "issue", "dev-a", "--out", str(pem), "--days", "10") == 0
    first = read_dates(pem)
    assert (first.name, round(first.days_left())) == ("dev-a", 10)
    assert pem.stat().st_mode & 0o077 == 0
    assert ca(folder, "renew", str(pem)) == 0
    second = read_dates(pem)
    assert (second.name, round(second.days_left())) == ("dev-a", 90)
    assert second.serial != first.serial
    assert ca(folder, "revoke", first.serial, "--serial", "--reason", "lost") == 0
    assert [(one["serial"], one["reason"]) for one in listed(folder, capsys) if one["revoked_s"]] == [
        (first.serial, "lost")
    ]
    assert ca(folder, "revoke", "dev-a") == 0
    assert ca(folder, "renew", str(pem)) == 1
    assert "was revoked" in capsys.readouterr().err
    assert ca(folder, "revoke", "nobody") == 4


@pytest.mark.parametrize(
    "words",
    [("Dev", "--role", "device"), ("dev-a", "--role", "king"), ("claim-x",), ("dev-a", "--role", "claim")],
)
def test_what_nobody_can_have_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    ca(tmp_path / "ca", "init")
    capsys.readouterr()
    assert ca(tmp_path / "ca", "issue", *words, "--out", str(tmp_path / "x.pem")) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "x.pem").exists()


def test_a_certificate_of_another_authority_is_not_renewed(tmp_path: Path) -> None:
    for fleet in ("one", "two"):
        ca(tmp_path / fleet, "init", "--fleet", fleet)
    pem = tmp_path / "dev.pem"
    ca(tmp_path / "one", "issue", "dev-a", "--out", str(pem))
    before = pem.read_bytes()
    assert ca(tmp_path / "two", "renew", str(pem)) == 1
    assert pem.read_bytes() == before


def broker_init(folder: Path, *more: str) -> int:
    words = ["broker", "init", "--host", "broker.example.org", "--state", str(folder / "state")]
    words += ["--dir", str(folder / "mosquitto"), "--config", str(folder / "coordinator.yaml")]
    return main([*words, "--user", "nobody-has-this-name", *more])


def test_a_broker_and_its_coordinator_are_set_up_by_one_command(tmp_path: Path) -> None:
    assert broker_init(tmp_path) == 0
    config = coordinator_config(tmp_path / "coordinator.yaml")
    settings = MqttSettings.from_files(
        config.broker,
        client_id=config.coordinator,
        username=None,
        password_file=None,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
    )
    assert (settings.host, settings.port, settings.tls is not None) == ("localhost", 8883, True)
    assert config.joining.broker == "mqtts://broker.example.org:8883"
    files = tmp_path / "mosquitto"
    server = facts((files / "certs" / "server.pem").read_bytes())
    assert server.hosts == ("broker.example.org", "localhost", "127.0.0.1")
    assert {path.name for path in (files / "certs").iterdir()} == {
        "ca.crt", "ca.crl", "claims.crt", "claims.crl", "server.pem",
    }  # fmt: skip
    assert (files / "certs" / "server.pem").stat().st_mode & 0o007 == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_setting_up_again_changes_settings_and_keeps_certificates(tmp_path: Path) -> None:
    broker_init(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    authority = Authority(tmp_path / "state" / "ca")
    broker_files.sync(tmp_path / "mosquitto", authority, "default", "co1", ["dev-x"])
    assert broker_init(tmp_path, "--mosquitto", "2.1", "--devices", "77") == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before
    text = (tmp_path / "mosquitto" / "mosquitto.conf").read_text()
    assert "plugin_use acl" in text
    assert "max_connections 100" in text
    assert broker_files.denied(tmp_path / "mosquitto") == ("dev-x",)  # who was shut out stays out


@pytest.mark.parametrize(
    "words",
    [("--port", "8884"), ("--devices", "0"), ("--bind", "a b"), ("--fleet", "Bad"), ("--mosquitto", "3.0")],
)
def test_a_broker_that_cannot_be_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert broker_init(tmp_path, *words) in (1, 2)


def test_another_fleet_never_gets_the_same_authority(tmp_path: Path) -> None:
    broker_init(tmp_path)
    assert broker_init(tmp_path, "--fleet", "other") == 2


def test_sync_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broker_init(tmp_path)
    config = str(tmp_path / "coordinator.yaml")
    assert main(["broker", "sync", "--config", config, "--no-reload"]) == 0
    assert "up to date" in capsys.readouterr().out
    state = tmp_path / "state" / "ca"
    ca(state, "issue", "dev-a", "--out", str(tmp_path / "dev.pem"))
    ca(state, "revoke", "dev-a")
    assert main(["broker", "sync", "--config", config, "--no-reload"]) == 0
    assert "changed; now send the broker SIGHUP" in capsys.readouterr().out


def test_times_of_invitations() -> None:
    assert [seconds_of(text) for text in ("30m", "1h", "7d", "90s")] == [1800, 3600, 604_800, 90]
    for wrong in ("", "1", "h", "0s", "31d", "-1h", "1h1"):
        with pytest.raises(ConfigError):
            seconds_of(wrong)


def test_what_a_file_says_is_read_without_cryptography(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca(tmp_path / "ca", "init")
    pem = tmp_path / "dev.pem"
    ca(tmp_path / "ca", "issue", "dev-a", "--out", str(pem))
    quick = read_dates(pem)
    monkeypatch.setattr("liberatai_core.certificate_file._decode", None)
    assert read_dates(pem) == quick
    for content in (b"", b"noise", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        pem.write_bytes(content)
        for decode in (None, __import__("_ssl")._test_decode_cert):
            monkeypatch.setattr("liberatai_core.certificate_file._decode", decode)
            with pytest.raises(CertificateError):
                read_dates(pem)
