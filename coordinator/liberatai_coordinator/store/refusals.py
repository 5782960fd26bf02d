"""Counters of what was refused, per device and code."""

import threading
from collections import Counter
from typing import Final

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, upsert_many
from liberatai_coordinator.store.tables import REFUSALS
from liberatai_coordinator.store.writer import Latest, Writer

MAX_REFUSAL_ROWS: Final = 10_000
"""Strangers may invent names for ever; beyond this many the refusals count for the name ""."""


class RefusalStore:
    """Counts in memory, and writes with whatever is written next: lost only if killed before that."""

    def __init__(self, database: Database, writer: Writer) -> None:
        """Read the counters of earlier runs."""
        with database.read() as connection:
            rows = connection.execute(sa.select(REFUSALS.c.device, REFUSALS.c.code, REFUSALS.c.count)).all()
        self._counts: Counter[tuple[str, str]] = Counter({(row[0], row[1]): row[2] for row in rows})
        self._lock = threading.Lock()
        self._unwritten: Latest[tuple[str, str], int] = Latest(database, _write)
        writer.look_after(self._unwritten)

    def count(self, device: str, code: str) -> None:
        """Count one refusal; never waits for the disk."""
        with self._lock:
            key = (device, code)
            if key not in self._counts and len(self._counts) >= MAX_REFUSAL_ROWS:
                key = ("", code)
            self._counts[key] += 1
            self._unwritten.put(key, self._counts[key])

    def forget(self, device: str) -> None:
        """Forget what was refused of a device; on disk it was forgotten with the device."""
        with self._lock:
            for key in [key for key in self._counts if key[0] == device]:
                del self._counts[key]

    def all(self) -> dict[str, dict[str, int]]:
        """Return device -> code -> count; the device "" stands for all beyond the first 10 000 pairs."""
        counts: dict[str, dict[str, int]] = {}
        with self._lock:
            for (device, code), count in sorted(self._counts.items()):
                counts.setdefault(device, {})[code] = count
        return counts


def _write(connection: sa.Connection, counts: dict[tuple[str, str], int]) -> None:
    rows = [{"device": device, "code": code, "count": count} for (device, code), count in counts.items()]
    upsert_many(connection, REFUSALS, rows, keys=("device", "code"))
