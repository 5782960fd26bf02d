"""Routes about devices."""

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from liberatai_coordinator.api.answers import JSON, body_of, json, parts, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import DeviceView
from liberatai_coordinator.client.wire import Reason


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about devices."""

    @app.get("/v1/devices", **shows(list[DeviceView]))
    async def devices() -> Response:
        """All devices."""
        return StreamingResponse(parts(await operations.devices.list()), media_type=JSON)

    @app.get("/v1/devices/{name}", **shows(DeviceView))
    async def device(name: str) -> Response:
        """One device."""
        return json(await operations.devices.show(name))

    @app.post("/v1/devices/{name}/approve", **shows(DeviceView))
    async def approve(name: str) -> Response:
        """Let a device in."""
        return json(await operations.devices.approve(name))

    @app.post("/v1/devices/{name}/quarantine", **shows(DeviceView, Reason))
    async def quarantine(name: str, request: Request) -> Response:
        """Shut a device out."""
        wanted = await body_of(request, Reason)
        return json(await operations.devices.quarantine(name, wanted.reason))

    @app.post("/v1/devices/{name}/release", **shows(DeviceView))
    async def release(name: str) -> Response:
        """Let a quarantined device in again."""
        return json(await operations.devices.release(name))
