"""Two commits side by side: tensors, figures, bytes, and answers to the same samples."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.names import short
from liberatai_coordinator.repository.store import Loaded, Store
from liberatai_core.errors import StructureError
from liberatai_core.learning.dataset import load_unlabeled
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, Structure
from liberatai_core.units import share_text, size_text
from liberatai_core.weights import Vector


class TensorDiff(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor in both.

    Attributes:
        changed: values that differ.
        norm: Euclidean length of the first one.
        moved: Euclidean length of the difference.
    """

    variant: str
    tensor: str
    values: int
    changed: int
    norm: float
    moved: float


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """What two commits differ in.

    Attributes:
        metrics: name -> (in the first, in the second); None where nobody measured.
        bytes: variant -> (in the first, in the second); 0 where it has none.
        agreement: variant -> share of the samples with the same answer.
        ancestor: commit that both come from; "" for none.
    """

    first: str
    second: str
    ancestor: str
    tensors: tuple[TensorDiff, ...]
    metrics: dict[str, tuple[float | None, float | None]]
    bytes: dict[str, tuple[int, int]]
    agreement: dict[str, float]

    def lines(self) -> Iterator[str]:
        """Yield what a table of tensors does not say."""
        if self.ancestor:
            yield f"both come from {short(self.ancestor)}"
        for name, (before, after) in self.metrics.items():
            yield f"{name.replace('_', ' ')}: {_figure(name, before)} -> {_figure(name, after)}"
        for name, sizes in self.bytes.items():
            yield f"{name}: {size_text(sizes[0])} -> {size_text(sizes[1])}"
        for name, share in self.agreement.items():
            yield f"{name}: same answer on {share:.2%} of the samples"


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return share_text(value) if name.endswith("accuracy") else f"{value:.6g}"


def compare(store: Store, first: Loaded, second: Loaded, samples: Path | None) -> Diff:
    """Return what two commits differ in.

    Args:
        store: that has both.
        first: one commit.
        second: the other one.
        samples: file of inputs, for which both are asked; None: nobody is.

    Raises:
        StructureError: no variant is in both, or nobody knows its family (and samples are given).
        DataError: the samples are not of the model's form.
    """
    mine, theirs = first.commit, second.commit
    rows: list[TensorDiff] = []
    agreement: dict[str, float] = {}
    both = [
        one for one in mine.variants if (two := theirs.variant(one.name)) and one.structure == two.structure
    ]
    for one in both:
        if one.structure is None or not one.weights:
            continue
        other = theirs.variant(one.name)
        if other is None:
            continue
        before, after = tensors.read(store, one), tensors.read(store, other)
        rows += _tensors(one.name, one.structure, before, after)
        if samples is not None:
            agreement[one.name] = _agreement(one.structure, mine.data or theirs.data, before, after, samples)
    if not both and samples is not None:
        raise StructureError("the two commits have no structure in common: nothing to ask both")
    names = [*mine.metrics, *(name for name in theirs.metrics if name not in mine.metrics)]
    variants = [*(one.name for one in mine.variants), *(one.name for one in theirs.variants)]
    sizes = [{one.name: one.bytes for one in commit.variants} for commit in (mine, theirs)]
    return Diff(
        first=first.digest,
        second=second.digest,
        ancestor=store.ancestor(first.digest, second.digest) or "",
        tensors=tuple(rows),
        metrics={name: (mine.metrics.get(name), theirs.metrics.get(name)) for name in names},
        bytes={name: (sizes[0].get(name, 0), sizes[1].get(name, 0)) for name in dict.fromkeys(variants)},
        agreement=agreement,
    )


def _tensors(name: str, structure: Structure, before: Vector, after: Vector) -> Iterator[TensorDiff]:
    for tensor, place in structure.slices():
        old, new = before[place].astype(np.float64), after[place].astype(np.float64)
        yield TensorDiff(
            variant=name,
            tensor=tensor.name,
            values=tensor.size,
            changed=int(np.count_nonzero(old != new)),
            norm=float(np.linalg.norm(old)),
            moved=float(np.linalg.norm(new - old)),
        )


def _agreement(
    structure: Structure, data: DataContract | None, before: Vector, after: Vector, samples: Path
) -> float:
    if data is None or structure.family == tensors.UNNAMED:
        raise StructureError(f"{structure.id}: nobody said of which family it is: it cannot be asked")
    x = load_unlabeled(samples, data)
    answers = [log_probabilities(structure, data, weights, x).argmax(1) for weights in (before, after)]
    return float(np.mean(answers[0] == answers[1]))
