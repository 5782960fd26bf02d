"""How the coordinator reaches its broker: its settings, with the files they name."""

from dataclasses import replace

from liberatai_coordinator.config import CoordinatorConfig
from liberatai_core.link.mqtt import MqttSettings

SESSION_EXPIRY_S = 7 * 86_400
"""A week: longer than any repair of a coordinator."""
FIRST_RETRY_S = 1.0
"""There is one coordinator: its first try need not make way for thousands, as that of a device does."""
URGENT_CAP_S = 5.0
"""Longest pause between two tries while a round is open: a device that has finished waits for the receipt."""
RECEIVE_MAXIMUM = 64
"""Unacknowledged messages at once; more only fill memory (notes on MQTT, §2)."""


def mqtt_settings(config: CoordinatorConfig) -> MqttSettings:
    """Return how to reach the broker.

    Raises:
        ConfigError: the URL is wrong, or a file cannot be read.
    """
    settings = MqttSettings.from_files(
        config.broker,
        client_id=config.coordinator,
        username=config.username,
        password_file=config.password_file,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
    )
    return replace(
        settings,
        session_expiry_s=SESSION_EXPIRY_S,
        receive_maximum=RECEIVE_MAXIMUM,
        spread_s=FIRST_RETRY_S,
        urgent_cap_s=URGENT_CAP_S,
    )
