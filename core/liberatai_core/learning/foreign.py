"""Weights in files of other programs: a torch `state_dict`, an ONNX graph. Nothing runs what is in them."""

import io
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import (
    CodecError,
    MissingExtraError,
    NonFiniteError,
    StructureError,
    TooLargeError,
    UnsafeFileError,
)
from liberatai_core.learning.families import require_torch
from liberatai_core.structure import MAX_PARAMETERS, MAX_TENSORS
from liberatai_core.weights import require_finite

SKIPPED: Final = "num_batches_tracked"
"""Counters of batch normalisation: no weights, and no floating-point values."""


def state_dict(content: bytes, name: str) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a torch file, as float32.

    torch's own reader for such files (`weights_only`) knows tensors and containers of them, nothing else.

    Args:
        content: the file; whoever calls has looked at the archive's list of members.
        name: for messages.

    Raises:
        MissingExtraError: torch is not installed.
        UnsafeFileError: it holds more than tensors.
        StructureError: no named dense floating-point tensors.
        NonFiniteError, TooLargeError: NaN, or more values than a model may have.
    """
    require_torch()
    import torch

    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # noqa: BLE001 - its reader refuses what is no tensor with whatever it likes
        why = type(error).__name__
        raise UnsafeFileError(f"{name}: holds more than tensors ({why}); save `model.state_dict()`") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not 1 <= len(found) <= MAX_TENSORS:
        raise StructureError(f"{name}: no state_dict: save `model.state_dict()`")
    tensors: dict[str, NDArray[np.float32]] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise StructureError(f"{name}: {str(key)[:80]}: no named tensor; save `model.state_dict()`")
        if key.rpartition(".")[2] != SKIPPED:
            tensors[key] = _array(key, value, name)
    if sum(value.size for value in tensors.values()) > MAX_PARAMETERS:
        raise TooLargeError(f"{name}: more than {MAX_PARAMETERS} values")
    return tensors


def _array(key: str, value: Any, name: str) -> NDArray[np.float32]:
    import torch

    if value.layout is not torch.strided or value.is_quantized or not value.is_floating_point():
        kind = f"{value.layout} {value.dtype}"
        raise StructureError(f"{name}: {key[:80]} is {kind}: weights are dense floating-point numbers")
    if value.numel() > MAX_PARAMETERS:  # a view may promise more than the file holds
        raise TooLargeError(f"{name}: {key[:80]}: more than {MAX_PARAMETERS} values")
    array: NDArray[np.float32] = value.detach().float().contiguous().numpy()
    require_finite(array.ravel(), f"{name}: {key[:80]}")
    return array


def checked_onnx(content: bytes, name: str) -> Any:
    """Return an onnx.ModelProto after every check.

    Raises:
        MissingExtraError: onnx is not installed.
        UnsafeFileError: weights lie in other files.
        NonFiniteError: a weight is NaN or infinite.
        CodecError: not ONNX, or damaged.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'liberatai[coordinator]'") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # noqa: BLE001 - protobuf raises what it likes
        raise CodecError(f"{name}: not ONNX, or damaged") from None
    if not model.graph.node:
        raise CodecError(f"{name}: not ONNX, or an empty graph")
    kinds = onnx.TensorProto
    for tensor in _tensors(model):
        if tensor.data_location == kinds.EXTERNAL or tensor.external_data:
            raise UnsafeFileError(
                f"{name}: weights of {tensor.name[:80]!r} lie in other files (external data)"
            )
        if tensor.data_type in (kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BFLOAT16):
            try:
                values = np.asarray(numpy_helper.to_array(tensor), np.float64)
            except Exception:  # noqa: BLE001 - a length that does not fit its shape
                raise CodecError(f"{name}: {tensor.name[:80]!r} does not hold its shape") from None
            if not np.isfinite(values).all():
                raise NonFiniteError(f"{name}: {tensor.name[:80]!r}: a value is NaN or infinite")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - it has no base class of its own
        why = (str(error).splitlines() or [""])[0][:120]
        raise CodecError(f"{name}: no valid ONNX graph ({why})") from None
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor of a model, also those in attributes, and in graphs inside of graphs."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor.values
                yield attribute.sparse_tensor.indices
            for sparse in attribute.sparse_tensors:
                yield sparse.values
                yield sparse.indices
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs
