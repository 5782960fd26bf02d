"""The frame's kind byte of every message, and how long its body may be."""

from typing import Final

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import Message
from liberatai_core.contract.messages.blobs import BlobManifest, Head
from liberatai_core.contract.messages.certificates import CertificateReply, CertificateRequest
from liberatai_core.contract.messages.presence import (
    Capability,
    CoordinatorState,
    EpochSeen,
    Event,
    Report,
    SessionSeen,
    State,
    Telemetry,
)
from liberatai_core.contract.messages.questions import Answer, Request
from liberatai_core.contract.messages.shadow import Have, Want
from liberatai_core.contract.messages.tasks import Cancel, Task
from liberatai_core.contract.messages.updates import Credit, Offer, Receipt, Update

KINDS: Final[dict[int, type[Message]]] = {
    1: State,
    2: Capability,
    3: Report,
    4: Telemetry,
    5: Event,
    6: Offer,
    7: Update,
    8: EpochSeen,
    11: CertificateRequest,
    9: Have,
    10: Answer,
    16: Task,
    17: Cancel,
    18: Credit,
    19: Receipt,
    20: SessionSeen,
    23: CertificateReply,
    21: Request,
    22: Want,
    32: BlobManifest,
    33: Head,
    48: CoordinatorState,
}
"""The frame's kind byte. Numbers are never used again for something else."""
KIND_OF: Final = {struct: kind for kind, struct in KINDS.items()}
MAX_BYTES: Final[dict[type[Message], int]] = dict.fromkeys(KIND_OF, limits.MAX_CONTROL_BYTES) | {
    Update: limits.MAX_OBJECT_BYTES - 128,  # with its header it travels as one object
    Task: limits.MAX_SINGLE_BYTES,
    Head: limits.MAX_SINGLE_BYTES,
    Want: limits.MAX_SINGLE_BYTES,
    Have: 8192,
    Request: 1024,
    BlobManifest: 1024,
    State: 4096,
    Report: 4096,
    Receipt: 4096,
    Credit: 2048,
    EpochSeen: 2048,
    SessionSeen: 1024,
    CertificateRequest: 4096,
    CertificateReply: 28_672,
    CoordinatorState: 1024,
}
"""Largest body per kind, checked before the signature. A Text of 512 characters may take 2048 bytes."""
