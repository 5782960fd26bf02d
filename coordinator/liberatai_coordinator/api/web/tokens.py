"""Routes about tokens."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import NOTHING, body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import TokenView
from liberatai_coordinator.client.wire import TokenRequest


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about tokens."""

    @app.get("/v1/tokens", **shows(list[TokenView]))
    async def tokens() -> Response:
        """All tokens, without what they are."""
        return json(await operations.tokens.list())

    @app.post("/v1/tokens", **shows(TokenView, TokenRequest, status=HTTPStatus.CREATED))
    async def create_token(request: Request) -> Response:
        """Make a token; it is shown this once."""
        wanted = await body_of(request, TokenRequest)
        made = await operations.tokens.create(wanted.name, wanted.role, wanted.ttl_s)
        return json(made, HTTPStatus.CREATED)

    @app.delete("/v1/tokens/{name}", **NOTHING)
    async def revoke_token(name: str) -> Response:
        """Let a token be worth nothing from now on."""
        await operations.tokens.revoke(name)
        return Response(status_code=HTTPStatus.NO_CONTENT)
