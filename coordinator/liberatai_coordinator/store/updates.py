"""Updates: stored once, by the writer thread, and receipted only after their commit."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rounds import update_ids
from liberatai_coordinator.store.rows import StoredUpdate
from liberatai_coordinator.store.tables import PATHS, ROUNDS, UPDATES
from liberatai_coordinator.store.writer import Writer
from liberatai_core.errors import (
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
            DigestError: `sha256` is not the digest of `frame`.
        """
        if hashlib.sha256(update.frame).digest() != update.sha256:
            raise DigestError(f"update of {update.device}: the frame does not have the SHA-256 given with it")
        outcome: Outcome = await self._writer.submit(_insert, update, len(update.frame))
        return outcome

    def of_round(self, job: str, number: int) -> list[StoredUpdate]:
        """Return the updates of a round with their frames, sorted by id.

        Raises:
            NotFoundError: the frames were pruned.
            DigestError: a stored frame is damaged.
        """
        query = sa.select(UPDATES).where(UPDATES.c.job == job, UPDATES.c.round == number)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(UPDATES.c.update_id)).mappings().all()
        if any(row["frame"] is None for row in rows):
            raise NotFoundError(f"round {number} of {job}: its frames were pruned after it was published")
        for row in rows:
            if hashlib.sha256(row["frame"]).digest() != row["sha256"]:
                raise DigestError(
                    f"update {row['update_id'].hex()} of {row['device']} is damaged in the ledger"
                )
        return [StoredUpdate(**row) for row in rows]

    def ids(self, job: str, number: int) -> list[bytes]:
        """Return the sorted ids of the stored updates of a round (also after pruning)."""
        with self._database.read() as connection:
            return update_ids(connection, job, number)

    def senders(self, job: str, number: int) -> list[tuple[str, bytes]]:
        """Return (device, update id) of what is stored for a round, without reading any frame."""
        query = sa.select(UPDATES.c.device, UPDATES.c.update_id).where(
            UPDATES.c.job == job, UPDATES.c.round == number
        )
        with self._database.read() as connection:
            return [(device, update_id) for device, update_id in connection.execute(query)]

    def has(self, job: str, device: str, update_id: bytes) -> bool:
        """Return whether an update is stored, in whichever round (also after pruning)."""
        query = sa.select(UPDATES.c.round).where(
            UPDATES.c.update_id == update_id, UPDATES.c.job == job, UPDATES.c.device == device
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def counts(self) -> dict[str, int]:
        """Return how many updates of each device were ever stored."""
        query = sa.select(UPDATES.c.device, sa.func.count()).group_by(UPDATES.c.device)
        with self._database.read() as connection:
            return {device: int(number) for device, number in connection.execute(query)}

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
    new: list[StoredUpdate] = []
    for update in updates:
        result = stored.verdict(update)
        results.append(result)
        if result == "stored":
            stored.note(update)
            new.append(update)
    if new:
        rows = [columns_of(update) for update in new]
        paths = [row.pop("path") for row in rows]
        connection.execute(sa.insert(UPDATES), rows)
        held = {(update.job, update.device): path for update, path in zip(new, paths, strict=True) if path}
        rows = [{"job": job, "device": device, "path": path} for (job, device), path in held.items()]
        upsert_many(connection, PATHS, rows, keys=("job", "device"))
    return results


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the ledger knows of a batch of updates.

    Attributes:
        digests: of those whose ids are stored, by id.
        taken: (job, round, device) that have an update.
        states: of their rounds.
    """

    digests: dict[bytes, bytes]
    taken: set[tuple[str, int, str]]
    states: dict[tuple[str, int], str]

    def note(self, update: StoredUpdate) -> None:
        self.digests[update.update_id] = update.sha256
        self.taken.add((update.job, update.round, update.device))

    def verdict(self, update: StoredUpdate) -> Outcome | LiberataiError:
        where = f"round {update.round} of {update.job}"
        digest = self.digests.get(update.update_id)
        if digest is not None:
            return "duplicate" if digest == update.sha256 else "conflict"
        if (update.job, update.round, update.device) in self.taken:
            return "conflict"
        state = self.states.get((update.job, update.round))
        if state is None:
            return RoundUnknownError(f"{where} was never opened")
        return "stored" if state == "open" else RoundClosedError(f"{where} is {state}")


def _stored(connection: sa.Connection, updates: Sequence[StoredUpdate]) -> _Stored:
    """Look a batch up. Lists of single values are found through an index; lists of pairs would not be."""
    by_round: dict[tuple[str, int], set[str]] = {}
    for update in updates:
        by_round.setdefault((update.job, update.round), set()).add(update.device)
    stored = _Stored({}, set(), {})
    for update_id, sha256 in connection.execute(BY_ID, {"ids": [update.update_id for update in updates]}):
        stored.digests[update_id] = sha256
    for (job, number), devices in by_round.items():
        state = connection.execute(ROUND_STATE, {"of_job": job, "number": number}).scalar()
        if state is not None:
            stored.states[job, number] = state
        slots = {"of_job": job, "number": number, "devices": sorted(devices)}
        stored.taken.update((job, number, device) for device in connection.execute(BY_SLOT, slots).scalars())
    return stored


BY_ID: Final = sa.select(UPDATES.c.update_id, UPDATES.c.sha256).where(
    UPDATES.c.update_id.in_(sa.bindparam("ids", expanding=True))
)
BY_SLOT: Final = sa.select(UPDATES.c.device).where(
    UPDATES.c.job == sa.bindparam("of_job"),
    UPDATES.c.round == sa.bindparam("number"),
    UPDATES.c.device.in_(sa.bindparam("devices", expanding=True)),
)
ROUND_STATE: Final = sa.select(ROUNDS.c.state).where(
    ROUNDS.c.job == sa.bindparam("of_job"), ROUNDS.c.round == sa.bindparam("number")
)
