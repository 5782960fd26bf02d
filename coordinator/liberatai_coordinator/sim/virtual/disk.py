"""The disk of a simulated device, in memory: what the agent's outbox, blobs and identity files keep.

It survives a crash of its device, as a disk does. The rules are those of `liberatai_agent.store.outbox`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from liberatai_agent.events import Returned, Unsent
from liberatai_agent.session.state import MAX_FINISHED
from liberatai_core.contract.messages import Step, Update
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import DiskError

KEPT_RESIDUALS: Final = 4


@dataclass(slots=True)
class Stored:
    """An update without a receipt."""

    job: str
    round: int
    structure: str
    frame: bytes
    transfer: str
    body: bytes


@dataclass(slots=True)
class Disk:
    """What one device keeps.

    Attributes:
        full: it takes nothing.
        session: number of the newest start.
        epoch, word: highest epoch of the coordinator, and the presence that says so.
        blobs: names of files that are here; their content is the same for all devices.
        residuals: sparsifier's state and round by (job, structure).
    """

    full: bool = False
    session: int = 0
    epoch: int = 0
    word: bytes = b""
    path: tuple[Step, ...] = ()
    blobs: set[str] = field(default_factory=set)
    updates: dict[bytes, Stored] = field(default_factory=dict)
    returned: dict[bytes, tuple[str, str, Returned]] = field(default_factory=dict)
    residuals: dict[tuple[str, str], tuple[bytes, int]] = field(default_factory=dict)
    finished: list[bytes] = field(default_factory=list)

    def fill(self, full: bool) -> None:
        """Fill it, or free it."""
        self.full = full

    def copy(self) -> "Disk":
        """Return what a copy of this disk holds."""
        return Disk(
            session=self.session,
            epoch=self.epoch,
            word=self.word,
            path=self.path,
            blobs=set(self.blobs),
            updates=dict(self.updates),
            returned=dict(self.returned),
            residuals=dict(self.residuals),
            finished=list(self.finished),
        )

    def require_space(self) -> None:
        """Raise DiskError while the disk is full."""
        if self.full:
            raise DiskError("no space left on device")

    def unsent(self) -> tuple[Unsent, ...]:
        """Return the updates without a receipt, oldest first."""
        return tuple(
            Unsent(
                update_id=uid,
                job=one.job,
                round=one.round,
                transfer=one.transfer,
                size_bytes=len(one.frame),
            )
            for uid, one in self.updates.items()
        )

    def commit(
        self, update: Update, frame: bytes, task_id: bytes, residual: bytes, used: Iterable[bytes]
    ) -> None:
        """Store an update, what it leaves over and its finished task, and forget what went into it."""
        self.require_space()
        self.finished = [*self.finished, task_id][-MAX_FINISHED:]
        if update.update_id in self.updates:
            return
        for uid in used:
            self.returned.pop(uid, None)
        self.updates[update.update_id] = Stored(
            update.job, update.round, update.structure, frame, blob_id(frame), update.body
        )
        if not residual:
            return
        key = (update.job, update.structure)
        self.residuals.pop(key, None)
        self.residuals[key] = (residual, update.round)
        while len(self.residuals) > KEPT_RESIDUALS:
            del self.residuals[next(iter(self.residuals))]

    def give_back(self, uid: bytes) -> None:
        """Delete a refused update and keep its body for the next training of its structure."""
        one = self.updates.pop(uid, None)
        if one is not None:
            left = Returned(update_id=uid, round=one.round, body=one.body)
            self.returned[uid] = (one.job, one.structure, left)

    def leftover(self, job: str, structure: str) -> tuple[bytes | None, int, tuple[Returned, ...]]:
        """Return residual, its round and refused updates for the next training of a structure."""
        residual, left_in = self.residuals.get((job, structure), (None, 0))
        back = (left for of, name, left in self.returned.values() if (of, name) == (job, structure))
        return residual, left_in, tuple(sorted(back, key=lambda one: one.update_id))
