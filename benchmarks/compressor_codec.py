"""Bytes and milliseconds of model files: how much of a budget they use, against the entropy of their indices.

    python -m benchmarks.compressor_codec [--seed N] [--quick]

The shapes are those of VGG-16 at a quarter of its width. Weights are drawn: `laplace`, alike in all rows and
columns, and `unequal`, whose rows and columns are of log-normal size, as they are in strongly compressed
networks. The entropy of a file is what its indices would take with one ideal table per tensor (order 0);
header, records and tables count as overhead. Tables by row and column take less than that: the overhead of
`unequal` is negative. No accuracy is measured here: see `benchmarks.compressor`.

`search_s` is one more budget with what `prepare` did, without retraining, in seconds of this process; times
are the shortest of several where that is cheap. `decode_peak_ratio` is the peak of what restoring allocates
over the size of the float32 model plus its largest tensor, at the largest budget of the list below 10 %.
"""

import argparse
import json
import platform
import sys
import time
import tracemalloc
from typing import Any

import numpy as np

from liberatai_core.compressor import artifact, codebook, contents
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SHARES = (0.01, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 0.5)
"""Budgets, as shares of float32; the first is beyond what is promised."""
QUICK = (0.03, 0.08, 0.3)
REPEATS = 5
SPREAD = 0.8
"""Standard deviation of the logarithm of a row's or column's size."""


def main() -> int:
    """Print a table, and JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three budgets")
    options = parser.parse_args()
    structure = vgg(0.25)
    rows: list[dict[str, Any]] = []
    peak = 0.0
    for law in ("laplace", "unequal"):
        prepared = codebook.prepare(draw(structure, law, options.seed), structure)
        for share in QUICK if options.quick else SHARES:
            rows.append({"law": law, **measure(prepared, int(share * 4 * structure.parameters))})
            _show(rows[-1], structure)
            if share < 0.1:
                peak = max(peak, decode_peak_ratio(prepared, rows[-1]["budget_bytes"]))
    result = {
        "params": structure.parameters,
        "seed": options.seed,
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
        "rows": rows,
        "decode_peak_ratio": round(peak, 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def vgg(width: float) -> Structure:
    """Return the shapes of VGG-16 with one normalisation per convolution and one dense layer."""
    tensors, inputs = [], 3
    for number, channels in enumerate(CHANNELS):
        outputs = int(channels * width)
        tensors.append(Tensor(f"conv{number}.weight", (outputs, inputs, 3, 3)))
        tensors += [Tensor(f"norm{number}.{name}", (outputs,)) for name in ("weight", "bias")]
        inputs = outputs
    tensors += [Tensor("head.weight", (10, inputs)), Tensor("head.bias", (10,))]
    return Structure(family="vgg", params={"width": width}, tensors=tuple(tensors))


def draw(structure: Structure, law: str, seed: int) -> Vector:
    """Return weights of one of the laws."""
    generator = np.random.default_rng(seed)
    parts = []
    for tensor in structure.tensors:
        if len(tensor.shape) == 1:
            parts.append(tensor.name.endswith("weight") + 0.05 * generator.normal(size=tensor.size))
            continue
        values = generator.laplace(size=tensor.shape) * (tensor.shape[0] / tensor.size) ** 0.5
        if law == "unequal":
            for axis in (0, 1):
                sides = [1] * len(tensor.shape)
                sides[axis] = tensor.shape[axis]
                values *= np.exp(SPREAD * generator.normal(size=sides))
        parts.append(values.ravel())
    return np.concatenate(parts).astype(np.float32)


def measure(prepared: codebook.Prepared, budget: int) -> dict[str, Any]:
    """Return one row of the table."""
    structure = prepared.structure
    start = time.process_time()
    file = codebook.compress_prepared(prepared, budget)
    seconds = time.process_time() - start
    entropy = contents.entropy_bits(file, structure) / 8
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        restored = artifact.restore(file, structure)
        times.append(time.process_time() - start)
    error = float(((restored - prepared.weights) ** 2).sum() / (prepared.weights**2).sum())
    return {
        "budget_bytes": budget,
        "file_bytes": len(file),
        "use": round(len(file) / budget, 5),
        "bits_per_weight": round(8 * len(file) / structure.parameters, 4),
        "entropy_bytes": round(entropy),
        "overhead": round(len(file) / entropy - 1, 5),
        "relative_error": float(f"{error:.4g}"),
        "decode_ms_per_1e6": round(1e9 * min(times) / structure.parameters, 2),
        "search_s": round(seconds, 3),
    }


def decode_peak_ratio(prepared: codebook.Prepared, budget: int) -> float:
    """Return what restoring allocates at most, over the float32 model and its largest tensor."""
    file = codebook.compress_prepared(prepared, budget)
    tracemalloc.start()
    artifact.restore(file, prepared.structure)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.size for tensor in prepared.structure.tensors)
    return peak / (4 * (prepared.structure.parameters + largest))


def _show(row: dict[str, Any], structure: Structure) -> None:
    sys.stdout.write(
        f"{row['law']:8} {row['budget_bytes'] / structure.parameters / 4:6.1%} of float32 "
        f"{row['bits_per_weight']:7.3f} bit/weight  use {row['use']:.4f}  "
        f"over entropy {row['overhead']:+.2%}  error {row['relative_error']:<9.3g} "
        f"decode {row['decode_ms_per_1e6']:6.1f} ms/1e6  "
        f"search {row['search_s']:.2f} s\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
