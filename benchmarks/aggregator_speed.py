"""Updates merged per second on one core, and memory against the number of devices.

    python -m benchmarks.aggregator_speed [--seed N] [--quick] [--flower PYTHON]

A model of a million parameters, updates of 1 % density made by our sparsifier, and what a coordinator makes
of them: a sample-weighted mean. All rows merge the same updates on one thread; seconds are those of the
processor, and the best of several runs counts. Other programs still disturb, through the caches (ours most:
it adds at places all over the model); `load` says how many there were.

- ours: from decoded updates (positions and values) to the mean, exact in any order
- with decoding: the same from the bytes that devices send
- whole rule: what a round does, `rules.merge` with the length and the angle of every update
- dense: numpy, the updates as arrays of all parameters, multiplied and added in place in float32
- Flower: `aggregate` of `flwr.server.strategy`, on arrays; `aggregate_inplace`, from Flower's own serialised
  bytes; and `aggregate_arrayrecords`, which its newer FedAvg calls, from the bytes of its records

Flower lives in an environment of its own, `.cache/flower-venv`, which is made when it is missing; `--flower`
names an interpreter that has it already. Without one its rows are null, and the benchmark says so.

Memory is the peak of a process (VmHWM) that merges 10 or 1000 devices with `rules.merge`; every update is
read from the disk when it is needed.
"""

import argparse
import importlib
import inspect
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.mean import mean
from liberatai_core.aggregator.packed import Packed, entries
from liberatai_core.aggregator.rules import Sender, Settings, merge
from liberatai_core.sparsifier import methods, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, to_bytes

