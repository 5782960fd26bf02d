"""What hostile devices do to every aggregation rule, and what the rules cost when nobody is hostile.

A fifth of the devices is hostile. They see what all others send in the round, and work together:

- sign_flip: five times the opposite of what they learned
- noise: random values, ten times as long as what others send
- alie: the mean of the others less 1.5 standard deviations (Baruch et al., NeurIPS 2019, arXiv:1902.06156)
- ipm: minus the mean of the others (Xie et al., UAI 2019, arXiv:1903.03936)
- label_flip: they train on wrong labels (class c becomes the last class - c)
- backdoor: half of their samples carry a patch and the label 0; what they learn is sent n / f times as large
  (Bagdasaryan et al., AISTATS 2020, arXiv:1807.00459)
- backdoor_quiet: the same, not enlarged
- inflated: wrong labels, and each says that it has ten million samples

"loss" is against the plain mean over the honest devices alone, "clean cost" against the plain mean over all
devices, all honest. "success" is the share of samples with the patch, of other classes, that get the label 0.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.simulation import Floats, Labels, Population, Simulation, Tamper
from benchmarks.sparsifier import population, structure_choice
from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice
from liberatai_coordinator.models.members import trained_part
from liberatai_coordinator.models.updates import difference
from liberatai_core.aggregator.rules import ROBUST, RULES, Name, feared
from liberatai_core.contract.limits import MAX_SAMPLES
from liberatai_core.contract.messages import Training, Update
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.sparsifier.top_k import init, sparsify
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

ATTACKS = ("sign_flip", "noise", "alie", "ipm", "label_flip", "backdoor", "backdoor_quiet", "inflated")
FLIP, LOUD, DEVIATIONS = 5.0, 10.0, 1.5
PATCH, TARGET = 3, 0
"""Places along every axis that the backdoor's patch covers, and the class that it asks for."""
TRAINED = 20_000
"""Parameters that are trained, about, of which every device sends a tenth per round."""
LAST = 3
"""Rounds over which accuracy is a mean."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run: a rule, and what the hostile devices do; "none": nothing, "absent": they do not take part."""

    rule: Name
    attack: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """What an arm gave.

    Attributes:
        accuracy: mean over the last rounds, on samples that no device has.
        success: of the backdoor, after the last round.
    """

    rule: str
    attack: str
    accuracy: float
    success: float
    seconds: float


# --- hostile devices -----------------------------------------------------------------------------


def hostile_places(options: argparse.Namespace, devices: int) -> list[int]:
    """Return which devices are hostile."""
    random = np.random.default_rng(options.seed + 1)
    return sorted(random.choice(devices, feared(options.hostile, devices), replace=False).tolist())


def poisoned(people: Population, attack: str, places: Sequence[int]) -> Population:
    """Return the population with the hostile devices' data changed, or without these devices."""
    if attack == "absent":
        left = [one for place, one in enumerate(people.devices) if place not in places]
        return replace(people, devices=left)
    devices = list(people.devices)
    for place in places:
        x, y = devices[place]
        if attack in ("label_flip", "inflated"):
            devices[place] = (x, people.data.classes - 1 - y)
        elif attack.startswith("backdoor"):
            marked = patched(people, x[::2])
            labels = np.full(len(marked), TARGET, dtype=np.int64)
            devices[place] = (np.concatenate([x[1::2], marked]), np.concatenate([y[1::2], labels]))
    return replace(people, devices=devices)


def patched(people: Population, x: Floats) -> Floats:
    """Return the samples with the patch in a corner, over all channels."""
    marked = x.copy()
    corner: Any = marked.T[(slice(-PATCH, None),) * max(1, x.ndim - 2)]
    corner[...] = max(float(own.max()) for own, _ in people.devices)
    return marked


