"""The coordinator's HTTP API: JSON under /v1, errors as {code, message}, described by /openapi.json.

It decides nothing: every route is one call of `Operations`.
"""

from typing import Any, Final

import msgspec
from fastapi import FastAPI, Response

from liberatai_coordinator.api.answers import REFERENCE, add_errors, json, shows
from liberatai_coordinator.api.auditing import Audited
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.web import (
    devices,
    groups,
    invitations,
    jobs,
    journal,
    models,
    rollouts,
    shadows,
    tokens,
    variants,
)
from liberatai_coordinator.client import fleet_views, views, wire

NOUNS: Final = (devices, groups, invitations, jobs, journal, models, rollouts, shadows, tokens, variants)
"""Each has `add(app, operations)`."""


def make_app(operations: Operations) -> FastAPI:
    """Return the web application that answers from `operations`."""
    app = FastAPI(title="LiberatAI coordinator", version="1", docs_url=None, redoc_url=None)
    add_errors(app)
    app.add_middleware(Audited, note=operations.audit.note)
    for noun in NOUNS:
        noun.add(app, operations)

    @app.get("/v1/health", **shows(dict[str, Any]))
    async def health() -> Response:
        """What the coordinator says about itself."""
        return json(await operations.health())

    _add_schemas(app)
    return app


def _add_schemas(app: FastAPI) -> None:
    """Describe every view and request, whichever routes name them."""
    types = [
        *_structs(views, views.View),
        *_structs(fleet_views, views.View),
        *_structs(wire, wire.Wire),
        wire.Problem,
    ]
    _, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    described = app.openapi()
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)


def _structs(module: Any, base: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base)]
    return [one for one in found if one is not base]
