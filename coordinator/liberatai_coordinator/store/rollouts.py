"""Rollouts: what was asked for, where they stand, and where each of their devices stands."""

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rows import RolloutRow
from liberatai_coordinator.store.tables import ROLLOUT_DEVICES, ROLLOUTS
from liberatai_core.errors import NotFoundError, StateError


class RolloutStore:
    """Rollouts by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, rollout: RolloutRow) -> None:
        """Remember a rollout.

        Raises:
            StateError: there is one of this name.
        """
        query = sa.select(ROLLOUTS.c.name).where(ROLLOUTS.c.name == rollout.name)
        with self._database.write() as connection:
            if connection.execute(query).first():
                raise StateError(f"rollout {rollout.name}: exists already; give another name")
            connection.execute(sa.insert(ROLLOUTS), [columns_of(rollout)])

    def put(self, name: str, state: bytes, devices: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
        """Remember where a rollout stands, and those of its devices that have moved, in one transaction.

        Raises:
            NotFoundError: there is none of this name.
        """
        rows = [{"rollout": name, "device": device, "state": one} for device, one in devices.items()]
        mine = ROLLOUT_DEVICES.c.rollout == name
        with self._database.write() as connection:
            change = sa.update(ROLLOUTS).where(ROLLOUTS.c.name == name).values(state=state)
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"rollout {name}: not known (see `liberatai rollout list`)")
            upsert_many(connection, ROLLOUT_DEVICES, rows, keys=("rollout", "device"))
            for device in gone:
                connection.execute(sa.delete(ROLLOUT_DEVICES).where(mine, ROLLOUT_DEVICES.c.device == device))

    def all(self) -> list[RolloutRow]:
        """Return all rollouts, the oldest first."""
        with self._database.read() as connection:
            query = sa.select(ROLLOUTS).order_by(ROLLOUTS.c.created_s)
            return [RolloutRow(**row) for row in connection.execute(query).mappings().all()]

    def devices(self, name: str) -> dict[str, bytes]:
        """Return where the devices of a rollout stand."""
        query = sa.select(ROLLOUT_DEVICES.c.device, ROLLOUT_DEVICES.c.state).where(
            ROLLOUT_DEVICES.c.rollout == name
        )
        with self._database.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query).all()}
