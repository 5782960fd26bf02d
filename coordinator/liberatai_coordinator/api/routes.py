"""The coordinator's HTTP API: JSON under /v1, errors as {code, message}, described by /openapi.json.

It decides nothing: every route is one call of `Operations`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import (
    DeviceView,
    EnsembleView,
    JobSummary,
    JobView,
    PlanView,
    SizesView,
    VariantDetail,
    VariantView,
    VersionView,
)
from liberatai_coordinator.client.wire import (
    JobRequest,
    PlanRequest,
    Problem,
    Reason,
    VariantUpload,
    Weights,
)
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.errors import (
    ConfigError,
    DigestError,
    LiberataiError,
    NotFoundError,
    SchemaError,
    TooLargeError,
)

MAX_BODY_BYTES: Final = 2 * 1024 * 1024
"""A job's YAML has at most 1 MiB, and JSON may escape it."""
MAX_VARIANT_BYTES: Final = MAX_OBJECT_BYTES + MAX_BODY_BYTES
"""A file, and a manifest with 4096 tensors."""
JSON: Final = "application/json"
PART: Final = 500
"""Records that are encoded at a time: some milliseconds."""

STATUS: Final[dict[str, HTTPStatus]] = {
    "E_NOT_FOUND": HTTPStatus.NOT_FOUND,
    "E_UNKNOWN_DEVICE": HTTPStatus.NOT_FOUND,
    "E_ROUND_UNKNOWN": HTTPStatus.NOT_FOUND,
    "E_CONFIG": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_SCHEMA": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_STRUCTURE": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_DATA": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_BUDGET": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_TOPIC": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_CODEC": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_BOMB": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_NONFINITE": HTTPStatus.UNPROCESSABLE_ENTITY,
    "E_SIZE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "E_DUP": HTTPStatus.CONFLICT,
    "E_DUP_CONFLICT": HTTPStatus.CONFLICT,
    "E_ROUND_CLOSED": HTTPStatus.CONFLICT,
    "E_STATE": HTTPStatus.CONFLICT,
    "E_REVOKED": HTTPStatus.CONFLICT,
    "E_LOCKED": HTTPStatus.CONFLICT,
    "E_BUSY": HTTPStatus.SERVICE_UNAVAILABLE,
    "E_DISK": HTTPStatus.SERVICE_UNAVAILABLE,
    "E_LINK": HTTPStatus.SERVICE_UNAVAILABLE,
    "E_EXTRA": HTTPStatus.NOT_IMPLEMENTED,
}
"""Error code to HTTP status; any other code is a fault of the coordinator (500)."""

Body = TypeVar("Body")


