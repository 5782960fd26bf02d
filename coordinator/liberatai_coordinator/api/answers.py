"""What all routes share: reading bodies, answers as JSON, errors as {code, message}, words for OpenAPI."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from liberatai_coordinator.client.wire import Problem
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.errors import ConfigError, LiberataiError, NotFoundError, SchemaError, TooLargeError

MAX_BODY_BYTES: Final = 2 * 1024 * 1024
"""A job's YAML has at most 1 MiB, and JSON may escape it."""
MAX_VARIANT_BYTES: Final = MAX_OBJECT_BYTES + MAX_BODY_BYTES
"""A file, and a manifest with 4096 tensors."""
JSON: Final = "application/json"
PART: Final = 500
"""Records that are encoded at a time: some milliseconds."""

STATUS: Final[dict[str, HTTPStatus]] = {
    "E_ROLE": HTTPStatus.FORBIDDEN,
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


# --- answers and errors --------------------------------------------------------------------------


async def parts(views: Sequence[Any]) -> AsyncIterator[bytes]:
    """Yield a long list as JSON, and let the coordinator go on with its devices between two parts."""
    yield b"["
    for start in range(0, len(views), PART):
        yield (b"," if start else b"") + msgspec.json.encode(views[start : start + PART])[1:-1]
        await asyncio.sleep(0)
    yield b"]"


def json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return a value as the answer to a request."""
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)


def problem(error: LiberataiError) -> Problem:
    """Return an error as it is shown."""
    if isinstance(error, ConfigError):
        return Problem(code=error.code, message=str(error), where=error.where, faults=tuple(error.faults))
    return Problem(code=error.code, message=str(error))


def add_errors(app: FastAPI) -> None:
    """Let every error be answered as a `Problem`, with the status of its code."""

    @app.exception_handler(LiberataiError)
    async def known(_request: Request, error: LiberataiError) -> Response:
        return json(problem(error), STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = NotFoundError.code if error.status_code == HTTPStatus.NOT_FOUND else SchemaError.code
        text = f"{request.method} {request.url.path}: {error.detail}"
        return json(Problem(code=code, message=text), HTTPStatus(error.status_code))

    @app.exception_handler(Exception)
    async def unknown(_request: Request, error: Exception) -> Response:
        # The server logs the traceback; the text alone may hold what is nobody's business.
        text = f"the coordinator failed ({type(error).__name__}); its log has the reason"
        return json(Problem(code=LiberataiError.code, message=text), HTTPStatus.INTERNAL_SERVER_ERROR)


async def body_of(
    request: Request,
    wanted: type[Body],
    max_bytes: int = MAX_BODY_BYTES,
    decode: Callable[..., Any] = msgspec.json.decode,
) -> Body:
    """Return a request's body, closed and bounded.

    Raises:
        TooLargeError: longer than `max_bytes`. SchemaError: not of this form.
    """
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

REFERENCE = "#/components/schemas/{name}"


_PROBLEM = {
    "description": "Error",
    "content": {"application/json": {"schema": {"$ref": REFERENCE.format(name="Problem")}}},
}
BYTES: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        "default": _PROBLEM,
    },
}
"""Arguments of a route that answers with bytes."""
NOTHING: dict[str, Any] = {
    "response_class": Response,
    "status_code": int(HTTPStatus.NO_CONTENT),
    "responses": {"default": _PROBLEM},
}
"""Arguments of a route that answers with nothing but success."""


def shows(
    answer: Any,
    body: Any = None,
    *,
    takes: str = "application/json",
    status: HTTPStatus = HTTPStatus.OK,
) -> dict[str, Any]:
    """Return the arguments of a route that describe its answer and its body."""
    (schema, *bodies), _ = msgspec.json.schema_components(
        [answer] if body is None else [answer, body], ref_template=REFERENCE
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
