"""Outboxes of earlier releases, brought to today's tables, inside one transaction.

They held one device, residuals inside the database, and updates that were sealed when they were first sent:
one that never was goes into the next training instead. Rows that do not say what they were made for (schema
1) have no meaning that any training has, so left-overs of them are let go. The session number and the highest
epoch wait among the counters until `identity` takes them.
"""

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from liberatai_agent.store.files import write_durably
from liberatai_core.contract.messages import Update

_FROM_1 = """
ALTER TABLE updates ADD COLUMN mark BLOB NOT NULL DEFAULT x'';
ALTER TABLE returned ADD COLUMN round INTEGER NOT NULL DEFAULT 0;
ALTER TABLE returned ADD COLUMN mark BLOB NOT NULL DEFAULT x'';
ALTER TABLE residuals ADD COLUMN mark BLOB NOT NULL DEFAULT x''
"""
_COPY = """
INSERT INTO updates (device, update_id, job, round, structure, frame, transfer, created, meaning)
    SELECT :device, update_id, job, round, structure, content, transfer, created, mark FROM old_updates
    WHERE transfer IS NOT NULL ORDER BY rowid;
INSERT INTO returned (device, update_id, job, structure, round, body, created, meaning)
    SELECT :device, update_id, job, structure, round, body, created, mark FROM old_returned ORDER BY rowid;
INSERT INTO finished (device, task_id) SELECT :device, task_id FROM old_finished ORDER BY number;
INSERT INTO counters (device, name, value) SELECT :device, name, value FROM old_meta
"""
_OLD = ("updates", "returned", "residuals", "finished", "meta")


def upgrade(
    db: sqlite3.Connection, version: int, device: str, folder: Path, make: Callable[[], None]
) -> None:
    """Bring an outbox of schema 1 or 2 to today's.

    Args:
        db: it, inside a transaction.
        version: its schema.
        device: whose rows these are.
        folder: where residuals go.
        make: makes today's tables.
    """
    for statement in _FROM_1.split(";") if version == 1 else ():
        db.execute(statement)
    for table in _OLD:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    make()
    for statement in _COPY.split(";"):
        db.execute(statement, {"device": device})
    _give_unsealed_back(db, device)
    _move_residuals(db, device, folder)
    for table in _OLD:
        db.execute(f"DROP TABLE old_{table}")


def _give_unsealed_back(db: sqlite3.Connection, device: str) -> None:
    rows = (
        "SELECT update_id, job, structure, round, content, created, mark FROM old_updates "
        "WHERE transfer IS NULL"
    )
    for uid, job, structure, number, content, created, mark in db.execute(rows).fetchall():
        try:
            body = msgspec.msgpack.decode(content, type=Update).body
        except msgspec.MsgspecError:
            continue
        db.execute(
            "INSERT OR IGNORE INTO returned (device, update_id, job, structure, round, body, created,"
            " meaning) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (device, uid, job, structure, number, body, created, mark),
        )


def _move_residuals(db: sqlite3.Connection, device: str, folder: Path) -> None:
    rows = "SELECT job, structure, round, state, mark FROM old_residuals ORDER BY used"
    for number, (job, structure, of, state, mark) in enumerate(db.execute(rows).fetchall()):
        name, sha256 = f"{device}.upgraded.{number}", hashlib.sha256(state).digest()
        write_durably(folder / name, state)
        db.execute(
            "INSERT INTO residuals (device, job, structure, round, file, sha256, meaning) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (device, job, structure, of, name, sha256, mark),
        )
