"""Numbers instead of names in updates; frames in a table of their own; long records of rounds compressed."""

import hashlib
import zlib
from pathlib import Path
from typing import Final

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

_TABLES: Final = Path(__file__).parents[1] / "schema_2.sql"
_BEFORE: Final = (
    "ALTER TABLE updates RENAME TO updates_1",
    "ALTER TABLE rounds RENAME TO rounds_1",
    "ALTER TABLE jobs ADD COLUMN first_version INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE versions ADD COLUMN collected INTEGER NOT NULL DEFAULT 0",
)
_SLOT: Final = f"""rounds.no * {1 << 24} + senders.no FROM updates_1
    JOIN rounds USING (job, round) JOIN senders USING (device)"""
_AFTER: Final = (
    "INSERT INTO senders (device, updates) SELECT device, count(*) FROM updates_1 GROUP BY device",
    f"INSERT INTO update_keys (update_id, slot) SELECT update_id, {_SLOT}",
    f"""INSERT INTO update_frames (structure, samples, received_s, sha256, frame, slot)
    SELECT structure, samples, received_s, sha256, frame, {_SLOT} WHERE frame IS NOT NULL""",
    "DROP TABLE updates_1",
    "DROP TABLE rounds_1",
)
_COLUMNS: Final = ("job", "round", "epoch", "state", "reason", "opened_s", "version_id", "stats")


def upgrade() -> None:
    """Move every row."""
    connection = op.get_bind()
    for statement in _BEFORE:
        connection.exec_driver_sql(statement)
    for statement in _TABLES.read_text().split(";"):
        if statement.strip():
            connection.exec_driver_sql(statement)
    for job, number in connection.exec_driver_sql(
        "SELECT job, round FROM rounds_1 ORDER BY job, round"
    ).all():
        _move_round(connection, job, number)
    for statement in _AFTER:
        connection.exec_driver_sql(statement)


def _move_round(connection: sa.Connection, job: str, number: int) -> None:
    where = (job, number)
    query = "SELECT * FROM rounds_1 WHERE job = ? AND round = ?"
    before = connection.exec_driver_sql(query, where).mappings().one()
    query = "SELECT update_id FROM updates_1 WHERE job = ? AND round = ? ORDER BY update_id"
    ids = list(connection.exec_driver_sql(query, where).scalars())
    if before["state"] == "open":
        ids = []
    row = {name: before[name] for name in _COLUMNS} | {
        "asked": _records_in(before["invited"]),
        "updates": len(ids),
        "frozen": before["frozen"] if before["state"] == "abandoned" else msgspec.msgpack.encode(()),
        "frozen_sha256": hashlib.sha256(b"".join(ids)).digest(),
        "invited": zlib.compress(before["invited"]),
        "details": zlib.compress(b""),
    }
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    connection.exec_driver_sql(f"INSERT INTO rounds ({columns}) VALUES ({marks})", tuple(row.values()))  # noqa: S608


def _records_in(invited: bytes) -> int:
    try:
        return len(msgspec.msgpack.decode(invited, type=list[msgspec.Raw]))
    except msgspec.MsgspecError:
        return 0
