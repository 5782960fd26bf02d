"""Rounds: what was opened, what was frozen, and what became of it."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.rows import RoundRow, RoundSummary, records_in
from liberatai_coordinator.store.tables import (
    JOB_VALUES,
    JOBS,
    ROUNDS,
    SLOT_BITS,
    UPDATE_FRAMES,
    UPDATE_KEYS,
    VERSIONS,
)
from liberatai_core.errors import DigestError, NotFoundError, RoundClosedError, RoundUnknownError

DELETED_ROWS: Final = 250
"""Deleted in one transaction: some milliseconds in which nobody else writes."""
PAGE_ROUNDS: Final = 20
"""Read at once where only the newest ones may be wanted."""

_PACKED: Final = ("invited", "details")
_SHORT = [ROUNDS.c[name] for name in RoundSummary.__dataclass_fields__]


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
        invited, asked = zlib.compress(row.invited, 1), records_in(row.invited)
        with self._database.write() as connection:
            if not connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == row.job)).first():
                raise NotFoundError(f"job {row.job}: not known (see `liberatai jobs list`)")
            before = _state(connection, row.job, row.round)
            if before is None:
                values = columns_of(row) | _frozen((), "open")
                values |= {"state": "open", "invited": invited, "asked": asked}
                connection.execute(sa.insert(ROUNDS), [values | {"details": zlib.compress(row.details, 1)}])
                return
            if before.state != "open":
                raise RoundClosedError(
                    f"round {row.round} of {row.job} is {before.state}: it cannot open again"
                )
            changes = {"epoch": row.epoch, "opened_s": row.opened_s, "asked": asked, "invited": invited}
            _change_round(connection, before, changes)

    def invite_anew(self, job: str, invited: Mapping[int, bytes], values: Mapping[str, bytes]) -> None:
        """Replace the invitations of open rounds, together with values of their job.

        Args:
            job: name of the job.
            invited: the invitations, by the number of the round.
            values: as `JobStore.set_value` writes them.

        Raises:
            RoundUnknownError, RoundClosedError: no such round, or it is not open; nothing is changed.
        """
        with self._database.write() as connection:
            for number, content in invited.items():
                row = _known_state(connection, job, number)
                if row.state != "open":
                    raise RoundClosedError(f"round {number} of {job} is {row.state}")
                _change_round(connection, row, {"invited": zlib.compress(content, 1)})
            rows = [{"job": job, "key": key, "value": value} for key, value in values.items()]
            upsert_many(connection, JOB_VALUES, rows, keys=("job", "key"))

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
            row = _known_state(connection, job, number)
            if row.state == "abandoned":
                raise RoundClosedError(f"round {number} of {job} was abandoned: {row.reason}")
            stored = tuple(ids_of(connection, row.no))
            unknown = sorted(set(frozen or ()) - set(stored))
            if unknown:
                raise NotFoundError(f"round {number} of {job}: update {unknown[0].hex()} is not stored")
            if row.state == "open":
                _change_round(connection, row, {"state": "closed", **_frozen(stored, "closed")})
        return stored

    def abandon(self, job: str, number: int, reason: str) -> tuple[bytes, ...]:
        """End an open or closed round without a version; its updates are listed in the row.

        Returns:
            The ids of the updates that count nowhere, sorted.

        Raises:
            RoundUnknownError, RoundClosedError: no such round, or it made a version.
        """
        with self._database.write() as connection:
            row = _known_state(connection, job, number)
            if row.state in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} made version {row.version_id[:12]}")
            lost = tuple(ids_of(connection, row.no))
            if row.state != "abandoned":
                _abandon(connection, row, reason, lost)
        return lost

    def set_aggregated(
        self,
        job: str,
        number: int,
        version_id: str,
        stats: bytes = b"",
        details: bytes = b"",
        values: Mapping[str, bytes] | None = None,
    ) -> None:
        """Say which version a closed round made, and what was measured; saying the same again is fine.

        Args:
            job: name of the job.
            number: of the round.
            version_id: of the version.
            stats: what lists show of it.
            details: what is shown of the round alone.
            values: of the job, as `JobStore.set_value` writes them, in the same transaction.

        Raises:
            RoundUnknownError: no such round.
            RoundClosedError: the round is open or abandoned, or made another version.
        """
        with self._database.write() as connection:
            row = _known_state(connection, job, number)
            if row.state in ("aggregated", "published") and row.version_id == version_id:
                return
            if row.state != "closed":
                raise RoundClosedError(
                    f"round {number} of {job} is {row.state}: it cannot make {version_id[:12]}"
                )
            changes = {"state": "aggregated", "version_id": version_id, "stats": stats}
            changes["details"] = zlib.compress(details, 6)
            _change_round(connection, row, changes)
            rows = [{"job": job, "key": key, "value": value} for key, value in (values or {}).items()]
            if rows:
                upsert_many(connection, JOB_VALUES, rows, keys=("job", "key"))

    def set_published(self, job: str, number: int) -> None:
        """Say that the version of an aggregated round has been published; idempotent.

        Raises:
            RoundUnknownError: no such round.
            RoundClosedError: the round has made no version.
        """
        with self._database.write() as connection:
            row = _known_state(connection, job, number)
            if row.state not in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} is {row.state}: there is nothing to publish")
            _change_round(connection, row, {"state": "published"})

    def set_stats(self, job: str, number: int, stats: bytes) -> None:
        """Replace the service's record of what it measured in a round (in any state).

        Raises:
            RoundUnknownError: no such round.
        """
        with self._database.write() as connection:
            _change_round(connection, _known_state(connection, job, number), {"stats": stats})

    def all(self, job: str, *, after: int = 0) -> list[RoundRow]:
        """Return the rounds of a job in order; only those with a larger number than `after`."""
        where = (ROUNDS.c.job == job, ROUNDS.c.round > after)
        query = sa.select(ROUNDS).where(*where).order_by(ROUNDS.c.round)
        with self._database.read() as connection:
            return [_round_row(connection, row) for row in connection.execute(query).mappings().all()]

    def newest(self, job: str) -> RoundRow | None:
        """Return the newest round of a job; None before the first one."""
        return next(self.newest_first(job, 1), None)

    def newest_number(self, job: str) -> int:
        """Return the number of the newest round of a job; 0 before the first one."""
        query = sa.select(sa.func.max(ROUNDS.c.round)).where(ROUNDS.c.job == job)
        with self._database.read() as connection:
            return connection.execute(query).scalar() or 0

    def last(self, job: str, count: int) -> list[RoundRow]:
        """Return so many of the newest rounds of a job, in order."""
        query = sa.select(ROUNDS).where(ROUNDS.c.job == job).order_by(ROUNDS.c.round.desc()).limit(count)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
            return [_round_row(connection, row) for row in reversed(rows)]

    def newest_first(self, job: str, page: int = PAGE_ROUNDS) -> Iterator[RoundRow]:
        """Yield the rounds of a job from the newest one on; so many are read at once."""
        query = sa.select(ROUNDS).where(ROUNDS.c.job == job).order_by(ROUNDS.c.round.desc()).limit(page)
        rows: list[RoundRow] | None = None
        while rows is None or len(rows) == page:
            older = query if rows is None else query.where(ROUNDS.c.round < rows[-1].round)
            with self._database.read() as connection:
                rows = [_round_row(connection, row) for row in connection.execute(older).mappings().all()]
            yield from rows

    def summaries(self, job: str, *, after: int = 0) -> list[RoundSummary]:
        """Return what a list shows of a job's rounds after this one; what is long of them is not read."""
        where = (ROUNDS.c.job == job, ROUNDS.c.round > after)
        query = sa.select(*_SHORT, ROUNDS.c.no).where(*where).order_by(ROUNDS.c.round)
        with self._database.read() as connection:
            summaries: list[RoundSummary] = []
            for row in connection.execute(query).mappings().all():
                values = dict(row)
                no = values.pop("no")
                if row["state"] == "open":
                    values["updates"] = _count(connection, no)
                summaries.append(RoundSummary(**values))
        return summaries

    def get(self, job: str, number: int) -> RoundRow:
        """Return one round.

        Raises:
            RoundUnknownError: no such round.
        """
        query = sa.select(ROUNDS).where(ROUNDS.c.job == job, ROUNDS.c.round == number)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                raise RoundUnknownError(f"round {number} of {job} was never opened")
            return _round_row(connection, row)

    def prune(self, job: str, keep_rounds: int, shorten: Callable[[bytes], bytes] | None = None) -> int:
        """Drop the frames (never the ids) of finished rounds, except of the newest `keep_rounds`.

        The space goes back to the file system. Takes a while, in many short transactions between which others
        write: call it through `asyncio.to_thread`. A crash in between leaves the rest to the next call.

        Args:
            job: name of the job.
            keep_rounds: newest rounds that keep everything.
            shorten: returns what is kept of `invited`.

        Returns:
            Number of frames dropped.
        """
        finished = (ROUNDS.c.job == job, ROUNDS.c.state.in_(("published", "abandoned")))
        newest = sa.select(ROUNDS.c.round).where(*finished).order_by(ROUNDS.c.round.desc())
        newest = newest.limit(1).offset(max(0, keep_rounds))
        query = sa.select(ROUNDS.c.no, ROUNDS.c.invited).order_by(ROUNDS.c.round)
        query = query.where(*finished, ROUNDS.c.round <= newest.scalar_subquery(), ROUNDS.c.pruned == 0)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        dropped = 0
        for no, invited in rows:
            dropped += delete_slots(self._database, UPDATE_FRAMES, no)
            short = invited if shorten is None else zlib.compress(shorten(zlib.decompress(invited)), 9)
            change = sa.update(ROUNDS).where(ROUNDS.c.no == no).values(pruned=1, invited=short)
            with self._database.write() as connection:
                connection.execute(change)
        if rows:
            self._database.give_space_back()
        return dropped