def tampering(
    options: argparse.Namespace, job: JobSpec, structure: Structure, attack: str, places: Sequence[int]
) -> Tamper | None:
    """Return what the hostile devices do to what they learned; None: nothing."""
    if attack in ("none", "absent", "label_flip", "backdoor_quiet"):
        return None
    part = trained_part(job, structure).part
    names = {f"device-{place:04d}" for place in places}

    def tamper(number: int, updates: Sequence[Update]) -> list[Update]:
        others = np.stack([difference(job, one, part) for one in updates if one.device not in names])
        random = np.random.default_rng((options.seed, number))
        sent = []
        for update in updates:
            if update.device not in names:
                sent.append(update)
            elif attack == "inflated":
                sent.append(msgspec.structs.replace(update, samples=MAX_SAMPLES))
            else:
                own = difference(job, update, part)
                said = _said(attack, own, others, len(updates) / len(names), random)
                body = sparsify(init(part.parameters), said, part, 1.0)[1]
                sent.append(msgspec.structs.replace(update, body=body))
        return sent

    return tamper


def _said(attack: str, own: Vector, others: Floats, boost: float, random: np.random.Generator) -> Vector:
    match attack:
        case "sign_flip":
            said = -FLIP * own
        case "noise":
            said = random.normal(size=own.shape)
            said *= LOUD * np.median(np.linalg.norm(others, axis=1)) / np.linalg.norm(said)
        case "alie":
            said = others.mean(axis=0) - DEVIATIONS * others.std(axis=0)
        case "ipm":
            said = -others.mean(axis=0)
        case _:
            said = boost * own
    return said.astype(np.float32)


# --- arms ----------------------------------------------------------------------------------------


def job_of(
    options: argparse.Namespace, people: Population, choice: StructureChoice, rule: Name, parameters: int
) -> JobSpec:
    """Return the job of an arm."""
    share = min(1.0, max(0.05, TRAINED / parameters))
    sparse = Sparsify(trained_share=share, up_density=0.1, down_density=0.1, final_density=0.3)
    aggregate = Aggregate(rule=rule, hostile=options.hostile, clip=options.clip, ensemble="uniform")
    return JobSpec(
        name="robustness",
        data=people.data,
        structures=(choice,),
        rounds=Rounds(count=options.rounds, deadline_s=600.0),
        training=Training(epochs=options.epochs, learning_rate=options.learning_rate, momentum=0.0),
        sparsify=Sparsify(method="dense") if options.dense else sparse,
        aggregate=aggregate,
        share_class_counts=False,
        seed=options.seed,
    )


def run_arm(work: tuple[argparse.Namespace, Population, StructureChoice, Arm]) -> Row:
    """Run one arm to its end."""
    options, people, choice, arm = work
    began = time.perf_counter()
    places = hostile_places(options, len(people.devices))
    structure = structure_of(choice.family, choice.params, people.data)
    job = job_of(options, people, choice, arm.rule, structure.parameters)
    tamper = tampering(options, job, structure, arm.attack, places)
    with tempfile.TemporaryDirectory(prefix="liberatai-robustness-") as folder:
        changed = poisoned(people, arm.attack, places)
        simulation = Simulation(job, changed, Path(folder), evaluate_every=1, tamper=tamper)
        try:
            found = [next(iter(end.accuracy.values())) for end in simulation.run()]
            view = simulation.versions.now.members[structure.id].view
        finally:
            simulation.close()
    row = Row(
        rule=arm.rule,
        attack=arm.attack,
        accuracy=float(np.mean(found[-LAST:])),
        success=_success(people, structure, view),
        seconds=time.perf_counter() - began,
    )
    print(_line(row), file=sys.stderr, flush=True)
    return row


def _success(people: Population, structure: Structure, view: Vector) -> float:
    x, y = people.test
    others: Labels = y[y != TARGET]
    answers = log_probabilities(structure, people.data, view, patched(people, x[y != TARGET]))
    return float((answers.argmax(axis=1) == TARGET).sum() / len(others))


def chosen(data: DataContract, size: str) -> StructureChoice:
    """Return the model; a tiny one is trained whole, and what robust rules do depends little on size."""
    if size != "tiny":
        return structure_choice(data, size)
    family = {3: "cnn", 2: "cnn1d"}.get(len(data.input_shape), "mlp")
    return StructureChoice(family=family, params={"hidden": 64} if family == "mlp" else {"width": 8})


