"""Routes about invitations."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import InvitationView
from liberatai_coordinator.client.wire import InvitationRequest


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about invitations."""

    @app.get("/v1/invitations", **shows(list[InvitationView]))
    async def invitations() -> Response:
        """All invitations, without their tokens."""
        return json(await operations.invitations.list())

    @app.post("/v1/invitations", **shows(list[InvitationView], InvitationRequest, status=HTTPStatus.CREATED))
    async def invite(request: Request) -> Response:
        """Make invitations; their tokens are shown once."""
        wanted = await body_of(request, InvitationRequest)
        return json(await operations.invitations.create(wanted), HTTPStatus.CREATED)
