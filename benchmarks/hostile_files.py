"""What files from a hostile coordinator cost a device before they are refused: processor time and memory.

Model files, specs and sparse updates are made by hand (many tables, few lanes, huge tensors from few bytes)
and by damaging good ones at random. Every one is decoded; the worst of each kind is kept. Memory counts what
numpy allocates beside the structure's own weights.

    python -m benchmarks.hostile_files [--files N] [--seed N]
"""

import argparse
import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from liberatai_agent.session.fits import Limits, require_fits
from liberatai_core.compressor import artifact, codebook
from liberatai_core.compressor.layout import CONSTANT, DRAWN, GRID
from liberatai_core.contract.frame import decode_spec, encode_spec
from liberatai_core.contract.messages import TaskSpec
from liberatai_core.cursor import varint
from liberatai_core.errors import LiberataiError
from liberatai_core.sparsifier import methods, top_k
from liberatai_core.structure import DataContract, Structure, Tensor

SMALL = (("conv", (16, 8, 3, 3)), ("bias", (16,)), ("dense", (40, 64)))


def a_structure(*shapes: tuple[int, ...]) -> Structure:
    """Return a structure of tensors with these shapes."""
    return Structure("made", {}, tuple(Tensor(f"t{number}", shape) for number, shape in enumerate(shapes)))


def head(structure: Structure) -> bytes:
    """Return the head of a model file with a wrong digest."""
    return b"LAM2" + bytes(32) + varint(structure.parameters) + varint(len(structure.tensors))


