"""Routes about rollouts."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import RolloutView
from liberatai_coordinator.client.wire import Reason, RolloutRequest


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about rollouts."""

    @app.get("/v1/rollouts", **shows(list[RolloutView]))
    async def rollouts() -> Response:
        """All rollouts, the oldest first."""
        return json(await operations.rollouts.list())

    @app.post("/v1/rollouts", **shows(RolloutView, RolloutRequest, status=HTTPStatus.CREATED))
    async def create_rollout(request: Request) -> Response:
        """Begin a rollout."""
        wanted = await body_of(request, RolloutRequest)
        return json(await operations.rollouts.create(wanted), HTTPStatus.CREATED)

    @app.get("/v1/rollouts/{name}", **shows(RolloutView))
    async def rollout(name: str) -> Response:
        """One rollout with its devices."""
        return json(await operations.rollouts.show(name))

    @app.post("/v1/rollouts/{name}/pause", **shows(RolloutView))
    async def pause_rollout(name: str) -> Response:
        """Stop a rollout where it is."""
        return json(await operations.rollouts.pause(name))

    @app.post("/v1/rollouts/{name}/resume", **shows(RolloutView))
    async def resume_rollout(name: str) -> Response:
        """Let a paused rollout go on."""
        return json(await operations.rollouts.resume(name))

    @app.post("/v1/rollouts/{name}/cancel", **shows(RolloutView))
    async def cancel_rollout(name: str) -> Response:
        """End a rollout; who has the new keeps it."""
        return json(await operations.rollouts.cancel(name))

    @app.post("/v1/rollouts/{name}/rollback", **shows(RolloutView, Reason))
    async def roll_back(name: str, request: Request) -> Response:
        """Let everybody have what was before."""
        wanted = await body_of(request, Reason)
        return json(await operations.rollouts.rollback(name, wanted.reason))
