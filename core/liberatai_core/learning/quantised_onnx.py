"""An ONNX file whose convolutions and dense layers compute in int8, for onnxruntime; no label is read.

Weights: 8 bits, symmetric, one scale per output channel. Activations: 8 bits, one scale and zero point per
tensor (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, arXiv:1712.05877), in onnxruntime's QDQ form. Normalisation, pooling and activation
functions stay float32: they are a small part of the work and the most sensitive.

The ranges of the activations come from unlabeled samples in three ways: the extremes; the extremes without
the outermost hundredth of a percent; the clipping with the least squared error (as in Banner et al., "Post
training 4-bit quantization of convolutional networks for rapid-deployment", NeurIPS 2019, arXiv:1810.05723).
Taken is the way whose outputs diverge least from the float model's on other unlabeled samples. If that is
still too much, the layers that do the most harm alone stay float32, as few as possible.

onnxruntime's own calibrators are not used: they keep every activation of every sample in memory, take all
cores and print. Its writer of quantised graphs is.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DataError, MissingExtraError, StructureError
from liberatai_core.learning.export import (
    INPUT,
    OUTPUT,
    bare,
    onnx_bytes,
    require_onnxruntime,
    session_of,
    write,
)
from liberatai_core.learning.training import require_inputs, require_samples
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised: nearly all multiply-accumulates, and kernels for int8 on every CPU."""
TARGET = 2e-3
"""Mean divergence in nats up to which every layer is quantised: about one top class in 500 changes, and
those that do were undecided."""
CALIBRATION, CHECK = 256, 2000
"""Samples used at most: extremes hardly grow after some hundreds; 2000 tell 0.1 % of changed answers."""
FEW = 32
"""Fewer calibration samples than this miss part of the ranges."""
SPLIT_FROM = 8
"""Fewer samples than this are not split: they calibrate and check."""
BATCH = 32
"""Samples whose activations are in memory at a time."""
BINS = 2048
TAIL = 1e-4
LEVELS = 256
SHRINKS = np.linspace(1.0, 0.2, 41)
"""Tried parts of the range; below a fifth, clipping outweighs every gain at 8 bits."""

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Report:
    """What a file in int8 costs and how far it is from the float model.

    Attributes:
        file_bytes: size of the file.
        float_bytes: size of the same model as a float32 ONNX file.
        ranges: how the activations' ranges were found: "extremes", "tails" or "squared_error".
        quantised: number of layers in int8.
        kept: names of the layers that stayed float32.
        calibrated: samples that the ranges come from.
        checked: samples behind `divergence` and `agreement`; none calibrated unless `warning` says so.
        divergence: mean KL(float || int8) of the predicted classes, nats.
        agreement: share of samples with the same top class as the float model, 0 … 1.
        float_accuracy, int8_accuracy: on the labelled samples given for the report, None without.
        warning: what is lost because samples are few or layers had to stay float32, or "".
    """

    file_bytes: int
    float_bytes: int
    ranges: str
    quantised: int
    kept: tuple[str, ...]
    calibrated: int
    checked: int
    divergence: float
    agreement: float
    float_accuracy: float | None
    int8_accuracy: float | None
    warning: str


def to_onnx_int8(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x_calibration: NDArray[np.float32],
    path: Path | str,
    *,
    x_check: NDArray[np.float32] | None = None,
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    target: float = TARGET,
    seed: int = 0,
) -> Int8Report:
    """Write an int8 ONNX file and say how far it is from the float model; same bytes for same arguments.

    Args:
        structure: what the weights are of.
        data: the data contract.
        weights: flat, shape (parameters,).
        x_calibration: unlabeled samples, shape (n, *input_shape), n >= 1: half of them give the ranges, a
            quarter chooses between ways, and a quarter checks, each up to a limit.
        path: the file; input "x" (n, *input_shape), output "logits" (n, classes), any n.
        x_check: unlabeled samples to check on instead of the last quarter.
        labelled: samples and labels for the report's accuracies only; nothing is chosen by them.
        target: mean divergence in nats up to which every layer is quantised.
        seed: fixes which samples do what.

    Raises:
        MissingExtraError: torch, onnx, onnxscript or onnxruntime is not installed.
        DataError: no samples, samples of another shape, or NaN among them.
        StructureError: the weights are not of this structure, or no layer of it can be quantised.
        NonFiniteError: a weight is NaN or infinite.
        DiskError: the file cannot be written.
    """
    _require_unlabeled(data, x_calibration, "calibration")
    if x_check is not None:
        _require_unlabeled(data, x_check, "check")
    if labelled is not None:
        require_samples(data, *labelled)
    _require_parts()
    content = onnx_bytes(structure, data, weights)
    calibrate, choose, check = _parts(x_calibration, x_check, seed)
    graph = _simplified(content)
    layers = _layers(graph)
    if not layers:
        raise StructureError(f"{structure.id}: no layer that could be quantised")
    reference = _log_probabilities(content, choose)

    def divergence_of(ranges: Ranges, chosen: Sequence[str]) -> tuple[bytes, float]:
        made = _quantised(graph, ranges, chosen)
        return made, divergence(reference, _log_probabilities(made, choose))

    ways = _ranges(graph, layers, calibrate)
    tried = {way: divergence_of(ranges, list(layers)) for way, ranges in ways.items()}
    way = min(tried, key=lambda name: tried[name][1])
    made, reached = tried[way]
    kept: list[str] = []
    if reached > target:
        made, kept = _with_float_layers(
            list(layers), target, lambda chosen: divergence_of(ways[way], chosen), made
        )
    wanted, found = _log_probabilities(content, check), _log_probabilities(made, check)
    write(Path(path), made)
    return Int8Report(
        file_bytes=len(made),
        float_bytes=len(content),
        ranges=way,
        quantised=len(layers) - len(kept),
        kept=tuple(kept),
        calibrated=len(calibrate),
        checked=len(check),
        divergence=divergence(wanted, found),
        agreement=float((wanted.argmax(axis=1) == found.argmax(axis=1)).mean()),
        float_accuracy=None if labelled is None else _accuracy(content, *labelled),
        int8_accuracy=None if labelled is None else _accuracy(made, *labelled),
        warning=_warning(len(x_calibration), len(calibrate), len(layers), len(kept)),
    )


