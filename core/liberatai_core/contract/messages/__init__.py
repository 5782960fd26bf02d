"""Every message: frozen, typed, closed, bounded. One Struct per kind; the frame's kind byte names it.

The body on the wire is one msgpack map, or one array for the kinds of every round: there, names would be half
of the bytes. Fields that crossed a trust boundary carry their bounds here,
so a decoder refuses them before anything is allocated for them.

Everybody imports messages from here; the modules below are only what they are about.
"""

from liberatai_core.contract.messages.base import (
    BlobId,
    Counter,
    DeviceId,
    Digest,
    Fraction,
    Key,
    Message,
    Name,
    Round,
    Seconds,
    Sums,
    Text,
    UpdateId,
    Version,
    WeightsName,
)
from liberatai_core.contract.messages.blobs import BlobManifest, BlobRef, Head, HeadState, Step, weights_name
from liberatai_core.contract.messages.certificates import CertificateReply, CertificateRequest, claimed
from liberatai_core.contract.messages.kinds import KIND_OF, KINDS, MAX_BYTES
from liberatai_core.contract.messages.presence import (
    Capability,
    CoordinatorState,
    EpochSeen,
    Event,
    Presence,
    Report,
    SessionSeen,
    State,
    Telemetry,
)
from liberatai_core.contract.messages.questions import Answer, Request
from liberatai_core.contract.messages.shadow import AgentWish, Have, ModelWish, Want, Wishes
from liberatai_core.contract.messages.tasks import (
    RUN_BYTES,
    SPARSE_METHODS,
    Cancel,
    SparseMethod,
    Task,
    TaskSpec,
    Training,
    part_seed,
    update_id,
    work_seed,
)
from liberatai_core.contract.messages.updates import Credit, Offer, Receipt, Update

__all__ = [
    "KINDS",
    "KIND_OF",
    "MAX_BYTES",
    "RUN_BYTES",
    "SPARSE_METHODS",
    "AgentWish",
    "Answer",
    "BlobId",
    "BlobManifest",
    "BlobRef",
    "Cancel",
    "Capability",
    "CertificateReply",
    "CertificateRequest",
    "CoordinatorState",
    "Counter",
    "Credit",
    "DeviceId",
    "Digest",
    "EpochSeen",
    "Event",
    "Fraction",
    "Have",
    "Head",
    "HeadState",
    "Key",
    "Message",
    "ModelWish",
    "Name",
    "Offer",
    "Presence",
    "Receipt",
    "Report",
    "Request",
    "Round",
    "Seconds",
    "SessionSeen",
    "SparseMethod",
    "State",
    "Step",
    "Sums",
    "Task",
    "TaskSpec",
    "Telemetry",
    "Text",
    "Training",
    "Update",
    "UpdateId",
    "Version",
    "Want",
    "WeightsName",
    "Wishes",
    "claimed",
    "part_seed",
    "update_id",
    "weights_name",
    "work_seed",
]