def delete_slots(database: Database, table: sa.Table, round_no: int) -> int:
    """Delete a round's rows of a table with slots, some per transaction; return how many there were."""
    some = sa.select(table.c.slot).where(within(table.c.slot)).limit(DELETED_ROWS)
    change = sa.delete(table).where(table.c.slot.in_(some))
    deleted, count = 0, DELETED_ROWS
    while count == DELETED_ROWS:
        with database.slice(), database.write() as connection:
            count = connection.execute(change, slots_of(round_no)).rowcount
        deleted += count
    return deleted


def end_rounds(connection: sa.Connection, job: str, reason: str) -> None:
    """End the rounds of a job that are under way, so that each of their updates has a fate (promise P1).

    A round whose version is in the ledger made it, whatever was noted in the round; the others are abandoned.
    """
    query = _states().where(ROUNDS.c.job == job, ROUNDS.c.state.in_(("open", "closed")))
    for row in connection.execute(query).all():
        stored = tuple(ids_of(connection, row.no))
        made = _version_of(connection, job, row.round, stored) if row.state == "closed" else ""
        if made:
            _change_round(connection, row, {"state": "aggregated", "version_id": made})
        else:
            _abandon(connection, row, reason, stored)


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


def slot_of(round_no: int, sender_no: int) -> int:
    """Return the slot of a sender's update in a round."""
    return (round_no << SLOT_BITS) | sender_no


