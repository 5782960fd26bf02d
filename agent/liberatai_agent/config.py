"""Settings of an agent: YAML in, a checked Struct out. Paths are relative to the settings file."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from liberatai_agent import windows
from liberatai_core.contract.topics import FLEET_OR_DEVICE
from liberatai_core.errors import ConfigError, NotFoundError
from liberatai_core.link.mqtt.settings import broker_address
from liberatai_core.profile import Profile
from liberatai_core.profile import load_profile as named
from liberatai_core.settings import convert, faults, parse_mapping

Positive = Annotated[float, Meta(gt=0)]


class GateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a device may train. None switches a rule off.

    Attributes:
        max_load_others: processors' worth of load by other programs; off by default, because shared machines
            are always busy.
        min_battery_percent: charge below which a device on battery waits; on mains it never waits.
        max_temp_c: hottest sensor; boards slow themselves down from about 80.
        min_free_disk_mb: MiB free where the state lies.
        min_free_memory_mb: MiB of memory available on the machine.
    """

    max_load_others: Annotated[float, Meta(ge=0)] | None = None
    min_battery_percent: Annotated[float, Meta(ge=0, le=100)] | None = 50.0
    max_temp_c: Annotated[float, Meta(gt=0, le=200)] | None = 85.0
    min_free_disk_mb: Annotated[float, Meta(ge=0)] | None = 32.0
    min_free_memory_mb: Annotated[float, Meta(ge=0)] | None = 64.0


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a device takes part at all; outside of it, it says that it rests, and is not invited.

    Attributes:
        windows: times of the day, local: "22:00-06:00", "mon-fri 19:00-07:00", "sat,sun"; none: always.
        on_metered: whether it takes part while its link is metered.
    """

    windows: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=16)] = ()
    on_metered: bool = True


class UpdateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the agent may renew itself.

    Attributes:
        release_key: Ed25519 public key of releases, hex; None: only the installed program runs.
        patience_s: in which a new release must be healthy; else what ran before runs again.
        beats: seconds that it must have been connected, and all its parts alive, to be healthy.
    """

    release_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")] | None = None
    patience_s: Annotated[float, Meta(ge=1, le=86_400)] = 300.0
    beats: Annotated[int, Meta(ge=1, le=3600)] = 30

    @property
    def key_bytes(self) -> bytes | None:
        """The release key's 32 bytes."""
        return None if self.release_key is None else bytes.fromhex(self.release_key)


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of the link may be used.

    Attributes:
        metered: whether traffic costs money; None: as the profile says, or true if there is a quota.
        quota_mb_per_day: MiB that a day (UTC) may move, both ways together; when they are used up, nothing
            new is fetched or trained until the next day. None: any number.
        up_mbit, down_mbit: Mbit/s that may be used; replace the profile's. What was measured counts where
            it is less.
    """

    metered: bool | None = None
    quota_mb_per_day: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    up_mbit: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    down_mbit: Annotated[float, Meta(gt=0, le=1e6)] | None = None

    @property
    def quota_bytes(self) -> int | None:
        """Bytes that a day may move; at least one, so that a tiny quota is not none."""
        return None if self.quota_mb_per_day is None else max(1, int(self.quota_mb_per_day * (1 << 20)))


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `liberatai-agent run`.

    Attributes:
        fleet: name in every topic.
        device: this device's name; also its MQTT client id.
        broker: mqtt:// or mqtts:// URL, without credentials.
        coordinator_key: the coordinator's Ed25519 public key, hex: nothing else is obeyed.
        username, password_file: how to log in at the broker.
        ca_file, cert_file, key_file: for mqtts. One file for certificate and key is renewed by the agent.
        claim_broker: mqtts:// URL of the broker's door for claims, where a certificate is asked for.
        claim_file: claim credential (certificate and key) that opens that door.
        state_dir: outbox, blobs, device key; one agent at a time.
        data: private .npz of this device, null: the device only observes.
        profile: name of a hardware class or path of its file.
        profiles_dir: folder with hardware classes.
        cpu_share, memory_mb, storage_kb: limits that replace the profile's.
        keepalive_s: the broker notices a dead link after 1.5 times this.
        telemetry_s: seconds between two samples of load and traffic, ±20 %.
        trainer_idle_s: the training process ends after so long without work.
        predict_idle_s: the process that answers at the local socket ends after so long; 0: no socket.
        outbox_max_mb: MiB of updates that may wait for a receipt.
        share_logs: whether the fleet may ask for the newest lines of the log (never words about the data).
        gate: when the device may train.
        link: what of the link may be used.
        train: when the device takes part at all.
        update: how the agent may renew itself.
    """

    fleet: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
    device: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]
    coordinator_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
    broker: str = "mqtt://127.0.0.1:1883"
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    claim_broker: str | None = None
    claim_file: str | None = None
    state_dir: str = "/var/lib/liberatai-agent"
    data: str | None = None
    profile: str | None = None
    profiles_dir: str | None = None
    cpu_share: Positive | None = None
    memory_mb: Positive | None = None
    storage_kb: Positive | None = None
    keepalive_s: Annotated[int, Meta(ge=1, le=65_535)] = 60
    telemetry_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0
    trainer_idle_s: Annotated[float, Meta(ge=0, le=86_400)] = 60.0
    predict_idle_s: Annotated[float, Meta(ge=0, le=86_400)] = 60.0
    outbox_max_mb: Annotated[float, Meta(gt=0, le=65_536)] = 128.0
    share_logs: bool = True
    gate: GateSettings = GateSettings()
    link: LinkSettings = LinkSettings()
    train: TrainSettings = TrainSettings()
    update: UpdateSettings = UpdateSettings()

    @property
    def state_path(self) -> Path:
        """Folder of everything that the agent keeps."""
        return Path(self.state_dir)

    @property
    def key_bytes(self) -> bytes:
        """The coordinator's 32-byte public key."""
        return bytes.fromhex(self.coordinator_key)


