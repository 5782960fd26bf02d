"""What devices shall be like."""

from collections.abc import Sequence

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rows import ShadowRow
from liberatai_coordinator.store.tables import SHADOWS


class ShadowStore:
    """Wishes by device."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, rows: Sequence[ShadowRow]) -> None:
        """Remember what devices shall be like, in one transaction."""
        with self._database.write() as connection:
            upsert_many(connection, SHADOWS, [columns_of(row) for row in rows], keys=("device",))

    def all(self) -> list[ShadowRow]:
        """Return what all devices shall be like."""
        with self._database.read() as connection:
            return [ShadowRow(**row) for row in connection.execute(sa.select(SHADOWS)).mappings().all()]
