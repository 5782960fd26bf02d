"""Rounds: what was opened, what was frozen, and what became of it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.rows import RoundRow
from liberatai_coordinator.store.tables import JOBS, ROUNDS, UPDATES, VERSIONS
from liberatai_core.errors import DigestError, NotFoundError, RoundClosedError, RoundUnknownError


class RoundStore:
    """Rounds by job and number. Every step may be repeated after a crash."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def open(self, row: RoundRow) -> None:
        """Open a round, or take an open one over with a new epoch (its stored updates stay).

        Raises:
            NotFoundError: no such job.
            RoundClosedError: the round has been closed or abandoned before.
        """
        values = columns_of(row) | _frozen(()) | {"state": "open"}
        with self._database.write() as connection:
            if not connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == row.job)).first():
                raise NotFoundError(f"job {row.job}: not known (see `liberatai jobs list`)")
            before = _round(connection, row.job, row.round)
            if before is None:
                connection.execute(sa.insert(ROUNDS), values)
                return
            if before.state != "open":
                raise RoundClosedError(
                    f"round {row.round} of {row.job} is {before.state}: it cannot open again"
                )
            changes = {key: values[key] for key in ("epoch", "opened_s", "invited")}
            _change_round(connection, before, changes)

    def close(self, job: str, number: int, frozen: Sequence[bytes] | None = None) -> tuple[bytes, ...]:
        """Freeze the round's set of updates, in the same transaction that closes it.

        All stored updates are frozen: each of them has been promised to its device (promise P1).

        Args:
            job: name of the job.
            number: of the round.
            frozen: what the caller believes to be stored; checked.

        Returns:
            The frozen ids, sorted. Closing a closed round again returns its frozen set.

        Raises:
            RoundUnknownError, RoundClosedError: no such round, or it was abandoned.
            NotFoundError: `frozen` names an update that is not stored; nothing is changed.
        """
        with self._database.write() as connection:
            row = _known_round(connection, job, number)
            if row.state == "abandoned":
                raise RoundClosedError(f"round {number} of {job} was abandoned: {row.reason}")
            stored = row.frozen if row.state != "open" else tuple(update_ids(connection, job, number))
            unknown = sorted(set(frozen or ()) - set(stored))
            if unknown:
                raise NotFoundError(f"round {number} of {job}: update {unknown[0].hex()} is not stored")
            if row.state == "open":
                _change_round(connection, row, {"state": "closed", **_frozen(stored)})
        return stored

    def abandon(self, job: str, number: int, reason: str) -> tuple[bytes, ...]:
        """End an open or closed round without a version; its updates are listed in the row.

        Returns:
            The ids of the updates that count nowhere, sorted.

        Raises:
            RoundUnknownError, RoundClosedError: no such round, or it made a version.
        """
        with self._database.write() as connection:
            row = _known_round(connection, job, number)
            if row.state in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} made version {row.version_id[:12]}")
            if row.state == "abandoned":
                return row.frozen
            lost = tuple(update_ids(connection, job, number))
            _change_round(connection, row, {"state": "abandoned", "reason": reason, **_frozen(lost)})
        return lost

    def set_aggregated(self, job: str, number: int, version_id: str, stats: bytes = b"") -> None:
        """Say which version a closed round made; saying the same again is fine.

        Raises:
            RoundUnknownError: no such round.
            RoundClosedError: the round is open or abandoned, or made another version.
        """
        with self._database.write() as connection:
            row = _known_round(connection, job, number)
            if row.state in ("aggregated", "published") and row.version_id == version_id:
                return
            if row.state != "closed":
                raise RoundClosedError(
                    f"round {number} of {job} is {row.state}: it cannot make {version_id[:12]}"
                )
            changes = {"state": "aggregated", "version_id": version_id, "stats": stats}
            _change_round(connection, row, changes)

    def set_published(self, job: str, number: int) -> None:
        """Say that the version of an aggregated round has been published; idempotent.

        Raises:
            RoundUnknownError: no such round.
            RoundClosedError: the round has made no version.
        """
        with self._database.write() as connection:
            row = _known_round(connection, job, number)
            if row.state not in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} is {row.state}: there is nothing to publish")
            _change_round(connection, row, {"state": "published"})

    def set_stats(self, job: str, number: int, stats: bytes) -> None:
        """Replace the service's record of what it measured in a round (in any state).

        Raises:
            RoundUnknownError: no such round.
        """
        with self._database.write() as connection:
            _change_round(connection, _known_round(connection, job, number), {"stats": stats})

    def all(self, job: str, *, after: int = 0) -> list[RoundRow]:
        """Return the rounds of a job in order; only those with a larger number than `after`."""
        where = (ROUNDS.c.job == job, ROUNDS.c.round > after)
        query = sa.select(ROUNDS).where(*where).order_by(ROUNDS.c.round)
        with self._database.read() as connection:
            return [_round_row(row) for row in connection.execute(query).mappings()]

    def get(self, job: str, number: int) -> RoundRow:
        """Return one round.

        Raises:
            RoundUnknownError: no such round.
        """
        with self._database.read() as connection:
            return _known_round(connection, job, number)

    def prune(self, job: str, keep_rounds: int) -> int:
        """Drop the frames (never the ids) of finished rounds, except of the newest `keep_rounds`.

        The space goes back to the file system. May take a while: call it through `asyncio.to_thread`.

        Returns:
            Number of frames dropped.
        """
        finished = (
            sa.select(ROUNDS.c.round)
            .where(ROUNDS.c.job == job, ROUNDS.c.state.in_(("published", "abandoned")))
            .order_by(ROUNDS.c.round.desc())
            .offset(max(0, keep_rounds))
        )
        with self._database.write() as connection:
            numbers = list(connection.execute(finished).scalars())
            if not numbers:
                return 0
            where = (UPDATES.c.job == job, UPDATES.c.round <= max(numbers), UPDATES.c.frame.is_not(None))
            within = UPDATES.c.round.in_(finished.with_only_columns(ROUNDS.c.round))
            dropped = connection.execute(sa.update(UPDATES).where(*where, within).values(frame=None)).rowcount
        if dropped:
            self._database.give_space_back()
        return dropped