def make_app(operations: Operations) -> FastAPI:
    """Return the web application that answers from `operations`."""
    app = FastAPI(title="LiberatAI coordinator", version="1", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_devices(app, operations)
    _add_jobs(app, operations)
    _add_models(app, operations)
    _add_variants(app, operations)

    @app.get("/v1/health", **_shows(dict[str, Any]))
    async def health() -> Response:
        """What the coordinator says about itself."""
        return _json(await operations.health())

    _add_schemas(app)
    return app


def _add_devices(app: FastAPI, operations: Operations) -> None:
    @app.get("/v1/devices", **_shows(list[DeviceView]))
    async def devices() -> Response:
        """All devices."""
        return StreamingResponse(_parts(await operations.devices.list()), media_type=JSON)

    @app.get("/v1/devices/{name}", **_shows(DeviceView))
    async def device(name: str) -> Response:
        """One device."""
        return _json(await operations.devices.show(name))

    @app.post("/v1/devices/{name}/approve", **_shows(DeviceView))
    async def approve(name: str) -> Response:
        """Let a device in."""
        return _json(await operations.devices.approve(name))

    @app.post("/v1/devices/{name}/quarantine", **_shows(DeviceView, Reason))
    async def quarantine(name: str, request: Request) -> Response:
        """Shut a device out."""
        wanted = await _body(request, Reason)
        return _json(await operations.devices.quarantine(name, wanted.reason))

    @app.post("/v1/devices/{name}/release", **_shows(DeviceView))
    async def release(name: str) -> Response:
        """Let a quarantined device in again."""
        return _json(await operations.devices.release(name))


def _add_jobs(app: FastAPI, operations: Operations) -> None:
    @app.get("/v1/jobs", **_shows(list[JobSummary]))
    async def jobs() -> Response:
        """All jobs."""
        return _json(await operations.jobs.list())

    @app.post("/v1/jobs", **_shows(JobView, JobRequest, status=HTTPStatus.CREATED))
    async def create_job(request: Request) -> Response:
        """Create a job from its YAML."""
        wanted = await _body(request, JobRequest)
        return _json(await operations.jobs.create(wanted.yaml, wanted.base_dir), HTTPStatus.CREATED)

    @app.get("/v1/jobs/{name}", **_shows(JobView))
    async def job(name: str) -> Response:
        """One job with its rounds."""
        return _json(await operations.jobs.show(name))

    @app.post("/v1/jobs/{name}/pause", **_shows(JobView))
    async def pause(name: str) -> Response:
        """Open no further round."""
        return _json(await operations.jobs.pause(name))

    @app.post("/v1/jobs/{name}/resume", **_shows(JobView))
    async def resume(name: str) -> Response:
        """Go on with a paused job."""
        return _json(await operations.jobs.resume(name))

    @app.post("/v1/jobs/{name}/abort", **_shows(JobView))
    async def abort(name: str) -> Response:
        """End a job for good."""
        return _json(await operations.jobs.abort(name))

    @app.delete("/v1/jobs/{name}", **_NOTHING)
    async def delete(name: str) -> Response:
        """Forget an ended job; its versions stay."""
        await operations.jobs.delete(name)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @app.post("/v1/plan", **_shows(PlanView, PlanRequest))
    async def plan(request: Request) -> Response:
        """Which device gets which variant, and why."""
        wanted = await _body(request, PlanRequest)
        if wanted.job is not None and wanted.yaml is not None:
            raise SchemaError("plan: give a job or a yaml, not both")
        return _json(await operations.plans.show(wanted.job, wanted.yaml))


def _add_models(app: FastAPI, operations: Operations) -> None:
    @app.get("/v1/models", **_shows(list[VersionView]))
    async def models() -> Response:
        """The newest version of every model."""
        return _json(await operations.models.list())

    @app.get("/v1/models/{model}/versions", **_shows(list[VersionView]))
    async def log(model: str) -> Response:
        """All versions of a model."""
        return _json(await operations.models.log(model))

    @app.get("/v1/models/{model}/versions/{ref}", **_shows(VersionView))
    async def version(model: str, ref: str) -> Response:
        """One version by number, tag or "latest"."""
        return _json(await operations.models.version(model, ref))

    @app.get("/v1/models/{model}/versions/{ref}/ensemble", **_shows(EnsembleView))
    async def ensemble(model: str, ref: str) -> Response:
        """How the structures of a version are combined."""
        return _json(await operations.models.ensemble(model, ref))

    @app.get("/v1/models/{model}/versions/{ref}/structures/{structure}/weights")
    async def weights(model: str, ref: str, structure: str) -> Response:
        """Weights of one structure: a msgpack map with structure, data, sha256 and float32 weights."""
        shape, data, content = await operations.models.weights(model, ref, structure)
        sha256 = hashlib.sha256(content).digest()
        envelope = Weights(structure=shape, data=data, sha256=sha256, weights=content)
        return Response(msgspec.msgpack.encode(envelope), media_type="application/octet-stream")


def _add_variants(app: FastAPI, operations: Operations) -> None:
    @app.get("/v1/models/{model}/versions/{ref}/structures/{structure}/sizes", **_shows(SizesView))
    async def sizes(model: str, ref: str, structure: str) -> Response:
        """Where the bytes of one structure's files go."""
        return _json(await operations.models.sizes(model, ref, structure))

    @app.get("/v1/models/{model}/versions/{ref}/variants", **_shows(list[VariantView]))
    async def variants(model: str, ref: str) -> Response:
        """Variants of a version, the smallest first."""
        return _json(await operations.variants.list(model, ref))

    @app.post(
        "/v1/models/{model}/versions/{ref}/variants",
        **_shows(VariantView, VariantUpload, takes="application/msgpack", status=HTTPStatus.CREATED),
    )
    async def commit_variant(model: str, ref: str, request: Request) -> Response:
        """Add a variant: a msgpack map with its manifest and its file."""
        wanted = await _body(request, VariantUpload, MAX_VARIANT_BYTES, msgspec.msgpack.decode)
        try:
            variant = await operations.variants.commit(model, ref, wanted.manifest, wanted.file)
        except DigestError as error:
            # Elsewhere a wrong digest means a damaged repository; here it came in.
            return _json(problem(error), HTTPStatus.UNPROCESSABLE_ENTITY)
        return _json(variant, HTTPStatus.CREATED)

    @app.get("/v1/models/{model}/variants/{prefix}", **_shows(VariantDetail))
    async def variant(model: str, prefix: str) -> Response:
        """One variant by the beginning of its id, with its structure and where its bytes go."""
        return _json(await operations.variants.show(model, prefix))

    @app.get("/v1/models/{model}/variants/{prefix}/file", **_BYTES)
    async def variant_file(model: str, prefix: str) -> Response:
        """The file of a variant."""
        content = await operations.variants.file(model, prefix)
        return Response(content, media_type="application/octet-stream")


# --- answers and errors --------------------------------------------------------------------------


async def _parts(views: Sequence[Any]) -> AsyncIterator[bytes]:
    """Yield a long list as JSON, and let the coordinator go on with its devices between two parts."""
    yield b"["
    for start in range(0, len(views), PART):
        yield (b"," if start else b"") + msgspec.json.encode(views[start : start + PART])[1:-1]
        await asyncio.sleep(0)
    yield b"]"


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)


