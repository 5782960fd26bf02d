"""The decoder of model files (`artifact` has their form); files come from anywhere."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from liberatai_core import rans
from liberatai_core.compressor.layout import (
    GRID,
    Bytes,
    Coding,
    Indices,
    Integers,
    Reader,
    Tables,
    class_starts,
    class_widths,
    read_record,
)
from liberatai_core.compressor.parts import (
    DIGEST,
    LONGEST,
    MAGIC,
    Part,
    coded_of,
    groups,
    header_bytes,
    two_sided,
)
from liberatai_core.errors import BombError, CodecError, DigestError, TooLargeError
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector, digest, require_finite

_ROWS, _PER_ROW = 1 << 13, 64
"""Rows of lanes in all messages together, and weights for which there may be one more. Ordinary messages have
some hundred rows; a decoder's time for others would have no measure."""


def restore(artifact: bytes, structure: Structure) -> Vector:
    """Return the weights in a file from anywhere, float32, shape (parameters,).

    Beside them it holds about 12 bytes per weight of the largest message, one byte per weight of the
    largest tensor and 150 KiB per table of a message, whatever the file says.

    Raises:
        CodecError: not such a file, of another structure, truncated, trailing or nonsensical bytes.
        TooLargeError: longer than any file of this structure.
        BombError: it promises more than the structure holds.
        NonFiniteError: a weight is NaN or infinite.
        DigestError: the weights are not the ones that were compressed.
    """
    reader, wanted, layouts = opened(artifact, structure)
    weights = np.empty(structure.parameters, np.float32)
    slices = list(structure.slices())
    for (coding, _), (_, place) in zip(layouts, slices, strict=True):
        if not coding.quantised:
            coding.fill(weights[place])
    for part, indices in _parts(reader, layouts, structure):
        start = slices[part.number][1].start
        weights[start + part.start : start + part.stop] = layouts[part.number][0].looked_up(indices)
    for (coding, _), (_, place) in zip(layouts, slices, strict=True):
        coding.scale_channels(weights[place])
    require_finite(weights, "model file")
    if digest(weights) != wanted:
        raise DigestError("model file: the decoded weights do not have the digest in the file")
    return weights


def read(artifact: bytes, structure: Structure) -> list[Coding]:
    """Return the codings in a file from anywhere, one per tensor: what `write` was given.

    Raises:
        CodecError, TooLargeError, BombError, NonFiniteError: as for `restore`; the digest is not checked.
    """
    reader, _, layouts = opened(artifact, structure)
    codings = [coding for coding, _ in layouts]
    indices: dict[int, list[Indices]] = {}
    for part, piece in _parts(reader, layouts, structure):
        indices.setdefault(part.number, []).append(piece)
    for number, pieces in indices.items():
        codings[number] = replace(codings[number], indices=np.concatenate(pieces))
    return codings


def opened(artifact: bytes, structure: Structure) -> tuple[Reader, bytes, list[tuple[Coding, Tables]]]:
    """Return a reader behind the records, the digest and what the records say."""
    limit = header_bytes(structure) + 8 * structure.parameters + 8192 * len(structure.tensors)
    if len(artifact) > limit:
        raise TooLargeError(f"model file: {len(artifact)} bytes, at most {limit} for {structure.id}")
    reader = Reader(artifact)
    if reader.take(len(MAGIC)) != MAGIC:
        raise CodecError("model file: wrong magic or version")
    wanted = reader.take(DIGEST)
    parameters, tensors = reader.varint(), reader.varint()
    if parameters != structure.parameters or tensors != len(structure.tensors):
        raise CodecError(f"model file: {parameters} parameters in {tensors} tensors are not {structure.id}")
    return reader, wanted, [read_record(reader, tensor.shape, tensor.size) for tensor in structure.tensors]


def _parts(
    reader: Reader, layouts: list[tuple[Coding, Tables]], structure: Structure
) -> Iterator[tuple[Part, Indices]]:
    """Yield the indices of all quantised tensors, part by part, and check that nothing follows."""
    _require_few_rows(reader, layouts, structure)
    for group in groups(layouts, structure):
        yield from _read_message(Reader(reader.take(reader.varint())), group, layouts, structure)
    reader.end()


