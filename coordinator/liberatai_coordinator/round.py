"""One round decides: who may answer, what is refused, when it closes. Pure: events in, actions out.

    OPEN ──target reached, all answered, or deadline with quorum──▶ CLOSING ──stores done──▶ CLOSED
      └──────────────── deadline without quorum ──────────────────▶ CLOSING ──stores done──▶ ABANDONED

An update that is being stored when the round closes still belongs to it: the round is frozen only when
no store is under way, so a receipted update is always in the frozen set (promise P1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from liberatai_core.contract.messages import Update
from liberatai_core.errors import (
    BaseModelError,
    DuplicateConflictError,
    DuplicateError,
    LiberataiError,
    RoundClosedError,
    RoundUnknownError,
    SchemaError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What one device was asked to do."""

    device: str
    structure: str
    base: bytes
    update_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateArrived:
    """A verified update of an approved device."""

    update: Update


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStored:
    """The ledger answered: "stored", "duplicate" or "conflict"."""

    device: str
    update_id: bytes
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFailed:
    """The ledger could not store it; the device will try again."""

    device: str
    update_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passes; `now_s` is the coordinator's monotonic clock."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """A device will not answer: lost, quarantined or taken away."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """A device that was gone is there again."""

    device: str


Event = UpdateArrived | UpdateStored | StoreFailed | Tick | Gone | Back


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Write the update to the ledger, then tell the outcome."""

    update: Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Send a receipt: stored; `code` is "E_DUP" for a repetition."""

    device: str
    update_id: bytes
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Send a receipt with the reason."""

    device: str
    update_id: bytes
    error: LiberataiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Freeze exactly these updates, sorted."""

    update_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """End the round without a version; these updates are listed as abandoned."""

    reason: str
    update_ids: tuple[bytes, ...]


Action = Store | Accept | Refuse | Close | Abandon


class Phase(Enum):
    """Where the round stands."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"
    ABANDONED = "abandoned"


def invited(ready: int, target: int | None, overselect: float) -> int:
    """Return how many of `ready` devices are asked: `target` times `overselect`, or all of them."""
    return ready if target is None else min(ready, math.ceil(target * overselect))


@dataclass(slots=True)
class Round:
    """A round of a job.

    Attributes:
        target: stored updates that are enough.
        quorum: fewest stored updates that make a version.
        closes_s: monotonic time of the deadline.
        stored: update ids that the ledger has.
    """

    job: str
    number: int
    invitations: Mapping[str, Invitation]
    target: int
    quorum: int
    closes_s: float
    stored: dict[str, bytes] = field(default_factory=dict)
    storing: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    phase: Phase = Phase.OPEN
    reason: str = ""

    def handle(self, event: Event) -> list[Action]:
        """Return what the service must do about `event`."""
        match event:
            case UpdateArrived(update=update):
                return self._arrived(update)
            case UpdateStored(device=device, update_id=update_id, outcome=outcome):
                self.storing.pop(device, None)
                return [self._answer(device, update_id, outcome), *self._progress()]
            case StoreFailed(device=device):
                self.storing.pop(device, None)
                return self._progress()
            case Tick(now_s=now_s):
                if self.phase is Phase.OPEN and now_s >= self.closes_s:
                    self.phase = Phase.CLOSING
                return self._progress()
            case Gone(device=device):
                self.gone.add(device)
                return self._progress()
            case Back(device=device):
                self.gone.discard(device)
                return []

    def _arrived(self, update: Update) -> list[Action]:
        error = self._fault(update)
        if isinstance(error, DuplicateError):
            return [Accept(device=update.device, update_id=update.update_id, code=error.code)]
        if error is not None:
            return [Refuse(device=update.device, update_id=update.update_id, error=error)]
        if update.device in self.storing:
            return []  # the first one is on its way to the disk; its receipt answers both
        self.storing[update.device] = update.update_id
        return [Store(update=update)]

    def _fault(self, update: Update) -> LiberataiError | None:
        invitation = self.invitations.get(update.device)
        if update.job != self.job or update.round != self.number or invitation is None:
            return RoundUnknownError(
                f"{update.device} was not invited to round {update.round} of {update.job}"
            )
        if update.base != invitation.base:
            return BaseModelError(
                f"base {update.base.hex()[:12]}, the round's is {invitation.base.hex()[:12]}"
            )
        if update.structure != invitation.structure:
            return SchemaError(f"structure {update.structure}, assigned was {invitation.structure}")
        if update.update_id != invitation.update_id:
            return SchemaError("the update's id is not the one of its device, job, round and base")
        if self.stored.get(update.device) == update.update_id:
            return DuplicateError("stored already")
        if self.phase is not Phase.OPEN:
            return RoundClosedError(f"round {self.number} of {self.job} is over")
        return None

    def _answer(self, device: str, update_id: bytes, outcome: str) -> Action:
        if outcome == "conflict":
            error = DuplicateConflictError(f"another update of {device} is stored for round {self.number}")
            return Refuse(device=device, update_id=update_id, error=error)
        repeated = device in self.stored or outcome == "duplicate"
        self.stored[device] = update_id
        return Accept(device=device, update_id=update_id, code=DuplicateError.code if repeated else "")

    def _progress(self) -> list[Action]:
        if self.phase is Phase.OPEN:
            waiting = set(self.invitations) - set(self.stored) - self.gone
            enough = len(self.stored) >= self.target
            if enough or (not waiting and len(self.stored) >= self.quorum):
                self.phase = Phase.CLOSING
        if self.phase is not Phase.CLOSING or self.storing:
            return []
        frozen = tuple(sorted(self.stored.values()))
        if len(frozen) >= self.quorum:
            self.phase = Phase.CLOSED
            return [Close(update_ids=frozen)]
        self.phase = Phase.ABANDONED
        self.reason = f"{len(frozen)} of {self.quorum} needed updates at the deadline"
        return [Abandon(reason=self.reason, update_ids=frozen)]
