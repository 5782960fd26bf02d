"""Records that travel between a client and the coordinator beside the views: requests, errors, weights."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from liberatai_coordinator.store.manifests import VariantManifest
from liberatai_core.contract.limits import MAX_OBJECT_BYTES, MAX_TEXT
from liberatai_core.contract.topics import NAME
from liberatai_core.structure import DataContract, Structure


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is sent: closed and frozen."""


class Reason(Wire, frozen=True, kw_only=True):
    """Why a device is shut out."""

    reason: Annotated[str, Meta(max_length=MAX_TEXT)] = ""


class Key(Wire, frozen=True, kw_only=True):
    """Beginning of a key's fingerprint, as the device shows it; "": it is not compared."""

    key: Annotated[str, Meta(max_length=128)] = ""


class Labels(Wire, frozen=True, kw_only=True):
    """Labels that a device gets; null takes one away."""

    labels: Annotated[
        dict[
            Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?\Z")],
            Annotated[str, Meta(max_length=64)] | None,
        ],
        Meta(min_length=1, max_length=32),
    ]


class Settings(Wire, frozen=True, kw_only=True):
    """Settings that are wished of a device; null: as the device has it."""

    settings: Annotated[
        dict[Annotated[str, Meta(max_length=64)], bool | float | None], Meta(min_length=1, max_length=32)
    ]


class RolloutPlan(Wire, frozen=True, kw_only=True):
    """How a rollout goes on, see `fleet.rollout.Plan`."""

    stages: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    soak_s: float = 600.0
    failed_share: float = 0.05
    failed_min: int = 10
    accuracy_drop: float | None = 0.02
    accuracy_least: float | None = None
    accuracy_answers: int = 30
    pause_after: tuple[int, ...] = ()
    deadline_s: float = 3600.0


class RolloutRequest(Wire, frozen=True, kw_only=True):
    """A new rollout: one of model ("digits:12"), agent (with its bundle) and settings; for whom, and how."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,48}\Z")]
    model: Annotated[str, Meta(max_length=160)] = ""
    agent: Annotated[str, Meta(max_length=64)] = ""
    bundle: Annotated[str, Meta(max_length=4096)] = ""
    settings: dict[Annotated[str, Meta(max_length=64)], bool | float | None] = {}
    group: Annotated[str, Meta(max_length=64)] = ""
    selector: Annotated[str, Meta(max_length=1024)] = ""
    query: Annotated[str, Meta(max_length=1024)] = ""
    plan: RolloutPlan = RolloutPlan()


class TokenRequest(Wire, frozen=True, kw_only=True):
    """A new token: its name, what it may do, and for how many seconds (0: for ever)."""

    name: Annotated[str, Meta(pattern=NAME)]
    role: Literal["viewer", "operator", "admin"] = "viewer"
    ttl_s: Annotated[float, Meta(ge=0, le=315_360_000)] = 0.0


class Lines(Wire, frozen=True, kw_only=True):
    """How many lines of a log are wanted."""

    lines: Annotated[int, Meta(ge=1, le=200)] = 50


class GroupRequest(Wire, frozen=True, kw_only=True):
    """A new group: its name, and the question that tells who belongs to it."""

    name: Annotated[str, Meta(pattern=NAME)]
    query: Annotated[str, Meta(min_length=1, max_length=1024)]


class InvitationRequest(Wire, frozen=True, kw_only=True):
    """New invitations, see `InvitationView`."""

    count: Annotated[int, Meta(ge=1, le=1000)] = 1
    ttl_s: Annotated[float, Meta(ge=1, le=30 * 86_400)] = 3600.0
    device: Annotated[str, Meta(max_length=32)] = ""
    profile: Annotated[str, Meta(max_length=64)] = ""
    group: Annotated[str, Meta(max_length=64)] = ""
    approval: Literal["auto", "hand"] = "auto"


class JobRequest(Wire, frozen=True, kw_only=True):
    """A new job: its YAML, and the folder that relative paths in it start from."""

    yaml: str
    base_dir: str


class PlanRequest(Wire, frozen=True, kw_only=True):
    """Plan of an existing job, or of one that is only described."""

    job: str | None = None
    yaml: str | None = None


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error: its stable code, and for wrong settings where and every fault."""

    code: str
    message: str
    where: str = ""
    faults: tuple[str, ...] = ()


class Weights(Wire, frozen=True, kw_only=True):
    """Weights of one structure (msgpack): float32, little-endian, in the order of the flat vector."""

    structure: Structure
    data: DataContract
    sha256: bytes
    weights: bytes


class VariantUpload(Wire, frozen=True, kw_only=True):
    """A new variant (msgpack): what it says of itself, and its file."""

    manifest: VariantManifest
    file: Annotated[bytes, Meta(min_length=1, max_length=MAX_OBJECT_BYTES)]
