"""Train and send a random part of every large tensor: the same coordinates on all devices of a job.

A large network needs only a small share of its parameters to be trained: the rest may keep the random
values that it started with (the intrinsic dimension of objective landscapes: Li et al., ICLR 2018,
arXiv:1804.08838; trained random masks: Konečný et al., arXiv:1610.05492). The part is drawn from a seed that
is part of the job, so it costs no bytes; differences inside it are dense enough to cost two bits per
coordinate instead of ten; and error feedback catches up in a few rounds, because a fifth of the part is
sent in each.

With a share s of a tensor's weights, the outputs move s times as fast for the same step. So gradients are
multiplied by 1 / s (`gain`), which keeps the speed of training in the space of functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from liberatai_core.sparsifier.support import Positions, draw, part_of
from liberatai_core.structure import Structure, Tensor, head_places, head_tensors, trains_head
from liberatai_core.weights import Vector

SMALLEST = 2000
"""Tensors up to this many values are trained whole: first layers, norms, biases and heads carry much."""

_SHARE, _AT, _POWER = 0.15, 250_000, 0.85
"""The measured share of a model of 0.25 million parameters, and how it falls with size: 0.033 at 1.5 million
(`docs/sparsifier.md`)."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The coordinates that a job trains.

    Attributes:
        structure: of the whole model.
        part: of the gathered coordinates: same tensors, flat, with fewer values.
        positions: int64, strictly increasing, shape (part.parameters,); empty if everything is trained.
        gain: float32, shape (parameters,): what a gradient is multiplied with, 0 outside the part; None if
            everything is trained.
    """

    structure: Structure
    part: Structure
    positions: Positions
    gain: Vector | None

    def gather(self, whole: Vector) -> Vector:
        """Return the values of the part, shape (part.parameters,); the vector itself if all is trained."""
        return whole if self.gain is None else whole[self.positions]

    def replaced(self, whole: Vector, values: Vector) -> Vector:
        """Return a copy of a whole vector that has these values in the part."""
        if self.gain is None:
            return values
        copy = whole.copy()
        copy[self.positions] = values
        return copy

    def added(self, whole: Vector, values: Vector) -> Vector:
        """Return a copy of a whole vector to whose part these values were added, in float32."""
        return self.replaced(whole, self.gather(whole) + values)


def recommended_share(parameters: int) -> float:
    """Return the share that suits a model of so many parameters where a job names none."""
    return min(1.0, _SHARE * math.pow(_AT / parameters, _POWER))


def subspace(structure: Structure, share: float, seed: int, *, smallest: int = SMALLEST) -> Subspace:
    """Return the coordinates that a share and a seed name; the same on every machine.

    Args:
        structure: the named tensors of the flat vector.
        share: of every tensor with more than `smallest` values, in (0, 1]; such a tensor keeps at least
            `smallest` values. 1: everything is trained. Of a structure whose head alone is trained it is
            that, whole, whatever the share.
        seed: 0 … 2^63.
        smallest: see `share`.

    Raises:
        ValueError: the share or the seed is out of range.
    """
    if not 0 < share <= 1 or not 0 <= seed <= 2**63:
        raise ValueError(f"share {share} must lie in (0, 1] and seed {seed} in 0 … 2^63")
    if trains_head(structure):
        return _head(structure)
    sizes = tuple(tensor.size for tensor in structure.tensors)
    if all(_count(size, share, smallest) == size for size in sizes):
        return Subspace(structure, structure, np.empty(0, np.int64), None)
    positions, gain = _drawn(sizes, share, seed, smallest)
    return Subspace(structure, part_of(structure, positions), positions, gain)


def trained_structure(structure: Structure, share: float, *, smallest: int = SMALLEST) -> Structure:
    """Return the `part` of a subspace, which depends on no seed: nothing is drawn for it.

    Args:
        structure: the named tensors of the flat vector.
        share: as for `subspace`.
        smallest: as for `subspace`.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must lie in (0, 1]")
    if trains_head(structure):
        return _head_alone(structure)
    counts = [_count(tensor.size, share, smallest) for tensor in structure.tensors]
    if all(count == tensor.size for count, tensor in zip(counts, structure.tensors, strict=True)):
        return structure
    tensors = tuple(
        Tensor(tensor.name, (count,)) for tensor, count in zip(structure.tensors, counts, strict=True)
    )
    return Structure(family=structure.family, params=structure.params, tensors=tensors)


def _head(structure: Structure) -> Subspace:
    """Return the last layer, whole."""
    places = head_places(structure)
    gain = np.zeros(structure.parameters, np.float32)
    gain[places] = 1
    return Subspace(structure, _head_alone(structure), np.arange(places.start, places.stop), gain)


def _head_alone(structure: Structure) -> Structure:
    return Structure(family=structure.family, params=structure.params, tensors=head_tensors(structure))


def _count(size: int, share: float, smallest: int) -> int:
    return max(min(size, smallest), round(share * size))


@lru_cache(maxsize=4)
def _drawn(sizes: Sequence[int], share: float, seed: int, smallest: int) -> tuple[Positions, Vector]:
    """Return positions and gain, read-only: they are asked for again in every round."""
    chosen, gain, start = [], np.ones(sum(sizes), np.float32), 0
    for number, size in enumerate(sizes):
        count = _count(size, share, smallest)
        inside = np.arange(start, start + size)
        if count < size:
            inside = np.sort(draw(size, count, seed + number)) + start
            gain[start : start + size] = 0
            gain[inside] = np.float32(size / count)
        chosen.append(inside)
        start += size
    positions = np.concatenate(chosen)
    positions.setflags(write=False)
    gain.setflags(write=False)
    return positions, gain
