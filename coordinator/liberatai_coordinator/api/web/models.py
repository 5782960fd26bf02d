"""Routes about models."""

import hashlib

import msgspec
from fastapi import FastAPI, Response

from liberatai_coordinator.api.answers import json, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import EnsembleView, VersionView
from liberatai_coordinator.client.wire import Weights


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about models."""

    @app.get("/v1/models", **shows(list[VersionView]))
    async def models() -> Response:
        """The newest version of every model."""
        return json(await operations.models.list())

    @app.get("/v1/models/{model}/versions", **shows(list[VersionView]))
    async def log(model: str) -> Response:
        """All versions of a model."""
        return json(await operations.models.log(model))

    @app.get("/v1/models/{model}/versions/{ref}", **shows(VersionView))
    async def version(model: str, ref: str) -> Response:
        """One version by number, tag or "latest"."""
        return json(await operations.models.version(model, ref))

    @app.get("/v1/models/{model}/versions/{ref}/ensemble", **shows(EnsembleView))
    async def ensemble(model: str, ref: str) -> Response:
        """How the structures of a version are combined."""
        return json(await operations.models.ensemble(model, ref))

    @app.get("/v1/models/{model}/versions/{ref}/structures/{structure}/weights")
    async def weights(model: str, ref: str, structure: str) -> Response:
        """Weights of one structure: a msgpack map with structure, data, sha256 and float32 weights."""
        shape, data, content = await operations.models.weights(model, ref, structure)
        sha256 = hashlib.sha256(content).digest()
        envelope = Weights(structure=shape, data=data, sha256=sha256, weights=content)
        return Response(msgspec.msgpack.encode(envelope), media_type="application/octet-stream")
