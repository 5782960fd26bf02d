"""What a client may ask about plans: which device gets which structure, and why."""

import asyncio
from dataclasses import dataclass

import msgspec

from liberatai_coordinator.api import present
from liberatai_coordinator.client.views import AssignmentView, PlanView
from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_coordinator.fleet import plan
from liberatai_coordinator.fleet.plan import Assignment
from liberatai_coordinator.jobs import materials
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_coordinator.store.rows import VersionRow
from liberatai_core.contract.messages import Capability


@dataclass(frozen=True, slots=True)
class Plans:
    """Plans of a coordinator's jobs."""

    service: Service

    async def show(self, job_name: str | None, yaml_text: str | None) -> PlanView:
        """Return a job's plan, or (dry run) that of one only described; the newest job's if none is given."""
        if yaml_text is not None:
            return await self._dry_run(parse_job(yaml_text, "job"))
        ledger = self.service.ledger
        rows = {row.name: row for row in ledger.jobs.all()}
        name = job_name or next(reversed(rows), "")
        row = rows.get(name) or ledger.jobs.get(name)
        job = msgspec.json.decode(row.spec, type=JobSpec)
        stored = ledger.jobs.value(name, "plan")
        if stored is None:
            return await self._dry_run(job)
        assigned = msgspec.msgpack.decode(stored, type=list[Assignment])
        newest = ledger.versions.newest(name, first=row.first_version)
        sizes = self._stored_bytes(name, newest)
        current = await self._by_link(job, assigned)
        return PlanView(
            job=name,
            assignments=tuple(self._assignment(a, sizes) for a in current),
            structures=present.structure_views(newest, assigned),
        )

    async def _by_link(self, job: JobSpec, assigned: list[Assignment]) -> list[Assignment]:
        """Return a plan with the densities that the devices' links allow now."""
        running = self.service.runners.get(job.name)
        candidates = list(running.roster.candidates.values()) if running else []
        if not candidates:
            candidates, _ = await asyncio.to_thread(materials.candidates_of, job)
        spacing = running.roster.spacing_s if running else _unknown
        return await asyncio.to_thread(
            lambda: [
                plan.by_link(job, candidates, one, self._capability(one.device), round_s=spacing(one.device))
                for one in assigned
            ]
        )

    async def _dry_run(self, job: JobSpec) -> PlanView:
        candidates, _ = await asyncio.to_thread(materials.candidates_of, job)
        devices = self.service.fleet.devices.values()
        known = [d.capability for d in devices if d.capability and d.status == "approved"]
        made = await asyncio.to_thread(plan.make_plan, job, candidates, known)
        assigned, sizes = list(made.assignments.values()), dict(made.keyframe_bytes)
        return PlanView(
            job=job.name,
            assignments=tuple(self._assignment(a, sizes) for a in assigned),
            structures=tuple(
                present.candidate_view(c, sizes.get(c.id, 0), sum(a.structure == c.id for a in assigned))
                for c in candidates
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
