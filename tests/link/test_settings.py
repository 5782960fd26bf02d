"""How a broker is named in settings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from liberatai_core.errors import ConfigError
from liberatai_core.link.link import Connected, Disconnected
from liberatai_core.link.mqtt import MqttSettings, TlsSettings, read_password


def test_a_url_names_everything() -> None:
    settings = MqttSettings.from_url("mqtt://us%40er:p%3Aw@[::1]:1999", client_id="d")
    assert (settings.host, settings.port) == ("::1", 1999)
    assert (settings.username, settings.password, settings.tls) == ("us@er", "p:w", None)


def test_the_scheme_chooses_port_and_encryption() -> None:
    assert MqttSettings.from_url("mqtt://h", client_id="d").port == 1883
    secure = MqttSettings.from_url("mqtts://h", client_id="d")
    assert (secure.port, secure.tls) == (8883, TlsSettings())


@pytest.mark.parametrize(
    "url",
    [
        "h:1883",
        "http://h",
        "mqtt://",
        "mqtt://h:0",
        "mqtt://h:70000",
        "mqtt://h:x",
        "mqtt://h/t",
        "mqtt://h?x=1",
    ],
)
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        MqttSettings.from_url(url, client_id="d")


def test_certificates_never_travel_over_plain_tcp() -> None:
    with pytest.raises(ConfigError, match="mqtts://"):
        MqttSettings.from_url("mqtt://h", client_id="d", tls=TlsSettings())


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MqttSettings(host="", client_id="", keepalive_s=0, receive_maximum=0, max_packet_bytes=1 << 30)
    assert len(caught.value.faults) == 5


def test_the_password_is_never_shown() -> None:
    assert "secret" not in repr(MqttSettings.from_url("mqtt://u:secret@h", client_id="d"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\n", "empty"),
        ("pässword".encode("latin-1"), "not UTF-8 text"),
        (b"x" * 70_000, "too long"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "pw"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_password(path)
    assert len(caught.value.faults) == 1


def test_the_first_line_is_the_password(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes("pässword\r\nsecond\n".encode())
    assert read_password(tmp_path / "pw") == "pässword"


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    names = {name: str(tmp_path / name) for name in ("password_file", "ca_file", "cert_file", "key_file")}
    with pytest.raises(ConfigError) as caught:
        MqttSettings.from_files("mqtts://h", client_id="d", username="u", **names)
    assert len(caught.value.faults) == 4


async def test_a_password_that_was_replaced_counts_for_the_next_connection(
    mqtt_world: Any, peer_of: Any, users: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pw"
    path.write_bytes("wröng".encode("latin-1"))
    peer = await peer_of(mqtt_world.link("dev-a", password=None, password_file=path)).open()
    assert "E_CONFIG: password_file" in (await peer.next(Disconnected)).reason
    path.write_text("wrong-password")
    while "refused by the broker" not in (await peer.next(Disconnected)).reason:
        pass
    path.write_text(users["dev-a"])
    await peer.next(Connected)
    await peer.link.close()


def test_settings_are_read_without_paho_and_without_tls() -> None:
    code = "import sys, liberatai_core.link.mqtt.settings; sys.exit('paho' in sys.modules or 'ssl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
