"""Limits of one class of hardware: what `device_profiles/*.yaml` holds, checked.

A profile states limits; the probe measures; the smaller one counts. Plans and simulations read the same
numbers. Units stand in the names.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from liberatai_core.errors import ConfigError
from liberatai_core.settings import parse
from liberatai_core.spelling import meant

Positive = Annotated[float, Meta(gt=0, le=1e12)]
Delay = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=1)]
Form = Literal["liberatai", "onnx-int8"]
"""Files that a device can run a model from: the compressed file (numpy decodes it, torch computes with it),
or int8 for onnxruntime, which cannot train."""


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Disk limits.

    Attributes:
        model_kb: kibibytes that the files of one model (keyframe and deltas) may take.
        kind: what the disk is; wear matters on cards.
        write_mb_s: 10^6 bytes per second that it writes in one go; None: nobody measured.
    """

    model_kb: Positive
    kind: Literal["microsd", "emmc", "ssd", "flash"] = "microsd"
    write_mb_s: Positive | None = None


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Link limits.

    Attributes:
        up_mbit, down_mbit: 10^6 bit/s from and to the device.
        rtt_ms: round trip to the broker.
        jitter_ms: how far a round trip is from that, as a standard deviation.
        loss_percent: packets that have to be sent again.
        metered: traffic costs money.
        assumed: nobody measured it.
    """

    up_mbit: Positive
    down_mbit: Positive
    rtt_ms: Delay = 20.0
    jitter_ms: Delay = 0.0
    loss_percent: Annotated[float, Meta(ge=0, lt=100)] = 0.0
    metered: bool = False
    assumed: bool = True


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the current comes from, and watts without work and under load."""

    supply: Literal["mains", "battery"] = "mains"
    idle_w: Positive | None = None
    load_w: Positive | None = None


