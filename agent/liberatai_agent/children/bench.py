"""Looks at data and arithmetic in a process of its own, so that the agent never loads numpy.

`python -m liberatai_agent.children.bench [--data FILE] [--answer FD] [--parent PID]` writes one JSON object
to the file descriptor (or prints it): float32 matrix product in Gflop/s of one thread, the families that can
be built here, and what the data file holds. Nothing of a single record is in it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from liberatai_agent.children.confine import confine

SIDE = 256
"""768 KiB for the three matrices: inside every second-level cache, as the layers of small models are."""
SECONDS = 0.3
"""Long enough for a governor to raise the clock, short enough for a start."""


def gflops(side: int = SIDE, seconds: float = SECONDS) -> float:
    """Return the best rate of a float32 matrix product, in 1e9 operations per second."""
    import numpy as np  # noqa: PLC0415 - argparse errors need no numpy

    random = np.random.default_rng(0)
    left, right = (random.random((side, side), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended > until:
            return 2 * side**3 / best / 1e9


def look_at_data(path: Path) -> dict[str, Any]:
    """Return samples, shape and number of classes of a private file, or its fault."""
    from liberatai_core.errors import LiberataiError  # noqa: PLC0415
    from liberatai_core.learning.dataset import contract_of, load_npz, require_training_rows  # noqa: PLC0415

    try:
        samples = load_npz(path)
        require_training_rows(samples, str(path))
        data = contract_of(samples)
    except LiberataiError as error:
        return {"fault": f"E_DATA: {error}"}
    found: dict[str, Any] = {
        "samples": len(samples) - (int(samples.test.sum()) if samples.test is not None else 0),
        "input_shape": list(data.input_shape),
        "classes": data.classes,
    }
    if samples.one_class:
        found["warning"] = "E_DATA: all labels are equal: what is learnt from them knows one answer only"
    return found


def families() -> list[str]:
    """Return the families that can be trained here: without torch only the built-in ones."""
    from liberatai_core.learning.families import FAMILIES, known_families  # noqa: PLC0415

    return sorted(FAMILIES) if find_spec("torch") is None else known_families()


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found as one JSON object."""
    parser = argparse.ArgumentParser(prog="liberatai_agent.children.bench")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--no-arithmetic", action="store_true")
    parser.add_argument("--answer", type=int, default=1, metavar="FD")
    parser.add_argument("--parent", type=int, metavar="PID")
    args = parser.parse_args(argv)
    if args.parent is not None:
        confine(args.parent)
    found: dict[str, Any] = {"families": families()}
    if not args.no_arithmetic:
        found["gflops"] = round(gflops(), 3)
    if args.data is not None:
        found["data"] = look_at_data(args.data)
    with os.fdopen(args.answer, "wb", closefd=False) as out:
        out.write(json.dumps(found).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