def arms(options: argparse.Namespace) -> list[Arm]:
    """Return what is compared."""
    found = [Arm(rule="mean", attack="absent")]
    for rule in options.rules:
        found += [Arm(rule=rule, attack=attack) for attack in ("none", *options.attacks)]
    if "mean" not in options.rules:
        found.append(Arm(rule="mean", attack="none"))
    return found


# --- what is told --------------------------------------------------------------------------------


def _line(row: Row) -> str:
    return f"{row.rule:18} {row.attack:15} {row.accuracy:7.1%} {row.success:8.1%} {row.seconds:6.0f} s"


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return per rule: clean cost, loss per attack, and the backdoor's success, in points."""
    by_arm = {(row.rule, row.attack): row for row in rows}
    honest, clean = by_arm["mean", "absent"].accuracy, by_arm["mean", "none"].accuracy
    found: dict[str, Any] = {}
    for rule in dict.fromkeys(row.rule for row in rows):
        own = {row.attack: row for row in rows if row.rule == rule and row.attack not in ("none", "absent")}
        if not own:
            continue
        losses = {attack: round(100 * (honest - row.accuracy), 2) for attack, row in own.items()}
        unlike = [loss for attack, loss in losses.items() if attack != "ipm"]
        backdoors = [row.success for attack, row in own.items() if attack.startswith("backdoor")]
        found[rule] = {
            "clean_cost": round(100 * (clean - by_arm[rule, "none"].accuracy), 2),
            "loss": losses,
            "worst_loss": max(unlike, default=None),
            "ipm_loss": losses.get("ipm"),
            "backdoor_success": round(100 * max(backdoors), 2) if backdoors else None,
            "backdoor_without": round(100 * by_arm[rule, "none"].success, 2),
        }
    return {
        "honest_only": round(100 * honest, 2),
        "clean_mean": round(100 * clean, 2),
        "robust_rule": ROBUST,
        "rules": found,
    }


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=".npz with x and y; default: the digits of scikit-learn")
    parser.add_argument("--devices", type=int, default=20, help="artificial devices (default 20)")
    parser.add_argument(
        "--alpha", type=float, help="label skew of artificial devices (default 0.5); else real owners"
    )
    parser.add_argument("--hostile", type=float, default=0.2, help="share of hostile devices (default 0.2)")
    parser.add_argument(
        "--clip", type=float, default=Aggregate().clip, help="of the robust rules, in medians"
    )
    parser.add_argument("--rules", nargs="*", choices=sorted(RULES), default=list(RULES))
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--dense", action="store_true", help="whole float32 updates instead of sparse ones")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of every arm (default 40)")
    parser.add_argument("--samples", type=int, default=20_000, help="training samples of a Dirichlet split")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument(
        "--model", choices=("tiny", "small", "large"), default="tiny", help="<= 20 000, <= 0.25 M, >= 1.5 M"
    )
    parser.add_argument("--epochs", type=int, default=2, help="local epochs")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="arms at the same time"
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, samples, rules and attacks")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (12 if options.quick else 40)
    if options.quick:
        options.samples, options.test = min(options.samples, 2_000), min(options.test, 1_000)
        options.rules = [rule for rule in options.rules if rule in ("mean", ROBUST)]
        options.attacks = [one for one in options.attacks if one in ("sign_flip", "alie", "ipm", "backdoor")]
    return options


def main() -> int:
    """Run all arms and tell."""
    options = parsed()
    try:
        people, _ = population(options)
        choice = chosen(people.data, options.model)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    work = [(options, people, choice, arm) for arm in arms(options)]
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(work))) as pool:
        rows = pool.map(run_arm, work, chunksize=1)
    print(f"{'rule':18} {'attack':15} {'final':>7} {'success':>8}")
    for row in rows:
        print(_line(row))
    structure = structure_of(choice.family, choice.params, people.data)
    found = summary(rows) | {
        "name": "robustness",
        "data": Path(options.data).stem if options.data else "digits",
        "model": structure.id,
        "parameters": structure.parameters,
        "devices": len(people.devices),
        "hostile": options.hostile,
        "clip": options.clip,
        "rounds": options.rounds,
        "alpha": options.alpha,
        "seed": options.seed,
        "rows": [asdict(row) for row in rows],
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
