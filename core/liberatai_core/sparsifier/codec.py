"""Bytes of a sparse difference, both ends.

A difference is a row of non-zeros: gap to the one before, sign, magnitude. Gaps fall into classes (exact
below 16, then eight per octave, the rest of the gap being raw bits) that are entropy-coded together with
magnitudes by `rans`. A table is two bytes: real updates lie in clusters, so beside the geometric law of
independent positions (Golomb 1966) there are heavy tails, S(g) = (1 + g / c)^-a (Lomax 1954);
runs of non-zeros with unlike densities (a convolution, a large dense layer) get tables of their own.
Neighbours in an update often have the same sign: where it pays, what is coded is whether the sign changes,
given the class of the gap, in one symbol with it. Decoding is integer arithmetic and one exact float32
multiplication (8-bit scale times at most 8-bit level), so it gives the same bits on every machine.
Sparse ternary updates are those of Sattler et al., arXiv 1903.02891; measured by
`benchmarks/sparsifier_codec.py`.

Stream 3, sparse::

    u8 3 | varint parameters | varint non-zeros k | nothing more if k = 0
    varint flags: 1 signs are modelled, 2 there are magnitudes above 1, 4 several gap tables,
                  8 gap table follows from k and parameters; from bit 4: groups - 1
    (groups - 1) x varint non-zeros | groups x u16 scale (upper half of a float32)
    if 4: varint tables - 2, (tables - 1) x varint non-zeros
    gap tables, but none if 8; if signs are modelled, 3 x u8: 256 x share of changes after gaps
        of 0, 1 ... 7, more
    if 2: table of magnitudes - 1
    if signs are modelled: varint lanes; otherwise `free_lanes` of symbols and k
    rANS message: k gap classes, then, if 2, k classes of magnitude - 1
        raw bits: rests of gaps | signs (1 = negative; absent if modelled) | rests of magnitudes

    table: u8 law | u8 scale          law 0 ... 7: Lomax, a = SHAPES[law] / 8, c = 2^(scale / 8 - 4)
                                      law 8: geometric, log2 of the ratio = -2^(4 - scale / 8)
           u8 9 | u8 classes - 1 | u8 per class: 8 x -log2(share), 255: none

Stream 2, plain float32 values (baseline)::

    u8 2 | varint parameters | varint k | k x u32 positions | k x f32 values

Stream 4, dense float32 (baseline)::

    u8 4 | varint parameters | parameters x f32 values

All integers are little-endian, bits are packed high bit first; a varint has 7 bits per byte, low bits
first, at most 5 bytes. Number 1 was the Golomb code; it is refused.
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core import rans
from liberatai_core.cursor import varint
from liberatai_core.errors import CodecError
from liberatai_core.sparsifier.choice import best_law, choose
from liberatai_core.sparsifier.decoder import Entries, decode, decode_all
from liberatai_core.sparsifier.stream import (
    DENSE,
    GROUPS_SHIFT,
    IMPLIED,
    MAGNITUDES,
    MAX_LEVELS,
    PLAIN,
    SEVERAL,
    SIGNS,
    SPARSE,
    Integers,
    Sparse,
    check_positions,
)
from liberatai_core.sparsifier.tables import (
    CLASSES,
    IMPLIED_LAW,
    LONGEST,
    classes_of,
    coded_by,
    free_lanes,
    rests,
)
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS
from liberatai_core.weights import Vector, require_finite

__all__ = [
    "DENSE",
    "MAX_LEVELS",
    "PLAIN",
    "SPARSE",
    "Entries",
    "Integers",
    "Sparse",
    "decode",
    "decode_all",
    "encode",
    "encode_dense",
    "encode_plain",
    "round_scale",
]


def round_scale(scale: float) -> np.float32:
    """Return the nearest float32 with 8 significant bits (its lower half zero); 0 if too small."""
    bits = int(np.float32(scale).view(np.uint32))
    return np.uint32(min((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, 0x7F7F) << 16).view(np.float32)


def encode(sparse: Sparse, parameters: int) -> bytes:
    """Return the stream of a sparse difference over `parameters` values.

    Groups should end where the statistics change, e.g. where tensors do: gap tables end there, too.

    Raises:
        IndexRangeError: a position is not in [0, parameters).
        IndexOrderError: positions are unsorted or doubled.
        NonFiniteError: a scale is NaN or infinite.
        CodecError: levels, counts or scales are not as `Sparse` says.
    """
    check_positions(sparse.positions, parameters)
    count = sparse.positions.size
    start = bytes([SPARSE]) + varint(parameters) + varint(count)
    if count == 0:
        return start
    magnitudes = np.abs(sparse.levels)
    _check_values(sparse, magnitudes)
    # 32 bits hold any gap: what the encoder needs beside the difference stays small.
    gaps = sparse.positions.astype(np.int32)
    gaps[1:] -= gaps[:-1] + np.int32(1)
    classes, negative = classes_of(gaps), sparse.levels < 0
    symbols = (classes.astype(np.uint16) << np.uint16(1)) | np.diff(negative, prepend=False)
    plan = choose(symbols, sparse.counts, parameters)
    magnitude_table = None
    raw = [rests(gaps, classes)]
    del gaps
    if not plan.signs:
        symbols = classes
        raw.append((negative.astype(np.uint32), np.ones(count, np.uint8)))
    if several := int(magnitudes.max()) > 1:
        magnitudes -= 1
        classes = classes_of(magnitudes)
        magnitude_table, _ = best_law(np.bincount(classes, minlength=CLASSES))
        symbols = np.concatenate([symbols, classes])
        raw.append(rests(magnitudes, classes))
    flags = SIGNS * plan.signs | MAGNITUDES * several | SEVERAL * (len(plan.laws) > 1)
    flags |= IMPLIED * (plan.laws[0] == IMPLIED_LAW)
    head = [start, varint((sparse.counts.size - 1) << GROUPS_SHIFT | flags)]
    head += map(varint, sparse.counts[:-1].tolist())
    head.append((sparse.scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes())
    if len(plan.laws) > 1:
        head += [varint(len(plan.laws) - 2), *map(varint, plan.counts[:-1])]
    for law, shares in zip(plan.laws, plan.changes, strict=True):
        head += [b"" if law == IMPLIED_LAW else law, bytes(shares)]
    head.append(magnitude_table or b"")
    coded = coded_by(plan, magnitude_table, parameters, count)
    values, widths = (np.concatenate(parts) for parts in zip(*raw, strict=True))
    del classes, negative, magnitudes, raw
    lanes = free_lanes(coded.symbols, count)
    if plan.signs:
        lanes = max(free_lanes(coded.symbols, int(widths.sum(dtype=np.int64))), -(-coded.symbols // LONGEST))
        head.append(varint(lanes))
    return b"".join(head) + rans.encode(symbols, coded, lanes, rans.pack(values, widths))


def encode_plain(positions: Integers, values: Vector, parameters: int) -> bytes:
    """Return the plain stream: 8 bytes per value, nothing quantised.

    Raises:
        IndexRangeError, IndexOrderError, NonFiniteError: as for `encode`.
    """
    check_positions(positions, parameters)
    require_finite(values, "plain update")
    if values.shape != positions.shape:
        raise CodecError(f"{values.size} values for {positions.size} positions")
    head = bytes([PLAIN]) + varint(parameters) + varint(positions.size)
    return head + positions.astype("<u4").tobytes() + values.astype("<f4").tobytes()


def encode_dense(values: Vector) -> bytes:
    """Return the dense stream: 4 bytes per parameter, no positions, nothing quantised.

    Args:
        values: float32, shape (parameters,).

    Raises:
        NonFiniteError: a value is NaN or infinite.
        CodecError: there are no values, or more than 2^28.
    """
    if values.ndim != 1 or not 0 < values.size <= MAX_PARAMETERS:
        raise CodecError(f"dense update of shape {values.shape}, at most {MAX_PARAMETERS} values")
    require_finite(values, "dense update")
    return bytes([DENSE]) + varint(values.size) + values.astype("<f4").tobytes()


def _check_values(sparse: Sparse, magnitudes: NDArray[np.int16]) -> None:
    if magnitudes.shape != sparse.positions.shape or magnitudes.min() < 1 or magnitudes.max() > MAX_LEVELS:
        raise CodecError(f"sparse update: levels must be 1 … {MAX_LEVELS} in magnitude, one per position")
    if sparse.counts.shape != sparse.scales.shape or sparse.counts.size > MAX_TENSORS:
        raise CodecError(f"sparse update: one scale per group and at most {MAX_TENSORS} groups")
    if sparse.counts.min() < 1 or sparse.counts.sum() != magnitudes.size:
        raise CodecError("sparse update: group counts do not add up to the non-zeros")
    require_finite(sparse.scales, "scales")
    if (sparse.scales <= 0).any() or (sparse.scales.view(np.uint32) & np.uint32(0xFFFF)).any():
        raise CodecError("sparse update: scales must be positive with 8 significant bits")
