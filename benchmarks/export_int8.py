"""The int8 ONNX form of a model against its float32 form: accuracy, divergence, bytes, latency.

    python -m benchmarks.export_int8 --net cnn --params width=16 [--data FILE.npz] [--seed N] [--quick]

Trains one model (scikit-learn's digits without `--data`), exports both forms with `models export`'s own
functions, and runs both with onnxruntime on one thread. Calibration sees inputs of the training samples
without their labels; test samples decide nothing. Without marks for testing in the file, a fifth of the
samples is drawn for it. Latency: median of single samples, the two forms taking turns.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.demo import digits
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.dataset import contract_of, load_npz
from liberatai_core.learning.export import INPUT, require_onnxruntime, session_of, to_onnx
from liberatai_core.learning.families import initial_weights, known_families, structure_of
from liberatai_core.learning.quantised_onnx import to_onnx_int8
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.structure import DataContract, Parameter

TEST_SHARE = 0.2
UNLABELED = 3000
"""Inputs for calibrating, choosing and checking; the export uses at most 256 for ranges."""
PARAMS: dict[str, dict[str, Parameter]] = {
    "cnn": {"width": 16},
    "cnn1d": {"width": 16},
    "ds_cnn": {"width": 32},
    "mlp": {"hidden": 64},
}
"""Used where `--params` is not given."""
TURNS, QUICK_TURNS, WARM_UP = 500, 100, 20

Set = tuple[NDArray[np.float32], NDArray[np.int64]]


def samples(path: Path | None, seed: int, limit: int) -> tuple[DataContract, Set, Set]:
    """Return the contract, at most `limit` training samples, and the test samples.

    Raises:
        DataError: the file is no labelled file of the data contract.
    """
    rng = np.random.default_rng(seed)
    if path is None:
        all_digits = digits.load()
        data, x, y, marks = digits.CONTRACT, all_digits.x, all_digits.y, None
    else:
        read = load_npz(path)
        data = contract_of(read)
        assert read.y is not None  # contract_of refuses files without labels
        x, y, marks = read.x, read.y, read.test
    test = rng.random(len(x)) < TEST_SHARE if marks is None else marks
    chosen = rng.permutation(np.flatnonzero(~test))[:limit]
    return data, (x[chosen], y[chosen]), (x[test], y[test])


def latency_ms(files: list[Path], sample: NDArray[np.float32], turns: int) -> list[float]:
    """Return the median milliseconds of one sample for each file, on one thread."""
    sessions = [session_of(file.read_bytes()) for file in files]
    taken: list[list[float]] = [[] for _ in files]
    for turn in range(WARM_UP + turns):
        for session, times in zip(sessions, taken, strict=True):
            began = time.perf_counter()
            session.run(None, {INPUT: sample})
            if turn >= WARM_UP:
                times.append(1e3 * (time.perf_counter() - began))
    return [float(np.median(times)) for times in taken]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, export twice, measure, and return what the last line says."""
    data, (x, y), labelled = samples(options.data, options.seed, options.samples)
    params: dict[str, Parameter] = dict(options.params or PARAMS.get(options.net, {}))
    structure = structure_of(options.net, params, data)
    settings = TrainSettings(epochs=options.epochs, learning_rate=options.learning_rate, balance=0.0)
    start = initial_weights(structure, data, options.seed)
    weights = train(structure, data, start, x, y, settings, options.seed).weights
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "float.onnx", Path(folder) / "int8.onnx"]
        to_onnx(structure, data, weights, files[0])
        began = time.perf_counter()
        report = to_onnx_int8(
            structure, data, weights, x[:UNLABELED], files[1], labelled=labelled, seed=options.seed
        )
        seconds = time.perf_counter() - began
        turns = QUICK_TURNS if options.quick else TURNS
        float_ms, int8_ms = latency_ms(files, labelled[0][:1], turns)
    assert report.float_accuracy is not None
    assert report.int8_accuracy is not None
    return {
        "name": "export_int8",
        "net": options.net,
        "params": params,
        "parameters": structure.parameters,
        "data": options.data.name if options.data else "digits",
        "seed": options.seed,
        "float_accuracy": report.float_accuracy,
        "int8_accuracy": report.int8_accuracy,
        "lost_points": round(100 * (report.float_accuracy - report.int8_accuracy), 3),
        "divergence": report.divergence,
        "agreement": report.agreement,
        "bytes_float": report.float_bytes,
        "bytes_int8": report.file_bytes,
        "ranges": report.ranges,
        "kept_float": report.kept,
        "latency_ms": {"float": round(float_ms, 4), "int8": round(int8_ms, 4)},
        "export_seconds": round(seconds, 2),
        "test_samples": len(labelled[0]),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": require_onnxruntime().__version__,
            "machine": platform.machine(),
        },
    }


def table(found: dict[str, Any]) -> str:
    """Return what people read."""
    kept = ", ".join(found["kept_float"]) or "none"
    lost = f"lost {found['lost_points']:+.2f} points; same answer {found['agreement']:.2%}"
    speed = found["latency_ms"]
    return "\n".join(
        [
            f"{found['net']} {found['params']} on {found['data']}, {found['parameters']} parameters",
            f"{'form':<8}{'accuracy':>10}{'bytes':>12}{'ms':>10}",
            f"{'float32':<8}{found['float_accuracy']:>10.4f}{found['bytes_float']:>12,d}{speed['float']:>10.3f}",
            f"{'int8':<8}{found['int8_accuracy']:>10.4f}{found['bytes_int8']:>12,d}{speed['int8']:>10.3f}",
            f"{lost}, divergence {found['divergence']:.2g} nats",
            f"ranges: {found['ranges']}; float32 kept: {kept}",
        ]
    )


def parameter(text: str) -> tuple[str, Parameter]:
    """Return (name, value) of "name=value"; whole numbers and fractions are numbers."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted name=value")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def main() -> int:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="cnn", choices=known_families())
    parser.add_argument("--params", type=parameter, nargs="+", help="name=value of the family's parameters")
    parser.add_argument("--data", type=Path, help="npz of the data contract; default: the digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=12_000, help="most training samples")
    parser.add_argument("--quick", action="store_true", help="2 epochs, 2000 samples, fewer timings")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.samples = min(options.epochs, 2), min(options.samples, 2000)
    try:
        found = run(options)
    except LiberataiError as error:
        print(f"export_int8: {error.code}: {error}", file=sys.stderr)
        return 1
    print(table(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