def problem(error: LiberataiError) -> Problem:
    """Return an error as it is shown."""
    if isinstance(error, ConfigError):
        return Problem(code=error.code, message=str(error), where=error.where, faults=tuple(error.faults))
    return Problem(code=error.code, message=str(error))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LiberataiError)
    async def known(_request: Request, error: LiberataiError) -> Response:
        return _json(problem(error), STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = NotFoundError.code if error.status_code == HTTPStatus.NOT_FOUND else SchemaError.code
        text = f"{request.method} {request.url.path}: {error.detail}"
        return _json(Problem(code=code, message=text), HTTPStatus(error.status_code))

    @app.exception_handler(Exception)
    async def unknown(_request: Request, error: Exception) -> Response:
        # The server logs the traceback; the text alone may hold what is nobody's business.
        text = f"the coordinator failed ({type(error).__name__}); its log has the reason"
        return _json(Problem(code=LiberataiError.code, message=text), HTTPStatus.INTERNAL_SERVER_ERROR)


async def _body(
    request: Request,
    wanted: type[Body],
    max_bytes: int = MAX_BODY_BYTES,
    decode: Callable[..., Any] = msgspec.json.decode,
) -> Body:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise TooLargeError(f"request of more than {max_bytes} bytes")
    empty = msgspec.json.encode({}) if decode is msgspec.json.decode else msgspec.msgpack.encode({})
    try:
        body: Body = decode(bytes(content) or empty, type=wanted)
    except LiberataiError:
        raise
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise SchemaError(f"request: {error}") from None
    return body


# --- OpenAPI: FastAPI reads pydantic models; ours are msgspec Structs ----------------------------

_REFERENCE = "#/components/schemas/{name}"


_PROBLEM = {
    "description": "Error",
    "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(name="Problem")}}},
}
_BYTES: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        "default": _PROBLEM,
    },
}
"""Arguments of a route that answers with bytes."""
_NOTHING: dict[str, Any] = {
    "response_class": Response,
    "status_code": int(HTTPStatus.NO_CONTENT),
    "responses": {"default": _PROBLEM},
}
"""Arguments of a route that answers with nothing but success."""


def _shows(
    answer: Any,
    body: Any = None,
    *,
    takes: str = "application/json",
    status: HTTPStatus = HTTPStatus.OK,
) -> dict[str, Any]:
    """Return the arguments of a route that describe its answer and its body."""
    (schema, *bodies), _ = msgspec.json.schema_components(
        [answer] if body is None else [answer, body], ref_template=_REFERENCE
    )
    described: dict[str, Any] = {
        "response_class": Response,
        "status_code": int(status),
        "responses": {
            int(status): {"content": {"application/json": {"schema": schema}}},
            "default": _PROBLEM,
        },
    }
    if bodies:
        content = {takes: {"schema": bodies[0]}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return described


def _add_schemas(app: FastAPI) -> None:
    types = [
        DeviceView,
        EnsembleView,
        JobSummary,
        JobView,
        PlanView,
        SizesView,
        VariantDetail,
        VariantView,
        VersionView,
        Problem,
        Reason,
        JobRequest,
        PlanRequest,
        VariantUpload,
    ]
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    described = app.openapi()
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)
