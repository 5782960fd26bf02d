"""The ledger: what the coordinator has promised, in one SQLite file that survives every crash.

Updates are stored by one writer thread with group commit: whatever waits when the disk is free becomes
one transaction, and a future resolves only after its commit reached the disk (`synchronous=FULL`;
`NORMAL` may roll back a committed transaction at a power loss). Everything else is one short
transaction per method and may be called from any thread.

Pragmas, the lock file and the errors of the driver are all that is SQLite's (`tables`).
"""

import asyncio
import fcntl
import hashlib
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from liberatai_coordinator.store.rows import (
    DeviceRow,
    JobRow,
    RoundRow,
    StoredUpdate,
    TrafficRow,
    VariantRow,
    VersionRow,
)
from liberatai_coordinator.store.tables import (
    DEVICES,
    JOB_VALUES,
    JOBS,
    META,
    METADATA,
    PATHS,
    REFUSALS,
    ROUNDS,
    TAGS,
    TRAFFIC,
    UPDATES,
    VARIANTS,
    VERSIONS,
)
from liberatai_core.errors import (
    BusyError,
    ConfigError,
    DigestError,
    DiskError,
    LiberataiError,
    LockedError,
    NotFoundError,
    RoundClosedError,
    RoundUnknownError,
    SchemaError,
)

APPLICATION_ID: Final = 0x4C414931
"""`LAI1`: tells `file` and us that this database is a ledger."""
SCHEMA_VERSION: Final = 1
"""Of the tables that a program must understand. One that is only added (and made at the next opening) changes
nothing for older programs, which leave it alone."""
BATCH_UPDATES: Final = 100
"""Measured: 404 updates/s with one per transaction, 5969 with 100; more gains little."""
BATCH_BYTES: Final = 64 * 1024 * 1024
"""One largest update: a batch never makes the write-ahead log grow much further."""
PENDING_UPDATES: Final = 10_000
PENDING_BYTES: Final = 512 * 1024 * 1024
"""What may wait for the disk in memory; beyond it senders are told to try again (E_BUSY)."""
RESERVE_BYTES: Final = 32 * 1024 * 1024
"""Free space that updates leave untouched: rounds can still be closed and published on a full disk."""
BUSY_TIMEOUT_MS: Final = 10_000
QUICK_CHECK_BYTES: Final = 1 << 30
"""A check reads every page; beyond 1 GiB it would break the promise of a recovery within seconds."""
JOURNAL_BYTES: Final = 64 * 1024 * 1024
"""The write-ahead log is cut back to this size after a checkpoint."""
MAX_REFUSAL_ROWS: Final = 10_000
"""Strangers may invent names for ever; beyond this many the refusals count for the name ""."""

Outcome = Literal["stored", "duplicate", "conflict"]

_FATAL_SYNC = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


@dataclass(frozen=True, slots=True)
class _Waiting:
    update: StoredUpdate
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Outcome]"


class _Stop:
    """Ends the writer thread after everything that was queued before."""


class _Flush:
    """Wakes the writer thread to write the counters of refusals."""


_Item = _Waiting | _Stop | _Flush