FLOWER = "1.41.0"
"""The newest release whose dependencies the package index had when this was written."""
FLOWER_HOME = Path(__file__).resolve().parent.parent / ".cache" / "flower-venv"
FLOWER_IMPORTS = """
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
"""
STRUCTURE = Structure(
    family="mlp",
    params={},
    tensors=(
        Tensor("layers.0.weight", (1024, 784)),
        Tensor("layers.0.bias", (1024,)),
        Tensor("layers.1.weight", (200, 1024)),
        Tensor("layers.1.bias", (200,)),
        Tensor("head.weight", (10, 200)),
        Tensor("head.bias", (10,)),
    ),
)
DENSITY = 0.01
DEVICES = (10, 1000)
CALM = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Decoded = tuple[NDArray[np.int64], Vector]


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer updates and runs")
    parser.add_argument("--flower", type=Path, help="an interpreter that has flwr")
    parser.add_argument("--merge", nargs=2, metavar=("FOLDER", "DEVICES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.merge:
        print(json.dumps(merged_from_disk(Path(given.merge[0]), int(given.merge[1]))))
        return 0
    number, budget = (20, 0.5) if given.quick else (100, 2.0)
    bodies = updates(number, given.seed)
    samples = np.random.default_rng(given.seed).integers(20, 2000, number).tolist()
    with tempfile.TemporaryDirectory(prefix="liberatai-speed-") as folder:
        decoded = [methods.entries(body, STRUCTURE) for body in bodies]
        write(Path(folder), bodies, decoded, samples)
        rates, result = ours(bodies, decoded, samples, budget)
        flower, version = flower_rates(given.flower, Path(folder), budget)
        runs = 1 if given.quick else 3
        memory = {devices: [peak(Path(folder), devices) for _ in range(runs)] for devices in DEVICES}
        if flower:
            theirs = np.load(Path(folder) / "mean.npy")
            # Float32 sums of theirs against the exact one.
            np.testing.assert_allclose(theirs, result, rtol=1e-3, atol=1e-7)
    rates |= {
        f"{name}_updates_s": flower.get(name) for name in ("flower", "flower_inplace", "flower_records")
    }
    best = rates["ours_updates_s"] or 0.0
    print(f"{'':>32} {'updates/s':>10} {'ours is':>9}")
    for name, rate in rates.items():
        told = f"{rate:10.0f} {best / rate:8.1f}x" if rate else f"{'not measured':>10}"
        print(f"{name:>32} {told}")
    megabytes = {
        devices: statistics.median(one["peak_mb"] for one in found) for devices, found in memory.items()
    }
    before = statistics.median(one["before_mb"] for found in memory.values() for one in found)
    for devices, size in megabytes.items():
        print(f"{devices:>10} devices: {size:6.1f} MiB at most, {before:.1f} of them before the first update")
    flower_rate = rates["flower_updates_s"]
    record = {
        "benchmark": "aggregator_speed",
        **{name: round(rate, 1) if rate else None for name, rate in rates.items()},
        "times_flower": round(best / flower_rate, 1) if flower_rate else None,
        "times_dense": round(best / (rates["dense_updates_s"] or 1.0), 1),
        **{f"rss_mb_{devices}": round(size, 1) for devices, size in megabytes.items()},
        "rss_mb_before": round(before, 1),
        "memory_ratio": round(megabytes[DEVICES[1]] / megabytes[DEVICES[0]], 3),
        "flower": version,
        "parameters": STRUCTURE.parameters,
        "density": DENSITY,
        "update_bytes": round(statistics.mean(map(len, bodies))),
        "updates": number,
        "seed": given.seed,
        "quick": given.quick,
        "load": round(os.getloadavg()[0], 1),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(record))
    return 0


def updates(number: int, seed: int) -> list[bytes]:
    """Return what devices send: tensors move by unlike amounts, devices by unlike ones, none as another."""
    generator, found = np.random.default_rng(seed), []
    amounts = np.repeat([1.0, 0.5, 2.0, 1.0, 4.0, 4.0], [tensor.size for tensor in STRUCTURE.tensors]).astype(
        np.float32
    )
    for _ in range(number):
        difference = generator.standard_normal(STRUCTURE.parameters, np.float32)
        difference *= np.abs(difference) * amounts * np.float32(1e-3 * generator.lognormal(0, 0.5))
        state = top_k.init(STRUCTURE.parameters)
        found.append(methods.METHODS[methods.DEFAULT].sparsify(state, difference, STRUCTURE, DENSITY)[1])
    return found


def ours(
    bodies: Sequence[bytes], decoded: Sequence[Decoded], samples: Sequence[int], budget: float
) -> tuple[dict[str, float | None], Vector]:
    """Return the updates per second of the rows without Flower, and the exact mean."""
    rule, size = mean(), STRUCTURE.parameters
    dense = [top_k.densify(body, STRUCTURE) for body in bodies]

    def merged(some: Iterator[tuple[Decoded, int]]) -> Vector:
        addends = ((entries(size, *one), count, None) for one, count in some)
        return rule.finish(rule.add_all(rule.init(size), addends))

    def plain() -> Vector:
        total, product = np.zeros(size, np.float32), np.empty(size, np.float32)
        for one, count in zip(dense, samples, strict=True):
            np.multiply(one, np.float32(count), out=product)
            total += product
        total /= np.float32(sum(samples))
        return total

    def decoding() -> Vector:
        return merged(
            ((methods.entries(body, STRUCTURE), count) for body, count in zip(bodies, samples, strict=True))
        )

    senders = [
        sender(place, samples[place], partial(bodies.__getitem__, place)) for place in range(len(bodies))
    ]
    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: merged(zip(decoded, samples, strict=True)),
        "ours_with_decoding": decoding,
        "ours_whole_rule": lambda: merge(Settings(), size, senders),
        "dense": plain,
    }
    exact = merged(zip(decoded, samples, strict=True))
    mixed = random.Random(0).sample(list(zip(decoded, samples, strict=True)), len(samples))
    assert to_bytes(merged(iter(mixed))) == to_bytes(exact) == to_bytes(decoding())
    assert to_bytes(merge(Settings(), size, senders).difference) == to_bytes(exact)
    np.testing.assert_allclose(plain(), exact, rtol=1e-3, atol=1e-7)
    rates: dict[str, float | None] = {
        f"{name}_updates_s": len(bodies) / seconds(action, budget) for name, action in actions.items()
    }
    return rates, exact


def seconds(action: Callable[[], object], budget: float) -> float:
    """Return the fewest processor seconds of three runs, or of as many as fit into a budget of seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def sender(place: int, samples: int, body: Callable[[], bytes]) -> Sender:
    """Return a device whose update is fetched and decoded whenever it is read."""

    def sent() -> Packed:
        return entries(STRUCTURE.parameters, *methods.entries(body(), STRUCTURE))

    return Sender(
        id=f"{place:06d}", samples=samples, read=lambda: top_k.densify(body(), STRUCTURE), sent=sent
    )


# --- memory ----------------------------------------------------------------------------------------


def write(folder: Path, bodies: Sequence[bytes], decoded: Sequence[Decoded], samples: Sequence[int]) -> None:
    """Write the updates as devices send them, and for Flower as positions and values."""
    (folder / "bodies").write_bytes(b"".join(bodies))
    ends = [0, *accumulate(map(len, bodies))]
    (folder / "index.json").write_text(json.dumps({"ends": ends, "samples": samples}))
    np.savez(
        folder / "updates.npz",
        positions=np.concatenate([one for one, _ in decoded]),
        values=np.concatenate([one for _, one in decoded]),
        counts=[one.size for one, _ in decoded],
        samples=samples,
    )
    shapes = [tensor.shape for tensor in STRUCTURE.tensors]
    (folder / "shapes.json").write_text(json.dumps(shapes))


def peak(folder: Path, devices: int) -> dict[str, float]:
    """Return the memory of a process that merges the updates of so many devices."""
    command = [sys.executable, "-m", "benchmarks.aggregator_speed", "--merge", str(folder), str(devices)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | CALM)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def merged_from_disk(folder: Path, devices: int) -> dict[str, float]:
    """Merge; more devices than there are updates send some of them again, with other counts."""
    index = json.loads((folder / "index.json").read_text())
    ends, counts = index["ends"], index["samples"]
    before = memory_mb()
    with (folder / "bodies").open("rb") as file:

        def body(number: int) -> bytes:
            file.seek(ends[number])
            return file.read(ends[number + 1] - ends[number])

        merged = merge(
            Settings(),
            STRUCTURE.parameters,
            [
                sender(place, counts[place % len(counts)] + place, partial(body, place % len(counts)))
                for place in range(devices)
            ],
        )
    assert np.isfinite(merged.difference).all()
    assert len(merged.contributions) == devices
    return {"before_mb": before, "peak_mb": memory_mb()}


def memory_mb() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `getrusage`: that starts with the size of the parent.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- Flower ----------------------------------------------------------------------------------------


def flower_rates(python: Path | None, folder: Path, budget: float) -> tuple[dict[str, float], str | None]:
    """Return Flower's updates per second by row, and its version; nothing where it cannot be had."""
    try:
        interpreter = python or flower_environment()
        call = f"flower({str(folder)!r}, {budget})"
        code = "\n".join([FLOWER_IMPORTS, inspect.getsource(seconds), inspect.getsource(flower), call])
        done = subprocess.run(
            [str(interpreter), "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | CALM | {"FLWR_TELEMETRY_ENABLED": "0"},
        )
    except (OSError, subprocess.CalledProcessError) as fault:
        why = (getattr(fault, "stderr", None) or str(fault)).strip().splitlines()
        print(f"Flower is not measured: {why[-1] if why else fault}")
        return {}, None
    told = json.loads(done.stdout.splitlines()[-1])
    return told["rates"], told["version"]


def flower_environment() -> Path:
    """Return an interpreter that has Flower; make its environment when it is missing."""
    python = FLOWER_HOME / "bin" / "python"
    if not python.exists() or subprocess.run([str(python), "-c", "import flwr"], check=False).returncode:
        print(f"installing flwr {FLOWER} into {FLOWER_HOME.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(FLOWER_HOME)], check=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            f"flwr=={FLOWER}",
        ]
        subprocess.run(install, check=True, capture_output=True, text=True)
    return python


def flower(folder: str, budget: float) -> None:
    """Print rates and write the mean. It runs in Flower's environment: of this file it has `seconds` only."""
    common: Any = importlib.import_module("flwr.common")
    rules: Any = importlib.import_module("flwr.server.strategy.aggregate")
    with np.load(Path(folder) / "updates.npz") as file:
        ends = np.cumsum(file["counts"])[:-1]
        pairs = list(zip(np.split(file["positions"], ends), np.split(file["values"], ends), strict=True))
        samples = file["samples"].tolist()
    shapes = json.loads((Path(folder) / "shapes.json").read_text())
    edges = np.cumsum([int(np.prod(shape)) for shape in shapes])
    layers = []
    for positions, values in pairs:
        dense = np.zeros(edges[-1], np.float32)
        dense[positions] = values
        layers.append(
            [part.reshape(shape) for part, shape in zip(np.split(dense, edges[:-1]), shapes, strict=True)]
        )
    results = list(zip(layers, samples, strict=True))
    status = common.Status(code=common.Code.OK, message="")
    replies = [
        (None, common.FitRes(status, common.ndarrays_to_parameters(one), count, {})) for one, count in results
    ]
    actions: dict[str, Callable[[], object]] = {
        "flower": lambda: rules.aggregate(results),
        "flower_inplace": lambda: rules.aggregate_inplace(replies),
    }
    try:
        app: Any = importlib.import_module("flwr.app")
        newer: Any = importlib.import_module("flwr.serverapp.strategy.strategy_utils")
    except ImportError:
        pass  # an older release
    else:
        records = [
            app.RecordDict(
                {"arrays": app.ArrayRecord(one), "metrics": app.MetricRecord({"num-examples": count})}
            )
            for one, count in results
        ]
        actions["flower_records"] = lambda: newer.aggregate_arrayrecords(records, "num-examples")
    rates = {name: len(results) / seconds(action, budget) for name, action in actions.items()}
    np.save(Path(folder) / "mean.npy", np.concatenate([one.ravel() for one in rules.aggregate(results)]))
    version = importlib.import_module("importlib.metadata").version("flwr")
    print(json.dumps({"rates": rates, "version": version}))


if __name__ == "__main__":
    sys.exit(main())
