"""Print SHA-256 digests that must be the same on every architecture, one `name digest` per line.

`python -m tests.aarch64.digests FOLDER`: FOLDER holds the model files that a coordinator compressed. The first
run, on the coordinator's architecture, makes them; every run, wherever, restores them. Inputs are made of
integers, so no library's idea of a random float is part of the comparison.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.golden import make

from liberatai_core.aggregator.mean import mean
from liberatai_core.compressor import artifact, cells, codebook
from liberatai_core.contract.chunks import Assembly, cut
from liberatai_core.contract.frame import open_frame, seal
from liberatai_core.contract.topics import blob_id
from liberatai_core.sparsifier import codec, quantile, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, digest, to_bytes

STRUCTURE = Structure(
    family="cnn",
    params={"width": 8},
    tensors=(
        Tensor(name="conv.weight", shape=(32, 16, 3, 3)),
        Tensor(name="conv.bias", shape=(32,)),
        Tensor(name="norm.weight", shape=(32,)),
        Tensor(name="head.weight", shape=(10, 2048)),
        Tensor(name="head.bias", shape=(10,)),
    ),
)
DENSITIES = (0.001, 0.01, 0.05, 0.2, 1.0)
BUDGETS = (1_500, 4_000, 10_000, 40_000)
UNEVEN = 10_000
"""Bytes up to which values are coarse enough to be trained."""


def noise(seed: int) -> Vector:
    """Return bell-shaped float32 weights made of integers only: sums of four draws, scaled by powers of 2."""
    draws = np.random.default_rng(seed).integers(-1000, 1001, (4, STRUCTURE.parameters))
    scale = np.ldexp(np.float32(1), -10 - np.arange(STRUCTURE.parameters) % 5)
    return np.asarray(draws.sum(axis=0).astype(np.float32) * scale, np.float32)


def contract() -> Iterator[tuple[str, bytes]]:
    """Frames are the same bytes, and read back as the same message."""
    for name, message in make.cases().items():
        frame = seal(message, make.SIGNER)
        yield f"frame/{name}", frame
        opened = open_frame(frame, make.FLEET, lambda _: make.SIGNER.public_key).message
        yield f"opened/{name}", repr(opened).encode()
    content = to_bytes(noise(1))
    assembly = Assembly(len(content), 10_000, hashlib.sha256(content).digest())
    for number in reversed(range(assembly.chunks)):
        assembly.add(number, cut(content, number, 10_000))
    yield "chunks", assembly.join() + assembly.bitmap()
    yield "blob id", blob_id(content).encode()
    yield "weights", digest(noise(1))


def sparsifier() -> Iterator[tuple[str, bytes]]:
    """An update that a device writes is the one that the coordinator would write, and reads the same."""
    total = mean().init(STRUCTURE.parameters)
    for density in DENSITIES:
        state = top_k.init(STRUCTURE.parameters)
        for turn in range(3):
            state, update = top_k.sparsify(state, noise(turn), STRUCTURE, density)
            dense = top_k.densify(update, STRUCTURE)
            total = mean().add(total, dense, 7 + turn, None)
            yield f"update/{density}/{turn}", update
            yield f"densified/{density}/{turn}", to_bytes(dense)
            yield f"residual/{density}/{turn}", to_bytes(state.residual)
        half = top_k.State(state.residual, state.rounds, "float16")
        again = top_k.state_from_bytes(top_k.state_to_bytes(half), STRUCTURE.parameters)
        yield f"residual/{density}/float16", to_bytes(again.residual)
        _, plain = quantile.sparsify(top_k.init(STRUCTURE.parameters), noise(9), STRUCTURE, density)
        yield f"quantile/{density}", plain
        positions, values = codec.decode(plain, STRUCTURE.parameters)
        yield f"quantile values/{density}", positions.astype("<i8").tobytes() + to_bytes(values)
    yield "mean of all updates", to_bytes(mean().finish(total))


def compressor(folder: Path) -> Iterator[tuple[str, bytes]]:
    """A model file decodes to the same weights everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for budget in BUDGETS:
        file = folder / f"{budget}.lam"
        if not file.exists():
            file.write_bytes(codebook.compress(noise(budget), STRUCTURE, budget))
        content = file.read_bytes()
        yield f"model file/{budget}", content
        yield f"restored/{budget}", to_bytes(artifact.restore(content, STRUCTURE))
        if budget > UNEVEN:
            continue
        # Rows of unlike size and importance: several tables, factors per row, values that moved.
        file = folder / f"{budget}-uneven.lam"
        if not file.exists():
            rows = np.ldexp(np.float32(1), -(np.arange(STRUCTURE.parameters) // 1024 % 6)).astype(np.float32)
            first = codebook.compress(
                noise(budget) * rows, STRUCTURE, budget, importance=np.reciprocal(rows), retraining=True
            )
            half = artifact.restore(first, STRUCTURE) * np.float32(0.5)
            file.write_bytes(cells.recentred(first, STRUCTURE, half))
        content = file.read_bytes()
        yield f"uneven model file/{budget}", content
        yield f"uneven restored/{budget}", to_bytes(artifact.restore(content, STRUCTURE))


def main() -> None:
    """Print everything."""
    for group in (contract(), sparsifier(), compressor(Path(sys.argv[1]))):
        for name, content in group:
            print(name, hashlib.sha256(content).hexdigest())  # noqa: T201 - the output of this program


if __name__ == "__main__":
    main()