def divergence(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Return the mean KL(wanted || found) in nats of log-probabilities (n, classes)."""
    return float((np.exp(wanted) * (wanted - found)).sum(axis=1).mean())


def _require_unlabeled(data: DataContract, x: NDArray[np.float32], what: str) -> None:
    require_inputs(data, x)
    if len(x) == 0:
        raise DataError(f"no {what} samples: int8 needs at least one unlabeled sample")
    if not np.isfinite(x).all():
        raise DataError(f"the {what} samples contain NaN or infinity")


def _require_parts() -> None:
    require_onnxruntime()
    try:
        import onnx as _  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx is not installed: pip install 'liberatai[coordinator]'") from error


def _parts(
    x: NDArray[np.float32], x_check: NDArray[np.float32] | None, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return samples for the ranges, for choosing, and for checking: no overlap unless they are too few."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    other = None if x_check is None else np.ascontiguousarray(x_check[:CHECK], dtype=np.float32)
    if len(x) < SPLIT_FROM:
        return x, x, x if other is None else other
    rows = np.random.default_rng(seed).permutation(len(x))
    half, quarter = len(x) // 2, len(x) // 4
    calibrate, choose, check = rows[:half], rows[half : half + quarter], rows[half + quarter :]
    return x[calibrate[:CALIBRATION]], x[choose[:CHECK]], x[check[:CHECK]] if other is None else other


def _warning(samples: int, calibrated: int, layers: int, kept: int) -> str:
    said = []
    if samples < SPLIT_FROM:
        said.append(
            f"{samples} unlabeled samples are too few to keep some apart: calibrated and chosen on the same, "
            "divergence and agreement look better than they are unless other samples check"
        )
    if calibrated < FEW:
        said.append(f"ranges come from {calibrated} samples only: unusual inputs are clipped")
    if kept == layers:
        said.append("every layer stays float32: int8 cannot reach the asked divergence")
    return "; ".join(said)


# --- the graph -----------------------------------------------------------------------------------


def _simplified(content: bytes) -> Any:
    """Return the onnx.ModelProto after folding constants and normalisation into layers, shapes inferred."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="liberatai-int8-") as folder:
        place = Path(folder) / "simplified.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Basic: standard operators only; higher levels are made for the CPU that runs them.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(place)
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return onnx.shape_inference.infer_shapes(onnx.load(place))


def _layers(graph: Any) -> dict[str, tuple[str, str]]:
    """Return layer -> (input tensor, output tensor) of all layers with constant weights, in order.

    Nodes are renamed to what their weights are called, so that a report names what the structure knows.
    """
    constants = {tensor.name for tensor in graph.graph.initializer}
    layers: dict[str, tuple[str, str]] = {}
    for node in graph.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants:
            name = node.input[1].removesuffix(".weight")
            node.name = f"{name}:{len(layers)}" if name in layers else name
            layers[node.name] = (node.input[0], node.output[0])
    return layers


def _quantised(graph: Any, ranges: Ranges, chosen: Sequence[str]) -> bytes:
    """Return the graph with these layers in QDQ form."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    if not chosen:  # an empty list means "all" to the quantiser
        return _small(copy)
    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    with _quiet():
        quantiser = QDQQuantizer(
            copy,
            True,  # per channel
            False,  # reduce_range
            QuantType.QInt8,
            QuantType.QUInt8,  # x86 has kernels for unsigned activations only, ARM for both
            TensorsData(CalibrationMethod.MinMax, limits),
            list(chosen),
            [],
            list(LAYERS),
            {},
        )
        quantiser.quantize_model()
    return _small(quantiser.model.model)


def _small(model: Any) -> bytes:
    """Return the content of a model without what only people read: long names are a fifth of a small file."""
    graph = bare(model).graph
    keep = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""}  # an empty name is an optional input that is not given

    def renamed(name: str) -> str:
        return name if name in keep else short.setdefault(name, f"{len(short):x}")

    for node in graph.node:
        node.ClearField("name")
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    content: bytes = model.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what onnxruntime's quantiser logs on the root logger about every tensor it leaves alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _with_float_layers(
    layers: list[str],
    target: float,
    measure: Callable[[Sequence[str]], tuple[bytes, float]],
    all_int8: bytes,
) -> tuple[bytes, list[str]]:
    """Return the file with as few layers in float32 as meet the target, and their names.

    Layers are taken in the order of the divergence that each of them causes alone; how many is bisected.
    """
    alone = {name: measure([name])[1] for name in layers}
    worst = sorted(layers, key=lambda name: -alone[name])
    made, low, high = all_int8, 0, len(layers)
    while high - low > 1:
        middle = (low + high) // 2
        candidate, reached = measure([name for name in layers if name not in worst[:middle]])
        if reached <= target:
            made, high = candidate, middle
        else:
            low = middle
    if high == len(layers):
        made, _ = measure([])
    return made, [name for name in layers if name in worst[:high]]


# --- ranges of activations -------------------------------------------------------------------------


def _ranges(graph: Any, layers: dict[str, tuple[str, str]], x: NDArray[np.float32]) -> dict[str, Ranges]:
    """Return way -> tensor -> (lowest, highest) for all inputs and outputs of the layers."""
    names = sorted({name for pair in layers.values() for name in pair})
    low = dict.fromkeys(names, 0.0)
    high = dict.fromkeys(names, 0.0)
    for values in _activations(graph, names, x):
        for name, value in values.items():
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in names}
    for values in _activations(graph, names, x):
        for name, value in values.items():
            counts[name] += np.histogram(value, bins=BINS, range=(low[name], high[name]))[0]
    extremes = {name: (low[name], high[name]) for name in names}
    return {
        "extremes": extremes,
        "tails": {name: _without_tails(counts[name], *extremes[name]) for name in names},
        "squared_error": {name: _least_error(counts[name], *extremes[name]) for name in names},
    }


def _activations(
    graph: Any, names: Sequence[str], x: NDArray[np.float32]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(graph)
    there = {INPUT, *(output.name for output in shown.graph.output)}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    session = session_of(shown.SerializeToString())
    asked = [name for name in names if name != INPUT]
    for start in range(0, len(x), BATCH):
        batch = x[start : start + BATCH]
        values = dict(zip(asked, session.run(asked, {INPUT: batch}), strict=True))
        yield values | ({INPUT: batch} if INPUT in names else {})


def _without_tails(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """Return the range that leaves out the share TAIL of the values, half of it at either end."""
    share = np.cumsum(counts) / max(1, int(counts.sum()))
    first = int(np.searchsorted(share, TAIL / 2, side="right"))
    last = int(np.searchsorted(share, 1 - TAIL / 2))
    step = (high - low) / BINS
    # Zero stays inside: padding and ReLU put most values exactly there.
    return min(0.0, low + first * step), max(0.0, low + min(BINS, last + 1) * step)


def _least_error(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """Return the shrunken range with the least squared error of values rounded to 256 steps of it."""
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    best, least = (low, high), np.inf
    for part in SHRINKS:
        first, last = part * low, part * high
        step = (last - first) / (LEVELS - 1)
        if step <= 0:
            break
        rounded = first + np.round((np.clip(centres, first, last) - first) / step) * step
        error = float((counts * (centres - rounded) ** 2).sum())
        if error < least:
            best, least = (first, last), error
    return float(best[0]), float(best[1])


# --- outputs -------------------------------------------------------------------------------------


def _log_probabilities(content: bytes, x: NDArray[np.float32]) -> NDArray[np.float64]:
    session = session_of(content)
    parts = [
        session.run([OUTPUT], {INPUT: np.ascontiguousarray(x[start : start + BATCH], dtype=np.float32)})[0]
        for start in range(0, len(x), BATCH)
    ]
    logits = np.concatenate(parts).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    scores: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return scores


def _accuracy(content: bytes, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    return float((_log_probabilities(content, x).argmax(axis=1) == y).mean())
