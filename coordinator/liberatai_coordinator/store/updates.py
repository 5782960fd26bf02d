"""Updates: stored once, by the writer thread, and receipted only after their commit."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, upsert_many
from liberatai_coordinator.store.rounds import ids_of, round_no, slot_of, slots_of, within
from liberatai_coordinator.store.rows import StoredUpdate
from liberatai_coordinator.store.tables import (
    PATHS,
    ROUNDS,
    SENDERS,
    SLOT_BITS,
    UPDATE_FRAMES,
    UPDATE_KEYS,
)
from liberatai_coordinator.store.writer import Writer
from liberatai_core.errors import (
    BusyError,
    DigestError,
    LiberataiError,
    NotFoundError,
    RoundClosedError,
    RoundUnknownError,
)

Outcome = Literal["stored", "duplicate", "conflict"]


class UpdateStore:
    """Updates by job and round, and what each device holds since its last one."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def store(self, update: StoredUpdate) -> Outcome:
        """Store an update durably; returns after its commit.

        Returns:
            "stored"; "duplicate" if the same update is there already (also when its round is over);
            "conflict" if another one of this device is stored for this round, or the id for other bytes.

        Raises:
            RoundUnknownError, RoundClosedError: the round was never opened, or is over.
            DiskError: not stored, the disk is full or refuses; heals by itself when there is space.
            BusyError: not stored, too much is waiting, or the ledger is closed.
        """
        outcome: Outcome = await self._writer.submit(_insert, update, len(update.frame))
        return outcome

    def of_round(self, job: str, number: int) -> list[StoredUpdate]:
        """Return the updates of a round with their frames, sorted by id.

        Raises:
            NotFoundError: the frames were pruned.
            DigestError: a stored frame is damaged.
        """
        with self._database.read() as connection:
            no = round_no(connection, job, number)
            rows = [] if no is None else connection.execute(OF_ROUND, slots_of(no)).mappings().all()
        found: list[StoredUpdate] = []
        for row in rows:
            if row["frame"] is None:
                raise NotFoundError(f"round {number} of {job}: its frames were pruned after it was published")
            if hashlib.sha256(row["frame"]).digest() != row["sha256"]:
                raise DigestError(
                    f"update {row['update_id'].hex()} of {row['device']} is damaged in the ledger"
                )
            found.append(StoredUpdate(job=job, round=number, **row))
        return sorted(found, key=lambda update: update.update_id)

    def senders(self, job: str, number: int) -> list[tuple[str, bytes]]:
        """Return (device, id) of every update that is stored for a round: much faster than with frames."""
        query = (
            sa.select(SENDERS.c.device, UPDATE_KEYS.c.update_id)
            .join_from(UPDATE_KEYS, SENDERS, SENDERS.c.no == _sender(UPDATE_KEYS.c.slot))
            .where(within(UPDATE_KEYS.c.slot))
        )
        with self._database.read() as connection:
            no = round_no(connection, job, number)
            rows: Iterable[Any] = [] if no is None else connection.execute(query, slots_of(no))
            return [(device, update_id) for device, update_id in rows]

    def ids(self, job: str, number: int) -> list[bytes]:
        """Return the sorted ids of the stored updates of a round (also after pruning)."""
        with self._database.read() as connection:
            no = round_no(connection, job, number)
            return [] if no is None else ids_of(connection, no)

    def has(self, job: str, device: str, update_id: bytes) -> bool:
        """Return whether an update is stored, in whichever round (also after pruning)."""
        query = (
            sa.select(UPDATE_KEYS.c.slot)
            .join(ROUNDS, ROUNDS.c.no == UPDATE_KEYS.c.slot.op(">>")(SLOT_BITS))
            .join(SENDERS, SENDERS.c.no == _sender(UPDATE_KEYS.c.slot))
            .where(UPDATE_KEYS.c.update_id == update_id, ROUNDS.c.job == job, SENDERS.c.device == device)
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def counts(self) -> dict[str, int]:
        """Return how many updates of each device were ever stored."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(SENDERS.c.device, SENDERS.c.updates))
            return {device: int(number) for device, number in rows}

    def paths(self, job: str) -> dict[str, bytes]:
        """Return what each device of a job holds, by device (`StoredUpdate.path`)."""
        query = sa.select(PATHS.c.device, PATHS.c.path).where(PATHS.c.job == job)
        with self._database.read() as connection:
            return {device: path for device, path in connection.execute(query)}  # noqa: C416 - rows

    def forget_path(self, job: str, device: str) -> None:
        """Forget what a device holds: it said that it does not."""
        with self._database.write() as connection:
            connection.execute(sa.delete(PATHS).where(PATHS.c.job == job, PATHS.c.device == device))


def _insert(connection: sa.Connection, updates: Sequence[StoredUpdate]) -> list[Outcome | LiberataiError]:
    """Store those that are new; one transaction."""
    stored = _stored(connection, updates)
    results: list[Outcome | LiberataiError] = []
    new: list[_New] = []
    for update in updates:
        digest = hashlib.sha256(update.frame).digest()
        result = stored.verdict(update, digest)
        results.append(result)
        if result == "stored":
            new.append(_New(stored.note(update, digest), digest, update))
    if new:
        _write(connection, new)
    return results


@dataclass(frozen=True, slots=True)
class _New:
    slot: int
    digest: bytes
    update: StoredUpdate


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the ledger knows of a batch of updates, and then of the batch itself.

    Attributes:
        digests: of those whose ids are stored, by id; None where only the id is left.
        rounds: (job, round) -> its number and state.
        senders: device -> its number; new ones get the next ones.
        slots: that are taken, of these rounds and senders.
    """

    digests: dict[bytes, bytes | None]
    rounds: dict[tuple[str, int], tuple[int, str]]
    senders: dict[str, int]
    slots: set[int]

    def note(self, update: StoredUpdate, digest: bytes) -> int:
        """Add an update that is stored now; return its slot."""
        slot = self.slot(update)
        self.digests[update.update_id] = digest
        self.slots.add(slot)
        return slot

    def slot(self, update: StoredUpdate) -> int:
        return slot_of(self.rounds[update.job, update.round][0], self.senders[update.device])

    def verdict(self, update: StoredUpdate, digest: bytes) -> Outcome | LiberataiError:
        where = f"round {update.round} of {update.job}"
        if update.update_id in self.digests:
            # Where the frame was pruned the id must do: it names the work, and the work was counted.
            return "duplicate" if self.digests[update.update_id] in {digest, None} else "conflict"
        opened = self.rounds.get((update.job, update.round))
        if opened is None:
            return RoundUnknownError(f"{where} was never opened")
        if self.senders[update.device] >= 1 << SLOT_BITS:
            return BusyError(f"{update.device}: more than {1 << SLOT_BITS} devices")
        if self.slot(update) in self.slots:
            return "conflict"
        return "stored" if opened[1] == "open" else RoundClosedError(f"{where} is {opened[1]}")


def _stored(connection: sa.Connection, updates: Sequence[StoredUpdate]) -> _Stored:
    """Look a batch up; every statement finds its rows through an index."""
    ids = [update.update_id for update in updates]
    digests = {row[0]: row[1] for row in connection.execute(BY_ID, {"ids": ids})}
    rounds = {}
    for job, number in {(update.job, update.round) for update in updates}:
        row = connection.execute(ROUND_STATE, {"of_job": job, "number": number}).first()
        if row is not None:
            rounds[job, number] = (row[0], row[1])
    devices = {update.device for update in updates}
    senders = {row[0]: row[1] for row in connection.execute(BY_DEVICE, {"devices": sorted(devices)})}
    last = connection.execute(LAST_SENDER).scalar() or 0
    known = [
        slot_of(rounds[update.job, update.round][0], senders[update.device])
        for update in updates
        if (update.job, update.round) in rounds and update.device in senders
    ]
    slots = set(connection.execute(BY_SLOT, {"slots": known}).scalars()) if known else set()
    for device in devices - senders.keys():
        last += 1
        senders[device] = last
    return _Stored(digests, rounds, senders, slots)


def _write(connection: sa.Connection, new: Sequence[_New]) -> None:
    keys = [{"slot": one.slot, "update_id": one.update.update_id} for one in new]
    connection.execute(sa.insert(UPDATE_KEYS), keys)
    frames = [
        {
            "slot": one.slot,
            "structure": one.update.structure,
            "samples": one.update.samples,
            "received_s": one.update.received_s,
            "sha256": one.digest,
            "frame": one.update.frame,
        }
        for one in new
    ]
    connection.execute(sa.insert(UPDATE_FRAMES), frames)
    mask = (1 << SLOT_BITS) - 1
    added = Counter((one.slot & mask, one.update.device) for one in new)
    senders = [{"no": no, "device": device, "updates": count} for (no, device), count in added.items()]
    upsert_many(connection, SENDERS, senders, keys=("no",), keep=("device",), add=("updates",))
    held = {(one.update.job, one.update.device): one.update.path for one in new if one.update.path}
    rows = [{"job": job, "device": device, "path": path} for (job, device), path in held.items()]
    upsert_many(connection, PATHS, rows, keys=("job", "device"))


def _sender(slot: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return slot.op("&")((1 << SLOT_BITS) - 1)


def _slots(no: int) -> dict[str, int]:
    return {"first": slot_of(no, 0), "last": slot_of(no + 1, 0) - 1}


BY_ID: Final = (
    sa.select(UPDATE_KEYS.c.update_id, UPDATE_FRAMES.c.sha256)
    .join_from(UPDATE_KEYS, UPDATE_FRAMES, UPDATE_FRAMES.c.slot == UPDATE_KEYS.c.slot, isouter=True)
    .where(UPDATE_KEYS.c.update_id.in_(sa.bindparam("ids", expanding=True)))
)
BY_DEVICE: Final = sa.select(SENDERS.c.device, SENDERS.c.no).where(
    SENDERS.c.device.in_(sa.bindparam("devices", expanding=True))
)
BY_SLOT: Final = sa.select(UPDATE_KEYS.c.slot).where(
    UPDATE_KEYS.c.slot.in_(sa.bindparam("slots", expanding=True))
)
LAST_SENDER: Final = sa.select(sa.func.max(SENDERS.c.no))
ROUND_STATE: Final = sa.select(ROUNDS.c.no, ROUNDS.c.state).where(
    ROUNDS.c.job == sa.bindparam("of_job"), ROUNDS.c.round == sa.bindparam("number")
)
OF_ROUND: Final = (
    sa.select(
        UPDATE_KEYS.c.update_id,
        SENDERS.c.device,
        UPDATE_FRAMES.c.structure,
        UPDATE_FRAMES.c.samples,
        UPDATE_FRAMES.c.sha256,
        UPDATE_FRAMES.c.frame,
        UPDATE_FRAMES.c.received_s,
    )
    .join_from(UPDATE_KEYS, SENDERS, SENDERS.c.no == _sender(UPDATE_KEYS.c.slot))
    .join(UPDATE_FRAMES, UPDATE_FRAMES.c.slot == UPDATE_KEYS.c.slot, isouter=True)
    .where(within(UPDATE_KEYS.c.slot))
)
