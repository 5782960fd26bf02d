"""Limits of one class of hardware: what `device_profiles/*.yaml` holds, checked.

A profile states limits; the probe measures; the smaller one counts. Units stand in the names.
Reading files is up to the caller: this module only says where the shipped ones lie.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from liberatai_core.settings import parse

Positive = Annotated[float, Meta(gt=0, le=1e12)]
Count = Annotated[int, Meta(ge=1)]
Form = Literal["liberatai", "onnx-int8"]
"""Files that a device can run a model from: the compressed file (numpy decodes it, torch computes with it),
or int8 for onnxruntime, which cannot train."""


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Disk limits.

    Attributes:
        model_kb: kibibytes that the files of one model (keyframe and deltas) may take.
        kind: what the disk is; wear matters on cards.
    """

    model_kb: Positive
    kind: Literal["microsd", "emmc", "ssd", "flash"] = "microsd"


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Link limits. `assumed` is true where nobody measured."""

    up_mbit: Positive
    down_mbit: Positive
    rtt_ms: Annotated[float, Meta(ge=0, le=1e9)] = 20.0
    metered: bool = False
    assumed: bool = True


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of hardware.

    Attributes:
        id: name, as in the file's name.
        arch: machine architecture.
        cores: processors.
        cpu_share: processors' worth of time that training may use.
        memory_mb: mebibytes that training may use.
        gflops: float32 matrix product of one core, as a fallback where the probe cannot measure.
        source: where the numbers come from.
    """

    id: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
    description: str
    arch: Literal["aarch64", "armv7l", "x86_64"]
    cores: Count
    cpu_share: Positive
    memory_mb: Positive
    storage: Storage
    net: Network
    gflops: Positive
    source: dict[str, str] = {}

    @property
    def storage_bytes(self) -> int:
        """Bytes that the files of one model may take."""
        return int(self.storage.model_kb * 1024)

    @property
    def memory_bytes(self) -> int:
        """Bytes that training may take."""
        return int(self.memory_mb * 1024 * 1024)


def parse_profile(text: str, where: str) -> Profile:
    """Return the profile that a YAML text holds, or raise ConfigError with every fault."""
    return parse(text, Profile, where)


def shipped_profiles() -> Path:
    """Return the folder of the profiles that come with LiberatAI, installed or in a source tree."""
    package = Path(__file__).parent
    installed = package / "data" / "device_profiles"
    return installed if installed.is_dir() else package.parents[1] / "device_profiles"


def form_of(tier: Literal["full", "head", "observe"], runtimes: Collection[str]) -> Form:
    """Return the form of a model that suits a device.

    Args:
        tier: what the device can do ("full" trains everything, "head" and "observe" do not).
        runtimes: names of what is installed there.

    Who trains needs float32 weights of an exact digest, which only the compressed file restores. Who only
    computes is served by int8 where something runs it; the compressed file can be decoded everywhere.
    """
    return "onnx-int8" if tier != "full" and "onnxruntime" in runtimes else "liberatai"
