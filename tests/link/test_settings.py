"""How a broker is named in settings."""

import pytest

from liberatai_core.errors import ConfigError
from liberatai_core.link.mqtt import MqttSettings, TlsSettings


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
