"""What one device must not lose: updates without a receipt, and what was left over.

One training is one transaction: the update, the new residual, the refused updates that went into it, and the
finished task appear together or not at all. An update is sealed before it is stored: what stands here can be
sent. A residual is as large as the model, so it is a file of its own, named by the row that belongs to it;
what no row names is removed at the next start. Left-overs carry a mark of what they mean (`meaning_of`):
another job under an old name, with another seed for example, must not be given them.
"""

import hashlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from liberatai_agent.events import ResidualFile, Returned, Unsent
from liberatai_agent.session.state import MAX_FINISHED
from liberatai_agent.store.database import Database
from liberatai_agent.store.files import sync_folder
from liberatai_agent.store.outbox_upgrade import upgrade
from liberatai_core.contract.frame import HEADER_BYTES
from liberatai_core.contract.messages import TaskSpec, Update
from liberatai_core.contract.topics import blob_id
from liberatai_core.errors import (
    DamagedError,
    DigestError,
    DiskError,
    LiberataiError,
    NotFoundError,
    QuotaError,
)

log = logging.getLogger(__name__)

APPLICATION_ID = 0x4C_41_49_41  # "LAIA"
SCHEMA_VERSION = 3
MAX_RESIDUALS = 4
"""Residuals of the last jobs that are kept: one is as large as the model itself."""
CUT_BYTES = 1 << 17
"""After a transaction of this size the database's log is cut."""
FILE = "outbox.db"
FOLDER = "residuals"

