"""Routes about variants of models."""

from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response

from liberatai_coordinator.api.answers import BYTES, MAX_VARIANT_BYTES, body_of, json, problem, shows
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.views import SizesView, VariantDetail, VariantView
from liberatai_coordinator.client.wire import VariantUpload
from liberatai_core.errors import DigestError


def add(app: FastAPI, operations: Operations) -> None:
    """Add the routes about variants."""

    @app.get("/v1/models/{model}/versions/{ref}/structures/{structure}/sizes", **shows(SizesView))
    async def sizes(model: str, ref: str, structure: str) -> Response:
        """Where the bytes of one structure's files go."""
        return json(await operations.models.sizes(model, ref, structure))

    @app.get("/v1/models/{model}/versions/{ref}/variants", **shows(list[VariantView]))
    async def variants(model: str, ref: str) -> Response:
        """Variants of a version, the smallest first."""
        return json(await operations.variants.list(model, ref))

    @app.post(
        "/v1/models/{model}/versions/{ref}/variants",
        **shows(VariantView, VariantUpload, takes="application/msgpack", status=HTTPStatus.CREATED),
    )
    async def commit_variant(model: str, ref: str, request: Request) -> Response:
        """Add a variant: a msgpack map with its manifest and its file."""
        wanted = await body_of(request, VariantUpload, MAX_VARIANT_BYTES, msgspec.msgpack.decode)
        try:
            variant = await operations.variants.commit(model, ref, wanted.manifest, wanted.file)
        except DigestError as error:
            # Elsewhere a wrong digest means a damaged repository; here it came in.
            return json(problem(error), HTTPStatus.UNPROCESSABLE_ENTITY)
        return json(variant, HTTPStatus.CREATED)

    @app.get("/v1/models/{model}/variants/{prefix}", **shows(VariantDetail))
    async def variant(model: str, prefix: str) -> Response:
        """One variant by the beginning of its id, with its structure and where its bytes go."""
        return json(await operations.variants.show(model, prefix))

    @app.get("/v1/models/{model}/variants/{prefix}/file", **BYTES)
    async def variant_file(model: str, prefix: str) -> Response:
        """The file of a variant."""
        content = await operations.variants.file(model, prefix)
        return Response(content, media_type="application/octet-stream")
