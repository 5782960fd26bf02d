"""Who is there, since when, and how it is: devices and coordinators."""

from typing import Annotated, Literal

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import Counter, DeviceId, Key, Message, Text, Version
from liberatai_core.structure import DataContract


class State(Message, frozen=True, kw_only=True):
    """Retained birth, goodbye and last will of an agent.

    Attributes:
        session: grows with every start of the agent and survives reboots; an older one is ignored.
    """

    device: DeviceId
    state: Literal["online", "draining", "offline", "lost"]
    session: Counter
    version: Text = ""


class Capability(Message, frozen=True, kw_only=True):
    """What one device measured about itself (retained). None: could not be measured.

    Attributes:
        public_key: Ed25519 key that signs this and all further messages of the device.
        tier: "full" trains everything, "head" trains a head on a frozen backbone, "observe" only infers.
        profile: name of the hardware class that the operator set, "" if none.
        storage_bytes: what the model's files (keyframe and deltas) may take on disk.
        memory_bytes: what training may take.
        cpu_share: processors' worth of time that training may use.
        gflops: measured float32 matrix product, one thread.
        up_bits_s, down_bits_s: link, measured or from the profile.
        samples: number of local samples.
        link_measured: `up_bits_s` comes from real transfers; otherwise from the profile or the settings.
        day_quota_bytes: what the link may move in a day, both ways together; 0: no quota.
        quota_spent: today's quota is used up: no task until this changes.
        telemetry_s: a Telemetry comes about so often: who is silent for much longer is not there, whatever
            stands at the broker.
    """

    device: DeviceId
    public_key: Key
    session: Counter
    agent_version: Text
    tier: Literal["full", "head", "observe"]
    profile: Annotated[str, Meta(max_length=64)] = ""
    arch: Annotated[str, Meta(max_length=32)] = ""
    cores: Annotated[int, Meta(ge=1, le=4096)] = 1
    cpu_share: Annotated[float, Meta(gt=0, le=4096)] = 1.0
    memory_bytes: Counter = 0
    storage_bytes: Counter = 0
    disk_free_bytes: Counter = 0
    gflops: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    up_bits_s: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    down_bits_s: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    metered: bool = False
    samples: Annotated[int, Meta(ge=0, le=limits.MAX_SAMPLES)] = 0
    data: DataContract | None = None
    families: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=64)] = ()
    runtimes: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=8)] = ()
    codecs: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=16)] = ()
    link_measured: bool = False
    day_quota_bytes: Counter = 0
    quota_spent: bool = False
    telemetry_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 60.0


class Report(Message, frozen=True, kw_only=True, array_like=True):
    """Retained: what the device is doing. `phase` says where it stands with `task`."""

    device: DeviceId
    session: Counter
    phase: Literal["idle", "gated", "fetching", "training", "sending", "failed"]
    job: Annotated[str, Meta(max_length=64)] = ""
    round: Version = 0
    reason: Text = ""


class Telemetry(Message, frozen=True, kw_only=True):
    """QoS 0 sample of load and traffic; may be lost."""

    device: DeviceId
    session: Counter
    cpu_percent: Annotated[float, Meta(ge=0, le=100_000)] = 0.0
    memory_available_bytes: Counter = 0
    rss_bytes: Counter = 0
    sent_bytes: Counter = 0
    received_bytes: Counter = 0
    temperature_c: Annotated[float, Meta(ge=-100, le=300)] | None = None


class Event(Message, frozen=True, kw_only=True):
    """Something that happened once, numbered per session."""

    device: DeviceId
    session: Counter
    number: Counter
    name: Annotated[str, Meta(max_length=64)]
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""


class EpochSeen(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to a coordinator whose epoch is lower than one that its own key has signed before.

    Attributes:
        word: the whole frame of the CoordinatorState with the highest epoch that the device believes: the
            coordinator believes its own signature, not the device.
    """

    device: DeviceId
    session: Counter
    word: Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_WORD_BYTES)]


class SessionSeen(Message, frozen=True, kw_only=True, array_like=True):
    """Answer to what came from an older session than one heard before: the device was put back from a copy.

    Attributes:
        session: highest number that was heard of the device: it goes on above it. Bounded, so that room to
            grow is left for ever.
    """

    device: DeviceId
    session: Annotated[int, Meta(ge=1, le=limits.MAX_SESSION)]


Presence = Literal["online", "offline", "lost"]


class CoordinatorState(Message, frozen=True, kw_only=True):
    """Retained presence of a coordinator; agents hold uploads while it is away.

    Attributes:
        epoch: bumped at every start, stored before use: fences a forgotten twin.
    """

    coordinator: DeviceId
    state: Presence
    epoch: Counter
