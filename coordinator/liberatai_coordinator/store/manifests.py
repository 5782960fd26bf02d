"""What a version and a variant consist of, as one byte string each; its SHA-256 is the id.

A manifest names blobs of the repository by their SHA-256. No time stands in it: the same content has the same
id, whenever it was made.
"""

import hashlib
import math
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from liberatai_core.contract.limits import (
    MAX_CHAIN,
    MAX_CLASSES,
    MAX_OBJECT_BYTES,
    MAX_ROUND,
    MAX_SAMPLES,
    MAX_TEXT,
)
from liberatai_core.contract.topics import NAME
from liberatai_core.errors import NonFiniteError, SchemaError
from liberatai_core.structure import DataContract, Structure

SHA256: Final = "^[0-9a-f]{64}\\Z"

Sha = Annotated[str, Meta(pattern=SHA256)]
Number = Annotated[int, Meta(ge=0, le=MAX_ROUND)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a manifest: closed and frozen."""


class StepRecord(Record, frozen=True, kw_only=True):
    """A published file: after applying `blob`, a device holds the weights that `digest` names.

    Attributes:
        version: number of the version that it leads to.
        blob: SHA-256 of the file.
        size: its length in bytes.
        digest: SHA-256 of the decoded weights (hex).
    """

    version: Number
    blob: Sha
    size: Annotated[int, Meta(ge=1, le=MAX_OBJECT_BYTES)]
    digest: Sha


class MemberRecord(Record, frozen=True, kw_only=True):
    """One structure of a version.

    Attributes:
        master: blob with the coordinator's own float32 weights (little-endian).
        view: blob with the float32 weights that devices hold after decoding.
        digest: SHA-256 (hex) of those decoded weights, as in a Task's `base`.
        keyframe: the whole model, compressed.
        deltas: what leads from the keyframe to this version: one merged delta, or several where no single
            one is exact.
        class_counts: samples per class of the devices that train this structure; () if not shared.
        samples: samples behind the updates of this version.
        updates: number of updates of this structure in this version.
        optimizer: blobs with the float32 moments of the server optimiser; () if it has none.
        delta: what leads here from the version before; None if a keyframe does.
    """

    structure: Structure
    master: Sha
    view: Sha
    digest: Sha
    keyframe: StepRecord
    deltas: Annotated[tuple[StepRecord, ...], Meta(max_length=MAX_CHAIN)] = ()
    class_counts: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=MAX_CLASSES)] = ()
    samples: Annotated[int, Meta(ge=0, le=MAX_SAMPLES * MAX_SAMPLES)] = 0
    updates: Annotated[int, Meta(ge=0)] = 0
    optimizer: Annotated[tuple[Sha, ...], Meta(max_length=4)] = ()
    delta: StepRecord | None = None

    @property
    def files(self) -> tuple[StepRecord, ...]:
        """Every file that devices may fetch for this version."""
        return (self.keyframe, *self.deltas, *(() if self.delta is None else (self.delta,)))


class Ensemble(Record, frozen=True, kw_only=True):
    """How the structures answer together.

    Attributes:
        method: one of `aggregator.methods.ENSEMBLES`; "single" for one structure without an ensemble.
        members: structure ids, in the order of the rows below.
        weights, log_priors: (members, classes).
        bias, kind: see `aggregator.ensemble.Pool`.
        use: "ensemble", or the id of the structure that the guard fell back to.
        guard: what the guard decided, in words; "" if it had nothing to judge with.
    """

    method: Annotated[str, Meta(max_length=64)]
    members: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    weights: Annotated[tuple[tuple[float, ...], ...], Meta(max_length=64)] = ()
    log_priors: Annotated[tuple[tuple[float, ...], ...], Meta(max_length=64)] = ()
    bias: Annotated[tuple[float, ...], Meta(max_length=MAX_CLASSES)] = ()
    kind: Literal["log", "linear", "vote"] = "log"
    use: Annotated[str, Meta(max_length=128)] = "ensemble"
    guard: Annotated[str, Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        """Refuse numbers that are not finite."""
        if not all(
            math.isfinite(value) for row in (*self.weights, *self.log_priors, self.bias) for value in row
        ):
            raise NonFiniteError("ensemble: a weight, prior or bias is not finite")


class Manifest(Record, frozen=True, kw_only=True):
    """One immutable version of a model. No time stands in it: the id depends on content only.

    Attributes:
        parent: id of the version before; None for the first.
        round: the round that made it; 0 for initial weights.
        structures: structure id -> its weights and files.
        updates: sorted ids (hex) of the updates that it counts.
    """

    model: Annotated[str, Meta(pattern=NAME)]
    number: Number
    parent: Sha | None
    round: Number
    structures: Annotated[dict[str, MemberRecord], Meta(min_length=1, max_length=64)]
    data: DataContract
    updates: tuple[Annotated[str, Meta(pattern="^[0-9a-f]{32}\\Z")], ...] = ()
    ensemble: Ensemble = Ensemble(method="single")

    def __post_init__(self) -> None:
        """Refuse names that do not belong to their structures, and unsorted updates."""
        for name, member in self.structures.items():
            if name != member.structure.id:
                raise SchemaError(f"manifest of {self.model}: {name} is {member.structure.id}")
        if list(self.updates) != sorted(set(self.updates)):
            raise SchemaError(f"manifest of {self.model}: updates are unsorted or doubled")

    @property
    def blobs(self) -> frozenset[str]:
        """SHA-256 of every blob that this version needs."""
        return frozenset(
            sha
            for member in self.structures.values()
            for sha in (
                member.master,
                member.view,
                *member.optimizer,
                *(step.blob for step in member.files),
            )
        )


MAX_WHY: Final = 4096
"""Characters of what a search says about its choice: a few sentences per structure that it tried."""
MAX_SEED: Final = 2**63 - 1


class VariantManifest(Record, frozen=True, kw_only=True):
    """One immutable variant of a model: a file that fits a budget, and what was lost for it.

    Like in a version's manifest, no time stands in it.

    Attributes:
        parent: id of the version that it was made from.
        parent_structure: id of the structure of that version that it stands for.
        structure: its own one: the same, or a smaller member of the family, or of another family.
        file: SHA-256 (hex) of the compressed model (`compressor.artifact`).
        size: length of the file in bytes.
        digest: SHA-256 (hex) of the weights that the file decodes to.
        budget_bytes: that it was made for; the file is not longer.
        method, why: how it was made, and why in this way, in words.
        divergence: mean KL divergence (nats) of its outputs from the parent's; None if nobody measured.
        agreement: share of samples with the parent's top class; None if nobody measured.
        accuracy: on labelled test data; None if there was none.
    """

    model: Annotated[str, Meta(pattern=NAME)]
    parent: Sha
    parent_structure: Annotated[str, Meta(min_length=1, max_length=128)]
    structure: Structure
    data: DataContract
    file: Sha
    size: Annotated[int, Meta(ge=1, le=MAX_OBJECT_BYTES)]
    digest: Sha
    budget_bytes: Annotated[int, Meta(ge=1, le=MAX_OBJECT_BYTES)]
    method: Annotated[str, Meta(max_length=MAX_TEXT)]
    why: Annotated[str, Meta(max_length=MAX_WHY)] = ""
    divergence: Annotated[float, Meta(ge=0)] | None = None
    agreement: Share | None = None
    accuracy: Share | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] = 0

    def __post_init__(self) -> None:
        """Refuse a file that is longer than its budget, and figures that are not finite."""
        if self.size > self.budget_bytes:
            raise SchemaError(
                f"variant of {self.model}: {self.size} bytes are more than its {self.budget_bytes}"
            )
        figures = (self.divergence, self.agreement, self.accuracy)
        if not all(math.isfinite(figure) for figure in figures if figure is not None):
            raise NonFiniteError(f"variant of {self.model}: a figure is not finite")

    @property
    def blobs(self) -> frozenset[str]:
        """SHA-256 of every blob that this variant needs."""
        return frozenset({self.file})


Decoded = TypeVar("Decoded", Manifest, VariantManifest)

# Deterministic: the keys of every dict sorted, the fields of every Struct in the order written here.
_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_DECODER = msgspec.msgpack.Decoder(Manifest)
_VARIANT_DECODER = msgspec.msgpack.Decoder(VariantManifest)


def encode_manifest(manifest: Manifest | VariantManifest) -> bytes:
    """Return the one byte string of a manifest (msgpack)."""
    return _ENCODER.encode(manifest)


def decode_manifest(data: bytes) -> Manifest:
    """Return the version's manifest of `encode_manifest`.

    Raises:
        SchemaError: not a manifest, or not in its one form.
    """
    return _decode(data, _DECODER)


def decode_variant(data: bytes) -> VariantManifest:
    """Return the variant's manifest of `encode_manifest`.

    Raises:
        SchemaError: not a manifest of a variant, or not in its one form.
    """
    return _decode(data, _VARIANT_DECODER)


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[Decoded]) -> Decoded:
    try:
        manifest = decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError) as error:
        raise SchemaError(f"manifest: {str(error)[:200]}") from None
    if _ENCODER.encode(manifest) != data:
        raise SchemaError("manifest: not in canonical form")
    return manifest


def version_id(manifest: Manifest | VariantManifest) -> str:
    """Return the id of a version or a variant: SHA-256 (hex) of its manifest."""
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()
