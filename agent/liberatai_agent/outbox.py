"""What a device must not lose: updates without a receipt, what was left over, counters. SQLite.

WAL with synchronous=FULL: NORMAL may roll back a committed transaction when the power fails. One training
is one transaction: the update, the new residual, the refused updates that went into it, and the finished
task appear together or not at all. Left-overs carry a mark of what they mean (`mark_of`): another job under
an old name, with another seed for example, must not be given them. One process uses the folder: `StateLock`
holds it.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from liberatai_agent.events import Returned, Unsent
from liberatai_agent.files import write_durably
from liberatai_agent.session import MAX_FINISHED
from liberatai_core.contract.frame import HEADER_BYTES
from liberatai_core.contract.messages import TaskSpec, Update
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import ConfigError, DiskError, LockedError, NotFoundError, QuotaError

APPLICATION_ID = 0x4C_41_49_41  # "LAIA"
SCHEMA_VERSION = 2
BUSY_TIMEOUT_MS = 5000
CACHE_KIB = 256
"""SQLite's own default is 2 MiB; every row here is written and read once."""
MAX_RESIDUALS = 4
"""Residuals of the last jobs that are kept: one is as large as the model itself."""
KEY_FILE = "device.key"

_SCHEMA = """
CREATE TABLE updates (
    update_id BLOB PRIMARY KEY, job TEXT NOT NULL, round INTEGER NOT NULL, structure TEXT NOT NULL,
    content BLOB NOT NULL, transfer TEXT, created INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    mark BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE TABLE returned (
    update_id BLOB PRIMARY KEY, job TEXT NOT NULL, structure TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, round INTEGER NOT NULL DEFAULT 0, mark BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE TABLE residuals (
    job TEXT NOT NULL, structure TEXT NOT NULL, round INTEGER NOT NULL, used INTEGER NOT NULL,
    state BLOB NOT NULL, mark BLOB NOT NULL DEFAULT x'', PRIMARY KEY (job, structure)
) STRICT;
CREATE TABLE finished (
    number INTEGER PRIMARY KEY AUTOINCREMENT, task_id BLOB NOT NULL UNIQUE
) STRICT;
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
"""

_FROM_1 = """
ALTER TABLE updates ADD COLUMN mark BLOB NOT NULL DEFAULT x'';
ALTER TABLE returned ADD COLUMN round INTEGER NOT NULL DEFAULT 0;
ALTER TABLE returned ADD COLUMN mark BLOB NOT NULL DEFAULT x'';
ALTER TABLE residuals ADD COLUMN mark BLOB NOT NULL DEFAULT x'';
"""
"""Rows without a mark do not say what they were made for: updates are sent, left-overs are let go."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Update)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What goes into the next training of a structure besides its own difference.

    Attributes:
        residual: the sparsifier's state, None before the first round.
        round: the round that left it.
        returned: updates that were refused and so never counted.
        dropped: residuals and returned updates that were deleted now, because they mean something else.
    """

    residual: bytes | None
    round: int = 0
    returned: tuple[Returned, ...]
    dropped: int = 0


def mark_of(spec: TaskSpec) -> bytes:
    """Return 16 bytes that name what the coordinates of a left-over mean.

    They depend on all that decides which coordinate of the model a value belongs to, and what it is worth.
    """
    structure = spec.structure
    meaning = (spec.job, structure.id, structure.tensors, spec.trained_share, spec.seed, spec.codec)
    return hashlib.sha256(_ENCODER.encode(meaning)).digest()[:16]


