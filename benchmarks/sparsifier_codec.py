"""Bytes and milliseconds of the codec of sparse updates, against the entropy and against other ways.

    python -m benchmarks.sparsifier_codec [--seed N] [--quick] [--data FILE.npz]

The bound of every row is what an ideal coder of independent values takes: n H(p) bits for the positions of
the k = p n non-zeros, and k times the order-0 entropy of the values, signs included (1 bit for ternary
ones). Scales, counts and every other head of the stream count as overhead. Real updates are not independent:
their non-zeros lie in clusters with one sign, layers differ in density, so their overhead over this bound,
taken over the whole vector, may be negative, and is.

- Synthetic: ternary values of independent positions, and Laplace values on a grid of 15 magnitudes.
- Real: what one epoch of SGD changes in a convolutional network of at least 1.5 million parameters, on
  `--data` (arrays x_train and y_train, images) or on scikit-learn's digits, enlarged; the largest are chosen
  and quantised by `top_k`, one scale per tensor.

Other ways, of the same update: zstd at its strongest level over the int8 levels of all parameters, without
scales (zlib where zstandard is not installed), COO (int32 position, float32 value), and a bitmap of positions
with one bit per sign (ternary only; more levels take ceil(log2) bits more each).
`worst_overhead` is that of the synthetic ternary rows of density 0.1 ... 0.001.
"""

import argparse
import importlib.util
import json
import math
import platform
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.demo import digits
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, train
from liberatai_core.sparsifier import codec, top_k
from liberatai_core.sparsifier.subspace import recommended_share
from liberatai_core.structure import DataContract, Structure, Tensor
from liberatai_core.weights import Vector

HAS_ZSTD = importlib.util.find_spec("zstandard") is not None

DENSITIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0005)
JUDGED = (0.001, 0.1)
"""Densities that `worst_overhead` looks at, both included."""
SIZE = 1_000_000
"""Parameters of the synthetic updates."""
LEVELS = 15
WIDTH, HIDDEN = 32, 1216
"""Of the network: 1.66 million parameters for images of 28 x 28."""
SIDE = 28
SAMPLES = 600
"""Of the device whose update it is: the order of what a fleet's device has."""
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Case:
    """One update to measure: `parameters` values of which `sparse` has the non-zeros."""

    source: str
    density: float
    sparse: codec.Sparse
    parameters: int


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer densities, a smaller network")
    parser.add_argument("--data", type=Path, help="npz with x_train and y_train; default: enlarged digits")
    given = parser.parse_args()
    densities = DENSITIES[1::2] if given.quick else DENSITIES
    print(f"{'source':>8} {'density':>8} {'bytes':>9} {'bit/par':>8} {'entropy':>8} {'over':>8}", end=" ")
    print(f"{'enc ms/M':>8} {'dec ms/M':>8} {PACKER:>9} {'COO':>9} {'bitmap':>9}")
    rows = []
    cases = [*synthetic(densities, given.seed), *real(densities, given.data, given.seed, given.quick)]
    for case in cases:
        row = measured(case, repeats=3 if given.quick else 15)
        rows.append(row)
        print(
            f"{row['source']:>8} {row['density']:>8} {row['bytes']:>9} {row['bits_per_param']:>8.5f} "
            f"{row['entropy_bits_per_param']:>8.5f} {row['overhead']:>+8.2%} {row['encode_ms_per_m']:>8.2f} "
            f"{row['decode_ms_per_m']:>8.2f} {row['zstd_bytes']:>9} {row['coo_bytes']:>9} "
            f"{row['bitmap_bytes']:>9}",
            flush=True,
        )
    judged = [
        float(row["overhead"])
        for row in rows
        if row["source"] == "ternary" and JUDGED[0] <= float(row["density"]) <= JUDGED[1]
    ]
    result = {
        "benchmark": "sparsifier_codec",
        "rows": rows,
        "worst_overhead": round(max(judged), 5),
        "seed": given.seed,
        "quick": given.quick,
        "data": given.data.name if given.data else "digits",
        "synthetic_parameters": SIZE,
        "real_parameters": cases[-1].parameters,
        "sparsify_peak": sparsify_peak(given.seed),
        "zstd_is": PACKER,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    return 0


def sparsify_peak(seed: int) -> dict[str, float]:
    """Return the most extra memory of `top_k.sparsify`, in units of 4 bytes per parameter of the model.

    Of all parameters at 1 %, and of the part of a model of 1.5 million that a job trains by default, at 20 %.
    """
    random, whole = np.random.default_rng(seed), 1_500_000
    part = round(whole * recommended_share(whole))
    found = {}
    for name, size, density in (("all at 1 %", SIZE, 0.01), ("trained part at 20 %", part, 0.2)):
        structure = Structure(family="mlp", params={}, tensors=(Tensor("w", (size,)),))
        difference = random.laplace(size=size).astype(np.float32)
        state = top_k.init(size)
        top_k.sparsify(state, difference, structure, density)  # tables are made once in a process
        tracemalloc.start()
        top_k.sparsify(state, difference, structure, density)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[name] = round(peak / 4 / (whole if size == part else size), 2)
    return found


PACKER = f"zstd-{ZSTD_LEVEL}" if HAS_ZSTD else "zlib-9"


def synthetic(densities: tuple[float, ...], seed: int) -> Iterator[Case]:
    """Yield ternary and many-level updates of independent values."""
    generator = np.random.default_rng(seed)
    for density in densities:
        positions = np.flatnonzero(generator.random(SIZE) < density)
        signs = generator.choice(np.array([-1, 1], np.int16), positions.size)
        yield Case("ternary", density, one_group(positions, signs), SIZE)
    for density in (1.0, *densities):
        values = generator.laplace(size=SIZE)
        threshold = np.quantile(np.abs(values), 1 - density)
        # The largest of them spread over the grid; what rounds to zero is not sent.
        steps = np.minimum(np.rint(np.abs(values) * (LEVELS / (threshold + 4))), LEVELS)
        levels = np.where(np.abs(values) >= threshold, np.where(values < 0, -steps, steps), 0).astype(
            np.int16
        )
        positions = np.flatnonzero(levels)
        yield Case("laplace", density, one_group(positions, levels[positions]), SIZE)


def one_group(positions: codec.Integers, levels: NDArray[np.int16]) -> codec.Sparse:
    """Return an update with one scale."""
    return codec.Sparse(positions, levels, np.array([positions.size]), np.array([2.0**-7], np.float32))


def real(densities: tuple[float, ...], data: Path | None, seed: int, quick: bool) -> Iterator[Case]:
    """Yield the difference that one epoch of training makes, at several densities, ternary."""
    x, y = images(data, seed)
    contract = DataContract(input_shape=x.shape[1:], classes=int(y.max()) + 1)
    params = {"width": 16, "hidden": 256} if quick else {"width": WIDTH, "hidden": HIDDEN}
    structure = structure_of("cnn", params, contract)
    base = initial_weights(structure, contract, seed)
    trained = train(structure, contract, base, x, y, TrainSettings(epochs=1), seed)
    difference = trained.weights - base
    for density in densities:
        _, update = top_k.sparsify(top_k.init(structure.parameters), difference, structure, density, levels=1)
        yield Case("real", density, parsed(update, structure.parameters, difference), structure.parameters)


def parsed(update: bytes, parameters: int, difference: Vector) -> codec.Sparse:
    """Return the ternary update as it was before it was encoded; its groups are runs of one scale."""
    positions, values = codec.decode(update, parameters)
    assert (np.sign(values) == np.sign(difference[positions])).all()
    sizes = np.abs(values)
    starts = np.flatnonzero(np.diff(sizes, prepend=-1) != 0)
    return codec.Sparse(
        positions,
        np.sign(values).astype(np.int16),
        np.diff(starts, append=positions.size),
        sizes[starts],
    )


def images(data: Path | None, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images (n, channels, height, width) in 0 ... 1 and labels of one device."""
    if data is None:
        samples = digits.load()
        place = np.arange(SIDE) * samples.x.shape[-1] // SIDE
        x, y = samples.x[:, :, place][:, :, :, place], samples.y
    else:
        with np.load(data) as file:
            x, y = file["x_train"], file["y_train"].astype(np.int64)
            x = x if x.ndim == 4 else x[:, None]
    chosen = np.random.default_rng(seed).permutation(len(y))[:SAMPLES]
    x = x[chosen].astype(np.float32)
    return x / max(float(x.max()), 1.0), y[chosen].astype(np.int64)


def measured(case: Case, repeats: int) -> dict[str, float | int | str]:
    """Return the row of one update; decoding must give back the update exactly."""
    sparse, size = case.sparse, case.parameters
    update = codec.encode(sparse, size)
    positions, values = codec.decode(update, size)
    assert np.array_equal(positions, sparse.positions)
    assert np.array_equal(values, sparse.values())
    dense = np.zeros(size, np.int8)
    dense[sparse.positions] = sparse.levels
    count, top = sparse.positions.size, int(np.abs(sparse.levels).max())
    bound = entropy_bits(sparse, size)
    return {
        "source": case.source,
        "density": case.density,
        "parameters": size,
        "non_zeros": count,
        "levels": top,
        "bytes": len(update),
        "bits_per_param": round(8 * len(update) / size, 6),
        "entropy_bits_per_param": round(bound / size, 6),
        "overhead": round(8 * len(update) / bound - 1, 5),
        "encode_ms_per_m": round(best_ms(lambda: codec.encode(sparse, size), repeats) * 1e6 / size, 3),
        "decode_ms_per_m": round(best_ms(lambda: codec.decode(update, size), repeats) * 1e6 / size, 3),
        "zstd_bytes": packed_bytes(dense.tobytes()),
        "coo_bytes": 8 * count,
        "bitmap_bytes": math.ceil((size + count * (1 + math.ceil(math.log2(top)))) / 8),
    }


def entropy_bits(sparse: codec.Sparse, parameters: int) -> float:
    """Return n H(p) + k x entropy of the signed levels; ternary signs count as one bit each."""
    count = sparse.positions.size
    share = np.array([count, parameters - count]) / parameters
    share = share[share > 0]
    bits = -parameters * float((share * np.log2(share)).sum())
    if np.abs(sparse.levels).max() == 1:
        return bits + count
    numbers = np.bincount(sparse.levels + 256)
    part = numbers[numbers > 0] / count
    return bits - count * float((part * np.log2(part)).sum())


def packed_bytes(content: bytes) -> int:
    """Return the size of a general-purpose compressor's output."""
    if not HAS_ZSTD:
        return len(zlib.compress(content, 9))
    import zstandard  # noqa: PLC0415 - an extra of the development environment

    return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content))


def best_ms(action: Callable[[], object], repeats: int) -> float:
    """Return the shortest of several runs: what the work takes when nobody disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    sys.exit(main())
