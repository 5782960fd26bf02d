"""Descriptors, manifests and indexes of OCI image spec 1.1: read with bounds, written in one form.

Manifests of others are read, never written again: their digest is of the bytes as they came.
"""

import hashlib
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from liberatai_coordinator.repository.names import DIGEST
from liberatai_core.errors import SchemaError, TooLargeError

INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
EMPTY: Final = "application/vnd.oci.empty.v1+json"
OTHER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
OTHER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"

COMMIT: Final = "application/vnd.liberatai.commit.v1"
COMMIT_CONFIG: Final = "application/vnd.liberatai.commit.v1+json"
SIGNATURE: Final = "application/vnd.liberatai.signature.v1"
ENVELOPE: Final = "application/vnd.dsse.envelope.v1+json"
MODEL_MANIFEST: Final = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
WEIGHT_RAW: Final = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_SAFETENSORS: Final = "application/vnd.docker.ai.safetensors"
DOC_RAW: Final = "application/vnd.cncf.model.doc.v1.raw"
COMPRESSED: Final = "application/vnd.liberatai.model.v1"
"""A file of `compressor.artifact`: what a device stores."""
DELTA: Final = "application/vnd.liberatai.model.delta.v1"
"""A stream of `sparsifier`: what leads from one version to the next."""
DIFFERENCE: Final = "application/vnd.liberatai.model.difference.v1"
"""An exact difference of `compressor.exact_difference`."""
BOM: Final = "application/vnd.cyclonedx+json"

FILEPATH: Final = "org.cncf.model.filepath"
TITLE: Final = "org.opencontainers.image.title"
REF: Final = "org.opencontainers.image.ref.name"
OURS: Final = "vnd.liberatai."

MAX_JSON_BYTES: Final = 4 * 1024 * 1024
"""A registry takes manifests of 4 MiB."""
MAX_BLOB_BYTES: Final = 4 << 30
MAX_ENTRIES: Final = 4096

Digest = Annotated[str, Meta(pattern=DIGEST)]
Size = Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]
Text = Annotated[str, Meta(max_length=256)]
Annotations = Annotated[
    dict[Annotated[str, Meta(max_length=256)], Annotated[str, Meta(max_length=65536)]], Meta(max_length=256)
]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What names a blob: its kind, its digest, its length."""

    media_type: Text
    digest: Digest
    size: Size
    annotations: Annotations | None = None
    artifact_type: Text | None = None

    @property
    def sha(self) -> str:
        """Hex digits of the digest."""
        return self.digest.removeprefix("sha256:")

    def note(self, key: str) -> str:
        """Return an annotation; "" if there is none."""
        return (self.annotations or {}).get(key, "")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One artifact: a config and layers."""

    schema_version: Literal[2]
    media_type: Text = MANIFEST
    artifact_type: Text | None = None
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], Meta(max_length=MAX_ENTRIES)]
    subject: Descriptor | None = None
    annotations: Annotations | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Several manifests together."""

    schema_version: Literal[2]
    media_type: Text = INDEX
    artifact_type: Text | None = None
    manifests: Annotated[tuple[Descriptor, ...], Meta(max_length=65_536)]
    annotations: Annotations | None = None


EMPTY_BLOB: Final = b"{}"
_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
Decoded = TypeVar("Decoded")


def encode(value: Any) -> bytes:
    """Return the one JSON text of a value."""
    if isinstance(value, Manifest | Index):
        # These two are defaults here, but must be written.
        fields = msgspec.to_builtins(value)
        return _ENCODER.encode({**fields, "schemaVersion": 2, "mediaType": value.media_type})
    return _ENCODER.encode(value)


def decode(content: bytes, kind: type[Decoded], what: str, *, limit: int = MAX_JSON_BYTES) -> Decoded:
    """Return a value from JSON.

    Raises:
        TooLargeError: the text is longer than any of its kind.
        SchemaError: it is no such value.
    """
    if len(content) > limit:
        raise TooLargeError(f"{what}: {len(content)} bytes, at most {limit}")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise SchemaError(f"{what}: {str(error)[:200]}") from None


def digest_of(content: bytes) -> str:
    """Return the digest of a blob."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def describe(content: bytes, media_type: str, annotations: dict[str, str] | None = None) -> Descriptor:
    """Return the descriptor of a blob."""
    return Descriptor(
        media_type=media_type, digest=digest_of(content), size=len(content), annotations=annotations
    )


def members(content: bytes, media_type: str, what: str) -> tuple[Descriptor, ...]:
    """Return what a manifest or an index names: of an index its manifests, of a manifest config and layers.

    Raises:
        TooLargeError, SchemaError: it is no manifest.
    """
    if media_type in (INDEX, OTHER_INDEX):
        return decode(content, Index, what).manifests
    if media_type in (MANIFEST, OTHER_MANIFEST):
        manifest = decode(content, Manifest, what)
        return (manifest.config, *manifest.layers)
    return ()


def is_manifest(media_type: str) -> bool:
    """Whether a blob of this kind names others."""
    return media_type in (INDEX, MANIFEST, OTHER_INDEX, OTHER_MANIFEST)
