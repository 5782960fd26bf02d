"""Routes about groups of devices."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import NOTHING, body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import GroupView
from liberatai_coordinator.client.wire import GroupRequest


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about groups."""

    @app.get("/v1/groups", **shows(list[GroupView]))
    async def groups() -> Response:
        """All groups with the number of their devices."""
        return json(await operations.groups.list())

    @app.post("/v1/groups", **shows(GroupView, GroupRequest, status=HTTPStatus.CREATED))
    async def create_group(request: Request) -> Response:
        """Give a question a name."""
        wanted = await body_of(request, GroupRequest)
        return json(await operations.groups.create(wanted.name, wanted.query), HTTPStatus.CREATED)

    @app.get("/v1/groups/{name}", **shows(GroupView))
    async def group(name: str) -> Response:
        """One group with the names of its devices."""
        return json(await operations.groups.show(name))

    @app.delete("/v1/groups/{name}", **NOTHING)
    async def delete_group(name: str) -> Response:
        """Forget a group; its devices stay."""
        await operations.groups.delete(name)
        return Response(status_code=HTTPStatus.NO_CONTENT)
