"""Routes about what happened, and about who changed what."""

from fastapi import FastAPI, Response

from liberatai_coordinator.api.answers import json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.fleet_views import AuditView, EventView


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about events and changes."""

    @app.get("/v1/events", **shows(list[EventView]))
    async def events(after: int | None = None, last: int = 20, device: str = "") -> Response:
        """Events above a number, the oldest first, or the newest ones."""
        if after is not None:
            return json(await operations.events.after(after, device))
        return json(await operations.events.last(last, device))

    @app.get("/v1/audit", **shows(list[AuditView]))
    async def audit(after: int | None = None, last: int = 20) -> Response:
        """Changes above a number, the oldest first, or the newest ones."""
        if after is not None:
            return json(await operations.audit.after(after))
        return json(await operations.audit.last(last))
