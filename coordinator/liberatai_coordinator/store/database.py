"""SQLite behind one door: the file and its lock, pragmas, transactions, and what the driver's errors mean.

Reads are consistent snapshots and wait for nobody (write-ahead log). Writes follow each other, and are on the
disk when they return: `synchronous=FULL`; `NORMAL` may roll back a committed transaction at a power loss.
"""

import fcntl
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from liberatai_coordinator.store.migration import SCHEMA_VERSION, create, upgrade
from liberatai_coordinator.store.tables import META
from liberatai_core.errors import (
    BusyError,
    ConfigError,
    DiskError,
    LiberataiError,
    LockedError,
    ReplacedError,
)

log = logging.getLogger(__name__)

APPLICATION_ID: Final = 0x4C414931
"""`LAI1`: tells `file` and us that this database is a ledger."""
RESERVE_BYTES: Final = 32 * 1024 * 1024
"""Free space that updates leave untouched: rounds can still be closed and published on a full disk."""
BUSY_TIMEOUT_MS: Final = 10_000
QUICK_CHECK_BYTES: Final = 1 << 30
"""A check reads every page; beyond 1 GiB it would break the promise of a recovery within seconds."""
JOURNAL_BYTES: Final = 4 * 1024 * 1024
"""The write-ahead log is cut back to this size after a checkpoint."""
LONG_JOURNAL_BYTES: Final = 2 * JOURNAL_BYTES
"""From here on a checkpoint makes others wait, so that the log begins anew."""
SETTLE_BYTES: Final = 4 * 1024 * 1024
"""In the write-ahead log before it is moved into the database."""
FORCED_PAGES: Final = 16_384
"""In the write-ahead log before whoever commits must move it (64 MiB): a safety net."""
TRANSACTION_BYTES: Final = 32 * 1024
"""A small transaction in the log, about."""
PAGE_BYTES: Final = 4096
FREED_PAGES: Final = 500
"""Given back at a time: some milliseconds in which nobody else writes."""
MAX_PAUSE_S: Final = 0.05

READERS: Final = 64
"""Threads that read at once; more wait for each other."""

REPLACED: Final = (
    "another coordinator with this key took the place of this one (restored from its backup, or started with"
    " --take-over): leave this one stopped; if it is the right one, `liberatai serve --take-over`"
)

