"""What a version consists of: a member per structure, and the samples that the coordinator itself has."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_core.aggregator import server_optimizer as optimizers
from liberatai_core.contract.messages import part_seed
from liberatai_core.learning.training import log_probabilities
from liberatai_core.sparsifier import methods, subspace
from liberatai_core.sparsifier.subspace import Subspace, recommended_share
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

Floats = NDArray[np.float32]
T = TypeVar("T")
Labels = NDArray[np.int64]
Labelled = tuple[Floats, Labels]


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One structure of a version.

    Attributes:
        master: the coordinator's float32 weights, shape (parameters,).
        view: the exact weights that devices hold, shape (parameters,).
        class_counts: samples of each class behind the structure, shape (classes,), sums over devices.
        optimizer: state of the server optimiser.
    """

    structure: Structure
    master: Vector
    view: Vector
    class_counts: NDArray[np.float64]
    optimizer: optimizers.ServerState


@dataclass(frozen=True, kw_only=True, eq=False)
class Public:
    """What the coordinator itself has: unlabeled inputs, and perhaps a labelled sample for the guard."""

    unlabeled: Floats | None = None
    validation: Labelled | None = None


def trained_share(job: JobSpec, structure: Structure) -> float:
    """Return the share of a structure's large tensors that the job trains."""
    choice = job.choice(structure.family, structure.params)
    named = (choice.trained_share if choice else None) or job.sparsify.trained_share
    if named is not None:
        return named
    # Baselines without feedback are what their papers say: they train everything.
    feedback = methods.METHODS[job.sparsify.method].feedback
    return recommended_share(structure.parameters) if feedback else 1.0


def trained_part(job: JobSpec, structure: Structure) -> Subspace:
    """Return the coordinates of a structure that the job trains."""
    seed = part_seed(job.seed, job.name, structure.id)
    return subspace.subspace(structure, trained_share(job, structure), seed)


def trained_structure(job: JobSpec, structure: Structure) -> Structure:
    """Return the `part` of `trained_part`: the same object for the same two, as every update asks for it."""
    return _trained_structure(_Same(job), _Same(structure))


class _Same(Generic[T]):
    """An object that equals itself only: settings and structures hold dicts, which have no hash."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(64)
def _trained_structure(job: _Same[JobSpec], structure: _Same[Structure]) -> Structure:
    return subspace.trained_structure(structure.value, trained_share(job.value, structure.value))


def outputs(
    members: Mapping[str, Member], weights: Mapping[str, Vector], data: DataContract, x: Floats
) -> Floats:
    """Return the members' log-probabilities, shape (members, n, classes), in the order of their ids."""
    return np.stack([log_probabilities(members[s].structure, data, weights[s], x) for s in sorted(members)])


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """Return a seed for one purpose and round: 31 bits of a hash, so no two purposes share a stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{number}".encode()).digest()[:4], "big") >> 1
