"""What a client may ask about jobs."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from liberatai_coordinator import clock
from liberatai_coordinator.api import present
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.api.rounds import EndedRounds
from liberatai_coordinator.client.views import JobSummary, JobView
from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.jobs import materials
from liberatai_coordinator.jobs.tasks import RUN
from liberatai_coordinator.models import starting
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.rows import JobRow
from liberatai_core.contract.messages import RUN_BYTES
from liberatai_core.errors import NotFoundError, StateError


@dataclass(frozen=True, slots=True)
class JobOperations:
    """Jobs of a coordinator."""

    service: Service
    _ended: EndedRounds = field(default_factory=EndedRounds)

    async def create(self, yaml_text: str, base_dir: str) -> JobView:
        """Start a job beside the others; relative paths in its YAML start from `base_dir`."""
        job, ledger = parse_job(yaml_text, "job"), self.service.ledger
        # Faults of the data, of families and parameters come now, not when devices are waiting.
        await asyncio.to_thread(materials.check, job, Path(base_dir))
        if job.start is not None:
            _, structures = await asyncio.to_thread(materials.candidates_of, job)
            await asyncio.to_thread(starting.check, self.service.jobs.commits.store, job, structures)
        ledger.jobs.create(
            job.name, msgspec.json.encode(job), base_dir, clock.wall(), {RUN: os.urandom(RUN_BYTES)}
        )
        self.service.jobs.start(ledger.jobs.get(job.name))
        return await self.show(job.name)

    async def check(self, yaml_text: str, base_dir: str) -> JobSpec:
        """Look at everything that `create` looks at, and create nothing.

        Raises:
            LiberataiError: `create` would raise it, too.
        """
        job = parse_job(yaml_text, "job")
        await asyncio.to_thread(materials.check, job, Path(base_dir))
        await asyncio.to_thread(self.service.ledger.jobs.require_free, job.name)
        return job

    async def list(self) -> tuple[JobSummary, ...]:
        """Return all jobs, oldest first; no round is read for it."""
        waits = self.service.jobs.waits()
        return await asyncio.to_thread(summaries, self.service.ledger, waits)

    async def show(self, name: str) -> JobView:
        """Return one job with its rounds."""
        ledger, running = self.service.ledger, self.service.runners.get(name)
        row = await self._row(name)
        now = running.open_round if running else None
        stored = {} if now is None else {now.number: len(now.stored)}
        waits = self.service.jobs.waits().get(name, "")
        return await asyncio.to_thread(_view, ledger, self._ended, row, stored, waits)

    async def pause(self, name: str) -> JobView:
        """Pause a job after the round that is open now."""
        await self._require_state(name, {"waiting", "running"}, "paused")
        self.service.jobs.pause(name)
        return await self.show(name)

    async def resume(self, name: str) -> JobView:
        """Go on with a paused job."""
        await self._require_state(name, {"paused"}, "resumed")
        self.service.jobs.unpause(name)
        return await self.show(name)

    async def abort(self, name: str) -> JobView:
        """End a job for good; its versions stay."""
        await self._require_state(name, {"waiting", "running", "paused"}, "aborted")
        await self.service.jobs.abort(name)
        return await self.show(name)

    async def delete(self, name: str) -> None:
        """Forget an ended job, so that its name can be used again; its versions stay."""
        await self._row(name)
        await self.service.jobs.delete(name)

    async def _row(self, name: str) -> JobRow:
        ledger = self.service.ledger
        try:
            return ledger.jobs.get(name)
        except NotFoundError as error:
            raise await not_found(error, name, [row.name for row in ledger.jobs.all()]) from None

    async def _require_state(self, name: str, allowed: set[str], what: str) -> None:
        state = (await self._row(name)).state
        if state not in allowed:
            raise StateError(f"job {name} is {state}: it cannot be {what}")


def summaries(ledger: Ledger, waits: Mapping[str, str]) -> tuple[JobSummary, ...]:
    """Return all jobs of a ledger, oldest first.

    Args:
        ledger: has them.
        waits: why no round of a job opens, by name.
    """
    newest = ledger.versions.newest
    return tuple(
        present.job_summary(row, newest(row.name, first=row.first_version), waits.get(row.name, ""))
        for row in ledger.jobs.all()
    )


def _view(ledger: Ledger, ended: EndedRounds, row: JobRow, stored: Mapping[int, int], waits: str) -> JobView:
    plan = ledger.jobs.value(row.name, "plan")
    return present.job_view(
        row,
        ledger.versions.newest(row.name, first=row.first_version),
        msgspec.msgpack.decode(plan, type=tuple[Assignment, ...]) if plan else (),
        ended.rounds(ledger, row, stored),
        waits,
    )
