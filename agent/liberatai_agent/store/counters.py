"""Counters of one device, in its database: refused frames by code."""

from liberatai_agent.store.database import Database


class Counters:
    """One device's counters.

    Args:
        database: where they stand.
        device: whose.

    Raises, in all methods:
        DiskError: the disk refuses; nothing has changed.
        DamagedError: the database is damaged.
    """

    def __init__(self, database: Database, device: str) -> None:
        self._database, self._device = database, device

    def add_refusals(self, counts: dict[str, int]) -> None:
        """Add to the counters of refused frames, by code."""
        with self._database.transaction() as db:
            db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT (device, name) "
                "DO UPDATE SET value = value + excluded.value",
                [(self._device, f"refused:{code}", number) for code, number in counts.items()],
            )

    def refusals(self) -> dict[str, int]:
        """Return the counters of `add_refusals`."""
        rows = self._database.rows(
            "SELECT name, value FROM counters WHERE device = ? AND name LIKE 'refused:%' ORDER BY name",
            (self._device,),
        )
        return {name.partition(":")[2]: value for name, value in rows}

    def take(self, name: str) -> int:
        """Return and delete a number that an earlier release kept here, 0 if there is none."""
        which = (self._device, name)
        rows = self._database.rows("SELECT value FROM counters WHERE device = ? AND name = ?", which)
        if rows:
            with self._database.transaction() as db:
                db.execute("DELETE FROM counters WHERE device = ? AND name = ?", which)
        return int(rows[0][0]) if rows else 0
