"""Routes about devices."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from liberatai_coordinator.api.answers import JSON, NOTHING, body_of, json, parts, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import LogView, PingView
from liberatai_coordinator.client.views import DeviceView
from liberatai_coordinator.client.wire import Key, Labels, Lines, Reason


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about devices."""

    @app.get("/v1/devices", **shows(list[DeviceView]))
    async def devices(selector: str = "", query: str = "", group: str = "") -> Response:
        """All devices, or those of which selector, question and group are true."""
        found = await operations.devices.list(selector, query, group)
        return StreamingResponse(parts(found), media_type=JSON)

    @app.get("/v1/devices/{name}", **shows(DeviceView))
    async def device(name: str) -> Response:
        """One device."""
        return json(await operations.devices.show(name))

    @app.post("/v1/devices/{name}/approve", **shows(DeviceView, Key))
    async def approve(name: str, request: Request) -> Response:
        """Let a device in; with a key only if its fingerprint begins so."""
        wanted = await body_of(request, Key)
        return json(await operations.devices.approve(name, wanted.key))

    @app.post("/v1/devices/{name}/reject", **NOTHING)
    async def reject(name: str, request: Request) -> Response:
        """Send a pending device away; its key is refused for good."""
        await operations.devices.reject(name, (await body_of(request, Reason)).reason)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @app.post("/v1/devices/{name}/decommission", **NOTHING)
    async def decommission(name: str, request: Request) -> Response:
        """Remove a device; its key is refused for good."""
        await operations.devices.decommission(name, (await body_of(request, Reason)).reason)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @app.post("/v1/devices/{name}/rekey", **shows(DeviceView, Key))
    async def rekey(name: str, request: Request) -> Response:
        """Take the key that asks for a device's name: it was set up anew."""
        wanted = await body_of(request, Key)
        return json(await operations.devices.rekey(name, wanted.key))

    @app.post("/v1/devices/{name}/labels", **shows(DeviceView, Labels))
    async def label(name: str, request: Request) -> Response:
        """Give a device labels; null takes one away."""
        wanted = await body_of(request, Labels)
        return json(await operations.devices.label(name, wanted.labels))

    @app.post("/v1/devices/{name}/drain", **shows(DeviceView, Reason))
    async def drain(name: str, request: Request) -> Response:
        """Give a device no new task; what it works on counts."""
        wanted = await body_of(request, Reason)
        return json(await operations.devices.drain(name, wanted.reason))

    @app.post("/v1/devices/{name}/resume", **shows(DeviceView))
    async def resume(name: str) -> Response:
        """Let a drained device work again."""
        return json(await operations.devices.resume(name))

    @app.post("/v1/devices/{name}/quarantine", **shows(DeviceView, Reason))
    async def quarantine(name: str, request: Request) -> Response:
        """Shut a device out."""
        wanted = await body_of(request, Reason)
        return json(await operations.devices.quarantine(name, wanted.reason))

    @app.post("/v1/devices/{name}/release", **shows(DeviceView))
    async def release(name: str) -> Response:
        """Let a quarantined device in again."""
        return json(await operations.devices.release(name))

    @app.post("/v1/devices/{name}/ping", **shows(PingView))
    async def ping(name: str) -> Response:
        """Ask a device whether it is there."""
        return json(await operations.devices.ping(name))

    @app.post("/v1/devices/{name}/probe", **shows(DeviceView))
    async def probe(name: str) -> Response:
        """Let a device look at its machine again."""
        return json(await operations.devices.probe(name))

    @app.post("/v1/devices/{name}/logs", **shows(LogView, Lines))
    async def logs(name: str, request: Request) -> Response:
        """The newest lines of a device's log."""
        wanted = await body_of(request, Lines)
        return json(await operations.devices.logs(name, wanted.lines))
