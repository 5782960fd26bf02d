"""All hostile devices in the largest tier: they are the majority of one structure, where no rule can hold.

Devices report their own capability, so colluders can gather. A fleet of unlike structures trains, as in
`benchmarks.aggregator`: once without the hostile devices, and once per attack of `benchmarks.robustness`,
each time with the ensemble teaching every structure. Told is what the other structures, the ensemble and the
poisoned structure itself lose against the fleet without these devices.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from benchmarks import aggregator, robustness
from benchmarks.simulation import Tamper, newest
from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.ensembles import answer
from liberatai_core.aggregator.ensemble import accuracy
from liberatai_core.aggregator.rules import ROBUST, RULES, feared
from liberatai_core.contract.messages import Update
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import Structure

ATTACKS = ("sign_flip", "noise", "ipm", "label_flip")
Work = tuple[argparse.Namespace, aggregator.World, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What an arm gave; accuracies by structure id, of devices' weights after the last round."""

    attack: str
    students: dict[str, float]
    ensemble: float
    guard: str
    seconds: float


def places_of(options: argparse.Namespace, given: aggregator.World) -> list[int]:
    """Return the hostile devices: the first ones of the largest structure, all but one of them at most."""
    owners = given.owners
    largest = [place for place, owner in enumerate(owners) if owner == len(given.choices) - 1]
    return largest[: min(feared(options.hostile, len(owners)), len(largest) - 1)]


def job_of(options: argparse.Namespace, given: aggregator.World) -> JobSpec:
    """Return the job: that of `benchmarks.aggregator`, with a robust rule."""
    job = aggregator.job_of(options, given.people.data, given.choices)
    aggregate = msgspec.structs.replace(job.aggregate, rule=options.rule, hostile=options.hostile)
    return msgspec.structs.replace(job, aggregate=aggregate)


def tampering(
    options: argparse.Namespace, job: JobSpec, structure: Structure, attack: str, places: Sequence[int]
) -> Tamper | None:
    """Return what hostile devices do to what they learned; the updates of other structures pass."""
    inner = robustness.tampering(options, job, structure, attack, places)
    if inner is None:
        return None

    def tamper(number: int, updates: Sequence[Update]) -> list[Update]:
        own = [update for update in updates if update.structure == structure.id]
        return [update for update in updates if update.structure != structure.id] + list(inner(number, own))

    return tamper


def run_arm(work: Work) -> Row:
    """Run one arm to its end; "absent": the hostile devices do not take part."""
    options, given, attack = work
    began = time.perf_counter()
    places, data, owners = places_of(options, given), given.people.data, given.owners
    if attack == "absent":
        owners = [owner for place, owner in enumerate(owners) if place not in places]
    choice = given.choices[-1]
    job = job_of(options, given)
    tamper = None
    if attack != "absent":
        tamper = tampering(options, job, structure_of(choice.family, choice.params, data), attack, places)
    people = robustness.poisoned(given.people, attack, places)
    now = newest(job, people, public=given.public, structures=owners, tamper=tamper)
    x, y = given.people.test
    asked = {sid: log_probabilities(one.structure, data, one.view, x) for sid, one in now.members.items()}
    together = answer(now.ensemble, np.stack([asked[sid] for sid in now.ensemble.members]))
    row = Row(
        attack=attack,
        students={sid: accuracy(asked[sid], y) for sid in given.ids},
        ensemble=accuracy(together, y),
        guard=f"{now.ensemble.method}, uses {now.ensemble.use}: {now.ensemble.guard}",
        seconds=time.perf_counter() - began,
    )
    print(_line(row), file=sys.stderr, flush=True)
    return row


def _line(row: Row) -> str:
    students = "  ".join(f"{sid} {value:.1%}" for sid, value in row.students.items())
    return f"{row.attack:12} ensemble {row.ensemble:6.1%}  {students}  {row.seconds:4.0f} s"


def summary(ids: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """Return what every attack costs against the fleet without the hostile devices, points."""
    base = next(row for row in rows if row.attack == "absent")
    found = {}
    for row in rows:
        if row is base:
            continue
        losses = {sid: round(100 * (base.students[sid] - row.students[sid]), 2) for sid in ids}
        found[row.attack] = {
            "ensemble_loss": round(100 * (base.ensemble - row.ensemble), 2),
            "worst_other_loss": max(losses[sid] for sid in ids[:-1]),
            "poisoned_loss": losses[ids[-1]],
            "guard": row.guard,
        }
    return {"absent": {"ensemble": round(base.ensemble, 4), **base.students}, "attacks": found}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: options of its own, the others as in `benchmarks.aggregator`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of benchmarks.aggregator: --data, --alpha, --devices, --quick …",
    )
    parser.add_argument("--hostile", type=float, default=0.2, help="share of all devices (default 0.2)")
    parser.add_argument("--rule", choices=sorted(RULES), default=ROBUST)
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    own, rest = parser.parse_known_args(arguments)
    return argparse.Namespace(**{**vars(aggregator.parsed(rest)), **vars(own)})


def main() -> int:
    """Run all arms and tell."""
    options = parsed()
    try:
        given = aggregator.world(options)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    work: list[Work] = [(options, given, attack) for attack in ("absent", *options.attacks)]
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(work))) as pool:
        rows = pool.map(run_arm, work, chunksize=1)
    for row in rows:
        print(_line(row))
    found = summary(given.ids, rows) | {
        "name": "robustness_tier",
        "setting": aggregator.told(options),
        "rule": options.rule,
        "devices": len(given.owners),
        "hostile_devices": len(places_of(options, given)),
        "devices_of_their_structure": given.owners.count(len(given.choices) - 1),
        "seed": options.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cores": os.cpu_count(),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
