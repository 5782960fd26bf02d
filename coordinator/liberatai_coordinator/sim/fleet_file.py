"""`fleet.yaml`: which devices a simulation has."""

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from liberatai_core.contract.topics import FLEET_OR_DEVICE
from liberatai_core.errors import ConfigError
from liberatai_core.profile import Profile, load_profile
from liberatai_core.settings import parse

MAX_DEVICES: Final = 10_000_000
Backend = Literal["virtual", "process", "container"]
Share = Annotated[float, Meta(ge=0, le=1)]


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fleet to simulate.

    Attributes:
        fleet: name in every topic.
        devices: how many of each profile.
        profiles_dir: folder of the profiles; null: those that come with LiberatAI.
        backend: where the devices are: in one process with virtual time, child processes, or containers.
        scenario: name of a shipped scenario, or the path of a file.
        training: "real", or "drawn": a seeded difference instead of training (virtual only).
        samples: of every device, where training is drawn.
        awake: share of the devices that is there; the others are known to the coordinator only.
        telemetry_s: between two signs of life.
        seed: of everything random.
    """

    fleet: Annotated[str, Meta(pattern=FLEET_OR_DEVICE)] = "sim"
    devices: dict[str, Annotated[int, Meta(ge=0, le=MAX_DEVICES)]]
    profiles_dir: str | None = None
    backend: Backend = "virtual"
    scenario: str = "steady"
    training: Literal["real", "drawn"] = "real"
    samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    awake: Share = 1.0
    telemetry_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0

    def profiles(self) -> dict[str, Profile]:
        """Return the profiles that are named.

        Raises:
            ConfigError: one does not exist, or has faults.
        """
        folder = Path(self.profiles_dir) if self.profiles_dir else None
        return {name: load_profile(name, "devices", folder) for name in self.devices}

    def names(self) -> dict[str, str]:
        """Return the profile of every device, by the device's name: `pi4-0001`."""
        return {
            device_name(profile, number): profile
            for profile, count in self.devices.items()
            for number in range(1, count + 1)
        }

    def scaled(self, **counts: int) -> "FleetFile":
        """Return the fleet with other numbers of some profiles."""
        return msgspec.structs.replace(self, devices=self.devices | counts)


def device_name(profile: str, number: int) -> str:
    """Return the name of a device: a profile of one's own may be named by a path."""
    return f"{Path(profile).stem[:24]}-{number:04}"


def load_fleet(path: Path) -> FleetFile:
    """Return the fleet in a file.

    Raises:
        ConfigError: not readable, or wrong; all faults at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    fleet = parse(text, FleetFile, str(path))
    if fleet.profiles_dir is not None:
        fleet = msgspec.structs.replace(fleet, profiles_dir=str(path.parent / fleet.profiles_dir))
    return check(fleet, str(path))


def check(fleet: FleetFile, where: str) -> FleetFile:
    """Return a fleet that can be simulated, or raise ConfigError."""
    faults = []
    total = sum(fleet.devices.values())
    if not 1 <= total <= MAX_DEVICES:
        faults.append(f"devices: {total} in all, 1 … {MAX_DEVICES} can be simulated")
    if fleet.backend != "virtual" and fleet.training != "real":
        faults.append("training: drawn needs backend: virtual")
    if fleet.backend != "virtual" and fleet.awake < 1:
        faults.append("awake: devices that are only known need backend: virtual")
    if faults:
        raise ConfigError(where, faults)
    fleet.profiles()
    return fleet
