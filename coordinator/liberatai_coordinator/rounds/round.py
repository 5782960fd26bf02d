"""One round decides: who may answer, what is refused, when it closes. Pure: events in, actions out.

    OPEN ──target reached, all answered, or deadline with quorum──▶ CLOSING ──stores done──▶ CLOSED
      └── deadline, or nobody is left: without quorum ────────────▶ CLOSING ──stores done──▶ ABANDONED

An update that is being stored when the round closes still belongs to it: the round is frozen only when
no store is under way, so a receipted update is always in the frozen set (promise P1).

In a buffered job (FedBuff: Nguyen et al., AISTATS 2022, arXiv:2106.06639) a round closes as soon as a few
updates are stored. Who is still busy then keeps its task: its invitation stands over into the next rounds,
and its update counts in the one that is open when it comes.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from liberatai_coordinator.rounds.catch_up import Way
from liberatai_core.contract.messages import Update
from liberatai_core.errors import (
    BaseModelError,
    BusyError,
    DuplicateConflictError,
    DuplicateError,
    LiberataiError,
    RoundClosedError,
    RoundUnknownError,
    SchemaError,
)

BUFFER_SHARE = 0.15
"""Of the devices that have a task: 10-20 % is what FedBuff was found to do best with."""


class Invitation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one device was asked to do; the ledger keeps it.

    Attributes:
        round: whose task it is; 0: of the round that it is listed in.
        version: that the device was asked to train on. This and all below: of buffered jobs only.
        opened_s: wall-clock time of the invitation.
        way: what the device was told to fetch.
    """

    device: str
    structure: str
    base: bytes
    update_id: bytes
    round: int = 0
    version: int = 0
    opened_s: float = 0.0
    way: Way | None = None


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
    """A device will not answer: it is lost, quarantined or taken away."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A device said that it cannot do its task: that is an answer, too, though without an update."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """A device that was gone is there again, or one that failed tries again after all."""

    device: str


Event = UpdateArrived | UpdateStored | StoreFailed | Tick | Gone | Failed | Back


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


def buffer_size(given: int | None, devices: int, hostile: float, structures: int) -> int:
    """Return how many updates make a version of a buffered job.

    Args:
        given: what the job says, None: nothing.
        devices: that have a task now; no more can be waited for.
        hostile: share of the updates that may be hostile, 0 with a rule that does not care. Against f of them
            a structure needs 2 f + 1 updates, fewer would be wasted.
        structures: that the devices share.
    """
    if given is None:
        least = next(size for size in range(1, 1000) if size > 2 * math.ceil(hostile * size - 1e-9))
        given = max(least * structures, math.ceil(BUFFER_SHARE * devices))
    return max(1, min(given, devices))


def standing(
    invitations: Iterable[Invitation],
    counted: Collection[bytes],
    *,
    version: int,
    max_staleness: int,
    free: Collection[str],
    opened_after_s: float,
) -> list[Invitation]:
    """Return the invitations that are still to be answered when the next round of a buffered job opens.

    Args:
        invitations: of the round before.
        counted: ids of the updates that were stored in it.
        version: the newest one.
        max_staleness: versions that may lie between the one a device trained on and the newest.
        free: devices that could get another task instead.
        opened_after_s: invitations from before are overdue; whoever is not there to be asked again may still
            answer.
    """
    return [
        one
        for one in invitations
        if one.update_id not in counted
        and version - one.version <= max_staleness
        and (one.opened_s >= opened_after_s or one.device not in free)
    ]


@dataclass(slots=True)
class Round:
    """A round of a job.

    Attributes:
        invitations: by device; in a buffered job also those of earlier rounds that still stand.
        target: stored updates that are enough.
        quorum: fewest stored updates that make a version.
        closes_s: monotonic time of the deadline.
        buffered: nothing is refused for being late: it goes into this round until the set is frozen, then
            into the next.
        stored: update ids that the ledger has, by device.
        storing: those on their way to the disk.
        gone: devices that are not waited for; they may come back with an update.
        failed: devices that said that they have none.
    """

    job: str
    number: int
    invitations: Mapping[str, Invitation]
    target: int
    quorum: int
    closes_s: float
    buffered: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)
    storing: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    phase: Phase = Phase.OPEN
    reason: str = ""
    _waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._waiting = set(self.invitations) - set(self.stored) - self.gone - self.failed

    @property
    def waiting(self) -> frozenset[str]:
        """Devices that the round still waits for."""
        return frozenset(self._waiting)

    def reinvite(self, invitation: Invitation) -> None:
        """Replace what one device was asked to do, by other work of the same round."""
        self.invitations = {**self.invitations, invitation.device: invitation}

    def asked(self, device: str) -> int | None:
        """Return the round whose task a device has, None if it has none."""
        invitation = self.invitations.get(device)
        return None if invitation is None else invitation.round or self.number

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
                self._waiting.discard(device)
                return self._progress()
            case Failed(device=device):
                self.failed.add(device)
                self._waiting.discard(device)
                return self._progress()
            case Back(device=device):
                self.gone.discard(device)
                self.failed.discard(device)
                if device in self.invitations and device not in self.stored:
                    self._waiting.add(device)
                return []

    def _arrived(self, update: Update) -> list[Action]:
        error = self.fault(update)
        if isinstance(error, DuplicateError):
            return [Accept(device=update.device, update_id=update.update_id, code=error.code)]
        if error is not None:
            return [Refuse(device=update.device, update_id=update.update_id, error=error)]
        if update.device in self.storing:
            return []  # the first one is on its way to the disk; its receipt answers both
        self.storing[update.device] = update.update_id
        return [Store(update=update)]

    def fault(self, update: Update) -> LiberataiError | None:
        """Return why an update does not count in this round, or not once more; None: it may."""
        invitation = self.invitations.get(update.device)
        if update.job != self.job or invitation is None or update.round != self.asked(update.device):
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
        if self.buffered and self.phase in (Phase.CLOSED, Phase.ABANDONED):
            return BusyError(f"round {self.number} of {self.job} is over: it counts in the next one")
        if not self.buffered and self.phase is not Phase.OPEN:
            return RoundClosedError(f"round {self.number} of {self.job} is over")
        return None

    def _answer(self, device: str, update_id: bytes, outcome: str) -> Action:
        if outcome == "conflict":
            error = DuplicateConflictError(f"another update of {device} is stored for round {self.number}")
            return Refuse(device=device, update_id=update_id, error=error)
        repeated = device in self.stored or outcome == "duplicate"
        self.stored[device] = update_id
        self._waiting.discard(device)
        return Accept(device=device, update_id=update_id, code=DuplicateError.code if repeated else "")

    def _may_return(self) -> set[str]:
        return {one for one in self.gone - self.failed if one in self.invitations and one not in self.stored}

    def _progress(self) -> list[Action]:
        if self.phase is Phase.OPEN:
            # Too few updates are kept till the deadline where whoever is gone may come back with one more.
            few = 0 < len(self.stored) < self.quorum <= len(self.stored) + len(self._may_return())
            if (not self._waiting and not few) or len(self.stored) >= self.target:
                self.phase = Phase.CLOSING
        if self.phase is not Phase.CLOSING or self.storing:
            return []
        frozen = tuple(sorted(self.stored.values()))
        if len(frozen) >= self.quorum:
            self.phase = Phase.CLOSED
            return [Close(update_ids=frozen)]
        self.phase = Phase.ABANDONED
        when = "at the deadline"
        if not self._waiting and not (frozen and self._may_return()):
            when = "and no device is left that could send one"
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        self.reason = f"{len(frozen)} of {self.quorum} needed updates {when}{failed}"
        return [Abandon(reason=self.reason, update_ids=frozen)]
