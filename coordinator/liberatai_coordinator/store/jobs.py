"""Jobs: what was asked for, what state it is in, and small values that must outlive a restart."""

from collections.abc import Collection, Mapping

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rounds import delete_slots, end_rounds
from liberatai_coordinator.store.rows import JobRow
from liberatai_coordinator.store.tables import (
    JOB_VALUES,
    JOBS,
    PATHS,
    ROUNDS,
    UPDATE_FRAMES,
    UPDATE_KEYS,
    VERSIONS,
)
from liberatai_core.errors import ConfigError, NotFoundError


class JobStore:
    """Jobs by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def require_free(self, name: str) -> None:
        """Raise ConfigError if a job of this name exists."""
        with self._database.read() as connection:
            _require_free(connection, name)

    def create(
        self,
        name: str,
        spec: bytes,
        base_dir: str,
        created_s: float,
        values: Mapping[str, bytes] | None = None,
    ) -> None:
        """Remember a new job in the state "waiting".

        Args:
            name: also of its model. If that has versions, those of this job follow them.
            spec: as it was given.
            base_dir: that its paths are relative to.
            created_s: now.
            values: as `set_value` writes them.

        Raises:
            ConfigError: a job of this name exists.
        """
        newest = sa.select(sa.func.max(VERSIONS.c.number)).where(VERSIONS.c.model == name)
        with self._database.write() as connection:
            _require_free(connection, name)
            last = connection.execute(newest).scalar()
            row = JobRow(
                name=name,
                spec=spec,
                base_dir=base_dir,
                created_s=created_s,
                first_version=0 if last is None else last + 1,
            )
            connection.execute(sa.insert(JOBS), [columns_of(row)])
            rows = [{"job": name, "key": key, "value": value} for key, value in (values or {}).items()]
            if rows:
                connection.execute(sa.insert(JOB_VALUES), rows)

    def delete(self, name: str) -> None:
        """Forget an ended job: its rounds and updates, and what its devices held. Its versions stay.

        The caller has made sure that nobody runs it. A long job takes a while, in short transactions; after a
        crash in between, what is left of it can be deleted again.

        Raises:
            NotFoundError: no such job.
        """
        self.get(name)
        with self._database.read() as connection:
            rounds = list(connection.execute(sa.select(ROUNDS.c.no).where(ROUNDS.c.job == name)).scalars())
        for no in rounds:
            for table in (UPDATE_FRAMES, UPDATE_KEYS):
                delete_slots(self._database, table, no)
            with self._database.write() as connection:
                connection.execute(sa.delete(ROUNDS).where(ROUNDS.c.no == no))
        with self._database.write() as connection:
            for table in (PATHS, JOB_VALUES):
                connection.execute(sa.delete(table).where(table.c.job == name))
            connection.execute(sa.delete(JOBS).where(JOBS.c.name == name))
        if rounds:
            self._database.give_space_back()

    def all(self) -> list[JobRow]:
        """Return all jobs, oldest first."""
        query = sa.select(JOBS).order_by(JOBS.c.created_s, JOBS.c.name)
        with self._database.read() as connection:
            return [JobRow(**row) for row in connection.execute(query).mappings()]

    def get(self, name: str) -> JobRow:
        """Return one job.

        Raises:
            NotFoundError: no such job.
        """
        with self._database.read() as connection:
            row = connection.execute(sa.select(JOBS).where(JOBS.c.name == name)).mappings().first()
        if row is None:
            raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
        return JobRow(**row)

    def set_spec(self, name: str, spec: bytes) -> None:
        """Change the specification of a job: where its files lie.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(spec=spec)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        """Change the state of a job, and why.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(state=state, reason=reason)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")

    def end(self, name: str, state: str, reason: str = "", forget: Collection[str] = ()) -> None:
        """End a job: its rounds under way and its state change together, or not at all.

        A round whose version is in the ledger is aggregated; any other one is abandoned, with its updates
        listed. What its devices held is forgotten, because only rounds need it. The same is done again at
        every call, so one that failed may be repeated.

        Args:
            name: of the job.
            state: "aborted", "failed" or "finished".
            reason: why.
            forget: keys of values that an ended job does not need.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(state=state, reason=reason)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
            end_rounds(connection, name, f"job {state}")
            connection.execute(sa.delete(PATHS).where(PATHS.c.job == name))
            dropped = sa.delete(JOB_VALUES).where(JOB_VALUES.c.job == name, JOB_VALUES.c.key.in_(forget))
            connection.execute(dropped)

    def set_value(self, name: str, key: str, value: bytes) -> None:
        """Remember a small value for a job, e.g. its assignments.

        Raises:
            NotFoundError: no such job.
        """
        with self._database.write() as connection:
            if not connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == name)).first():
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
            row = {"job": name, "key": key, "value": value}
            upsert_many(connection, JOB_VALUES, [row], keys=("job", "key"))

    def value(self, name: str, key: str) -> bytes | None:
        """Return what `set_job_value` remembered, or None."""
        query = sa.select(JOB_VALUES.c.value).where(JOB_VALUES.c.job == name, JOB_VALUES.c.key == key)
        with self._database.read() as connection:
            value: bytes | None = connection.execute(query).scalar()
        return value


def _require_free(connection: sa.Connection, name: str) -> None:
    if connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == name)).first():
        fault = f"name: a job {name} exists already; choose another name, or delete that one"
        raise ConfigError("job", [fault])