def update_ids(connection: sa.Connection, job: str, number: int) -> list[bytes]:
    """Return the sorted ids of the updates that are stored for a round."""
    query = sa.select(UPDATES.c.update_id).where(UPDATES.c.job == job, UPDATES.c.round == number)
    return list(connection.execute(query.order_by(UPDATES.c.update_id)).scalars())


def _round(connection: sa.Connection, job: str, number: int) -> RoundRow | None:
    query = sa.select(ROUNDS).where(ROUNDS.c.job == job, ROUNDS.c.round == number)
    row = connection.execute(query).mappings().first()
    return None if row is None else _round_row(row)


def _known_round(connection: sa.Connection, job: str, number: int) -> RoundRow:
    row = _round(connection, job, number)
    if row is None:
        raise RoundUnknownError(f"round {number} of {job} was never opened")
    return row


def _change_round(connection: sa.Connection, row: RoundRow, changes: Mapping[str, Any]) -> None:
    where = (ROUNDS.c.job == row.job, ROUNDS.c.round == row.round)
    connection.execute(sa.update(ROUNDS).where(*where).values(**changes))


def end_rounds(connection: sa.Connection, job: str, reason: str) -> None:
    """End the rounds of a job that are under way, so that each of their updates has a fate (promise P1).

    A round whose version is in the ledger made it, whatever was noted in the round; the others are abandoned.
    """
    query = sa.select(ROUNDS).where(ROUNDS.c.job == job, ROUNDS.c.state.in_(("open", "closed")))
    for row in map(_round_row, connection.execute(query).mappings().all()):
        stored = tuple(update_ids(connection, job, row.round))
        made = _version_of(connection, job, row.round, stored) if row.state == "closed" else ""
        if made:
            _change_round(connection, row, {"state": "aggregated", "version_id": made})
        else:
            _change_round(connection, row, {"state": "abandoned", "reason": reason, **_frozen(stored)})


def _version_of(connection: sa.Connection, job: str, number: int, ids: tuple[bytes, ...]) -> str:
    """Return the id of the version that counts exactly these updates of this round; "" if there is none."""
    query = (
        sa.select(VERSIONS.c.id, VERSIONS.c.manifest)
        .where(VERSIONS.c.model == job)
        .order_by(VERSIONS.c.number.desc())
        .limit(1)  # rounds follow each other: what one under way made is the newest
    )
    newest = connection.execute(query).first()
    if newest is None:
        return ""
    manifest = decode_manifest(newest.manifest)
    counted = tuple(sorted(update_id.hex() for update_id in ids))
    return str(newest.id) if (manifest.round, manifest.updates) == (number, counted) else ""


def _frozen(ids: tuple[bytes, ...]) -> dict[str, bytes]:
    return {"frozen": msgspec.msgpack.encode(ids), "frozen_sha256": hashlib.sha256(b"".join(ids)).digest()}


def _round_row(row: Mapping[Any, Any]) -> RoundRow:
    frozen = msgspec.msgpack.decode(row["frozen"], type=tuple[bytes, ...])
    if hashlib.sha256(b"".join(frozen)).digest() != row["frozen_sha256"]:
        raise DigestError(f"round {row['round']} of {row['job']}: its frozen set is damaged in the ledger")
    return RoundRow(**{**row, "frozen": frozen})
