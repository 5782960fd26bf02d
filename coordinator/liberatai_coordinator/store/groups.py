"""Groups of devices: questions that have a name."""

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of
from liberatai_coordinator.store.rows import GroupRow
from liberatai_coordinator.store.tables import GROUPS
from liberatai_core.errors import NotFoundError, StateError


class GroupStore:
    """Groups by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, group: GroupRow) -> None:
        """Remember a group.

        Raises:
            StateError: there is one of this name.
        """
        with self._database.write() as connection:
            if connection.execute(sa.select(GROUPS.c.name).where(GROUPS.c.name == group.name)).first():
                raise StateError(f"group {group.name}: exists already; delete it first")
            connection.execute(sa.insert(GROUPS), [columns_of(group)])

    def all(self) -> list[GroupRow]:
        """Return all groups, sorted by name."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(GROUPS).order_by(GROUPS.c.name)).mappings().all()
        return [GroupRow(**row) for row in rows]

    def get(self, name: str) -> GroupRow:
        """Return a group.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._database.read() as connection:
            row = connection.execute(sa.select(GROUPS).where(GROUPS.c.name == name)).mappings().first()
        if row is None:
            raise NotFoundError(f"group {name}: not known (see `liberatai groups list`)")
        return GroupRow(**row)

    def delete(self, name: str) -> None:
        """Forget a group; its devices stay.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._database.write() as connection:
            if not connection.execute(sa.delete(GROUPS).where(GROUPS.c.name == name)).rowcount:
                raise NotFoundError(f"group {name}: not known (see `liberatai groups list`)")
