"""Where the bytes of a model file go, and what an ideal table per tensor would take."""

import math
from dataclasses import dataclass

import numpy as np

from liberatai_core import rans
from liberatai_core.compressor.layout import (
    DRAWN,
    GRID,
    Coding,
    Tables,
    axes_of,
    class_widths,
    classes_of,
    record,
)
from liberatai_core.compressor.parts import (
    Part,
    distances_of,
    groups,
    header_bytes,
    symbols_of,
    two_sided,
)
from liberatai_core.compressor.reading import opened, read
from liberatai_core.structure import Structure


@dataclass(frozen=True, slots=True)
class TensorSize:
    """Where the bytes of a file go.

    Attributes:
        name: of the tensor; "header" for what stands before the first record.
        kind: "constant", "half", "full", "grid", "codebook", "drawn" or "header".
        weights: number of them.
        bytes: of its record and its share of the messages; whole bytes that add up to the file's size.
        distinct: different values that the coding allows.
    """

    name: str
    kind: str
    weights: int
    bytes: int
    distinct: int


_KINDS = ("constant", "half", "full", "grid", "codebook", "drawn")


def sizes(artifact: bytes, structure: Structure) -> list[TensorSize]:
    """Return where the bytes of a file go: its header first, then every tensor in order.

    The bytes of a message are shared in proportion to the information of its tensors.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    reader, _, layouts = opened(artifact, structure)
    codings = read(artifact, structure)
    heads = [len(record(coding, tables)) for coding, tables in layouts]
    shares = [0.0] * len(layouts)
    for group in groups(layouts, structure):
        before = reader.at
        reader.take(reader.varint())
        bits = [_information(codings[p.number], layouts[p.number][1], p, structure) for p in group]
        for part, information in zip(group, bits, strict=True):
            shares[part.number] += (reader.at - before) * information / (sum(bits) or 1.0)
    ends = np.rint(np.cumsum(np.array(heads) + np.array(shares))).astype(np.int64)
    own = np.diff(ends, prepend=0).tolist()
    rows = [TensorSize("header", "header", 0, header_bytes(structure), 0)]
    for tensor, coding, size in zip(structure.tensors, codings, own, strict=True):
        rows.append(TensorSize(tensor.name, _KINDS[coding.kind], tensor.size, size, _distinct(coding)))
    return rows


def entropy_bits(artifact: bytes, structure: Structure) -> float:
    """Return what the indices of a file would take with one ideal table per tensor: order-0 entropy.

    Indices that are stored raw, in small tensors, count as they are: a table would cost more.
    """
    bits = 0.0
    for coding in read(artifact, structure):
        if coding.raw_bits:
            bits += coding.raw_bits * coding.indices.size
        elif coding.quantised:
            symbols, distances = coding.indices.astype(np.int64), np.zeros(0, np.int64)
            if coding.kind == GRID:
                # Rests of distances are noise that no table of a finite tensor could tell from a law.
                distances = distances_of(coding, symbols)
                signs = np.where(symbols < (coding.centre or 0), -1, 1)
                symbols = signs * classes_of(distances)
            counts = np.unique(symbols, return_counts=True)[1].astype(np.float64)
            bits += float(counts @ (math.log2(symbols.size) - np.log2(counts)))
            bits += float(class_widths(classes_of(distances)).sum())
    return bits


def _distinct(coding: Coding) -> int:
    if coding.kind == DRAWN:
        return 2 * coding.reach + 1
    if coding.values is not None:
        return int(np.unique(coding.values).size)
    return int(np.unique(coding.indices).size) if coding.quantised else 1


def _information(coding: Coding, tables: Tables, part: Part, structure: Structure) -> float:
    if coding.raw_bits:
        return float(coding.raw_bits * (part.stop - part.start))
    distances = distances_of(coding, coding.indices[part.start : part.stop])
    symbols = symbols_of(coding, distances)
    bits = float(np.count_nonzero(two_sided(coding, distances)))
    if coding.kind == GRID:
        bits += float(class_widths(symbols).sum())
    costs = rans.PRECISION - np.log2(np.stack(tables.frequencies()))
    owners = tables.owners(axes_of(structure.tensors[part.number].shape))
    rows = 0 if owners is None else owners[part.start : part.stop].astype(np.intp)
    return bits + float(costs[rows, symbols].sum())
