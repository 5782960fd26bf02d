"""A commit as a value: what it is made of, who made it from what; and the index and manifests that say so.

A commit is an OCI index. Its first manifest is the commit's own (its config is the record below, its layers
card and bill of materials), the others are one per variant. The record names the variants by digest, so one
signature over the index's digest covers everything, and nothing can be exchanged inside.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from liberatai_coordinator.repository.descriptors import (
    COMMIT,
    COMMIT_CONFIG,
    INDEX,
    MANIFEST,
    MODEL_MANIFEST,
    OURS,
    Descriptor,
    Digest,
    Index,
    Manifest,
    describe,
    encode,
)
from liberatai_coordinator.repository.names import MODEL
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.contract.limits import MAX_ROUND, MAX_TEXT
from liberatai_core.errors import NonFiniteError, SchemaError
from liberatai_core.structure import DataContract, Structure

Kind = Literal["import", "variant", "round", "ensemble", "student", "merge", "finetune"]
Runtime = Literal["liberatai", "safetensors", "onnx", "onnx-int8", "other"]
"""What runs a variant: our own compressed form (numpy and torch), named tensors, ONNX, or who knows what."""

MAX_VARIANTS: Final = 256
MAX_PARENTS: Final = 16
MAX_TIME: Final = 2**40

Line = Annotated[str, Meta(max_length=MAX_TEXT)]
Figures = Annotated[dict[Annotated[str, Meta(max_length=64)], float], Meta(max_length=128)]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of everything in a commit: closed and frozen."""


