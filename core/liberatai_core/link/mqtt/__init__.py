"""The link over MQTT: settings · client (the only importer of paho) · connection · reconnect · link.

Names are loaded when they are asked for: who only reads settings does not load paho.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liberatai_core.link.link import Connected, Disconnected, LinkEvent, Received, Refused, Traffic, Will
    from liberatai_core.link.mqtt.link import MqttLink
    from liberatai_core.link.mqtt.settings import MqttSettings, TlsSettings, broker_address, read_password

_ROOMS = {
    "MqttLink": "liberatai_core.link.mqtt.link",
    "MqttSettings": "liberatai_core.link.mqtt.settings",
    "TlsSettings": "liberatai_core.link.mqtt.settings",
    "broker_address": "liberatai_core.link.mqtt.settings",
    "read_password": "liberatai_core.link.mqtt.settings",
}

__all__ = [
    "Connected",
    "Disconnected",
    "LinkEvent",
    "MqttLink",
    "MqttSettings",
    "Received",
    "Refused",
    "TlsSettings",
    "Traffic",
    "Will",
    "broker_address",
    "read_password",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS.get(name, "liberatai_core.link.link")), name)
