"""A ledger of an older release becomes one of today, in the transaction that opens it."""

import hashlib
import zlib
from typing import Final

import msgspec
import sqlalchemy as sa

from liberatai_coordinator.store.rows import records_in
from liberatai_coordinator.store.tables import METADATA, SLOT_BITS

_BEFORE: Final = (
    "ALTER TABLE updates RENAME TO updates_1",
    "ALTER TABLE rounds RENAME TO rounds_1",
    "ALTER TABLE jobs ADD COLUMN first_version INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE versions ADD COLUMN collected INTEGER NOT NULL DEFAULT 0",
)
_SLOT: Final = f"""rounds.no * {1 << SLOT_BITS} + senders.no FROM updates_1
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


def migrate_1_to_2(connection: sa.Connection) -> None:
    """Numbers instead of names in updates; frames in a table of their own; long records of rounds compressed.

    A killed migration leaves the database as it was.
    """
    for statement in _BEFORE:
        connection.exec_driver_sql(statement)
    METADATA.create_all(connection)
    numbers = connection.exec_driver_sql("SELECT job, round FROM rounds_1 ORDER BY job, round").all()
    for job, number in numbers:
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
        "asked": records_in(before["invited"]),
        "updates": len(ids),
        "frozen": before["frozen"] if before["state"] == "abandoned" else msgspec.msgpack.encode(()),
        "frozen_sha256": hashlib.sha256(b"".join(ids)).digest(),
        "invited": zlib.compress(before["invited"]),
        "details": zlib.compress(b""),
    }
    connection.execute(sa.insert(METADATA.tables["rounds"]), [row])