@dataclass(slots=True)
class _Pending:
    """What waits for the disk; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    updates: int = 0
    size_bytes: int = 0


# --- the ledger ----------------------------------------------------------------------------------


class Ledger:
    """The coordinator's memory. Open it with `Ledger.open`; close it with `close`.

    Attributes:
        epoch: generation of this coordinator: larger than that of every earlier one on this folder.
        folder: where the ledger lives.
    """

    def __init__(self, folder: Path, lock_fd: int, engine: sa.Engine, reserve_bytes: int) -> None:
        """Use `Ledger.open`."""
        self.folder = folder
        self.epoch = 0
        self._lock_fd = lock_fd
        self._engine = engine
        self._reserve_bytes = reserve_bytes
        self._write_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._pending = _Pending()
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._dirty: set[tuple[str, str]] = set()
        self._refusal_lock = threading.Lock()
        self._dead: LiberataiError | None = None
        self._writer = threading.Thread(target=self._write_forever, name="ledger", daemon=True)

    @classmethod
    def open(cls, folder: Path, *, reserve_bytes: int = RESERVE_BYTES) -> "Ledger":
        """Lock the folder, check the database, and begin a new epoch.

        Args:
            folder: made if it is not there.
            reserve_bytes: free space that `store_update` leaves on the disk.

        Raises:
            LockedError: another coordinator uses the folder.
            DiskError: the disk refuses, or the database is damaged (the text says what to do).
            ConfigError: the database is of a newer LiberatAI or of another program.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from None
        lock_fd = _lock(folder / "lock")
        engine = _engine(folder / "ledger.db")
        ledger = cls(folder, lock_fd, engine, reserve_bytes)
        try:
            ledger._begin_epoch()
        except BaseException:
            engine.dispose()
            os.close(lock_fd)
            raise
        ledger._writer.start()
        return ledger

    def close(self) -> None:
        """Write what is queued, and let go of the folder; idempotent."""
        if self._lock_fd < 0:
            return
        with self._pending.lock:
            self._dead = self._dead or BusyError("the ledger is closed: the coordinator is stopping")
            self._queue.put(_Stop())
        self._writer.join()
        self._engine.dispose()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # --- updates ---

    async def store_update(self, update: StoredUpdate) -> Outcome:
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
        loop = asyncio.get_running_loop()
        waiting = _Waiting(update, loop, loop.create_future())
        pending = self._pending
        with pending.lock:
            if self._dead is not None:
                raise _again(self._dead)
            size_bytes = pending.size_bytes + len(update.frame)
            if pending.updates >= PENDING_UPDATES or (pending.updates and size_bytes > PENDING_BYTES):
                raise BusyError(f"{pending.updates} updates wait for the disk: try again later")
            pending.updates += 1
            pending.size_bytes = size_bytes
            self._queue.put(waiting)
        return await waiting.future

    def updates(self, job: str, number: int) -> list[StoredUpdate]:
        """Return the updates of a round with their frames, sorted by id.

        Raises:
            NotFoundError: the frames were pruned.
            DigestError: a stored frame is damaged.
        """
        query = sa.select(UPDATES).where(UPDATES.c.job == job, UPDATES.c.round == number)
        with self._read() as connection:
            rows = connection.execute(query.order_by(UPDATES.c.update_id)).mappings().all()
        if any(row["frame"] is None for row in rows):
            raise NotFoundError(f"round {number} of {job}: its frames were pruned after it was published")
        for row in rows:
            if hashlib.sha256(row["frame"]).digest() != row["sha256"]:
                raise DigestError(
                    f"update {row['update_id'].hex()} of {row['device']} is damaged in the ledger"
                )
        return [StoredUpdate(**row) for row in rows]

    def update_ids(self, job: str, number: int) -> list[bytes]:
        """Return the sorted ids of the stored updates of a round (also after pruning)."""
        with self._read() as connection:
            return _ids(connection, job, number)

    def has_update(self, job: str, device: str, update_id: bytes) -> bool:
        """Return whether an update is stored, in whichever round (also after pruning)."""
        query = sa.select(UPDATES.c.round).where(
            UPDATES.c.update_id == update_id, UPDATES.c.job == job, UPDATES.c.device == device
        )
        with self._read() as connection:
            return connection.execute(query).first() is not None

    def paths(self, job: str) -> dict[str, bytes]:
        """Return what each device of a job holds, by device (`StoredUpdate.path`)."""
        query = sa.select(PATHS.c.device, PATHS.c.path).where(PATHS.c.job == job)
        with self._read() as connection:
            return {device: path for device, path in connection.execute(query)}  # noqa: C416 - rows

    def forget_path(self, job: str, device: str) -> None:
        """Forget what a device holds: it said that it does not."""
        with self._write() as connection:
            connection.execute(sa.delete(PATHS).where(PATHS.c.job == job, PATHS.c.device == device))

    # --- devices ---

    def upsert_device(self, device: DeviceRow) -> None:
        """Remember a device; of a known one everything but `first_seen_s` and `reason` is replaced."""
        values = _values(device)
        new = {key: value for key, value in values.items() if key not in ("id", "first_seen_s", "reason")}
        with self._write() as connection:
            connection.execute(_upsert(connection, DEVICES, values, ["id"], new))

    def devices(self) -> list[DeviceRow]:
        """Return all devices, sorted by name."""
        with self._read() as connection:
            rows = connection.execute(sa.select(DEVICES).order_by(DEVICES.c.id)).mappings().all()
        return [DeviceRow(**row) for row in rows]

    def set_device_status(self, device: str, status: str, reason: str = "") -> None:
        """Change whether a device is let in, and why.

        Raises:
            NotFoundError: no such device.
        """
        change = sa.update(DEVICES).where(DEVICES.c.id == device).values(status=status, reason=reason)
        with self._write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"device {device}: not known (see `liberatai devices list`)")

    def set_traffic(self, rows: Sequence[TrafficRow]) -> None:
        """Remember what devices' sockets carried, all in one transaction."""
        with self._write() as connection:
            for row in rows:
                values = _values(row)
                new = {key: value for key, value in values.items() if key != "device"}
                connection.execute(_upsert(connection, TRAFFIC, values, ["device"], new))

    def traffic(self) -> dict[str, TrafficRow]:
        """Return what `set_traffic` remembered, by device."""
        with self._read() as connection:
            rows = connection.execute(sa.select(TRAFFIC)).mappings().all()
        return {row["device"]: TrafficRow(**row) for row in rows}

    def update_counts(self) -> dict[str, int]:
        """Return how many updates of each device were ever stored."""
        query = sa.select(UPDATES.c.device, sa.func.count()).group_by(UPDATES.c.device)
        with self._read() as connection:
            return {device: int(number) for device, number in connection.execute(query)}

    # --- jobs ---

    def create_job(self, name: str, spec: bytes, base_dir: str, created_s: float) -> None:
        """Remember a new job in the state "waiting".

        Raises:
            ConfigError: a job of this name exists.
        """
        row = JobRow(name=name, spec=spec, base_dir=base_dir, created_s=created_s)
        with self._write() as connection:
            if connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == name)).first():
                raise ConfigError("job", [f"name: a job {name} exists already; choose another name"])
            connection.execute(sa.insert(JOBS), _values(row))

    def jobs(self) -> list[JobRow]:
        """Return all jobs, oldest first."""
        query = sa.select(JOBS).order_by(JOBS.c.created_s, JOBS.c.name)
        with self._read() as connection:
            return [JobRow(**row) for row in connection.execute(query).mappings()]

    def job(self, name: str) -> JobRow:
        """Return one job.

        Raises:
            NotFoundError: no such job.
        """
        with self._read() as connection:
            row = connection.execute(sa.select(JOBS).where(JOBS.c.name == name)).mappings().first()
        if row is None:
            raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
        return JobRow(**row)

    def set_job_state(self, name: str, state: str, reason: str = "") -> None:
        """Change the state of a job, and why.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(state=state, reason=reason)
        with self._write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")

    def set_job_value(self, name: str, key: str, value: bytes) -> None:
        """Remember a small value for a job, e.g. its assignments.

        Raises:
            NotFoundError: no such job.
        """
        with self._write() as connection:
            if not connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == name)).first():
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
            row = {"job": name, "key": key, "value": value}
            connection.execute(_upsert(connection, JOB_VALUES, row, ["job", "key"], {"value": value}))

    def job_value(self, name: str, key: str) -> bytes | None:
        """Return what `set_job_value` remembered, or None."""
        query = sa.select(JOB_VALUES.c.value).where(JOB_VALUES.c.job == name, JOB_VALUES.c.key == key)
        with self._read() as connection:
            found: bytes | None = connection.execute(query).scalar()
        return found

    # --- rounds ---

    def open_round(self, row: RoundRow) -> None:
        """Open a round, or take an open one over with a new epoch (its stored updates stay).

        Raises:
            NotFoundError: no such job.
            RoundClosedError: the round has been closed or abandoned before.
        """
        values = _values(row) | _frozen(()) | {"state": "open"}
        with self._write() as connection:
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

    def close_round(self, job: str, number: int, frozen: Sequence[bytes] | None = None) -> tuple[bytes, ...]:
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
        with self._write() as connection:
            row = _known_round(connection, job, number)
            if row.state == "abandoned":
                raise RoundClosedError(f"round {number} of {job} was abandoned: {row.reason}")
            stored = row.frozen if row.state != "open" else tuple(_ids(connection, job, number))
            unknown = sorted(set(frozen or ()) - set(stored))
            if unknown:
                raise NotFoundError(f"round {number} of {job}: update {unknown[0].hex()} is not stored")
            if row.state == "open":
                _change_round(connection, row, {"state": "closed", **_frozen(stored)})
        return stored

    def abandon_round(self, job: str, number: int, reason: str) -> tuple[bytes, ...]:
        """End an open or closed round without a version; its updates are listed in the row.

        Returns:
            The ids of the updates that count nowhere, sorted.

        Raises:
            RoundUnknownError, RoundClosedError: no such round, or it made a version.
        """
        with self._write() as connection:
            row = _known_round(connection, job, number)
            if row.state in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} made version {row.version_id[:12]}")
            if row.state == "abandoned":
                return row.frozen
            lost = tuple(_ids(connection, job, number))
            _change_round(connection, row, {"state": "abandoned", "reason": reason, **_frozen(lost)})
        return lost

    def set_aggregated(self, job: str, number: int, version_id: str, stats: bytes = b"") -> None:
        """Say which version a closed round made; saying the same again is fine.

        Raises:
            RoundUnknownError: no such round.
            RoundClosedError: the round is open or abandoned, or made another version.
        """
        with self._write() as connection:
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
        with self._write() as connection:
            row = _known_round(connection, job, number)
            if row.state not in ("aggregated", "published"):
                raise RoundClosedError(f"round {number} of {job} is {row.state}: there is nothing to publish")
            _change_round(connection, row, {"state": "published"})

    def set_round_stats(self, job: str, number: int, stats: bytes) -> None:
        """Replace the service's record of what it measured in a round (in any state).

        Raises:
            RoundUnknownError: no such round.
        """
        with self._write() as connection:
            _change_round(connection, _known_round(connection, job, number), {"stats": stats})

    def rounds(self, job: str) -> list[RoundRow]:
        """Return the rounds of a job in order."""
        query = sa.select(ROUNDS).where(ROUNDS.c.job == job).order_by(ROUNDS.c.round)
        with self._read() as connection:
            return [_round_row(row) for row in connection.execute(query).mappings()]

    def round(self, job: str, number: int) -> RoundRow:
        """Return one round.

        Raises:
            RoundUnknownError: no such round.
        """
        with self._read() as connection:
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
        with self._write() as connection:
            numbers = list(connection.execute(finished).scalars())
            if not numbers:
                return 0
            where = (UPDATES.c.job == job, UPDATES.c.round <= max(numbers), UPDATES.c.frame.is_not(None))
            within = UPDATES.c.round.in_(finished.with_only_columns(ROUNDS.c.round))
            dropped = connection.execute(sa.update(UPDATES).where(*where, within).values(frame=None)).rowcount
        if dropped:
            self._give_space_back()
        return dropped

    # --- versions ---

    def add_version(self, version: VersionRow) -> None:
        """Add a version; adding the same again is fine.

        Raises:
            DigestError: the id is not the SHA-256 of the manifest, or the number or the parent is
                another version's.
        """
        if hashlib.sha256(version.manifest).hexdigest() != version.id:
            raise DigestError(f"{version.model} version {version.number}: id and manifest do not match")
        model, number = version.model, version.number
        with self._write() as connection:
            rows = _version_rows(connection, model)
            if any(row.id == version.id and row.number == number for row in rows):
                return
            if any(row.id == version.id or row.number == number for row in rows):
                raise DigestError(f"{model} version {number}: another version has this number or this id")
            if version.parent is not None and version.parent not in {row.id for row in rows}:
                raise DigestError(f"{model} version {number}: its parent {version.parent[:12]} is not stored")
            values = _values(version)
            del values["tags"]
            connection.execute(sa.insert(VERSIONS), values)
            _set_tags(connection, version.model, dict.fromkeys(version.tags, number))

    def set_tag(self, model: str, tag: str, number: int) -> None:
        """Let a tag name this version; it names no other any more.

        Raises:
            NotFoundError: no such version.
            SchemaError: the tag could be taken for a number, or for "latest".
        """
        with self._write() as connection:
            if not any(row.number == number for row in _version_rows(connection, model)):
                raise NotFoundError(f"model {model}: no version {number}")
            _set_tags(connection, model, {tag: number})

    def versions(self, model: str) -> list[VersionRow]:
        """Return the versions of a model, oldest first; none if there is no such model."""
        with self._read() as connection:
            return _version_rows(connection, model)

    def version(self, model: str, ref: int | str = "latest") -> VersionRow:
        """Return one version by number, tag, full id, or "latest".

        Raises:
            NotFoundError: no such model or version.
        """
        rows = self.versions(model)
        if not rows:
            raise NotFoundError(f"model {model}: not known (see `liberatai models list`)")
        if ref == "latest":
            return rows[-1]
        text = str(ref)
        for row in rows:
            if text == str(row.number) or text in row.tags or text == row.id:
                return row
        raise NotFoundError(f"model {model}: no version {text[:64]!r} (see `liberatai models log {model}`)")

    def models(self) -> list[str]:
        """Return the names of all models that have a version."""
        with self._read() as connection:
            query = sa.select(VERSIONS.c.model).distinct().order_by(VERSIONS.c.model)
            return list(connection.execute(query).scalars())

    # --- variants ---

    def add_variant(self, variant: VariantRow) -> None:
        """Add a variant; adding the same again is fine.

        Raises:
            DigestError: the id is not the SHA-256 of the manifest, or is another version's variant.
            NotFoundError: no such version of this model.
        """
        model, number = variant.model, variant.number
        if hashlib.sha256(variant.manifest).hexdigest() != variant.id:
            raise DigestError(f"variant of {model} version {number}: id and manifest do not match")
        same = sa.select(VARIANTS.c.number).where(VARIANTS.c.model == model, VARIANTS.c.id == variant.id)
        with self._write() as connection:
            if not any(row.number == number for row in _version_rows(connection, model)):
                raise NotFoundError(f"model {model}: no version {number}")
            stored = connection.execute(same).scalar()
            if stored is not None and stored != number:
                raise DigestError(f"variant {variant.id[:12]} of {model} is one of version {stored}")
            if stored is None:
                connection.execute(sa.insert(VARIANTS), _values(variant))

    def variants(self, model: str, number: int | None = None) -> list[VariantRow]:
        """Return the variants of a model, or of one version of it: by version, then from small to large."""
        query = sa.select(VARIANTS).where(VARIANTS.c.model == model)
        if number is not None:
            query = query.where(VARIANTS.c.number == number)
        query = query.order_by(VARIANTS.c.number, VARIANTS.c.size_bytes, VARIANTS.c.id)
        with self._read() as connection:
            return [VariantRow(**row) for row in connection.execute(query).mappings()]

    def variant(self, model: str, prefix: str) -> VariantRow:
        """Return the variant whose id begins with `prefix`.

        Raises:
            NotFoundError: no variant of this model has such an id.
            SchemaError: several have.
        """
        found = [row for row in self.variants(model) if prefix and row.id.startswith(prefix)]
        if not found:
            raise NotFoundError(
                f"model {model}: no variant {prefix[:64]!r} (see `liberatai models show {model}`)"
            )
        if len(found) > 1:
            raise SchemaError(
                f"model {model}: {len(found)} variants begin with {prefix!r}: give more of the id"
            )
        return found[0]

    # --- refusals ---

    def count_refusal(self, device: str, code: str) -> None:
        """Count one refusal. Cheap: written with the next transaction, lost only if killed before it."""
        with self._refusal_lock:
            key = (device, code)
            if key not in self._refusals and len(self._refusals) >= MAX_REFUSAL_ROWS:
                key = ("", code)
            self._refusals[key] += 1
            wake = not self._dirty
            self._dirty.add(key)
        if wake:
            self._queue.put(_Flush())

    def refusals(self) -> dict[str, dict[str, int]]:
        """Return device -> code -> count; the device "" stands for all beyond the first 10 000 pairs."""
        with self._refusal_lock:
            found: dict[str, dict[str, int]] = {}
            for (device, code), count in sorted(self._refusals.items()):
                found.setdefault(device, {})[code] = count
        return found

    # --- inside ---

    def _begin_epoch(self) -> None:
        self._check()
        with self._write() as connection:
            METADATA.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            before = connection.execute(sa.select(META.c.value).where(META.c.key == "epoch")).scalar()
            self.epoch = (before or 0) + 1
            row = {"key": "epoch", "value": self.epoch}
            connection.execute(_upsert(connection, META, row, ["key"], {"value": self.epoch}))
            for device, code, count in connection.execute(sa.select(REFUSALS)):
                self._refusals[device, code] = count

    def _check(self) -> None:
        path = self.folder / "ledger.db"
        try:
            path.touch(mode=0o600)  # nobody else may read it; SQLite's files beside it take over the mode
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from None
        with self._read() as connection:
            application = connection.exec_driver_sql("PRAGMA application_id").scalar()
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            if tables and (application != APPLICATION_ID or version != SCHEMA_VERSION):
                fault = f"database format {application:#x} version {version}, this program writes "
                fault += f"{APPLICATION_ID:#x} version {SCHEMA_VERSION}: install the release that wrote it"
                raise ConfigError(str(path), [fault])
            if path.stat().st_size <= QUICK_CHECK_BYTES:
                result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if result != "ok":
                    raise _damaged(path, str(result))

    def _give_space_back(self) -> None:
        # This pragma frees one page per step: only `executescript` goes through all of them, and it
        # works outside of a transaction.
        try:
            with self._write_lock, closing(self._engine.raw_connection()) as connection:
                driver: Any = connection.driver_connection
                driver.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(PASSIVE);")
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            raise self._translate(error) from error

    def _require_alive(self) -> None:
        if self._dead is not None and (self._lock_fd < 0 or isinstance(self._dead, DiskError)):
            raise _again(self._dead)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """One consistent snapshot."""
        self._require_alive()
        try:
            with self._engine.connect() as connection, connection.begin():
                yield connection
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            raise self._translate(error) from error

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """One durable transaction."""
        self._require_alive()
        try:
            with self._write_lock, self._engine.connect() as connection:
                connection = connection.execution_options(write=True)  # noqa: PLW2901 - the same connection
                with connection.begin():
                    yield connection
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> LiberataiError:
        origin = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        code = getattr(origin, "sqlite_errorcode", 0) or 0
        path = self.folder / "ledger.db"
        if code in _FATAL_SYNC:
            # After a failed fsync the kernel may have dropped the pages: nothing later can be trusted.
            self._dead = DiskError(f"{path}: fsync failed; restart the coordinator and check the disk")
            return _again(self._dead)
        if code & 0xFF in _DAMAGED:
            return _damaged(path, str(origin))
        if code & 0xFF in _BUSY:
            return BusyError(f"{path}: {origin}; another program uses the database")
        return DiskError(f"{path}: {origin}; free space or check the disk, then it goes on by itself")

    # --- the writer thread ---

    def _write_forever(self) -> None:
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch()
            if batch:
                self._settle(batch)
            self._write_refusals()

    def _next_batch(self) -> tuple[list[_Waiting], bool]:
        """Wait for something, then take whatever else is there already."""
        batch: list[_Waiting] = []
        size_bytes = 0
        item: _Item = self._queue.get()
        while True:
            if isinstance(item, _Stop):
                return batch, True
            if isinstance(item, _Waiting):
                batch.append(item)
                size_bytes += len(item.update.frame)
            if len(batch) >= BATCH_UPDATES or size_bytes >= BATCH_BYTES:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False

    def _settle(self, batch: list[_Waiting]) -> None:
        results = self._store([waiting.update for waiting in batch])
        with self._pending.lock:
            self._pending.updates -= len(batch)
            self._pending.size_bytes -= sum(len(waiting.update.frame) for waiting in batch)
        for waiting, result in zip(batch, results, strict=True):
            with suppress(RuntimeError):  # its event loop is closed: nobody waits any more
                waiting.loop.call_soon_threadsafe(_resolve, waiting.future, result)

    def _store(self, updates: list[StoredUpdate]) -> list[Outcome | LiberataiError]:
        if isinstance(self._dead, DiskError):
            return [_again(self._dead)] * len(updates)
        try:
            self._require_space(sum(len(update.frame) for update in updates))
            with self._write() as connection:
                results = _insert(connection, updates)
        except LiberataiError as error:
            if len(updates) == 1 or not isinstance(error, DiskError):
                return [_again(error) for _ in updates]
            # what does not fit together may fit alone
            return [result for update in updates for result in self._store([update])]
        except Exception as error:  # noqa: BLE001 - the thread must answer, whatever went wrong
            return [DiskError(f"ledger: {type(error).__name__}: {error}") for _ in updates]
        return results

    def _require_space(self, size_bytes: int) -> None:
        if shutil.disk_usage(self.folder).free - size_bytes < self._reserve_bytes:
            raise DiskError(
                f"{self.folder}: disk full (less than {self._reserve_bytes} bytes left); free space"
            )

    def _write_refusals(self) -> None:
        with self._refusal_lock:
            dirty = {key: self._refusals[key] for key in self._dirty}
            self._dirty.clear()
        if not dirty:
            return
        try:
            with self._write() as connection:
                for (device, code), count in dirty.items():
                    row = {"device": device, "code": code, "count": count}
                    connection.execute(
                        _upsert(connection, REFUSALS, row, ["device", "code"], {"count": count})
                    )
        except LiberataiError:
            # Counters are no promise: they stay in memory and are tried again with the next ones.
            with self._refusal_lock:
                self._dirty |= dirty.keys()
            time.sleep(0.01)


# --- one transaction -----------------------------------------------------------------------------


def _insert(connection: sa.Connection, updates: list[StoredUpdate]) -> list[Outcome | LiberataiError]:
    slots = [(update.job, update.round, update.device) for update in updates]
    columns = (UPDATES.c.update_id, UPDATES.c.sha256, UPDATES.c.job, UPDATES.c.round, UPDATES.c.device)
    by_id = UPDATES.c.update_id.in_([update.update_id for update in updates])
    by_slot = sa.tuple_(UPDATES.c.job, UPDATES.c.round, UPDATES.c.device).in_(slots)
    by_round = sa.tuple_(ROUNDS.c.job, ROUNDS.c.round).in_(list({slot[:2] for slot in slots}))
    known: dict[bytes, bytes] = {}
    taken: set[tuple[str, int, str]] = set()
    # two queries, because an OR of both would not use the indexes
    for condition in (by_id, by_slot):
        for update_id, sha256, job, number, device in connection.execute(
            sa.select(*columns).where(condition)
        ):
            known[update_id] = sha256
            taken.add((job, number, device))
    states = {
        (job, number): state
        for job, number, state in connection.execute(
            sa.select(ROUNDS.c.job, ROUNDS.c.round, ROUNDS.c.state).where(by_round)
        )
    }
    results: list[Outcome | LiberataiError] = []
    new: list[StoredUpdate] = []
    for update, slot in zip(updates, slots, strict=True):
        result = _verdict(update, known, taken, states)
        results.append(result)
        if result == "stored":
            known[update.update_id] = update.sha256
            taken.add(slot)
            new.append(update)
    if new:
        rows = [_values(update) for update in new]
        paths = [row.pop("path") for row in rows]
        connection.execute(sa.insert(UPDATES), rows)
        for update, path in zip(new, paths, strict=True):
            if path:
                row = {"job": update.job, "device": update.device, "path": path}
                connection.execute(_upsert(connection, PATHS, row, ["job", "device"], {"path": path}))
    return results


def _verdict(
    update: StoredUpdate,
    known: Mapping[bytes, bytes],
    taken: set[tuple[str, int, str]],
    states: Mapping[tuple[str, int], str],
) -> Outcome | LiberataiError:
    where = f"round {update.round} of {update.job}"
    if update.update_id in known:
        return "duplicate" if known[update.update_id] == update.sha256 else "conflict"
    if (update.job, update.round, update.device) in taken:
        return "conflict"
    state = states.get((update.job, update.round))
    if state is None:
        return RoundUnknownError(f"{where} was never opened")
    return "stored" if state == "open" else RoundClosedError(f"{where} is {state}")


def _ids(connection: sa.Connection, job: str, number: int) -> list[bytes]:
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


def _frozen(ids: tuple[bytes, ...]) -> dict[str, bytes]:
    return {"frozen": msgspec.msgpack.encode(ids), "frozen_sha256": hashlib.sha256(b"".join(ids)).digest()}


def _round_row(row: Mapping[Any, Any]) -> RoundRow:
    frozen = msgspec.msgpack.decode(row["frozen"], type=tuple[bytes, ...])
    if hashlib.sha256(b"".join(frozen)).digest() != row["frozen_sha256"]:
        raise DigestError(f"round {row['round']} of {row['job']}: its frozen set is damaged in the ledger")
    return RoundRow(**{**row, "frozen": frozen})


def _version_rows(connection: sa.Connection, model: str) -> list[VersionRow]:
    tags: dict[int, list[str]] = {}
    for tag, number in connection.execute(
        sa.select(TAGS.c.tag, TAGS.c.number).where(TAGS.c.model == model).order_by(TAGS.c.tag)
    ):
        tags.setdefault(number, []).append(tag)
    query = sa.select(VERSIONS).where(VERSIONS.c.model == model).order_by(VERSIONS.c.number)
    rows = connection.execute(query).mappings()
    return [VersionRow(**row, tags=tuple(tags.get(row["number"], ()))) for row in rows]


def _set_tags(connection: sa.Connection, model: str, tags: Mapping[str, int]) -> None:
    for tag, number in tags.items():
        if not tag or tag == "latest" or tag.isdigit():
            raise SchemaError(f"tag {tag!r}: must be a name, not a number and not 'latest'")
        row = {"model": model, "tag": tag, "number": number}
        connection.execute(_upsert(connection, TAGS, row, ["model", "tag"], {"number": number}))


def _upsert(
    connection: sa.Connection,
    table: sa.Table,
    row: Mapping[str, Any],
    keys: Sequence[str],
    new: Mapping[str, Any],
) -> sa.Insert:
    """Return INSERT … ON CONFLICT DO UPDATE, which both databases write alike but SQLAlchemy does not."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement: sa.Insert = dialect.insert(table).values(**row).on_conflict_do_update(keys, set_=dict(new))
    return statement


