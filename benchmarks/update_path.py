"""Milliseconds of the processor that the coordinator spends on one update before its receipt, step by step.

    python -m benchmarks.update_path [--seed N] [--updates N]

Updates are made by the default method (top-k inside the part of the model that a job trains) from noise of
unlike size per tensor. Where neighbours have one sign, as in trained weights, signs are modelled: a stream
then has a few lanes only, and one alone takes ten times as long as many together. Steps:

- verify: the Ed25519 signature of the frame, with a key that was seen before
- open: the same and the typed decoding of the message
- one: the full check (stream, positions, values, counts) of one update at a time
- batch: the same of 64 updates at a time, as they arrive when many devices answer
- kept, again: reading the update for the aggregation, from what the check kept or from its bytes

One thread, time of the processor, the best of several runs. Other programs disturb through the caches;
`load` says how many there were.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from liberatai_coordinator.config import JobSpec, Sparsify, StructureChoice
from liberatai_coordinator.models.members import trained_structure
from liberatai_coordinator.models.updates import check_update, check_updates, packed
from liberatai_core.contract.frame import HEADER_BYTES, Signer, open_frame, seal
from liberatai_core.contract.messages import Update, update_id
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import structure_of
from liberatai_core.sparsifier.top_k import init, sparsify
from liberatai_core.structure import DataContract, Structure

FLEET = "bench"
BASE = bytes(16)
DATA = DataContract(input_shape=(1, 28, 28), classes=10)
STEPS = ("verify", "open", "one", "batch", "kept", "again")
BATCH = 64
REPEATS = 5
STRUCTURES = (
    ("cnn", {"width": 16}, 0.2, None, 1),
    ("cnn", {"width": 32}, 0.2, None, 8),
    ("mlp", {"hidden": 256}, 0.2, None, 1),
    ("mlp", {"hidden": 512}, 0.2, None, 8),
    ("mlp", {"hidden": 512}, 0.01, 1.0, 1),
)
"""Family, parameters, density, share of the large tensors that is trained (None: the default), and how many
neighbours have one sign."""


@dataclass(frozen=True)
class Case:
    """Updates of one structure, and their frames."""

    job: JobSpec
    structure: Structure
    updates: list[Update]
    frames: list[bytes]


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=BATCH, help="per structure")
    given = parser.parse_args()
    signer = Signer.from_seed(bytes(32), FLEET)
    print(f"{'structure':>14} {'trained':>8} {'bytes':>6}", *(f"{step:>7}" for step in STEPS))
    rows = []
    for number, case in enumerate(STRUCTURES):
        row = measured(made(*case, updates=given.updates, seed=given.seed + number, signer=signer), signer)
        rows.append(row)
        print(
            f"{row['structure']:>14} {row['trained']:>8} {row['bytes']:>6}",
            *(f"{row[f'{step}_ms']:>7.3f}" for step in STEPS),
            flush=True,
        )
    result = {
        "benchmark": "update_path",
        "rows": rows,
        "mean_ms": {step: round(float(np.mean([row[f"{step}_ms"] for row in rows])), 4) for step in STEPS},
        "seed": given.seed,
        "updates": given.updates,
        "load": round(os.getloadavg()[0], 1),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    return 0


def made(
    family: str,
    params: dict[str, int],
    density: float,
    share: float | None,
    neighbours: int,
    *,
    updates: int,
    seed: int,
    signer: Signer,
) -> Case:
    """Return a job with one structure, and updates of it."""
    job = JobSpec(
        name="path",
        data=DATA,
        structures=(StructureChoice(family=family, params=dict(params), trained_share=share),),
        sparsify=Sparsify(up_density=density),
    )
    structure = structure_of(family, dict(params), DATA)
    part = trained_structure(job, structure)
    random = np.random.default_rng(seed)
    size = np.concatenate([np.full(tensor.size, random.uniform(0.5, 1.5)) for tensor in part.tensors])
    found = []
    for number in range(updates):
        signs = np.repeat(random.choice([-1, 1], -(-part.parameters // neighbours)), neighbours)
        noise = np.abs(random.standard_t(4, part.parameters)) * signs[: part.parameters]
        difference = (0.01 * size * noise).astype(np.float32)
        _, body = sparsify(init(part.parameters), difference, part, density)
        device = f"device-{number}"
        found.append(
            Update(
                update_id=update_id(device, job.name, 1, BASE),
                device=device,
                job=job.name,
                round=1,
                epoch=1,
                structure=structure.id,
                base=BASE,
                samples=100,
                codec=job.sparsify.method,
                body=body,
                class_counts=(10,) * DATA.classes,
            )
        )
    return Case(job, structure, found, [seal(update, signer) for update in found])


def measured(case: Case, signer: Signer) -> dict[str, float | int | str]:
    """Return the milliseconds of every step, per update."""
    job, structure, updates = case.job, case.structure, case.updates
    part = trained_structure(job, structure)
    asked = [(update, structure, job) for update in updates]
    decoded = [check_update(*one) for one in asked]
    key = Ed25519PublicKey.from_public_bytes(signer.public_key)
    signed = [(frame[12:HEADER_BYTES], _signed(frame)) for frame in case.frames]

    def batches() -> None:
        for first in range(0, len(asked), BATCH):
            for found in check_updates(asked[first : first + BATCH]):
                if isinstance(found, LiberataiError):
                    raise found

    steps: dict[str, Callable[[], object]] = {
        "verify": lambda: [key.verify(*one) for one in signed],
        "open": lambda: [open_frame(frame, FLEET, lambda _: signer.public_key) for frame in case.frames],
        "one": lambda: [check_update(*one) for one in asked],
        "batch": batches,
        "kept": lambda: [packed(job, one, part, kept) for one, kept in zip(updates, decoded, strict=True)],
        "again": lambda: [packed(job, one, part) for one in updates],
    }
    return {
        "structure": structure.id,
        "parameters": structure.parameters,
        "trained": part.parameters,
        "bytes": round(float(np.mean([len(update.body) for update in updates]))),
        **{f"{name}_ms": round(1000 * best(step) / len(updates), 4) for name, step in steps.items()},
    }


def _signed(frame: bytes) -> bytes:
    """Return what the signature of a frame covers."""
    return b"liberatai/v1" + FLEET.encode() + b"\0" + frame[3:4] + frame[HEADER_BYTES:]


def best(step: Callable[[], object]) -> float:
    """Return seconds of the processor, the least of several runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
