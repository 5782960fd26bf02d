"""Jobs: what was asked for, what state it is in, and small values that must outlive a restart."""

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rounds import end_rounds
from liberatai_coordinator.store.rows import JobRow
from liberatai_coordinator.store.tables import JOB_VALUES, JOBS
from liberatai_core.errors import ConfigError, NotFoundError


class JobStore:
    """Jobs by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, spec: bytes, base_dir: str, created_s: float) -> None:
        """Remember a new job in the state "waiting".

        Raises:
            ConfigError: a job of this name exists.
        """
        row = JobRow(name=name, spec=spec, base_dir=base_dir, created_s=created_s)
        with self._database.write() as connection:
            if connection.execute(sa.select(JOBS.c.name).where(JOBS.c.name == name)).first():
                raise ConfigError("job", [f"name: a job {name} exists already; choose another name"])
            connection.execute(sa.insert(JOBS), columns_of(row))

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

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        """Change the state of a job, and why.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(state=state, reason=reason)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")

    def end(self, name: str, state: str, reason: str = "") -> None:
        """End a job: its rounds under way and its state change together, or not at all.

        A round whose version is in the ledger is aggregated; any other one is abandoned, with its updates
        listed. The same is done again at every call, so a call that failed may be repeated.

        Args:
            name: of the job.
            state: "aborted", "failed" or "finished".
            reason: why.

        Raises:
            NotFoundError: no such job.
        """
        change = sa.update(JOBS).where(JOBS.c.name == name).values(state=state, reason=reason)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
            end_rounds(connection, name, f"job {state}")

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