def within(slot: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Return the condition that a slot is one of a round's, whose bounds are `slots_of`."""
    return slot.between(sa.bindparam("first"), sa.bindparam("last"))


def slots_of(round_no: int) -> dict[str, int]:
    """Return the first and the last slot of a round."""
    return {"first": slot_of(round_no, 0), "last": slot_of(round_no + 1, 0) - 1}


def round_no(connection: sa.Connection, job: str, number: int) -> int | None:
    """Return under which number the slots of a round are kept; None if it was never opened."""
    query = sa.select(ROUNDS.c.no).where(ROUNDS.c.job == job, ROUNDS.c.round == number)
    return connection.execute(query).scalar()


def ids_of(connection: sa.Connection, no: int) -> list[bytes]:
    """Return the sorted ids of the updates that are stored for a round."""
    query = sa.select(UPDATE_KEYS.c.update_id).where(within(UPDATE_KEYS.c.slot))
    return sorted(connection.execute(query, slots_of(no)).scalars())


def _count(connection: sa.Connection, no: int) -> int:
    query = sa.select(sa.func.count()).select_from(UPDATE_KEYS).where(within(UPDATE_KEYS.c.slot))
    return connection.execute(query, slots_of(no)).scalar_one()


def _states() -> sa.Select[Any]:
    columns = ("no", "job", "round", "state", "reason", "version_id")
    return sa.select(*(ROUNDS.c[name] for name in columns))


def _state(connection: sa.Connection, job: str, number: int) -> sa.Row[Any] | None:
    return connection.execute(_states().where(ROUNDS.c.job == job, ROUNDS.c.round == number)).first()


def _known_state(connection: sa.Connection, job: str, number: int) -> sa.Row[Any]:
    row = _state(connection, job, number)
    if row is None:
        raise RoundUnknownError(f"round {number} of {job} was never opened")
    return row


def _change_round(connection: sa.Connection, row: sa.Row[Any], changes: Mapping[str, Any]) -> None:
    connection.execute(sa.update(ROUNDS).where(ROUNDS.c.no == row.no).values(**changes))


def _abandon(connection: sa.Connection, row: sa.Row[Any], reason: str, lost: tuple[bytes, ...]) -> None:
    changes = {"state": "abandoned", "reason": reason, **_frozen(lost, "abandoned")}
    _change_round(connection, row, changes)


def _frozen(ids: tuple[bytes, ...], state: str) -> dict[str, Any]:
    """Return the columns of a frozen set.

    What was stored when a round ended never changes, so its ids are those of the stored updates. The list is
    written for abandoned rounds only: it says what is counted nowhere.
    """
    return {
        "updates": len(ids),
        "frozen": msgspec.msgpack.encode(ids if state == "abandoned" else ()),
        "frozen_sha256": hashlib.sha256(b"".join(ids)).digest(),
    }


def _round_row(connection: sa.Connection, row: Mapping[Any, Any]) -> RoundRow:
    values = dict(row)
    frozen = () if row["state"] == "open" else tuple(ids_of(connection, row["no"]))
    if hashlib.sha256(b"".join(frozen)).digest() != row["frozen_sha256"]:
        raise DigestError(f"round {row['round']} of {row['job']}: its frozen set is damaged in the ledger")
    for name in ("no", "updates", "pruned"):
        del values[name]
    for name in _PACKED:
        values[name] = zlib.decompress(values[name])
    return RoundRow(**{**values, "frozen": frozen})
