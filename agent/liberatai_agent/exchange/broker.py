"""How the agent reaches its broker: its settings, with the files they name."""

from dataclasses import replace

from liberatai_agent.config import AgentConfig
from liberatai_core.link.mqtt import MqttSettings


def mqtt_settings(config: AgentConfig) -> MqttSettings:
    """Return how to reach the broker.

    Raises:
        ConfigError: a file is missing, unreadable or empty.
    """
    settings = MqttSettings.from_files(
        config.broker,
        client_id=config.device,
        username=config.username,
        password_file=config.password_file,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
    )
    return replace(settings, keepalive_s=config.keepalive_s)