class Leaves(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microcontrollers behind a gateway: they have data and no agent; the gateway trains on what they send.

    Attributes:
        count: behind one gateway.
        description: what they are.
        ram_kb, flash_kb: kibibytes of one.
        link_kbit: 10^3 bit/s from one to the gateway.
    """

    count: Annotated[int, Meta(ge=1, le=1024)]
    description: str
    ram_kb: Positive
    flash_kb: Positive
    link_kbit: Positive


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of hardware.

    Attributes:
        id: name, as in the file's name.
        arch: machine architecture.
        cores: processors.
        clock_mhz: of the fastest processor.
        ram_mb: mebibytes that the board has.
        cpu_share: processors' worth of time that training may use.
        memory_mb: mebibytes that training may use.
        gflops: float32 matrix product of one core, as a fallback where the probe cannot measure.
        power: what it takes.
        leaves: what sends its data through it.
        source: where the numbers come from, by key (`gflops`, `net.up_mbit`, or `net` for all of a group).
        assumed: keys of numbers that nobody measured, in the same form.
    """

    id: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
    description: str
    arch: Literal["aarch64", "armv7l", "x86_64"]
    cores: Count
    clock_mhz: Positive | None = None
    ram_mb: Positive | None = None
    cpu_share: Positive
    memory_mb: Positive
    storage: Storage
    net: Network
    gflops: Positive
    power: Power = Power()
    leaves: Leaves | None = None
    source: dict[str, str] = {}
    assumed: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Sources of data behind one device of this class: itself, or its leaves."""
        return self.leaves.count if self.leaves else 1

    @property
    def storage_bytes(self) -> int:
        """Bytes that the files of one model may take."""
        return int(self.storage.model_kb * 1024)

    @property
    def memory_bytes(self) -> int:
        """Bytes that training may take."""
        return int(self.memory_mb * 1024 * 1024)


RENAMED = {"pi4-4g": "pi4", "pi5-8g": "pi5"}
"""Names of earlier releases, which settings may still use."""


def parse_profile(text: str, where: str) -> Profile:
    """Return the profile that a YAML text holds, or raise ConfigError with every fault."""
    profile = parse(text, Profile, where)
    known = {key for name, _ in numbers(profile) for key in (name, name.partition(".")[0])} | {
        "storage",
        "net",
    }
    unknown = sorted((set(profile.source) | set(profile.assumed)) - known - {"arch", "description"})
    if unknown:
        raise ConfigError(where, [f"source, assumed: {name}: no number of this profile" for name in unknown])
    return profile


def numbers(profile: Profile) -> Iterator[tuple[str, float]]:
    """Yield every number that a profile states, by its dotted key."""
    for name, value in msgspec.to_builtins(profile).items():
        inner = value.items() if isinstance(value, dict) and name not in ("source", "assumed") else ()
        for key, number in ((name, value), *((f"{name}.{key}", number) for key, number in inner)):
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key, number


def is_assumed(profile: Profile, key: str) -> bool:
    """Whether nobody measured the number with this dotted key."""
    group = key.partition(".")[0]
    return bool({key, group} & set(profile.assumed)) or (group == "net" and profile.net.assumed)


def source_of(profile: Profile, key: str) -> str:
    """Return where the number with this dotted key comes from, "" if the profile does not say."""
    return profile.source.get(key) or profile.source.get(key.partition(".")[0], "")


def load_profile(name: str, where: str, folder: Path | None = None) -> Profile:
    """Return the profile with this name in a folder, or in a file that is named by its path.

    Args:
        name: as in `profile: pi4`, or a path: it has a slash.
        where: what names it, for the error.
        folder: of the profiles; None: those that come with LiberatAI.

    Raises:
        ConfigError: no such profile (the text lists those that exist), or a faulty file.
    """
    path = Path(name)
    if "/" not in name:
        folder = folder or shipped_profiles()
        path = folder / f"{name}.yaml"
        if not path.is_file():
            path = folder / f"{RENAMED.get(name, name)}.yaml"
        if not path.is_file():
            known = profile_names(folder)
            hint = meant(name, known)
            fault = f"no profile {name!r} in {folder}{hint} (known: {', '.join(known) or 'none'})"
            raise ConfigError(where, [fault])
    try:
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, [f"{path}: cannot be read: {error}"]) from None


def profile_names(folder: Path | None = None) -> list[str]:
    """Return the names of the profiles in a folder, sorted; None: of those that come with LiberatAI."""
    return sorted(path.stem for path in (folder or shipped_profiles()).glob("*.yaml"))


def shipped_profiles() -> Path:
    """Return the folder of the profiles that come with LiberatAI, installed or in a source tree."""
    package = Path(__file__).parent
    installed = package / "data" / "device_profiles"
    return installed if installed.is_dir() else package.parents[1] / "device_profiles"


Trainer = Literal["torch", "numpy"]
"""What can train a whole network, the wanted one first."""
PROCESS_BYTES: Final[dict[Trainer, int]] = {"torch": 340 << 20, "numpy": 48 << 20}
"""Resident memory of a training process before its first batch: with torch 330 MiB were measured, with
numpy 45 (samples, codecs and a network of 60 000 parameters included)."""
STATE_BYTES = 24
"""Per parameter: weights, gradient, two optimiser moments, base and difference, six float32 vectors."""
MAPS = 2
"""Times what layers compute from a sample: beside the outputs themselves, their gradients or windows."""
MAPS_BYTES: Final[dict[Trainer, int]] = {"torch": 1 << 62, "numpy": 16 << 20}
"""Most that they take: numpy's kernels cut batches into parts."""


def training_bytes(trainer: Trainer, parameters: int, batch: int, activation_bytes: int = 0) -> int:
    """Return what a training takes with a runtime.

    Args:
        trainer: what computes.
        parameters: of the network.
        batch: samples per step.
        activation_bytes: outputs of all layers for one sample.
    """
    maps = min(max(MAPS_BYTES[trainer], MAPS * activation_bytes), MAPS * batch * activation_bytes)
    return PROCESS_BYTES[trainer] + STATE_BYTES * parameters + maps


HEAD_BYTES = 44 << 20
"""Resident memory of a training process that trains heads, before it has a backbone."""


def head_bytes(parameters: int, head: int, samples: int = 0, activation_bytes: int = 0) -> int:
    """Return what training the last layer on a frozen backbone takes.

    Args:
        parameters: of the network.
        head: of its last layer.
        samples: their features are kept in a byte each, at most as many as the head has inputs.
        activation_bytes: outputs of all layers for one sample.
    """
    maps = 16 * activation_bytes  # a forward pass of 64 samples holds a quarter of them at a time
    return HEAD_BYTES + 12 * parameters + STATE_BYTES * head + samples * head // 2 + maps


def trainers(runtimes: Collection[str], memory_bytes: int, parameters: int = 0) -> tuple[Trainer, ...]:
    """Return what could train a network of this size on a device, the wanted one first.

    Args:
        runtimes: names of what is installed there.
        memory_bytes: what training may take; 0: no limit.
        parameters: of the network.
    """
    return tuple(
        one
        for one in PROCESS_BYTES
        if one in runtimes and (not memory_bytes or training_bytes(one, parameters, 0) <= memory_bytes)
    )


def form_of(tier: Literal["full", "head", "observe"], runtimes: Collection[str]) -> Form:
    """Return the form of a model that suits a device.

    Args:
        tier: what the device can do ("full" trains everything, "head" and "observe" do not).
        runtimes: names of what is installed there.

    Who trains needs float32 weights of an exact digest, which only the compressed file restores. Who only
    computes is served by int8 where something runs it; the compressed file can be decoded everywhere.
    """
    return "onnx-int8" if tier != "full" and "onnxruntime" in runtimes else "liberatai"
