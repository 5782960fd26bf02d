"""What the ledger's tables remember, a value per row."""

from dataclasses import dataclass
from typing import Literal

import msgspec

RoundState = Literal["open", "closed", "aggregated", "published", "abandoned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpdate:
    """One update as it arrived: the signed frame, and what is asked about it.

    Attributes:
        round: that counts it; in a buffered job perhaps a later one than that of the frame.
        sha256: digest of `frame`, 32 bytes; the ledger makes it itself.
        path: what the device holds, now that it made this update (the runner's own record); written in the
            same transaction, empty: nothing to note.
    """

    update_id: bytes
    job: str
    round: int
    device: str
    structure: str
    samples: int
    frame: bytes
    received_s: float
    sha256: bytes = b""
    path: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """What is remembered of a device; `capability` is the msgpack of the message of that name."""

    id: str
    public_key: bytes
    status: str
    capability: bytes | None
    session: int
    first_seen_s: float
    last_seen_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """What a device's socket carried in all, and the counters of its last start that are in it."""

    device: str
    sent_bytes: int
    received_bytes: int
    session: int
    session_sent: int
    session_received: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job: its specification as it was given, and the folder that its paths are relative to.

    Attributes:
        first_version: number of its version 0 in the model, which may have versions of an earlier job.
    """

    name: str
    spec: bytes
    base_dir: str
    created_s: float
    state: str = "waiting"
    reason: str = ""
    first_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round.

    Attributes:
        epoch: generation of the coordinator that opened (or took over) it.
        invited: the service's own record of whom it asked for what; `prune` makes it shorter.
        asked: number of records in it; the ledger counts them.
        frozen: sorted ids of the updates that count (closed) or are lost (abandoned).
        frozen_sha256: digest of the joined ids.
        stats: the service's own record of what it measured.
        details: a longer record of that; lists of rounds do without it.
    """

    job: str
    round: int
    epoch: int
    opened_s: float
    invited: bytes
    asked: int = 0
    state: RoundState = "open"
    reason: str = ""
    frozen: tuple[bytes, ...] = ()
    frozen_sha256: bytes = b""
    version_id: str = ""
    stats: bytes = b""
    details: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """What a list of rounds shows: see `RoundRow`.

    Attributes:
        updates: that are stored for it.
    """

    job: str
    round: int
    state: RoundState
    reason: str
    opened_s: float
    asked: int
    updates: int
    version_id: str
    stats: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """One version of a model: `id` is the SHA-256 (hex) of `manifest`.

    Attributes:
        collected: whether its files were removed; what it was is still known.
    """

    model: str
    number: int
    id: str
    parent: str | None
    manifest: bytes
    created_s: float
    tags: tuple[str, ...] = ()
    collected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """One variant of version `number` of a model: `id` is the SHA-256 (hex) of `manifest`."""

    model: str
    number: int
    id: str
    structure: str
    size_bytes: int
    manifest: bytes
    created_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened once in the fleet.

    Attributes:
        number: grows by one with every event, over all starts.
        device: that it is about; "" for the fleet.
        code: stable, if it is a fault.
    """

    number: int
    at_s: float
    device: str
    name: str
    code: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """A change that somebody asked for, whether it was made or not.

    Attributes:
        actor: name of the token; "local" for whoever uses the Unix socket.
        action: noun and verb.
        target: what it was done to.
        code: "" if it was done, else that of the refusal.
        detail: what else was said, shortened.
    """

    number: int = 0
    at_s: float
    actor: str
    role: str
    action: str
    target: str
    code: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRow:
    """Something that an operator has said of a device, since when and why."""

    device: str
    mark: str
    since_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TombstoneRow:
    """A key that is refused for good: its device was decommissioned, or has another key now."""

    public_key: bytes
    device: str
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """A question about devices that has a name."""

    name: str
    query: str
    created_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowRow:
    """What a device shall be like; `desired` is the record of `control.shadows`."""

    device: str
    version: int
    desired: bytes
    updated_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """A rollout: what was asked for, and where it stands (records of `control.rollouts`)."""

    name: str
    spec: bytes
    state: bytes
    created_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """Who may use the API from another machine; of the token itself only the SHA-256 is kept.

    Attributes:
        expires_s: 0: never.
        used_s: last time, about; 0: never.
    """

    name: str
    role: str
    sha256: bytes
    created_s: float
    expires_s: float = 0.0
    used_s: float = 0.0


def records_in(invited: bytes) -> int:
    """Return the number of records in a list of them; what they are is not the ledger's business."""
    try:
        return len(msgspec.msgpack.decode(invited, type=list[msgspec.Raw]))
    except msgspec.MsgspecError:
        return 0