_PATHS = (
    "password_file",
    "ca_file",
    "cert_file",
    "key_file",
    "claim_file",
    "state_dir",
    "data",
    "profiles_dir",
)


def parse_config(text: str, where: str, folder: Path) -> AgentConfig:
    """Return the settings that a YAML text holds, relative paths resolved against `folder`.

    Raises:
        ConfigError: with every fault, one line each.
    """
    raw = parse_mapping(text, where)
    found = faults(raw, AgentConfig)
    if not found:
        found = _across(msgspec.convert(raw, AgentConfig))
    if found:
        raise ConfigError(where, found)
    for name in _PATHS:
        if raw.get(name) is not None:
            raw[name] = str(folder / raw[name])
    if raw.get("profile") is not None and "/" in raw["profile"]:
        raw["profile"] = str(folder / raw["profile"])
    return convert(raw, AgentConfig, where)


def load_config(path: Path) -> AgentConfig:
    """Return the settings in a file.

    Raises:
        NotFoundError: no such file.
        ConfigError: not readable, or wrong; all faults at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    return parse_config(text, str(path), path.parent.absolute())


def load_profile(config: AgentConfig) -> Profile | None:
    """Return the hardware class that the settings name, None if they name none.

    Raises:
        ConfigError: no such profile (the text lists those that exist), or a faulty file.
    """
    if config.profile is None:
        return None
    folder = None if config.profiles_dir is None else Path(config.profiles_dir)
    return named(config.profile, "profile", folder)


def _across(config: AgentConfig) -> list[str]:
    """Return faults that no single key shows."""
    found = []
    for window in config.train.windows:
        try:
            windows.parse(window)
        except ValueError as error:
            found.append(f"train.windows: {error}")
    try:
        address = broker_address(config.broker)
    except ConfigError:
        return [*found, f'broker: must be mqtt://host:port or mqtts://host:port (got "{config.broker}")']
    if address.username or address.password:
        found.append("broker: no credentials in the URL: use username and password_file")
    if config.password_file is not None and config.username is None:
        found.append("password_file: needs username")
    if (config.cert_file is None) != (config.key_file is None):
        found.append("cert_file and key_file: give both or none")
    if (config.claim_broker is None) != (config.claim_file is None):
        found.append("claim_broker and claim_file: give both or none")
    if not address.secure and (config.ca_file or config.cert_file):
        found.append("ca_file, cert_file: need broker: mqtts://…")
    return found
