"""A commit for one machine: the variant that fits is picked, or made, and written with its card.

A pull adapts the model to the hardware: what is stored already in a form that fits is taken, the best one by
what was measured for all; else the largest structure is brought into the form that was asked for.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.repository import cards, tensor_file, tensors
from liberatai_coordinator.repository.commits import Commit, Variant
from liberatai_coordinator.repository.descriptors import COMPRESSED
from liberatai_coordinator.repository.layout import write_all
from liberatai_coordinator.repository.names import short
from liberatai_coordinator.repository.store import Loaded, Store
from liberatai_core.compressor.codebook import compress, smallest_bytes
from liberatai_core.errors import BudgetError, ConfigError, DiskError, NotFoundError, StructureError
from liberatai_core.learning import export
from liberatai_core.learning.quantised_onnx import to_onnx_int8
from liberatai_core.model import Description, description_file
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

Runtime = Literal["safetensors", "numpy", "onnx", "onnx-int8"]
NAMES: Final[Mapping[str, str]] = {
    "safetensors": "model.safetensors",
    "numpy": "model.lam",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
}
PLAIN_BITS: Final = 8.0
"""Per weight of a compressed file that nobody gave a budget for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What was pulled.

    Attributes:
        variant: name of the variant, or of the structure that a form was made of.
        file: name of the model's file.
        bytes: its length.
        made: whether it was made for this pull.
        why: why this one, in words.
    """

    commit: str
    variant: str
    runtime: str
    file: str
    bytes: int
    made: bool
    why: str


def pull(
    store: Store,
    loaded: Loaded,
    folder: Path,
    *,
    runtime: Runtime | None = None,
    room: int | None = None,
    variant: str | None = None,
    unlabeled: NDArray[np.float32] | None = None,
) -> Pulled:
    """Write the fitting form of a commit to a folder, with its model card and what it is.

    Args:
        store: that has it.
        loaded: the commit.
        folder: made if it is not there.
        runtime: what shall run it; None: a compressed file if a budget is given, else named tensors.
        room: bytes that the file may have; None: any number.
        variant: only this variant or structure.
        unlabeled: inputs on which int8 is calibrated.

    Raises:
        NotFoundError: no such variant. BudgetError: nothing fits, and nothing can be made that does.
        StructureError: the form needs a family that nobody named.
        ConfigError: int8 without inputs. DiskError: the disk refuses.
    """
    wanted = runtime or ("numpy" if room is not None else "safetensors")
    every = [*loaded.commit.variants, *fitted(store, loaded)]
    if variant is not None:
        every = [one for one in every if variant in (one.name, one.parent_structure)]
        if not every:
            known = ", ".join(one.name for one in loaded.commit.variants)
            raise NotFoundError(f"{short(loaded.digest)} has no variant {variant!r}: {known}")
    ready = _ready(store, every, wanted, room)
    if ready is not None:
        one, content, why = ready
        made = False
    else:
        one, content, why = _made(store, every, loaded.commit, wanted, room, unlabeled)
        made = True
    content = _described(content, wanted, loaded, one)
    found = Pulled(
        commit=loaded.digest,
        variant=one.name,
        runtime=wanted,
        file=NAMES[wanted],
        bytes=len(content),
        made=made,
        why=why,
    )
    record = {**_texts(loaded, one), "file": found.file, "runtime": wanted, "why": why}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}") from None
    write_all(
        {
            folder / found.file: content,
            folder / cards.CARD_FILE: cards.card(loaded.commit).encode(),
            folder / "model.json": msgspec.json.format(msgspec.json.encode(record), indent=2),
            **_beside(folder / found.file, wanted, loaded.commit, one),
        }
    )
    return found


def _beside(file: Path, wanted: Runtime, commit: Commit, one: Variant) -> dict[Path, bytes]:
    """Return what `liberatai_core.model.load` needs beside a compressed file."""
    shape = one.structure
    if wanted != "numpy" or shape is None or commit.data is None or shape.family == tensors.UNNAMED:
        return {}
    known = Description(
        family=shape.family,
        params=dict(shape.params),
        data=commit.data,
        classes=commit.labels,
        model=commit.model,
        version=commit.number or 0,
    )
    return dict([description_file(file, known)])


def fitted(store: Store, loaded: Loaded) -> list[Variant]:
    """Return the compressed variants that were made of a commit later."""
    found: list[Variant] = []
    for named in store.names(loaded.commit.model):
        entry = store.entry(named.digest)
        if entry.kind == "variant" and loaded.digest in entry.parents:
            found += store.read(named.digest).commit.variants
    return found


def _ready(
    store: Store, every: Sequence[Variant], wanted: Runtime, room: int | None
) -> tuple[Variant, bytes, str] | None:
    """Return a stored file that fits as it is."""
    runtimes = {"numpy": "liberatai", "onnx": "onnx", "onnx-int8": "onnx-int8"}
    fitting: list[tuple[Variant, str]] = []
    for one in every:
        layers = store.layers(one) if one.runtime == runtimes.get(wanted) else ()
        single = len(layers) == 1 and (wanted != "numpy" or layers[0].media_type == COMPRESSED)
        if single and (room is None or one.bytes <= room):
            fitting.append((one, layers[0].digest))
    if not fitting or (wanted == "numpy" and room is None):
        return None
    rated = next(
        (name for name in ("accuracy", "agreement") if all(name in one.metrics for one, _ in fitting)), ""
    )
    best, digest = max(
        fitting,
        key=lambda pair: (pair[0].metrics[rated] if rated else pair[0].bytes, -pair[0].bytes),
    )
    reason = (
        f"best {rated} of {len(fitting)} that fit" if rated else f"the largest of {len(fitting)} that fit"
    )
    return best, store.layout.get(digest, limit=best.bytes), reason


def _made(
    store: Store,
    every: Sequence[Variant],
    commit: Commit,
    wanted: Runtime,
    room: int | None,
    unlabeled: NDArray[np.float32] | None,
) -> tuple[Variant, bytes, str]:
    """Return a file that is made of the most capable structure for which it fits."""
    whole = [one for one in every if one.structure is not None and one.weights and not one.budget]
    if not whole:
        raise StructureError(f"{commit.model}: no weights of which {wanted} could be made")
    ranked = sorted(
        whole,
        key=lambda one: (
            -one.metrics.get("accuracy", 0.0),
            -(one.structure.parameters if one.structure else 0),
        ),
    )
    refused = ""
    for one in ranked:
        structure = one.structure
        if structure is None:
            continue
        weights = tensors.read(store, one)
        if wanted == "numpy" and room is not None and smallest_bytes(structure) > room:
            refused = refused or f"{one.name} takes {smallest_bytes(structure)} bytes at least"
            continue
        content = _form(structure, weights, commit, wanted, room, unlabeled)
        if room is None or len(content) <= room:
            return one, content, f"made of {one.name}" + (f" for {room} bytes" if room is not None else "")
        refused = refused or f"{one.name} as {wanted} takes {len(content)} bytes"
    raise BudgetError(f"{commit.model}: nothing fits into {room} bytes ({refused})")


def _form(
    structure: Structure,
    weights: Vector,
    commit: Commit,
    wanted: Runtime,
    room: int | None,
    unlabeled: NDArray[np.float32] | None,
) -> bytes:
    if wanted == "safetensors":
        return tensor_file.encode(structure, weights, tensor_file.FORMAT)
    if wanted == "numpy":
        return compress(weights, structure, room or 4 * structure.parameters + 65_536, max_bits=PLAIN_BITS)
    if commit.data is None or structure.family == tensors.UNNAMED:
        raise StructureError(
            f"{structure.id}: nobody said of which family and for which data (commit --family)"
        )
    if wanted == "onnx":
        return export.onnx_bytes(structure, commit.data, weights)
    if unlabeled is None:
        raise ConfigError("--unlabeled", ["missing: onnx-int8 is calibrated on inputs like the devices'"])
    return _int8(structure, weights, commit, unlabeled)


def _int8(structure: Structure, weights: Vector, commit: Commit, unlabeled: NDArray[np.float32]) -> bytes:
    if commit.data is None:
        raise StructureError(f"{structure.id}: nobody said for which data")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx_int8(structure, commit.data, weights, unlabeled, path)
        return path.read_bytes()


def _texts(loaded: Loaded, one: Variant) -> dict[str, str]:
    """Return what a file says of itself."""
    commit = loaded.commit
    told = {
        "model": commit.model,
        "commit": loaded.digest,
        "version": "" if commit.number is None else str(commit.number),
        "variant": one.name,
        "structure": one.structure.id if one.structure else "",
        "weights_sha256": one.weights,
        "classes": ",".join(commit.labels) or (str(commit.data.classes) if commit.data else ""),
        "input_shape": "x".join(map(str, commit.data.input_shape)) if commit.data else "",
        "input_range": ":".join(f"{value:g}" for value in commit.input_range),
        "licence": commit.licence,
    }
    return {key: value for key, value in told.items() if value}


def _described(content: bytes, wanted: Runtime, loaded: Loaded, one: Variant) -> bytes:
    """Return a file with what it is inside, where its form has room for it."""
    if wanted in ("onnx", "onnx-int8"):
        return export.described(content, _texts(loaded, one))
    if wanted == "safetensors" and one.structure is not None:
        weights = tensor_file.flat(content, one.structure)
        return tensor_file.encode(one.structure, weights, {**_texts(loaded, one), **tensor_file.FORMAT})
    return content