_SCHEMA = """
CREATE TABLE updates (
    number INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, update_id BLOB NOT NULL,
    job TEXT NOT NULL, round INTEGER NOT NULL, structure TEXT NOT NULL, frame BLOB NOT NULL,
    transfer TEXT NOT NULL, created INTEGER NOT NULL, meaning BLOB NOT NULL, UNIQUE (device, update_id)
) STRICT;
CREATE TABLE returned (
    number INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, update_id BLOB NOT NULL,
    job TEXT NOT NULL, structure TEXT NOT NULL, round INTEGER NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, meaning BLOB NOT NULL, UNIQUE (device, update_id)
) STRICT;
CREATE TABLE residuals (
    number INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, job TEXT NOT NULL,
    structure TEXT NOT NULL, round INTEGER NOT NULL, file TEXT NOT NULL, sha256 BLOB NOT NULL,
    meaning BLOB NOT NULL, UNIQUE (device, job, structure)
) STRICT;
CREATE TABLE finished (
    number INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, task_id BLOB NOT NULL,
    UNIQUE (device, task_id)
) STRICT;
CREATE TABLE counters (
    device TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (device, name)
) STRICT;
"""
TABLES = ("updates", "returned", "residuals", "finished", "counters")

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Update)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What goes into the next training of a structure besides its own difference.

    Attributes:
        residual: file of the sparsifier's state, None before the first round.
        round: the round that left it.
        returned: updates that were refused and so never counted.
        dropped: residuals and returned updates that were deleted now, because they mean something else.
    """

    residual: ResidualFile | None
    round: int = 0
    returned: tuple[Returned, ...]
    dropped: int = 0


def meaning_of(spec: TaskSpec) -> bytes:
    """Return 16 bytes that name what the coordinates of a left-over mean.

    They depend on all that decides which coordinate of the model a value belongs to, and what it is worth.
    """
    structure = spec.structure
    meaning = (spec.job, structure.id, structure.tensors, spec.trained_share, spec.seed, spec.codec)
    return hashlib.sha256(_ENCODER.encode(meaning)).digest()[:16]


def open_database(folder: Path, device: str) -> Database:
    """Return the state folder's database; a damaged one is set aside (`Database.damaged` says so).

    Args:
        folder: of the state.
        device: whose the rows of an earlier release are, which held one device.

    Raises:
        DiskError: the disk refuses.
    """

    def prepare(db: sqlite3.Connection) -> None:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) == (0, 0):
            _run(db, _SCHEMA)
        elif application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION:
            raise DamagedError(f"not an outbox of this version: schema {version}")
        elif version < SCHEMA_VERSION:
            upgrade(db, version, device, folder / FOLDER, lambda: _run(db, _SCHEMA))
        for table in TABLES:
            db.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - our own words
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    with _files(FOLDER):
        (folder / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    return Database(folder / FILE, prepare)


def _run(db: sqlite3.Connection, script: str) -> None:
    # executescript would commit first.
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)


class Outbox:
    """One device's part of a database.

    Args:
        database: from `open_database`.
        folder: of the state, for files beside it.
        device: whose.
        max_bytes: quota of updates and returned bodies together.

    Raises, in all methods:
        DiskError: the disk refuses; nothing has changed, a later try may work.
        DamagedError: the database is damaged.
    """

    def __init__(self, database: Database, folder: Path, device: str, max_bytes: int) -> None:
        self._database, self._device, self._max_bytes = database, device, max_bytes
        self._folder = folder / FOLDER
        with _files(FOLDER):
            self._remove_unnamed()

    # --- updates -------------------------------------------------------------------------------

    def unsent(self) -> tuple[Unsent, ...]:
        """Return the updates without a receipt, oldest first."""
        rows = self._rows(
            "SELECT update_id, job, round, transfer, length(frame) FROM updates WHERE device = ? "
            "ORDER BY number"
        )
        return tuple(
            Unsent(update_id=uid, job=job, round=number, transfer=transfer, size_bytes=size)
            for uid, job, number, transfer, size in rows
        )

    def finished(self) -> tuple[bytes, ...]:
        """Return the ids of tasks whose update was stored, oldest first."""
        rows = self._rows("SELECT task_id FROM finished WHERE device = ? ORDER BY number")
        return tuple(row[0] for row in rows)

    def leftover(self, job: str, structure: str, meaning: bytes) -> Leftover:
        """Return what goes into the next training of this structure.

        What is there for this job and structure with another meaning is deleted: it can never be used.

        Args:
            job: its name.
            structure: its id.
            meaning: of the training's spec, see `meaning_of`.
        """
        dropped = self._drop_strange(job, structure, meaning)
        which = (self._device, job, structure)
        rows = self._database.rows(
            "SELECT file, sha256, round FROM residuals WHERE device = ? AND job = ? AND structure = ?", which
        )
        residual, number = None, 0
        if rows:
            name, sha256, number = rows[0]
            residual = ResidualFile(path=str(self._folder / name), sha256=sha256)
        bodies = self._database.rows(
            "SELECT update_id, round, body FROM returned WHERE device = ? AND job = ? AND structure = ? "
            "ORDER BY update_id",
            which,
        )
        returned = tuple(Returned(update_id=uid, round=of, body=body) for uid, of, body in bodies)
        return Leftover(residual=residual, round=number, returned=returned, dropped=dropped)

    def _drop_strange(self, job: str, structure: str, meaning: bytes) -> int:
        """Delete left-overs of a job and structure that mean something else; return how many there were."""
        which = "WHERE device = ? AND job = ? AND structure = ? AND meaning != ?"
        values = (self._device, job, structure, meaning)
        counted = f"SELECT (SELECT count(*) FROM residuals {which}) + (SELECT count(*) FROM returned {which})"  # noqa: S608 - our own words
        found = int(self._database.rows(counted, (*values, *values))[0][0])
        if found:
            with self._database.transaction() as db:
                db.execute(f"DELETE FROM residuals {which}", values)  # noqa: S608
                db.execute(f"DELETE FROM returned {which}", values)  # noqa: S608
        return found

    def commit_training(
        self,
        update: Update,
        frame: bytes,
        *,
        task_id: bytes,
        residual: ResidualFile | None,
        meaning: bytes,
        returned: tuple[bytes, ...] = (),
    ) -> tuple[bytes, ...]:
        """Store update, residual and finished task in one transaction, and delete the `returned` used.

        If an update with this id is stored already, that one counts and nothing but the task is noted.

        Args:
            update: what is sent.
            frame: the update, sealed: every repetition is the same bytes.
            task_id: of the task that it answers.
            residual: the sparsifier's state after it, in a file of `new_residual`; None: it leaves nothing.
            meaning: of the training's spec, see `meaning_of`.
            returned: ids of refused updates that are done with.

        Returns:
            Ids of older updates that were dropped because the quota was reached, superseded ones first.

        Raises:
            QuotaError: larger than the whole quota.
        """
        if len(frame) > self._max_bytes:
            raise QuotaError(f"update of {len(frame)} bytes, the outbox takes {self._max_bytes}")
        now = int(time.time())
        with _files(FOLDER):
            sync_folder(self._folder)
        with self._database.transaction() as db:
            self._finish(db, task_id)
            known = (self._device, update.update_id)
            if db.execute("SELECT 1 FROM updates WHERE device = ? AND update_id = ?", known).fetchone():
                dropped: tuple[bytes, ...] = ()
            else:
                db.executemany(
                    "DELETE FROM returned WHERE device = ? AND update_id = ?",
                    [(self._device, uid) for uid in returned],
                )
                dropped = self._make_room(db, update, len(frame))
                db.execute(
                    "INSERT INTO updates (device, update_id, job, round, structure, frame, transfer, created,"
                    " meaning) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*known, update.job, update.round, update.structure, frame, blob_id(frame), now, meaning),
                )
                if residual is not None:
                    self._name_residual(db, update, residual, meaning)
        with _files(FOLDER):
            self._remove_unnamed()
        if len(frame) > CUT_BYTES:
            self._database.cut_log()
        return dropped

    def frame(self, update_id: bytes) -> bytes:
        """Return the frame of an update.

        Raises:
            NotFoundError: no such update.
            DigestError: it is not what was stored.
        """
        rows = self._database.rows(
            "SELECT frame, transfer FROM updates WHERE device = ? AND update_id = ?",
            (self._device, update_id),
        )
        if not rows:
            raise NotFoundError(f"update {update_id.hex()}: not in the outbox")
        frame, transfer = rows[0]
        if blob_id(frame) != transfer:
            raise DigestError(f"update {update_id.hex()}: not what was stored")
        return bytes(frame)

    def part(self, update_id: bytes, begin: int, length: int) -> tuple[str, bytes]:
        """Return the blob id of an update's frame, and a part of it: nobody holds the whole for that.

        Raises:
            NotFoundError: no such update.
        """
        rows = self._database.rows(
            "SELECT transfer, substr(frame, ?, ?) FROM updates WHERE device = ? AND update_id = ?",
            (begin + 1, length, self._device, update_id),
        )
        if not rows:
            raise NotFoundError(f"update {update_id.hex()}: not in the outbox")
        return rows[0][0], bytes(rows[0][1])

    def forget(self, update_id: bytes) -> None:
        """Delete an update that the coordinator has (its receipt says so), or that cannot be read."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM updates WHERE device = ? AND update_id = ?", (self._device, update_id))

    def give_back(self, update_id: bytes) -> None:
        """Delete a refused update and keep its body for the next training of its structure."""
        which = (self._device, update_id)
        rows = self._database.rows(
            "SELECT job, structure, round, meaning FROM updates WHERE device = ? AND update_id = ?", which
        )
        if not rows:
            return
        body = self._body(update_id)
        with self._database.transaction() as db:
            db.execute("DELETE FROM updates WHERE device = ? AND update_id = ?", which)
            if body is not None:
                db.execute(
                    "INSERT OR IGNORE INTO returned (device, update_id, job, structure, round, meaning,"
                    " body, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*which, *rows[0], body, int(time.time())),
                )

    def _body(self, update_id: bytes) -> bytes | None:
        """Return an update's difference; None if it cannot be read any more, which is told in the log."""
        try:
            return _DECODER.decode(self.frame(update_id)[HEADER_BYTES:]).body
        except (LiberataiError, msgspec.MsgspecError) as error:
            log.warning("E_DAMAGED: refused update %s is lost: %s", update_id.hex(), error)
            return None

    def _finish(self, db: sqlite3.Connection, task_id: bytes) -> None:
        db.execute("INSERT OR IGNORE INTO finished (device, task_id) VALUES (?, ?)", (self._device, task_id))
        db.execute(
            "DELETE FROM finished WHERE device = ? AND number NOT IN "
            "(SELECT number FROM finished WHERE device = ? ORDER BY number DESC LIMIT ?)",
            (self._device, self._device, MAX_FINISHED),
        )

    def _make_room(self, db: sqlite3.Connection, update: Update, size: int) -> tuple[bytes, ...]:
        """Delete what is oldest until the new update fits: superseded updates, then others, then returned."""
        used = int(
            db.execute(
                "SELECT (SELECT ifnull(sum(length(frame)), 0) FROM updates WHERE device = ?1) "
                "+ (SELECT ifnull(sum(length(body)), 0) FROM returned WHERE device = ?1)",
                (self._device,),
            ).fetchone()[0]
        )
        dropped: list[bytes] = []
        for table, uid, bytes_freed in self._oldest(db, update):
            if used + size <= self._max_bytes:
                break
            db.execute(f"DELETE FROM {table} WHERE device = ? AND update_id = ?", (self._device, uid))  # noqa: S608 - our own names
            used -= bytes_freed
            if table == "updates":
                dropped.append(uid)
        return tuple(dropped)

    def _oldest(self, db: sqlite3.Connection, update: Update) -> Iterator[tuple[str, bytes, int]]:
        rows = db.execute(
            "SELECT update_id, length(frame) FROM updates WHERE device = ? "
            "ORDER BY NOT (job = ? AND structure = ? AND round < ?), number",
            (self._device, update.job, update.structure, update.round),
        ).fetchall()
        yield from (("updates", uid, size) for uid, size in rows)
        rows = db.execute(
            "SELECT update_id, length(body) FROM returned WHERE device = ? ORDER BY number", (self._device,)
        ).fetchall()
        yield from (("returned", uid, size) for uid, size in rows)

    # --- residuals -----------------------------------------------------------------------------

    def new_residual(self, update_id: bytes) -> Path:
        """Return the file that the residual of this work is written to, before it is named."""
        return self._folder / f"{self._device}.{update_id.hex()}.{time.time_ns():x}"

    def _name_residual(
        self, db: sqlite3.Connection, update: Update, residual: ResidualFile, meaning: bytes
    ) -> None:
        """Let a file on disk be the newest residual, and forget those of jobs long over."""
        named = (Path(residual.path).name, residual.sha256, meaning)
        db.execute(
            "INSERT OR REPLACE INTO residuals (device, job, structure, round, file, sha256, meaning) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self._device, update.job, update.structure, update.round, *named),
        )
        db.execute(
            "DELETE FROM residuals WHERE device = ? AND number NOT IN "
            "(SELECT number FROM residuals WHERE device = ? ORDER BY number DESC LIMIT ?)",
            (self._device, self._device, MAX_RESIDUALS),
        )

    def _remove_unnamed(self) -> None:
        """Delete this device's files that no row names: a crash or a newer one left them."""
        named = {row[0] for row in self._database.rows("SELECT file FROM residuals")}
        for path in list(self._folder.iterdir()):
            if path.name not in named and path.name.startswith(f"{self._device}."):
                path.unlink(missing_ok=True)

    def _rows(self, sql: str) -> list[Any]:
        return self._database.rows(sql, (self._device,))


@contextmanager
def _files(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror}: free some space; the agent tries again") from error
