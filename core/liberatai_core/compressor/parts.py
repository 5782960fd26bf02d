"""How the weights of a model file are joined into messages, and what of an index is a symbol: both ends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.compressor.layout import (
    CODEBOOK,
    Bytes,
    Coding,
    Indices,
    Integers,
    Tables,
    axes_of,
    classes_of,
)
from liberatai_core.cursor import varint
from liberatai_core.structure import Structure

MAGIC = b"LAM2"
DIGEST = 32
LONGEST = 4096
"""Most symbols per lane: bounds the time of the decoder's loop, about 20 us per row of lanes."""
_PARTS = (1 << 18, 1 << 19)
"""Weights of a message: a decoder holds about 14 bytes for each of them, and wants many lanes in each row."""
PORTION = 1 << 15
"""Weights whose raw bits lie together: a decoder's intermediate results fit a cache."""


@dataclass(frozen=True)
class Part:
    """Weights start … stop of tensor `number`."""

    number: int
    start: int
    stop: int

    def portions(self) -> Iterator["Part"]:
        """Yield parts whose raw bits lie together."""
        for start in range(self.start, self.stop, PORTION):
            yield Part(self.number, start, min(start + PORTION, self.stop))


def symbols_of(coding: Coding, distances: Integers) -> Integers:
    """Return what is entropy-coded of distances: they themselves in a codebook, their classes on a grid."""
    return distances if coding.kind == CODEBOOK else classes_of(distances)


def distances_of(coding: Coding, indices: Indices) -> Integers:
    """Return how far indices are from the centre, if there is one."""
    distances = indices.astype(np.int64)
    if coding.centre:
        distances -= coding.centre
        np.abs(distances, out=distances)
    return distances


def two_sided(coding: Coding, distances: Indices) -> NDArray[np.bool_]:
    """Return which weights have a sign."""
    near = coding.reaches[0]
    return (distances > 0) & (distances <= near)


def groups(layouts: Sequence[tuple[Coding, Tables]], structure: Structure) -> Iterator[list[Part]]:
    """Yield the parts of tensors of each message."""
    largest = max(tensor.size for tensor in structure.tensors)
    limit = min(max(2 * largest, _PARTS[0]), _PARTS[1])
    group: list[Part] = []
    weights = tables = 0
    for number, ((coding, own_tables), tensor) in enumerate(zip(layouts, structure.tensors, strict=True)):
        if not coding.quantised:
            continue
        own = sum(codes is not None for codes in own_tables.codes)
        if group and (weights + tensor.size > limit or tables + own > rans.MAX_TABLES):
            yield group
            group, weights, tables = [], 0, 0
        if tensor.size > limit:
            size = -(-tensor.size // -(-tensor.size // limit))
            for start in range(0, tensor.size, size):
                yield [Part(number, start, min(start + size, tensor.size))]
            continue
        group.append(Part(number, 0, tensor.size))
        weights, tables = weights + tensor.size, tables + own
    if group:
        yield group


def coded_of(
    group: list[Part], layouts: Sequence[tuple[Coding, Tables]], structure: Structure
) -> rans.Coded | None:
    """Return the tables of a message; None if it has no symbols."""
    frequencies: list[Integers] = []
    counts, owners = [], []
    each: list[Bytes] = []
    several = any(layouts[part.number][1].classes for part in group)
    for part in group:
        tables = layouts[part.number][1]
        if not tables.codes:
            continue
        first, size = len(frequencies), part.stop - part.start
        frequencies += tables.frequencies()
        counts.append(size)
        owners.append(first)
        if several:
            of_weight = tables.owners(axes_of(structure.tensors[part.number].shape))
            if of_weight is None:
                each.append(np.full(size, first, np.uint8))
            else:
                each.append(of_weight[part.start : part.stop] + np.uint8(first))
    if not frequencies:
        return None
    return rans.Coded(frequencies, counts, owners, np.concatenate(each) if several else None)


def header_bytes(structure: Structure) -> int:
    """Return the bytes of a file before its records."""
    return len(MAGIC) + DIGEST + len(varint(structure.parameters)) + len(varint(len(structure.tensors)))
