"""Variants of a model: files that fit a budget, checked and committed; and where a file's bytes go.

Whoever fits a model sends a manifest and a file. Nothing in them is believed: the parent must be the
version that was named, the structure what its family builds for the same data, and the file must decode to
the weights that the manifest names. File first, then one row in the ledger: a variant is complete and
verifiable, or absent (promise P3).
"""

import hashlib

from liberatai_coordinator import clock
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.manifests import Manifest, VariantManifest, decode_manifest, decode_variant
from liberatai_coordinator.store.repository import Repository
from liberatai_coordinator.store.rows import VariantRow, VersionRow
from liberatai_core.compressor import artifact, contents
from liberatai_core.errors import (
    DataError,
    DigestError,
    NotFoundError,
    SchemaError,
    StateError,
    StructureError,
)
from liberatai_core.learning.families import structure_of
from liberatai_core.spelling import meant
from liberatai_core.structure import Structure
from liberatai_core.weights import digest


def commit(
    ledger: Ledger,
    repository: Repository,
    model: str,
    version: VersionRow,
    manifest: VariantManifest,
    file: bytes,
    now_s: float | None = None,
) -> VariantRow:
    """Check a variant and store it; the same one again is stored once.

    Args:
        ledger: gets the row.
        repository: gets the file.
        model: name of the model.
        version: that the variant is added to.
        manifest: what the variant says of itself.
        file: the compressed model.
        now_s: Unix seconds; None: the clock.

    Raises:
        SchemaError: it is a variant of another model.
        StateError: it was made from another version.
        NotFoundError: the version has no such structure.
        DataError, StructureError: it is for other data, or its family builds something else.
        DigestError: the file is not the one that the manifest names, or decodes to other weights.
        CodecError, BombError, TooLargeError: the file is damaged.
        DiskError: the disk is full or refuses.
    """
    _check_parent(model, version, manifest)
    _check_structure(manifest)
    _check_file(manifest, file)
    with repository.holding():
        found, encoded = repository.commit_variant(manifest, file)
        row = VariantRow(
            model=model,
            number=version.number,
            id=found,
            structure=manifest.structure.id,
            size_bytes=manifest.size,
            manifest=encoded,
            created_s=clock.wall() if now_s is None else now_s,
        )
        ledger.versions.add_variant(row)
    return ledger.versions.variant(model, found)


def _check_parent(model: str, version: VersionRow, manifest: VariantManifest) -> None:
    if manifest.model != model:
        raise SchemaError(f"the variant says it is of {manifest.model}, not of {model}")
    if manifest.parent != version.id:
        raise StateError(
            f"{model} version {version.number} is {version.id[:12]}, the variant was made from "
            f"{manifest.parent[:12]}: fit that version again"
        )
    parent: Manifest = decode_manifest(version.manifest)
    if manifest.parent_structure not in parent.structures:
        known = ", ".join(sorted(parent.structures))
        raise NotFoundError(
            f"{model} version {version.number} has no structure {manifest.parent_structure!r}"
            f"{meant(manifest.parent_structure, parent.structures)} (known: {known})"
        )
    if manifest.data != parent.data:
        raise DataError(
            f"the variant is for samples {manifest.data.input_shape} and {manifest.data.classes} classes, "
            f"{model} for {parent.data.input_shape} and {parent.data.classes}"
        )


def _check_structure(manifest: VariantManifest) -> None:
    told = manifest.structure
    if structure_of(told.family, told.params, manifest.data) != told:
        raise StructureError(f"{told.id}: its tensors are not those that its family builds for this data")


def _check_file(manifest: VariantManifest, file: bytes) -> None:
    if (len(file), hashlib.sha256(file).hexdigest()) != (manifest.size, manifest.file):
        raise DigestError(
            f"the variant's file ({len(file)} bytes) is not the one that its manifest names "
            f"({manifest.size} bytes): it was damaged on the way"
        )
    if digest(artifact.restore(file, manifest.structure)).hex() != manifest.digest:
        raise DigestError("the variant's file decodes to other weights than its manifest names")


def file_of(repository: Repository, row: VariantRow) -> bytes:
    """Return a variant's file, verified.

    Raises:
        NotFoundError, DigestError: it is missing or damaged.
    """
    return repository.get(decode_variant(row.manifest).file)


def tensor_sizes(repository: Repository, file: str, structure: Structure) -> list[contents.TensorSize]:
    """Return where the bytes of a model file go.

    Args:
        repository: that has it.
        file: SHA-256 (hex) of the file.
        structure: of the model in it.

    Raises:
        NotFoundError, DigestError: it is missing or damaged.
    """
    return contents.sizes(repository.get(file), structure)