class Outbox:
    """The agent's durable state.

    Args:
        path: the SQLite file; made if missing.
        max_bytes: quota of updates and returned bodies together.

    Raises:
        DiskError: the file cannot be opened or is damaged.
        ConfigError: made by a newer version, or no file of ours.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        with _disk(f"{path}"):
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            self._open_schema(path)

    def _open_schema(self, path: Path) -> None:
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) == (0, 0):
            self._db.executescript(
                f"BEGIN IMMEDIATE;{_SCHEMA}"
                f"PRAGMA application_id={APPLICATION_ID};PRAGMA user_version={SCHEMA_VERSION};COMMIT;"
            )
        elif application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION:
            raise ConfigError(str(path), [f"not an outbox of this version (schema {version})"])
        elif version == 1:
            self._db.executescript(f"BEGIN IMMEDIATE;{_FROM_1}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    # --- counters ------------------------------------------------------------------------------

    def next_session(self) -> int:
        """Return a number larger than any before; it is on disk when this returns."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO meta VALUES ('session', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
            )
            return self._meta("session")

    @property
    def epoch(self) -> int:
        """Highest coordinator epoch seen."""
        return self._meta("epoch")

    def remember_epoch(self, epoch: int) -> None:
        """Store the highest coordinator epoch; a lower one changes nothing."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO meta VALUES ('epoch', ?) ON CONFLICT (name) "
                "DO UPDATE SET value = max(value, excluded.value)",
                (epoch,),
            )

    def add_refusals(self, counts: dict[str, int]) -> None:
        """Add to the counters of refused frames and updates, by code."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) "
                "DO UPDATE SET value = value + excluded.value",
                [(f"refused:{code}", number) for code, number in counts.items()],
            )

    def refusals(self) -> dict[str, int]:
        """Return the counters of `add_refusals`."""
        rows = self._db.execute("SELECT name, value FROM meta WHERE name LIKE 'refused:%' ORDER BY name")
        return {name.partition(":")[2]: value for name, value in rows}

    def _meta(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    # --- updates -------------------------------------------------------------------------------

    def unsent(self) -> tuple[Unsent, ...]:
        """Return the updates without a receipt, oldest first."""
        rows = self._db.execute("SELECT update_id, job, round FROM updates ORDER BY rowid")
        return tuple(Unsent(update_id=uid, job=job, round=number) for uid, job, number in rows)

    def finished(self) -> tuple[bytes, ...]:
        """Return the ids of tasks whose update was stored, oldest first."""
        return tuple(row[0] for row in self._db.execute("SELECT task_id FROM finished ORDER BY number"))

    def leftover(self, job: str, structure: str, mark: bytes) -> Leftover:
        """Return what goes into the next training of this structure.

        What is there for this job and structure with another mark is deleted: it can never be used.

        Args:
            job: its name.
            structure: its id.
            mark: of the training's spec, see `mark_of`.

        Raises:
            DiskError: it could not be deleted; nothing has changed, a later try may work.
        """
        dropped = self._drop_strange(job, structure, mark)
        row = self._db.execute(
            "SELECT state, round FROM residuals WHERE job = ? AND structure = ?", (job, structure)
        ).fetchone()
        bodies = self._db.execute(
            "SELECT update_id, round, body FROM returned WHERE job = ? AND structure = ? ORDER BY update_id",
            (job, structure),
        )
        state, number = row or (None, 0)
        returned = tuple(Returned(update_id=uid, round=of, body=body) for uid, of, body in bodies)
        return Leftover(residual=state, round=number, returned=returned, dropped=dropped)

    def _drop_strange(self, job: str, structure: str, mark: bytes) -> int:
        """Delete left-overs of a job and structure that have another mark; return how many there were."""
        which, values = "WHERE job = ? AND structure = ? AND mark != ?", (job, structure, mark)
        found = self._db.execute(
            f"SELECT (SELECT count(*) FROM residuals {which}) + (SELECT count(*) FROM returned {which})",  # noqa: S608 - our own words
            (*values, *values),
        ).fetchone()[0]
        if found:
            with self._transaction():
                self._db.execute(f"DELETE FROM residuals {which}", values)  # noqa: S608
                self._db.execute(f"DELETE FROM returned {which}", values)  # noqa: S608
        return int(found)

    def commit_training(
        self,
        update: Update,
        *,
        task_id: bytes,
        residual: bytes,
        mark: bytes,
        returned: tuple[bytes, ...] = (),
    ) -> tuple[bytes, ...]:
        """Store update, residual and finished task in one transaction, and delete the `returned` used.

        If an update with this id is stored already, that one counts and nothing but the task is noted.

        Args:
            update: what is sent.
            task_id: of the task that it answers.
            residual: the sparsifier's state after it.
            mark: of the training's spec, see `mark_of`.
            returned: ids of refused updates that are done with.

        Returns:
            Ids of older updates that were dropped because the quota was reached, superseded ones first.

        Raises:
            QuotaError: larger than the whole quota.
            DiskError: the disk is full; nothing has changed, a later try may work.
        """
        content = _ENCODER.encode(update)
        now = int(time.time())
        if len(content) > self._max_bytes:
            raise QuotaError(f"update of {len(content)} bytes, the outbox takes {self._max_bytes}")
        with self._transaction():
            self._finish(task_id)
            known = self._db.execute("SELECT 1 FROM updates WHERE update_id = ?", (update.update_id,))
            if known.fetchone():
                return ()
            self._db.executemany("DELETE FROM returned WHERE update_id = ?", [(uid,) for uid in returned])
            dropped = self._make_room(update, len(content))
            self._db.execute(
                "INSERT INTO updates (update_id, job, round, structure, content, created, mark) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (update.update_id, update.job, update.round, update.structure, content, now, mark),
            )
            self._db.execute(
                "INSERT OR REPLACE INTO residuals (job, structure, round, used, state, mark) "
                "VALUES (?, ?, ?, (SELECT ifnull(max(used), 0) + 1 FROM residuals), ?, ?)",
                (update.job, update.structure, update.round, residual, mark),
            )
            self._db.execute(
                "DELETE FROM residuals WHERE rowid NOT IN "
                "(SELECT rowid FROM residuals ORDER BY used DESC LIMIT ?)",
                (MAX_RESIDUALS,),
            )
            return dropped

    def seal(self, update_id: bytes, seal: Callable[[Update], bytes]) -> bytes:
        """Return the frame of an update; the first call makes it with `seal` and keeps it for ever.

        Raises:
            NotFoundError: no such update.
            DiskError: the frame could not be stored, so it must not be sent.
        """
        content, transfer = self._content(update_id)
        if transfer is not None:
            return content
        frame = seal(_DECODER.decode(content))
        with self._transaction():
            self._db.execute(
                "UPDATE updates SET content = ?, transfer = ? WHERE update_id = ?",
                (frame, blob_id(frame), update_id),
            )
        return frame

    def count_attempt(self, update_id: bytes) -> None:
        """Note that an update was sent once more."""
        with self._transaction():
            self._db.execute("UPDATE updates SET attempts = attempts + 1 WHERE update_id = ?", (update_id,))

    def of_transfer(self, transfer: str) -> bytes | None:
        """Return the id of the update whose frame has this blob id."""
        row = self._db.execute("SELECT update_id FROM updates WHERE transfer = ?", (transfer,)).fetchone()
        return bytes(row[0]) if row else None

    def forget(self, update_id: bytes) -> None:
        """Delete an update that the coordinator has. Only a receipt may lead here."""
        with self._transaction():
            self._db.execute("DELETE FROM updates WHERE update_id = ?", (update_id,))

    def give_back(self, update_id: bytes) -> None:
        """Delete a refused update and keep its body for the next training of its structure."""
        with self._transaction():
            row = self._db.execute(
                "SELECT job, structure, round, mark FROM updates WHERE update_id = ?", (update_id,)
            ).fetchone()
            if row is None:
                return
            body = self._update(update_id).body
            self._db.execute("DELETE FROM updates WHERE update_id = ?", (update_id,))
            self._db.execute(
                "INSERT OR IGNORE INTO returned (update_id, job, structure, round, mark, body, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (update_id, *row, body, int(time.time())),
            )

    def _update(self, update_id: bytes) -> Update:
        content, transfer = self._content(update_id)
        return _DECODER.decode(content[HEADER_BYTES:] if transfer is not None else content)

    def _content(self, update_id: bytes) -> tuple[bytes, str | None]:
        row = self._db.execute(
            "SELECT content, transfer FROM updates WHERE update_id = ?", (update_id,)
        ).fetchone()
        if row is None:
            raise NotFoundError(f"update {update_id.hex()}: not in the outbox")
        return row[0], row[1]

    def _finish(self, task_id: bytes) -> None:
        self._db.execute("INSERT OR IGNORE INTO finished (task_id) VALUES (?)", (task_id,))
        self._db.execute(
            "DELETE FROM finished WHERE number <= (SELECT max(number) FROM finished) - ?", (MAX_FINISHED,)
        )

    def _make_room(self, update: Update, size: int) -> tuple[bytes, ...]:
        """Delete what is oldest until the new update fits: superseded updates, then others, then returned."""
        used = int(
            self._db.execute(
                "SELECT (SELECT ifnull(sum(length(content)), 0) FROM updates) "
                "+ (SELECT ifnull(sum(length(body)), 0) FROM returned)"
            ).fetchone()[0]
        )
        dropped: list[bytes] = []
        for table, uid, bytes_freed in self._oldest(update):
            if used + size <= self._max_bytes:
                break
            self._db.execute(f"DELETE FROM {table} WHERE update_id = ?", (uid,))  # noqa: S608 - our own names
            used -= bytes_freed
            if table == "updates":
                dropped.append(uid)
        return tuple(dropped)

    def _oldest(self, update: Update) -> Iterator[tuple[str, bytes, int]]:
        rows = self._db.execute(
            "SELECT update_id, length(content) FROM updates "
            "ORDER BY NOT (job = ? AND structure = ? AND round < ?), rowid",
            (update.job, update.structure, update.round),
        ).fetchall()
        yield from (("updates", uid, size) for uid, size in rows)
        rows = self._db.execute("SELECT update_id, length(body) FROM returned ORDER BY rowid").fetchall()
        yield from (("returned", uid, size) for uid, size in rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _disk("outbox"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DiskError(f"{what}: {error}: free some space; the agent tries again") from error


# --- folder and key ----------------------------------------------------------------------------


class StateLock:
    """Holds a state folder against a second agent; released by `close` or when the process ends.

    Raises:
        LockedError: another agent uses the folder.
        DiskError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise DiskError(f"{folder}: cannot be locked: {error.strerror}") from error
            raise LockedError(f"{folder}: another agent uses this state folder") from None

    def close(self) -> None:
        """Release the folder; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def device_seed(folder: Path) -> bytes:
    """Return the device's 32-byte Ed25519 private key; made at the first call, readable by its owner only.

    Raises:
        ConfigError: others may read it, or it has another length.
        DiskError: it cannot be read or written.
    """
    path = folder / KEY_FILE
    try:
        _make_key(folder, path)
        seed, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(str(path), ["others may read this private key: chmod 600 it, or replace it"])
    if len(seed) != 32:
        raise ConfigError(str(path), [f"{len(seed)} bytes, a private key has 32"])
    return seed


def _make_key(folder: Path, path: Path) -> None:
    if path.exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, secrets.token_bytes(32), mode=0o600)
