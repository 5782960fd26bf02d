"""What a client may ask about jobs."""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from liberatai_coordinator.api import present
from liberatai_coordinator.client.views import JobView, RoundView
from liberatai_coordinator.config import parse_job
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.jobs import materials
from liberatai_coordinator.jobs.tasks import RUN
from liberatai_coordinator.rounds.round import Invitation
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.rows import JobRow
from liberatai_core.contract.messages import RUN_BYTES
from liberatai_core.errors import StateError


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs of a coordinator."""

    service: Service

    async def create(self, yaml_text: str, base_dir: str) -> JobView:
        """Start a job, or let it wait for its turn; relative paths in its YAML start from `base_dir`."""
        job, ledger = parse_job(yaml_text, "job"), self.service.ledger
        # Faults of the data, of families and parameters come now, not when devices are waiting.
        await asyncio.to_thread(materials.check, job, Path(base_dir))
        ledger.jobs.create(
            job.name, msgspec.json.encode(job), base_dir, time.time(), {RUN: os.urandom(RUN_BYTES)}
        )
        self.service.jobs.start(ledger.jobs.get(job.name))
        return await self.show(job.name)

    async def list(self) -> tuple[JobView, ...]:
        """Return all jobs, oldest first."""
        return tuple(self._view(row) for row in self.service.ledger.jobs.all())

    async def show(self, name: str) -> JobView:
        """Return one job with its rounds."""
        return self._view(self.service.ledger.jobs.get(name))

    async def pause(self, name: str) -> JobView:
        """Pause a job after the round that is open now."""
        self._require_state(name, {"waiting", "running"}, "paused")
        self.service.jobs.pause(name)
        return await self.show(name)

    async def resume(self, name: str) -> JobView:
        """Go on with a paused job."""
        self._require_state(name, {"paused"}, "resumed")
        self.service.jobs.unpause(name)
        return await self.show(name)

    async def abort(self, name: str) -> JobView:
        """End a job for good; its versions stay."""
        self._require_state(name, {"waiting", "running", "paused"}, "aborted")
        await self.service.jobs.abort(name)
        return await self.show(name)

    async def delete(self, name: str) -> None:
        """Forget an ended job, so that its name can be used again; its versions stay."""
        await self.service.jobs.delete(name)

    def _require_state(self, name: str, allowed: set[str], what: str) -> None:
        state = self.service.ledger.jobs.get(name).state
        if state not in allowed:
            raise StateError(f"job {name} is {state}: it cannot be {what}")

    def _rounds(self, name: str) -> tuple[RoundView, ...]:
        ledger, running = self.service.ledger, self.service.runners.get(name)
        now = running.open_round if running else None
        return tuple(
            present.round_view(
                row,
                len(msgspec.msgpack.decode(row.invited, type=list[Invitation])),
                len(now.stored)
                if now is not None and now.number == row.round
                else len(ledger.updates.ids(name, row.round)),
            )
            for row in ledger.rounds.all(name)
        )

    def _view(self, row: JobRow) -> JobView:
        ledger, running = self.service.ledger, self.service.runners.get(row.name)
        stored, versions = ledger.jobs.value(row.name, "plan"), ledger.versions.all(row.name)
        return present.job_view(
            row,
            versions[-1] if versions else None,
            msgspec.msgpack.decode(stored, type=tuple[Assignment, ...]) if stored else (),
            self._rounds(row.name),
            running.waits if running else "",
        )
