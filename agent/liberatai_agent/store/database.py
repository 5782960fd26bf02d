"""The agent's SQLite file: opened, checked, set aside if it is damaged. What stands in it is `outbox`'s.

WAL with synchronous=FULL: NORMAL may roll back a committed transaction when the power fails. Statements are
not kept: a kept one holds the last blob that was bound to it. One lock: a store runs in a thread of its own.
"""

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liberatai_agent.store.files import set_aside
from liberatai_core.errors import DamagedError, DiskError

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 5000
CACHE_KIB = 256
"""SQLite's own default is 2 MiB; every row here is written and read once."""
WAL_BYTES = 1 << 20
"""What the log may take while nothing happens; it is cut after every large transaction."""
_REFUSED = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_INTERRUPT,
    }
)
"""The disk or the system refuses; everything else that SQLite says of a file is damage."""


class Database:
    """One file.

    Args:
        path: it; made if missing.
        prepare: makes or renews the tables of a file that is whole, inside one transaction; raises
            sqlite3.DatabaseError or DamagedError for a file that is not what it should be.

    Attributes:
        damaged: what was wrong with the file that was set aside at the start, "" if nothing.

    Raises:
        DiskError: the disk refuses.
    """

    def __init__(self, path: Path, prepare: Callable[[sqlite3.Connection], None]) -> None:
        self._path, self._prepare = path, prepare
        self._lock = threading.RLock()
        self.damaged = ""
        try:
            self._db = self._open()
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error
        except (sqlite3.Error, DamagedError) as error:
            if isinstance(error, sqlite3.Error) and not is_damage(error):
                raise DiskError(f"{path}: {error}: free some space; the agent tries again") from error
            self.damaged = f"{path.name}: damaged ({error})"
            self.set_aside()
            with _disk(path.name):
                self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        # No access from two threads at once: the lock. SQLite's own check forbids a second thread at all.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._path.chmod(0o600)
        db = sqlite3.connect(self._path, isolation_level=None, cached_statements=0, check_same_thread=False)
        try:
            db.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            db.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
            # Some builds overwrite what is deleted: an update would be written to the card three times.
            db.execute("PRAGMA secure_delete=OFF")
            _require_whole(db)
            db.execute("BEGIN IMMEDIATE")
            self._prepare(db)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def set_aside(self) -> None:
        """Give the damaged file another name; a fresh one is made at the next start.

        Raises:
            DiskError: it cannot be renamed.
        """
        self.close()
        try:
            aside = set_aside(self._path)
            for ending in ("-wal", "-shm"):
                self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{self._path}: {error.strerror}") from error
        log.warning("E_DAMAGED: %s: set aside as %s, a fresh one is made", self.damaged, aside.name)

    def close(self) -> None:
        """Close the file; idempotent."""
        with contextlib.suppress(AttributeError, sqlite3.Error), self._lock:
            self._db.close()

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Return what a question gives.

        Raises:
            DiskError: the disk refuses.
            DamagedError: the file is damaged.
        """
        with self._lock, _disk(self._path.name):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do several things together or not at all.

        Raises:
            DiskError: the disk refuses; nothing has changed.
            DamagedError: the file is damaged.
        """
        with self._lock, _disk(self._path.name):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def cut_log(self) -> None:
        """Write the log into the file and cut it, after something large; a reader may be in the way."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is not what was written, rather than that the disk refuses."""
    if isinstance(error, sqlite3.InterfaceError | sqlite3.ProgrammingError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF not in _REFUSED


def _require_whole(db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA quick_check(1)").fetchone()
    if found is None or found[0] != "ok":
        raise DamagedError(" ".join(str(found[0] if found else "no answer").split())[:200])


@contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if is_damage(error):
            raise DamagedError(f"{what}: damaged ({error})") from error
        raise DiskError(f"{what}: {error}: free some space; the agent tries again") from error
