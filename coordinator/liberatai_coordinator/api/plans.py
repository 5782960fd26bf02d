"""What a client may ask about plans: which device gets which structure, and why."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from liberatai_coordinator.api import present
from liberatai_coordinator.api.names import not_found
from liberatai_coordinator.client.views import AssignmentView, PlanView
from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.fleet import plan
from liberatai_coordinator.fleet.plan import Assignment, Candidate
from liberatai_coordinator.jobs import materials
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.rows import JobRow, VersionRow
from liberatai_core.contract.messages import Capability
from liberatai_core.errors import NotFoundError, StateError


@dataclass(frozen=True, slots=True)
class PlanOperations:
    """Plans of a coordinator's jobs."""

    service: Service

    async def show(self, job_name: str | None, yaml_text: str | None) -> PlanView:
        """Return a job's plan, or (dry run) that of one only described; the newest job's if none is given."""
        if yaml_text is not None:
            return await self._dry_run(parse_job(yaml_text, "job"))
        ledger = self.service.ledger
        rows = {row.name: row for row in await asyncio.to_thread(ledger.jobs.all)}
        name = job_name or next(reversed(rows), "")
        if name not in rows:
            error = NotFoundError(f"job {name}: not known (see `liberatai jobs list`)")
            raise await not_found(error, name, list(rows))
        job = present.spec_of(rows[name])
        if job is None:
            raise StateError(f"job {name}: {present.UNREADABLE}")
        stored = ledger.jobs.value(name, "plan")
        if stored is None:
            return await self._dry_run(job)
        running = self.service.runners.get(name)
        candidates = list(running.roster.candidates.values()) if running else []
        if not candidates:
            candidates, _ = await asyncio.to_thread(materials.candidates_of, job)
        spacing = running.roster.spacing_s if running else _unknown
        assigned = msgspec.msgpack.decode(stored, type=list[Assignment])
        return await asyncio.to_thread(self._view, rows[name], job, assigned, candidates, spacing)

    def _view(
        self,
        row: JobRow,
        job: JobSpec,
        assigned: list[Assignment],
        candidates: list[Candidate],
        spacing_s: Callable[[str], float | None],
    ) -> PlanView:
        """Return a plan with the densities that the devices' links allow now."""
        newest = self.service.ledger.versions.newest(row.name, first=row.first_version)
        sizes = self._stored_bytes(row.name, newest)
        current = (
            plan.by_link(job, candidates, one, self._capability(one.device), round_s=spacing_s(one.device))
            for one in assigned
        )
        return PlanView(
            job=row.name,
            assignments=tuple(self._assignment(one, sizes) for one in current),
            structures=present.structure_views(newest, assigned),
        )

    async def _dry_run(self, job: JobSpec) -> PlanView:
        candidates, _ = await asyncio.to_thread(materials.candidates_of, job)
        devices = self.service.fleet.devices.values()
        known = [d.capability for d in devices if d.capability and d.status == "approved"]
        return await asyncio.to_thread(self._dry_view, job, candidates, known)

    def _dry_view(self, job: JobSpec, candidates: list[Candidate], known: list[Capability]) -> PlanView:
        planned = plan.make_plan(job, candidates, known)
        assigned, sizes = list(planned.assignments.values()), dict(planned.keyframe_bytes)
        devices = Counter(one.structure for one in assigned)
        return PlanView(
            job=job.name,
            assignments=tuple(self._assignment(one, sizes) for one in assigned),
            structures=tuple(
                present.candidate_view(c, sizes.get(c.id, 0), devices[c.id]) for c in candidates
            ),
            dry_run=True,
        )

    def _assignment(self, assigned: Assignment, sizes: dict[str, int]) -> AssignmentView:
        capability = self._capability(assigned.device)
        return present.assignment_view(assigned, capability, sizes.get(assigned.structure, 0))

    def _capability(self, name: str) -> Capability | None:
        device = self.service.fleet.devices.get(name)
        return device.capability if device else None

    def _stored_bytes(self, job: str, newest: VersionRow | None) -> dict[str, int]:
        """Return per structure what the newest version's files take on a device; before one, the budget."""
        if newest is not None:
            return present.stored_bytes(decode_manifest(newest.manifest))
        budgets = self.service.ledger.jobs.value(job, "keyframes")
        return msgspec.msgpack.decode(budgets, type=dict[str, int]) if budgets else {}


def _unknown(_device: str) -> None:
    """Return how long a round takes in a job that does not run."""