def _values(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _resolve(future: "asyncio.Future[Outcome]", result: Outcome | LiberataiError) -> None:
    if future.done():  # the caller gave up waiting
        return
    if isinstance(result, LiberataiError):
        future.set_exception(result)
    else:
        future.set_result(result)


# --- opening -------------------------------------------------------------------------------------


def _lock(path: Path) -> int:
    try:
        lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock_fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock_fd)
        raise LockedError(
            f"two coordinators on one state folder: {path.parent} is used by process {holder}; stop it first"
        ) from None
    except OSError as error:
        os.close(lock_fd)
        raise DiskError(f"{path}: {error.strerror}; free space or check the disk") from None
    return lock_fd


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite+pysqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's implicit BEGIN is too late for a snapshot
        for pragma in (
            "auto_vacuum = INCREMENTAL",  # before the first table, else it has no effect
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            f"journal_size_limit = {JOURNAL_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # a deferred transaction that first reads and then writes fails with SQLITE_BUSY at once
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _damaged(path: Path, detail: str) -> DiskError:
    return DiskError(
        f"{path} is damaged ({' '.join(detail.split())[:200]}): stop the coordinator, keep a copy of "
        f"{path.parent}, then restore a backup, or save what can be read with `sqlite3 {path.name} .recover`"
    )


def _again(error: LiberataiError) -> LiberataiError:
    """Return a fresh copy: one exception object must not be raised in several tasks."""
    return type(error)(str(error))