def _require_few_rows(reader: Reader, layouts: list[tuple[Coding, Tables]], structure: Structure) -> None:
    """Refuse messages that would take long to decode, before the first one is; the reader does not move."""
    start, rows = reader.at, 0
    for group in groups(layouts, structure):
        message = Reader(reader.take(reader.varint()))
        symbols = sum(part.stop - part.start for part in group if layouts[part.number][1].codes)
        rows += -(-symbols // _read_lanes(message, symbols)) if symbols else 0
    if rows > _ROWS + structure.parameters // _PER_ROW:
        raise BombError(f"model file: {rows} rows of lanes for {structure.parameters} weights")
    reader.at = start


def _read_lanes(reader: Reader, symbols: int) -> int:
    lanes = reader.varint()
    if not 0 < lanes <= symbols:
        raise BombError(f"model file: {lanes} lanes for {symbols} symbols")
    if symbols > lanes * LONGEST:
        raise CodecError(f"model file: only {lanes} lanes for {symbols} symbols")
    return lanes


def _read_message(
    reader: Reader,
    group: list[Part],
    layouts: list[tuple[Coding, Tables]],
    structure: Structure,
) -> Iterator[tuple[Part, Indices]]:
    coded = coded_of(group, layouts, structure)
    symbols: Indices = np.empty(0, np.uint16)
    least = 0
    if coded is not None:
        lanes = _read_lanes(reader, coded.symbols)
        symbols, raw = rans.decode(reader.take(len(reader.data) - reader.at), coded, lanes)
        least = 3 * lanes
    else:
        raw = reader.data
    bits = _Bits(raw)
    at = 0
    for part in (portion for whole in group for portion in whole.portions()):
        coding, size = layouts[part.number][0], part.stop - part.start
        if coding.raw_bits:
            numbers = bits.numbers(np.full(size, coding.raw_bits))
            if int(numbers.max()) >= coding.levels:
                raise CodecError(f"model file: index {int(numbers.max())} of {coding.levels} levels")
            yield part, numbers
            continue
        yield part, _indices(coding, symbols[at : at + size], bits)
        at += size
    bits.end(least)


class _Bits:
    """Cursor over raw bits."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def _slice(self, size: int) -> tuple[bytes, int]:
        """Return the bytes in which the next `size` bits lie, and where they begin."""
        start, stop = self.at, self.at + size
        if stop > 8 * len(self.data):
            raise CodecError("model file: raw bits are missing")
        self.at = stop
        return self.data[start // 8 : (stop + 7) // 8], start % 8

    def take(self, size: int) -> Bytes:
        """Return the next `size` bits."""
        data, first = self._slice(size)
        return np.unpackbits(np.frombuffer(data, np.uint8))[first:][:size]

    def numbers(self, widths: Integers) -> Integers:
        """Return the next numbers of these widths."""
        data, first = self._slice(int(widths.sum()))
        return rans.unpack(data, first, widths)

    def end(self, least: int) -> None:
        """Refuse more bytes than the bits, or `least` bytes, need, and padding that is not zero."""
        used = (self.at + 7) // 8
        if len(self.data) != max(used, least) or any(self.data[used:]):
            raise CodecError("model file: raw bits that nothing needs")
        if self.at % 8 and self.data[used - 1] & (0xFF >> self.at % 8):
            raise CodecError("model file: padding that is not zero")


def _indices(coding: Coding, symbols: Indices, bits: _Bits) -> Indices:
    """Return the indices that the symbols of a portion and its raw bits stand for."""
    distances: Indices = symbols
    if coding.kind == GRID:
        far_off = np.flatnonzero(symbols >= 16)
        if far_off.size:
            classes = symbols[far_off]
            distances = symbols.astype(np.int32)
            distances[far_off] = class_starts(classes) + bits.numbers(class_widths(classes))
    near, far = coding.reaches
    if int(distances.max()) > far:
        raise CodecError(f"model file: index of distance {int(distances.max())}, at most {far}")
    if coding.centre is None:
        return distances
    signed = np.flatnonzero(two_sided(coding, distances))
    below = signed[bits.take(signed.size).astype(np.bool_)]
    indices = distances.astype(np.int32)
    indices[below] *= -1
    if coding.centre > near:
        indices[distances > near] *= -1
    indices += coding.centre
    return indices