def with_tables(shape: tuple[int, ...], widths: tuple[int, int, int]) -> bytes:
    """Return the record of a codebook of two entries with as many tables as the classes allow."""
    size = 1
    for side in shape[2:]:
        size *= side
    sides = (shape[0], shape[1], size)
    out = bytes([4]) + np.float32(1).tobytes() + varint(2) + bytes([64 | 32, 0])
    out += bytes([sum(width << 2 * axis for axis, width in enumerate(widths))])
    for side, width in zip(sides, widths, strict=True):
        out += bytes((side * width + 7) // 8)
    tables = sum((1 << width) - 1 for width in widths) + 1
    return out + bytes([8, 8]) * tables + np.array([0, 1], "<f2").tobytes()


def message(symbols: int, lanes: int) -> bytes:
    """Return a message of random states and bits."""
    body = varint(lanes) + b"\x55" * (3 * lanes + symbols // 2)
    return varint(len(body)) + body


def by_hand() -> Iterator[tuple[str, bytes, Structure]]:
    """Yield (name, model file, structure)."""
    for count, shape in ((512, (16, 16, 8)), (512, (4, 4, 4)), (100, (64, 64, 3, 3)), (2000, (2, 2, 2))):
        structure = a_structure(*[shape] * count)
        for widths in ((3, 3, 3), (2, 2, 2), (1, 1, 1)):
            tables = sum((1 << width) - 1 for width in widths) + 1
            for longest in (4096, 64, 1):
                each = max(40 // tables, 1)
                file = head(structure) + with_tables(shape, widths) * count
                for first in range(0, count, each):
                    symbols = min(each, count - first) * structure.tensors[0].size
                    file += message(symbols, -(-symbols // longest))
                yield f"{count} x {tables} tables, rows of {longest}", file, structure
    large = a_structure((1 << 24,))
    one = np.float32(1).tobytes()
    yield "drawn", head(large) + bytes([DRAWN]) + one + varint(1 << 15) + bytes(4), large
    yield "constant", head(large) + bytes([CONSTANT]) + one, large
    for levels in (2, 1 << 16, 1 << 24):
        grid = bytes([GRID]) + one + varint(levels) + bytes([0]) + varint(0)
        yield f"grid of {levels}", head(large) + grid + bytes([8]) * 200 + message(1 << 20, 1 << 14), large
    many = a_structure(*[(1,)] * 4096)
    yield "4096 tensors", head(many) + (bytes([CONSTANT]) + one) * 4096, many
    for size in (0, 1, 4, 36, 40, 51):
        yield f"{size} bytes", (head(large) + bytes(60))[:size], large


def damaged(good: bytes, random: np.random.Generator) -> bytes:
    """Return a file with some bytes changed, cut off or repeated."""
    file = bytearray(good)
    for _ in range(int(random.integers(1, 6))):
        file[int(random.integers(len(file)))] = int(random.integers(256))
    match int(random.integers(4)):
        case 0:
            del file[int(random.integers(len(file))) :]
        case 1:
            file += bytes(file[: int(random.integers(len(file)))])
    return bytes(file)


def costs(decode: Callable[[], object], structure: Structure, *, traced: bool) -> tuple[float, float]:
    """Return processor seconds, and memory beside the weights as a multiple of them.

    Raises:
        Exception: what is not one of our errors.
    """
    if traced:
        tracemalloc.start()
    started = time.process_time()
    with contextlib.suppress(LiberataiError):
        decode()
    seconds = time.process_time() - started
    if not traced:
        return seconds, 0.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What a decoder may hold whatever the structure: tables and portions.
    return seconds, max(0.0, peak - (8 << 20)) / (4 * structure.parameters)


def checked_spec(body: bytes, limits: Limits) -> None:
    """Do with a spec what a device does before it reserves anything."""
    require_fits(decode_spec(body), 0.1, limits)


def main() -> None:
    """Print the worst of each kind."""
    parser = argparse.ArgumentParser(prog="benchmarks.hostile_files", description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="some hundred files")
    given = parser.parse_args()
    files = 300 if given.quick else given.files
    random = np.random.default_rng(given.seed)
    worst: dict[str, dict[str, float | str | int]] = {}

    def note(kind: str, name: str, seconds: float, times: float) -> None:
        row = worst.setdefault(kind, {"cpu_s": 0.0, "slowest": "", "times_the_weights": 0.0, "files": 0})
        row["files"] = int(row["files"]) + 1
        row["times_the_weights"] = max(float(row["times_the_weights"]), round(times, 2))
        if seconds > float(row["cpu_s"]):
            row |= {"cpu_s": round(seconds, 4), "slowest": name}

    for name, file, structure in by_hand():
        for traced in (False, True):
            seconds, times = costs(partial(artifact.restore, file, structure), structure, traced=traced)
            note("by hand", name, 0.0 if traced else seconds, times)
    spec = encode_spec(TaskSpec(job="job", structure=a_structure((16, 8), (16,)), data=DataContract((8,), 3)))
    for number in range(files):
        given_limits = Limits(memory_bytes=512 << 20, residual_bytes=128 << 20, samples=1000)
        decode = partial(checked_spec, damaged(spec, random), given_limits)
        note("damaged spec", str(number), *costs(decode, a_structure((1,)), traced=False))
    small = Structure("made", {}, tuple(Tensor(name, shape) for name, shape in SMALL))
    weights = random.normal(0, 1, small.parameters).astype(np.float32)
    good = [codebook.compress(weights, small, budget) for budget in (700, 2000, 8000)]
    sparse = [
        method.sparsify(top_k.init(small.parameters), weights, small, 0.1, seed=1)[1]
        for method in methods.METHODS.values()
    ]
    for number in range(files):
        file = damaged(good[number % len(good)], random)
        traced = number % 50 == 0
        note(
            "damaged model", str(number), *costs(partial(artifact.restore, file, small), small, traced=traced)
        )
        body = damaged(sparse[number % len(sparse)], random)
        note(
            "damaged update",
            str(number),
            *costs(partial(methods.densify, body, small, 1), small, traced=traced),
        )
    for kind, row in worst.items():
        print(
            f"{kind:<16} {row['files']:>8} files   worst {row['cpu_s']:.4f} s ({row['slowest']}),"
            f" {row['times_the_weights']} x the weights"
        )
    print(json.dumps({"benchmark": "hostile_files", "seed": given.seed, "worst": worst}))


if __name__ == "__main__":
    main()