class Variant(Record, frozen=True, kw_only=True):
    """One form of the committed model.

    Attributes:
        name: unique in the commit, e.g. "cnn-width16" or "cnn-width16-120000".
        manifest: digest of its manifest.
        size: bytes of the manifest.
        runtime: what runs it.
        bytes: that a device must store.
        structure: None where the file is of another program and nobody knows the family.
        weights: SHA-256 (hex) of the float32 weights that it decodes to; "" if it has none of ours.
        parent_structure: that a compressed variant stands for; "" if it is that structure itself.
        budget: bytes that it was made for; 0: for none.
        tier: of devices that can run it.
        profile: class of hardware that it was made for; "" for none.
        sparsity: share of the weights that are zero.
        metrics: measured on this variant, e.g. accuracy, agreement, divergence.
        why: how and why it was made, in words.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,159}\Z")]
    manifest: Digest
    size: Annotated[int, Meta(ge=2)]
    runtime: Runtime
    bytes: Annotated[int, Meta(ge=0)]
    structure: Structure | None = None
    weights: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    parent_structure: Annotated[str, Meta(max_length=128)] = ""
    budget: Annotated[int, Meta(ge=0)] = 0
    tier: Literal["", "full", "head", "observe"] = ""
    profile: Annotated[str, Meta(max_length=64)] = ""
    sparsity: Annotated[float, Meta(ge=0, le=1)] = 0.0
    metrics: Figures = {}
    why: Annotated[str, Meta(max_length=4096)] = ""


class Commit(Record, frozen=True, kw_only=True):
    """One immutable state of a model.

    Attributes:
        parents: digests of the commits that it was made from, the first one first.
        author: who made it, in their own word; the signature says whose key.
        time: Unix seconds by the author's clock: advice, nothing depends on it.
        number: of the version in its training; None outside of one.
        job, round: of the training; "" and 0 outside of one.
        updates: contributions of devices in this round.
        metrics: of the whole model, e.g. accuracy, ensemble_accuracy, sparsity.
        labels: names of the classes; () if nobody knows them.
        input_range: least and largest value of inputs; () if nobody knows.
        licence: SPDX expression; "" if nobody said.
        ensemble: how its structures answer together; None for one structure.
        origin: where an imported file or a fetched artifact came from.
    """

    model: Annotated[str, Meta(pattern=MODEL)]
    kind: Kind
    parents: Annotated[tuple[Digest, ...], Meta(max_length=MAX_PARENTS)] = ()
    author: Line = ""
    time: Annotated[int, Meta(ge=0, le=MAX_TIME)] = 0
    message: Annotated[str, Meta(max_length=4096)] = ""
    number: Annotated[int, Meta(ge=0, le=MAX_ROUND)] | None = None
    job: Line = ""
    round: Annotated[int, Meta(ge=0, le=MAX_ROUND)] = 0
    updates: Annotated[int, Meta(ge=0)] = 0
    samples: Annotated[int, Meta(ge=0)] = 0
    metrics: Figures = {}
    data: DataContract | None = None
    labels: Annotated[tuple[Line, ...], Meta(max_length=65_536)] = ()
    input_range: Annotated[tuple[float, ...], Meta(max_length=2)] = ()
    licence: Line = ""
    ensemble: Ensemble | None = None
    origin: Line = ""
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1, max_length=MAX_VARIANTS)]

    def __post_init__(self) -> None:
        """Refuse doubled names and figures that are not finite."""
        if len({variant.name for variant in self.variants}) != len(self.variants):
            raise SchemaError(f"commit of {self.model}: two variants have one name")
        if len(set(self.parents)) != len(self.parents):
            raise SchemaError(f"commit of {self.model}: a parent is named twice")
        figures = [*self.metrics.values(), *self.input_range]
        for variant in self.variants:
            figures += variant.metrics.values()
        if not all(map(math.isfinite, figures)):
            raise NonFiniteError(f"commit of {self.model}: a figure is not finite")

    def variant(self, name: str) -> Variant | None:
        """Return a variant by its name."""
        return next((one for one in self.variants if one.name == name), None)


def variant_notes(model: str, variant: Variant) -> dict[str, str]:
    """Return the annotations by which others can choose among the variants of an index."""
    told = {
        "variant": variant.name,
        "runtime": variant.runtime,
        "bytes": str(variant.bytes),
        "structure": variant.structure.id if variant.structure else "",
        "profile": variant.profile,
        "tier": variant.tier,
        "budget": str(variant.budget) if variant.budget else "",
        "weights": f"sha256:{variant.weights}" if variant.weights else "",
    }
    notes = {f"{OURS}{key}": value for key, value in told.items() if value}
    return {**notes, "org.opencontainers.image.title": f"{model} {variant.name}"}


def manifest_of(commit: Commit, layers: tuple[Descriptor, ...]) -> tuple[bytes, bytes]:
    """Return the commit's own manifest and its config."""
    config = encode(commit)
    notes = {
        f"{OURS}kind": commit.kind,
        f"{OURS}parents": ",".join(commit.parents),
        "org.opencontainers.image.licenses": commit.licence,
        **{f"{OURS}metric.{name}": repr(value) for name, value in sorted(commit.metrics.items())},
    }
    manifest = Manifest(
        schema_version=2,
        artifact_type=COMMIT,
        config=describe(config, COMMIT_CONFIG),
        layers=layers,
        annotations={key: value for key, value in notes.items() if value},
    )
    return encode(manifest), config


def index_of(commit: Commit, own: bytes) -> bytes:
    """Return the index that is the commit; `own` is its manifest."""
    described = [
        Descriptor(
            media_type=MANIFEST,
            digest=variant.manifest,
            size=variant.size,
            annotations=variant_notes(commit.model, variant),
        )
        for variant in commit.variants
    ]
    first = describe(own, MANIFEST, {f"{OURS}variant": "commit"})
    index = Index(
        schema_version=2,
        media_type=INDEX,
        artifact_type=COMMIT,
        manifests=(first, *described),
        annotations={"org.opencontainers.image.title": commit.model, f"{OURS}kind": commit.kind},
    )
    return encode(index)


def variant_manifest(
    config: Descriptor, layers: tuple[Descriptor, ...], notes: Mapping[str, str] | None = None
) -> bytes:
    """Return the manifest of one variant, as CNCF ModelPack has it."""
    manifest = Manifest(
        schema_version=2,
        artifact_type=MODEL_MANIFEST,
        config=config,
        layers=layers,
        annotations=dict(notes) if notes else None,
    )
    return encode(manifest)


def model_config(name: str, family: str, parameters: int, layers: tuple[Descriptor, ...]) -> bytes:
    """Return the config of CNCF ModelPack 0.0.7 for one variant."""
    value = {
        "descriptor": {"name": name, **({"family": family} if family else {})},
        "config": {"format": "safetensors", "paramSize": str(parameters)},
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }
    return encode(value)
