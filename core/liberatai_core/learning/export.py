"""Files for other programs: safetensors (weights) and ONNX (weights and graph).

The int8 form for onnxruntime is in `quantised_onnx.py`.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liberatai_core.errors import DiskError, MissingExtraError, StructureError
from liberatai_core.learning._flat import flat_module, reproducible
from liberatai_core.learning.device import computing_on
from liberatai_core.learning.families import require_torch
from liberatai_core.structure import DataContract, Structure, to_tensors
from liberatai_core.weights import Vector, require_finite

TOLERANCE = 1e-4
"""Largest difference of a logit between torch and onnxruntime, absolute plus relative: sums of float32 in
another order differ by some 1e-6; a wrong operator differs by far more."""
INPUT, OUTPUT = "x", "logits"


def to_safetensors(
    structure: Structure, weights: Vector, path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the named tensors, with text metadata, to a safetensors file.

    Raises:
        MissingExtraError: safetensors is not installed.
        StructureError: the weights are not of this structure.
        NonFiniteError: a weight is NaN or infinite.
        DiskError: the file cannot be written.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise MissingExtraError(
            "safetensors is not installed: pip install 'liberatai[coordinator]'"
        ) from error
    require_finite(weights, structure.id)
    tensors = {name: np.ascontiguousarray(t) for name, t in to_tensors(weights, structure).items()}
    write(Path(path), save(tensors, metadata=dict(metadata or {})))


def to_onnx(structure: Structure, data: DataContract, weights: Vector, path: Path | str) -> None:
    """Write an ONNX file: input "x" (n, *input_shape), output "logits" (n, classes), any n; then check it.

    Raises:
        MissingExtraError: torch, onnx, onnxscript or onnxruntime is not installed.
        StructureError: the weights are not of this structure, or onnxruntime computes something else
            from the file than torch.
        NonFiniteError: a weight is NaN or infinite.
        DiskError: the file cannot be written.
    """
    write(Path(path), onnx_bytes(structure, data, weights))


def onnx_bytes(structure: Structure, data: DataContract, weights: Vector) -> bytes:
    """Return the checked content of the file that `to_onnx` writes.

    Raises:
        MissingExtraError, StructureError, NonFiniteError: as `to_onnx`.
    """
    require_torch()
    import torch

    try:
        import onnxscript as _  # noqa: F401  (torch's exporter needs it and would fail halfway)
    except ImportError as error:
        raise MissingExtraError(
            "onnxscript is not installed: pip install 'liberatai[coordinator]'"
        ) from error
    require_finite(weights, structure.id)
    with reproducible(0), computing_on("cpu"):
        module = flat_module(structure, data, weights).module.eval()
        samples = torch.randn((3, *data.input_shape))
        with warnings.catch_warnings():
            # torch's exporter warns about torch's own internals; nothing a user of it could change.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
            program = torch.onnx.export(
                module,
                (samples,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                verbose=False,
            )
        if program is None:
            raise StructureError(f"{structure.id}: torch's exporter made no program")
        content: bytes = bare(program.model_proto).SerializeToString()
        _check(content, structure, module, samples)
    return content


def bare(model: Any) -> Any:
    """Remove from an onnx.ModelProto, in place, what torch notes about where every node came from.

    It names source files of the machine that exported, and is a third of a small model's file.
    """
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    # Shapes between the nodes are inferred again by whoever reads the file.
    graph.ClearField("value_info")
    return model


def session_of(content: bytes) -> Any:
    """Return an onnxruntime.InferenceSession of this content on one CPU thread.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # x86 without VNNI adds two int8 products in 16 bits, which overflows; this takes the exact kernels there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def require_onnxruntime() -> Any:
    """Return the module onnxruntime, its telemetry off.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    # Read by onnxruntime when it is imported: a model must not phone home.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime is not installed: pip install 'liberatai[infer]'") from error
    return onnxruntime


def _check(content: bytes, structure: Structure, module: Any, samples: Any) -> None:
    """Raise StructureError unless onnxruntime gives torch's outputs, for another batch size too."""
    import torch

    session = session_of(content)
    for batch in (samples, samples[:1]):
        with torch.no_grad():
            wanted = module(batch).numpy()
        (found,) = session.run([OUTPUT], {INPUT: batch.numpy()})
        if not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
            worst = float(np.abs(found - wanted).max())
            raise StructureError(f"{structure.id}: the ONNX file's outputs differ from torch's by {worst:g}")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror})") from error


def described(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return an ONNX file that carries these texts, e.g. version, digest, classes, licence.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'liberatai[coordinator]'") from error
    model = onnx.load_model_from_string(content)
    known = {prop.key: prop.value for prop in model.metadata_props}
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {**known, **dict(sorted(metadata.items()))})
    written: bytes = model.SerializeToString(deterministic=True)
    return written
