"""What happened in the fleet, and what operators changed. Both are bounded; the newest entries stay."""

import threading
from typing import Final

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rows import AuditRow, EventRow
from liberatai_coordinator.store.tables import AUDIT, EVENTS
from liberatai_coordinator.store.writer import Latest, Writer

MAX_EVENTS: Final = 20_000
"""About 3 MB; a device that talks pushes out the events of others only after so many."""
MAX_AUDIT: Final = 100_000
"""Changes by people and their programs: years."""
MAX_READ: Final = 1000
"""Entries that one question returns."""


class EventStore:
    """Events by number. What happened is written by the writer thread, many together."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        with database.read() as connection:
            self._number = connection.execute(sa.select(sa.func.max(EVENTS.c.number))).scalar() or 0
        self._new: Latest[int, EventRow] = Latest(database, _write_events)
        self._lock = threading.Lock()
        writer.look_after(self._new)

    @property
    def newest(self) -> int:
        """Number of the newest event; 0 if nothing has happened yet."""
        return self._number

    def note(self, at_s: float, device: str, name: str, code: str = "", text: str = "") -> EventRow:
        """Let an event be written within a second or so; never waits for the disk."""
        with self._lock:
            self._number += 1
            event = EventRow(number=self._number, at_s=at_s, device=device, name=name, code=code, text=text)
            self._new.put(event.number, event)
        return event

    def after(self, number: int, device: str = "", count: int = MAX_READ) -> list[EventRow]:
        """Return the oldest events above a number, at most `count`; of one device if it is named."""
        query = sa.select(EVENTS).where(EVENTS.c.number > number).order_by(EVENTS.c.number).limit(count)
        return self._read(query, device)

    def last(self, count: int, device: str = "") -> list[EventRow]:
        """Return the newest events, the oldest of them first."""
        query = sa.select(EVENTS).order_by(EVENTS.c.number.desc()).limit(min(count, MAX_READ))
        return self._read(query, device)[::-1]

    def _read(self, query: sa.Select[tuple[object, ...]], device: str) -> list[EventRow]:
        self._new.flush()
        if device:
            query = query.where(EVENTS.c.device == device)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [EventRow(**row) for row in rows]


class AuditStore:
    """Changes by number; an entry is on disk before its change is answered."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, entry: AuditRow) -> AuditRow:
        """Write an entry down; its number is given here."""
        newest = sa.select(sa.func.max(AUDIT.c.number))
        with self._database.write() as connection:
            number = (connection.execute(newest).scalar() or 0) + 1
            row = columns_of(entry) | {"number": number}
            connection.execute(sa.insert(AUDIT), [row])
            if number % 1000 == 0:
                connection.execute(sa.delete(AUDIT).where(AUDIT.c.number <= number - MAX_AUDIT))
        return AuditRow(**row)

    def after(self, number: int, count: int = MAX_READ) -> list[AuditRow]:
        """Return the oldest entries above a number, at most `count`."""
        query = sa.select(AUDIT).where(AUDIT.c.number > number).order_by(AUDIT.c.number).limit(count)
        return self._read(query)

    def last(self, count: int) -> list[AuditRow]:
        """Return the newest entries, the oldest of them first."""
        query = sa.select(AUDIT).order_by(AUDIT.c.number.desc()).limit(min(count, MAX_READ))
        return self._read(query)[::-1]

    def _read(self, query: sa.Select[tuple[object, ...]]) -> list[AuditRow]:
        with self._database.read() as connection:
            return [AuditRow(**row) for row in connection.execute(query).mappings().all()]


def _write_events(connection: sa.Connection, events: dict[int, EventRow]) -> None:
    upsert_many(connection, EVENTS, [columns_of(event) for event in events.values()], keys=("number",))
    connection.execute(sa.delete(EVENTS).where(EVENTS.c.number <= max(events) - MAX_EVENTS))
