"""safetensors files (https://huggingface.co/docs/safetensors): written in one form, read with every check.

    header length u64 | header (JSON: name -> dtype, shape, data_offsets; "__metadata__" -> texts) | values

Written: float32 tensors in the order of their structure, so that what follows the header is the flat vector.
Read: floating-point tensors of any order; nothing doubled, nothing overlapping, no gap, nothing behind.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import CodecError, NonFiniteError, StructureError, TooLargeError
from liberatai_core.structure import (
    MAX_PARAMETERS,
    MAX_RANK,
    MAX_TENSORS,
    Structure,
    from_tensors,
    require_length,
)
from liberatai_core.weights import Vector

MAX_HEADER_BYTES: Final = 4 * 1024 * 1024
METADATA: Final = "__metadata__"
SKIPPED: Final = "num_batches_tracked"
"""Counters of batch normalisation: no weights, and no floating-point values."""
_SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WHOLE: Final = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}

FORMAT: Final = {"format": "pt"}
"""Metadata of every file of ours: names and shapes are torch's."""

Tensors = dict[str, NDArray[np.float32]]


def header_of(structure: Structure, metadata: Mapping[str, str]) -> bytes:
    """Return everything before the values."""
    fields: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for tensor, place in structure.slices():
        offsets = [4 * place.start, 4 * place.stop]
        fields[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def encode(structure: Structure, weights: Vector, metadata: Mapping[str, str]) -> bytes:
    """Return the file of these weights.

    Raises:
        StructureError: the weights are not of this structure.
    """
    require_length(weights, structure)
    return b"".join([header_of(structure, metadata), np.ascontiguousarray(weights, "<f4").data])


def decode(content: bytes, structure: Structure | None = None) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a file, as float32, and its metadata.

    Args:
        content: the file.
        structure: if it must be one that `encode` wrote: only names and shapes of this one are taken.

    Raises:
        CodecError: not such a file, cut short, something behind, doubled names, gaps or overlaps.
        StructureError: a tensor that is no floating-point one, or not of this structure.
        NonFiniteError: a value is NaN or infinite.
        TooLargeError: it is larger than any model here.
    """
    fields, start = _header(content)
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CodecError("safetensors: metadata must be texts")
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise StructureError(f"safetensors: {len(fields)} tensors, 1 … {MAX_TENSORS} are possible")
    size = len(content) - start
    places: list[tuple[int, int, str]] = []
    tensors: Tensors = {}
    total = 0
    for name, field in fields.items():
        dtype, shape, begin, end = _field(name, field, size)
        places.append((begin, end, name))
        total += math.prod(shape)
        if total > MAX_PARAMETERS:
            raise TooLargeError(f"safetensors: more than {MAX_PARAMETERS} values")
        if dtype in _WHOLE:
            if name.rpartition(".")[2] == SKIPPED:
                continue
            raise StructureError(f"safetensors: {name} is {dtype}: weights are floating-point numbers")
        tensors[name] = _values(memoryview(content)[start + begin : start + end], dtype, shape, name)
    end_before = 0
    for begin, end, name in sorted(places):
        if begin != end_before:
            raise CodecError(f"safetensors: {name} overlaps another tensor or leaves a gap")
        end_before = end
    if end_before != size:
        raise CodecError("safetensors: something follows the last tensor, or the file is cut short")
    if structure is not None:
        wanted = {tensor.name: tensor.shape for tensor in structure.tensors}
        if {name: value.shape for name, value in tensors.items()} != wanted:
            raise StructureError(f"safetensors: not the tensors of {structure.id}")
    return tensors, metadata


def flat(content: bytes, structure: Structure) -> Vector:
    """Return the weights in a file of this structure, as one vector; without a copy if `encode` wrote it.

    Raises:
        CodecError, StructureError, NonFiniteError, TooLargeError: as `decode`.
    """
    header = header_of(structure, FORMAT)
    if content.startswith(header) and len(content) == len(header) + 4 * structure.parameters:
        weights = np.frombuffer(content, "<f4", offset=len(header))
        require_finite(weights, structure.id)
        return weights
    tensors, _ = decode(content, structure)
    return from_tensors(tensors, structure)


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    if len(content) < 8:
        raise CodecError("safetensors: cut short")
    (length,) = struct.unpack_from("<Q", content)
    if length > MAX_HEADER_BYTES:
        raise TooLargeError(f"safetensors: a header of {length} bytes, at most {MAX_HEADER_BYTES}")
    if length < 2 or 8 + length > len(content):
        raise CodecError("safetensors: not such a file, or cut short")
    try:
        found = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CodecError(f"safetensors: the header is no JSON ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise CodecError("safetensors: the header is no map")
    return found, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CodecError("safetensors: a name stands twice in the header")
    return found


def _field(name: str, field: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise CodecError(f"safetensors: {name[:80]}: wants dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    bytes_each = {**_SIZES, **_WHOLE}.get(dtype) if isinstance(dtype, str) else None
    if bytes_each is None:
        raise StructureError(f"safetensors: {name[:80]}: dtype {str(dtype)[:20]!r} is no weight of ours")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(one) is int and 0 <= one <= 1 << 40 for one in numbers) or len(offsets) != 2:
        raise CodecError(f"safetensors: {name[:80]}: impossible shape or place")
    if len(shape) > MAX_RANK or not 1 <= len(name) <= 128:
        raise StructureError(f"safetensors: {name[:80]}: too long a name, or more than {MAX_RANK} axes")
    begin, end = offsets
    if not 0 <= begin <= end <= size or end - begin != math.prod(shape) * bytes_each:
        raise CodecError(f"safetensors: {name[:80]}: its place does not hold its shape")
    return dtype, tuple(shape), begin, end


def _values(content: memoryview, dtype: str, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        words = np.frombuffer(content, "<u2").astype(np.uint32) << 16
        values = words.view(np.float32)
    else:
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
        values = np.frombuffer(content, kind)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    require_finite(values, f"safetensors: {name}")
    return values.reshape(shape)


def require_finite(values: Vector, what: str) -> None:
    """Raise NonFiniteError if a value is NaN or infinite; quick where none is."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float32)  # finite only if all of them are
    if not np.isfinite(total) and not np.isfinite(values).all():
        raise NonFiniteError(f"{what}: a value is NaN or infinite")
