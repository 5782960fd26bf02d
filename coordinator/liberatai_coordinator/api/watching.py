"""For whoever watches the coordinator from outside: is it alive, is it ready, what does it count."""

from http import HTTPStatus

from fastapi import FastAPI, Response

from liberatai_coordinator.api import metrics
from liberatai_coordinator.api.operations import Operations


def make_watching_app(operations: Operations) -> FastAPI:
    """Return the web application with /healthz, /readyz and /metrics."""
    app = FastAPI(title="LiberatAI coordinator", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the loop turns: who gets an answer knows."""
        return _text("ok")

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether devices can be served; else every reason on a line."""
        found = operations.faults()
        return _text("\n".join(found), HTTPStatus.SERVICE_UNAVAILABLE) if found else _text("ok")

    @app.get("/metrics")
    async def everything() -> Response:
        """All that is counted."""
        return Response(await metrics.exposed(operations), media_type=metrics.CONTENT_TYPE)

    return app


def _text(words: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(words + "\n", status_code=status, media_type="text/plain")
