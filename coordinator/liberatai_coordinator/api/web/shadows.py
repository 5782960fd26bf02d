"""Routes about what devices shall be like."""

from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import body_of, json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import ShadowView
from liberatai_coordinator.client.wire import Settings


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about shadows."""

    @app.get("/v1/devices/{name}/shadow", **shows(ShadowView))
    async def shadow(name: str) -> Response:
        """What a device shall be like, and what it is like."""
        return json(await operations.shadows.show(name))

    @app.post("/v1/devices/{name}/shadow", **shows(ShadowView, Settings))
    async def change_shadow(name: str, request: Request) -> Response:
        """Wish settings of a device; null: as the device has it."""
        wanted = await body_of(request, Settings)
        return json(await operations.shadows.change(name, wanted.settings))
