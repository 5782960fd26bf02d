"""Routes about jobs and plans."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import NOTHING, body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import JobSummary, JobView, PlanView
from liberatai_coordinator.client.wire import JobRequest, PlanRequest
from liberatai_core.errors import SchemaError


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about jobs and plans."""

    @app.get("/v1/jobs", **shows(list[JobSummary]))
    async def jobs() -> Response:
        """All jobs."""
        return json(await operations.jobs.list())

    @app.post("/v1/jobs", **shows(JobView, JobRequest, status=HTTPStatus.CREATED))
    async def create_job(request: Request) -> Response:
        """Create a job from its YAML."""
        wanted = await body_of(request, JobRequest)
        return json(await operations.jobs.create(wanted.yaml, wanted.base_dir), HTTPStatus.CREATED)

    @app.post("/v1/jobs/check", **shows(PlanView, JobRequest))
    async def check_job(request: Request) -> Response:
        """Which device would get what; all that creating checks is checked, and nothing is created."""
        wanted = await body_of(request, JobRequest)
        await operations.jobs.check(wanted.yaml, wanted.base_dir)
        return json(await operations.plans.show(None, wanted.yaml))

    @app.get("/v1/jobs/{name}", **shows(JobView))
    async def job(name: str) -> Response:
        """One job with its rounds."""
        return json(await operations.jobs.show(name))

    @app.post("/v1/jobs/{name}/pause", **shows(JobView))
    async def pause(name: str) -> Response:
        """Open no further round."""
        return json(await operations.jobs.pause(name))

    @app.post("/v1/jobs/{name}/resume", **shows(JobView))
    async def resume(name: str) -> Response:
        """Go on with a paused job."""
        return json(await operations.jobs.resume(name))

    @app.post("/v1/jobs/{name}/abort", **shows(JobView))
    async def abort(name: str) -> Response:
        """End a job for good."""
        return json(await operations.jobs.abort(name))

    @app.delete("/v1/jobs/{name}", **NOTHING)
    async def delete(name: str) -> Response:
        """Forget an ended job; its versions stay."""
        await operations.jobs.delete(name)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @app.post("/v1/plan", **shows(PlanView, PlanRequest))
    async def plan(request: Request) -> Response:
        """Which device gets which variant, and why."""
        wanted = await body_of(request, PlanRequest)
        if wanted.job is not None and wanted.yaml is not None:
            raise SchemaError("plan: give a job or a yaml, not both")
        return json(await operations.plans.show(wanted.job, wanted.yaml))
