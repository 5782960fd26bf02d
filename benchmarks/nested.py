"""Members of one family: each on its own, or sharing coordinates; with teaching and without; see --help.

A mixed fleet, every device with one member of the family, trains for the same rounds in virtual time
(`benchmarks.simulation`); nothing is left out on the wire, so that only the aggregation differs:

- separate: federated averaging inside each structure;
- nested: coverage-weighted averaging of all members (HeteroFL for widths, leading blocks for depths);
- taught: separate, and the guarded ensemble teaches every structure in every round;
- nested_taught: both.

Private, unlabeled, labelled and test samples are disjoint. Labelled ones decide ensemble and guard only.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.simulation import Population, newest
from benchmarks.sparsifier import population
from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice, Teach
from liberatai_coordinator.models.ensembles import answer
from liberatai_coordinator.models.members import Public
from liberatai_core.aggregator.ensemble import accuracy
from liberatai_core.contract.messages import Training
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.families import structure_of
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract

JOB = "nested"
SHARE = 5
"""Unlabeled and labelled samples are at most one in five of the training samples each."""
ARMS = ("separate", "nested", "taught", "nested_taught")
Mode = Literal["off", "width", "depth"]

WIDTHS: dict[str, list[dict[str, Any]]] = {
    "cnn": [{"width": width} for width in (32, 16, 8)],
    "ds_cnn": [{"width": width} for width in (32, 16, 8)],
    "cnn1d": [{"width": width} for width in (32, 16, 8)],
    "mlp": [{"hidden": hidden, "layers": 2} for hidden in (64, 32, 16)],
}
DEPTHS: dict[str, list[dict[str, Any]]] = {
    "cnn": [{"width": 16, "layers": layers} for layers in (3, 2, 1)],
    "ds_cnn": [{"width": 16, "layers": layers} for layers in (3, 2, 1)],
    "mlp": [{"hidden": 32, "layers": layers} for layers in (3, 2, 1)],
}
"""Members of each family, the largest first."""


def split(options: argparse.Namespace, seed: int) -> tuple[Population, Public]:
    """Return the devices' samples, and the coordinator's, which are drawn from all of them."""
    asked = argparse.Namespace(**{**vars(options), "seed": seed})
    people, _ = population(asked)
    x = np.concatenate([one[0] for one in people.devices])
    y = np.concatenate([one[1] for one in people.devices])
    owner = np.repeat(np.arange(len(people.devices)), [len(one[1]) for one in people.devices])
    lot = np.random.default_rng(seed).permutation(len(y))
    public, labelled = (min(wanted, len(y) // SHARE) for wanted in (options.public, options.validation))
    unlabeled, known, private = np.split(lot, [public, public + labelled])
    devices = [(x[rows], y[rows]) for rows in (np.sort(private[owner[private] == one]) for one in set(owner))]
    return (
        Population(data=people.data, devices=[one for one in devices if len(one[1])], test=people.test),
        Public(unlabeled=x[unlabeled], validation=(x[known], y[known])),
    )


def arms(options: argparse.Namespace, data: DataContract) -> Iterator[tuple[str, str, str, Mode, bool]]:
    """Yield (dimension, family, name, which members are nested, taught) of every arm."""
    usual = {3: "cnn", 2: "cnn1d"}.get(len(data.input_shape), "mlp")
    for family in options.families or [usual]:
        dimensions: tuple[tuple[str, Mode, dict[str, Any]], ...] = (
            ("width", "width", WIDTHS),
            ("depth", "depth", DEPTHS),
        )
        for dimension, mode, members in dimensions:
            if family not in members:
                continue
            kinds: list[tuple[str, Mode, bool]] = [("separate", "off", False), ("nested", mode, False)]
            if dimension == "width" or not options.quick:
                kinds += [("taught", "off", True), ("nested_taught", mode, True)]
            for name, nests, taught in kinds:
                if name in options.only:
                    yield dimension, family, name, nests, taught


def run_arm(
    options: argparse.Namespace,
    people: Population,
    public: Public,
    members: list[tuple[str, dict[str, Any]]],
    mode: Mode,
    seed: int,
) -> dict[str, Any]:
    """Run a job to its end and return the accuracy of every member and of the ensemble."""
    choices = tuple(StructureChoice(family=family, params=params) for family, params in members)
    job = JobSpec(
        name=JOB,
        data=people.data,
        structures=choices,
        rounds=Rounds(count=options.rounds, overselect=1.0),
        training=Training(epochs=options.epochs),
        sparsify=Sparsify(method=options.sparsify),
        aggregate=Aggregate(nested=mode, validation="validation.npz"),
        teach=Teach(copies=2, steps=options.teach_steps),
        seed=seed,
    )
    owners = [number % len(choices) for number in range(len(people.devices))]
    began = time.perf_counter()
    now = newest(job, people, public=public, structures=owners)
    x, y = people.test
    answers = {
        sid: log_probabilities(one.structure, people.data, one.view, x) for sid, one in now.members.items()
    }
    ids = [structure_of(family, params, people.data).id for family, params in members]
    together = answer(now.ensemble, np.stack([answers[sid] for sid in now.ensemble.members]))
    reached = {sid: round(accuracy(answers[sid], y), 4) for sid in ids}
    return {
        "members": reached,
        "mean": round(float(np.mean(list(reached.values()))), 4),
        "ensemble": round(accuracy(together, y), 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=".npz with x and y; default: the digits of scikit-learn")
    parser.add_argument(
        "--families", nargs="*", choices=sorted(WIDTHS), help="default: one that suits the data"
    )
    parser.add_argument("--only", nargs="*", choices=ARMS, default=ARMS, help="arms")
    parser.add_argument("--alpha", type=float, default=0.3, help="label skew of artificial devices")
    parser.add_argument("--devices", type=int, default=12, help="dealt to the members in turn")
    parser.add_argument("--rounds", type=int, help="of every arm (default 25, quick 10)")
    parser.add_argument("--samples", type=int, default=12_000, help="training samples")
    parser.add_argument("--public", type=int, default=2_000, help="unlabeled samples of the coordinator")
    parser.add_argument("--validation", type=int, default=200, help="labelled samples of the coordinator")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument("--epochs", type=int, default=2, help="local epochs")
    parser.add_argument("--teach-steps", type=int, default=100)
    parser.add_argument("--sparsify", default="dense", choices=("dense", "topk"), help="what travels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few samples and rounds, depths without teaching"
    )
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 10 if options.quick else 25
    if options.quick:
        options.samples, options.public = min(options.samples, 2_400), min(options.public, 300)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run all arms and tell."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    print(f"{'family':7} {'by':6} {'seed':>4} {'arm':14} {'members, the largest first':28} mean  ensemble")
    try:
        for seed in options.seeds:
            people, public = split(options, seed)
            for dimension, family, name, mode, taught in arms(options, people.data):
                table = WIDTHS if dimension == "width" else DEPTHS
                given = public if taught else Public(validation=public.validation)
                members = [(family, params) for params in table[family]]
                row = run_arm(options, people, given, members, mode, seed)
                found.append({"family": family, "by": dimension, "arm": name, "seed": seed, **row})
                each = " ".join(f"{value:7.1%}" for value in row["members"].values())
                told = f"{each:28} {row['mean']:6.1%} {row['ensemble']:6.1%}"
                print(f"{family:7} {dimension:6} {seed:4} {name:14} {told}", flush=True)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    means: dict[str, float] = {}
    for row in found:
        key = f"{row['family']} {row['by']} {row['arm']}"
        same = [one["mean"] for one in found if f"{one['family']} {one['by']} {one['arm']}" == key]
        means[key] = round(float(np.mean(same)), 4)
    summary = {
        "name": JOB,
        "data": Path(options.data).stem if options.data else "digits",
        "alpha": options.alpha,
        "devices": options.devices,
        "rounds": options.rounds,
        "seeds": options.seeds,
        "sparsify": options.sparsify,
        "means": means,
        "arms": found,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