_REFUSED = (sa.exc.DBAPIError, sa.exc.TimeoutError, sqlite3.Error)
_FATAL_SYNC = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class Database:
    """The ledger's file. Any thread may read and write.

    Attributes:
        folder: where it lies.
        epoch: generation of this coordinator: larger than that of every earlier one on this folder.
        engine: SQLAlchemy's; for tests, and for nobody else.
        unsettled_bytes: that wait in the write-ahead log, about.
        wake: called when they are many; `settle` is for a thread that nobody waits for.
    """

    def __init__(self, folder: Path, lock_fd: int, engine: sa.Engine, reserve_bytes: int) -> None:
        """Use `Database.open`."""
        self.folder = folder
        self.epoch = 0
        self.engine = engine
        self.write_lock = threading.Lock()
        self._path = folder / "ledger.db"
        self._journal = folder / "ledger.db-wal"
        self._lock_fd = lock_fd
        self._reserve_bytes = reserve_bytes
        self._fault: DiskError | None = None
        self.unsettled_bytes = 0
        self.wake: Callable[[], None] = lambda: None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        reserve_bytes: int = RESERVE_BYTES,
        epoch_after: Callable[[int], int] | None = None,
    ) -> "Database":
        """Lock the folder, check the database, and begin a new epoch.

        Args:
            folder: made if it is not there.
            reserve_bytes: free space that `require_space` leaves on the disk.
            epoch_after: the epoch to begin with instead of the next one, from the last one; whoever replaced
                this coordinator is replaced by it in turn.

        Raises:
            LockedError: another coordinator uses the folder.
            DiskError: the disk refuses, or the database is damaged (the text says what to do).
            ConfigError: the database is of a newer LiberatAI or of another program.
            ReplacedError: another coordinator took the place of this one, see `note_replaced`.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from None
        lock_fd = _lock(folder / "lock")
        engine = _engine(folder / "ledger.db")
        database = cls(folder, lock_fd, engine, reserve_bytes)
        try:
            database._begin_epoch(epoch_after)
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def look(cls, folder: Path) -> "Database":
        """Open a copy of a database to read it; it is checked, and nothing in it changes.

        Raises:
            LockedError: somebody uses the folder.
            DiskError: it is damaged.
            ConfigError: it is not of this release.
        """
        database = cls(folder, _lock(folder / "lock"), _engine(folder / "ledger.db"), 0)
        try:
            database._require_today()
        except BaseException:
            database.close()
            raise
        return database

    def _require_today(self) -> None:
        version = self._check()
        if version != SCHEMA_VERSION:
            fault = f"schema {version}, this program reads {SCHEMA_VERSION}: use the release that runs there"
            raise ConfigError(str(self._path), [fault])

    @staticmethod
    def copy(path: Path, copy: Path) -> None:
        """Write a consistent copy of a database while others use it; it is whole or absent.

        Args:
            path: of the database.
            copy: of the copy; nobody else may read it.

        Raises:
            DiskError: it cannot be written, or the database is damaged.
        """
        beside = copy.with_name(f"{copy.name}.tmp")
        try:
            beside.unlink(missing_ok=True)
            beside.touch(mode=0o600)
            with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000)) as connection:
                connection.execute("VACUUM INTO ?", (str(beside),))
            _sync(beside)
            beside.replace(copy)
            _sync(copy.parent)
        except OSError as error:
            raise DiskError(f"{copy}: {error.strerror}; free space or check the disk") from error
        except sqlite3.Error as error:
            if (error.sqlite_errorcode or 0) & 0xFF in _DAMAGED:
                raise _damaged(path, str(error)) from error
            raise DiskError(f"{copy}: {error}; free space or check the disk") from error

    def close(self) -> None:
        """Let go of the folder; idempotent."""
        if self._lock_fd < 0:
            return
        self.engine.dispose()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def number(self, key: str) -> int:
        """Return a number that the ledger keeps for itself, e.g. "epoch"; 0 if there is none."""
        with self.read() as connection:
            return _number(connection, key)

    def require_alive(self) -> None:
        """Refuse when nothing can be promised any more.

        Raises:
            DiskError: a sync failed.
            BusyError: the ledger is closed.
        """
        if self._fault is not None:
            raise again(self._fault)
        if self._lock_fd < 0:
            raise BusyError("the ledger is closed: the coordinator is stopping")

    def require_space(self, size_bytes: int) -> None:
        """Refuse what would use up the reserve.

        Raises:
            DiskError: less than `reserve_bytes` would be free.
        """
        if shutil.disk_usage(self.folder).free - size_bytes < self._reserve_bytes:
            raise DiskError(
                f"{self.folder}: disk full (less than {self._reserve_bytes} bytes left); free space"
            )

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent snapshot."""
        self.require_alive()
        try:
            with self.engine.connect() as connection, connection.begin():
                yield connection
        except _REFUSED as error:
            raise self._translate(error) from error

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One durable transaction."""
        self.require_alive()
        try:
            with self.write_lock, self.engine.connect() as connection:
                connection = connection.execution_options(write=True)  # noqa: PLW2901 - the same connection
                with connection.begin():
                    yield connection
                self.unsettled_bytes += TRANSACTION_BYTES
        except _REFUSED as error:
            raise self._translate(error) from error
        if self.unsettled_bytes >= SETTLE_BYTES:
            self.wake()

    def give_space_back(self) -> None:
        """Let the file shrink by what was deleted, some pages at a time; others write in between."""
        with self.read() as connection:
            free = connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0
        for _ in range(-(-free // FREED_PAGES)):
            with self.slice(), self.write_lock:
                self._script(f"PRAGMA incremental_vacuum({FREED_PAGES});")
            self.unsettled_bytes += FREED_PAGES * PAGE_BYTES

    @contextmanager
    def slice(self) -> Iterator[None]:
        """Do a part of long work; then rest as long as it took.

        The lock of writers is not fair: without a rest whoever waits for it might wait for all parts.
        """
        started = time.monotonic()
        yield
        time.sleep(min(MAX_PAUSE_S, time.monotonic() - started))

    def settle(self) -> None:
        """Move what was committed from the write-ahead log into the database; others write meanwhile.

        A log that others always append to never ends, however often it is moved: once it is long, they wait
        for the few pages that are left, and it begins anew.
        """
        self.unsettled_bytes = 0
        self._script("PRAGMA wal_checkpoint(PASSIVE);")
        if self._journal.exists() and self._journal.stat().st_size >= LONG_JOURNAL_BYTES:
            with self.write_lock:  # a reader of what was before may be in the way: then the next call does it
                self._script(
                    "PRAGMA busy_timeout = 0; PRAGMA wal_checkpoint(RESTART); "
                    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS};"
                )

    def _script(self, pragma: str) -> None:
        # This pragma frees one page per step: only `executescript` goes through all of them, and it works
        # outside of a transaction.
        self.require_alive()
        try:
            with closing(self.engine.raw_connection()) as connection:
                driver: Any = connection.driver_connection
                driver.executescript(pragma)
        except _REFUSED as error:
            raise self._translate(error) from error

    def _begin_epoch(self, epoch_after: Callable[[int], int] | None) -> None:
        version = self._check()
        copy = self._keep_copy(version) if 0 < version < SCHEMA_VERSION else None
        with self.write() as connection:
            if version == 0:
                create(connection)
            elif version < SCHEMA_VERSION:
                upgrade(connection, version)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            before = _number(connection, "epoch")
            self.epoch = before + 1
            if epoch_after is not None:
                self.epoch = epoch_after(max(before, _number(connection, "replaced_by")))
            elif _number(connection, "replaced_by") > before:
                raise ReplacedError(f"{self.folder}: {REPLACED}")
            upsert_many(connection, META, [{"key": "epoch", "value": self.epoch}], keys=("key",))
        if copy is not None:
            log.warning("the ledger went from schema %d to %d; before: %s", version, SCHEMA_VERSION, copy)
            for older in self.folder.glob("ledger-schema-*.db"):
                if older != copy:
                    older.unlink(missing_ok=True)

    def _keep_copy(self, version: int) -> Path:
        """Copy the ledger beside itself before its schema changes: the way back to the older release.

        Raises:
            DiskError: there is no room for it.
        """
        copy = self.folder / f"ledger-schema-{version}.db"
        size = self._path.stat().st_size
        if shutil.disk_usage(self.folder).free < size + self._reserve_bytes:
            fault = (
                f"{self.folder}: no room for a copy of the ledger before its upgrade from schema {version}"
            )
            raise DiskError(f"{fault} to {SCHEMA_VERSION}: free {size + self._reserve_bytes >> 20} MiB")
        self.copy(self._path, copy)
        return copy

    def raise_epoch(self, epoch: int) -> None:
        """Let the next start begin above an epoch that was used before; on disk when this returns.

        Raises:
            DiskError, BusyError: it cannot be written.
        """
        with self.write() as connection:
            value = max(self.epoch, epoch)
            upsert_many(connection, META, [{"key": "epoch", "value": value}], keys=("key",))

    def note_replaced(self, epoch: int) -> None:
        """Let no start on this folder succeed any more, but one that says what it wants (`epoch_after`).

        Args:
            epoch: of the coordinator that took the place of this one.

        Raises:
            DiskError, BusyError: it cannot be written.
        """
        with self.write() as connection:
            upsert_many(connection, META, [{"key": "replaced_by", "value": epoch}], keys=("key",))

    def _check(self) -> int:
        """Return the number of the schema; 0: the database is empty."""
        path = self._path
        try:
            path.touch(mode=0o600)  # nobody else may read it; SQLite's files beside it take over the mode
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from None
        with self.read() as connection:
            application = connection.exec_driver_sql("PRAGMA application_id").scalar()
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            if tables and (application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION):
                fault = f"database format {application:#x} version {version}, this program writes "
                fault += f"{APPLICATION_ID:#x} version {SCHEMA_VERSION}: install the release that wrote it"
                if application == APPLICATION_ID:
                    fault += ", or put back a copy of before its upgrade (ledger-schema-*.db)"
                raise ConfigError(str(path), [fault])
            if path.stat().st_size <= QUICK_CHECK_BYTES:
                result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if result != "ok":
                    raise _damaged(path, str(result))
        return version if tables else 0

    def _translate(self, error: Exception) -> LiberataiError:
        origin = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        code = getattr(origin, "sqlite_errorcode", 0) or 0
        if isinstance(error, sa.exc.TimeoutError):
            return BusyError(f"{self._path}: more than {READERS} threads read at once: try again later")
        if code in _FATAL_SYNC:
            # After a failed fsync the kernel may have dropped the pages: nothing later can be trusted.
            self._fault = DiskError(f"{self._path}: fsync failed; restart the coordinator and check the disk")
            return again(self._fault)
        if code & 0xFF in _DAMAGED:
            return _damaged(self._path, str(origin))
        if code & 0xFF in _BUSY:
            return BusyError(f"{self._path}: {origin}; another program uses the database")
        return DiskError(f"{self._path}: {origin}; free space or check the disk, then it goes on by itself")


def upsert_many(
    connection: sa.Connection,
    table: sa.Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    keys: Sequence[str],
    keep: Sequence[str] = (),
    add: Sequence[str] = (),
) -> None:
    """Insert rows; of those that are there already replace all columns but `keys` and `keep`; add to `add`.

    PostgreSQL and SQLite write this alike, but SQLAlchemy does not. One statement is prepared for all rows.
    """
    if not rows:
        return
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert = dialect.insert(table)
    new: dict[str, Any] = {
        name: table.c[name] + insert.excluded[name] if name in add else insert.excluded[name]
        for name in rows[0]
        if name not in (*keys, *keep)
    }
    connection.execute(insert.on_conflict_do_update(keys, set_=new), list(rows))


def _number(connection: sa.Connection, key: str) -> int:
    return connection.execute(sa.select(META.c.value).where(META.c.key == key)).scalar() or 0


def columns_of(row: Any) -> dict[str, Any]:
    """Return the columns of a row's dataclass."""
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def again(error: LiberataiError) -> LiberataiError:
    """Return a fresh copy: one exception object must not be raised in several tasks."""
    return type(error)(str(error))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_unused(folder: Path) -> None:
    """Refuse a state folder that somebody works on.

    Raises:
        LockedError: another coordinator uses it. DiskError: it cannot be looked at.
    """
    os.close(_lock(folder / "lock"))


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
    engine = sa.create_engine(
        f"sqlite+pysqlite:///{path}",
        connect_args={"timeout": BUSY_TIMEOUT_MS / 1000},
        max_overflow=READERS - 5,  # beside the five that stay open
    )

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
            f"wal_autocheckpoint = {FORCED_PAGES}",
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
