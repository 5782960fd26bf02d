"""Unlike structures learn from each other: what ensembles, teaching and plain averaging reach; see --help.

Every arm trains the same way for the same rounds on the same devices in virtual time
(`benchmarks.simulation`); nothing is left out on the wire, so that only the aggregation differs:

- centralised: one structure on all private samples in one place, as many epochs as a device trains;
- fedavg_all: federated averaging of one structure that every device can run;
- fedavg_family: the same when the fleet is mixed, each structure on its own share of the devices;
- ensemble: the members of fedavg_family together, by every method and its seconds;
- students: the mixed fleet again, taught on unlabeled samples (`--teachers`);
- server_only: no device at all. The same structures train on the coordinator's labelled samples and teach
  each other on its unlabeled ones, for as many rounds: what the federation must beat to be worth it.

`figures`, in points: the taught ensemble over the best student; what teaching gives the smallest structure,
and the structure that gains least; the worst student below the ensemble; all devices' own structures on
average over the smallest one on all devices (what all of them can run; with `--structures 6` six profiles);
the largest student over the largest structure on all devices; the best model over the centralised largest.

Private, unlabeled, labelled and test samples are disjoint. Methods see the labelled part that is theirs, the
guard the other one, and the test samples decide nothing.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation import Floats, Labels, Population, newest
from benchmarks.sparsifier import population
from liberatai_coordinator.config import Aggregate, JobSpec, Rounds, Sparsify, StructureChoice, Teach
from liberatai_coordinator.models.ensembles import answer
from liberatai_coordinator.models.members import Public, derive_seed
from liberatai_core.aggregator.ensemble import Evidence, Pool, accuracy, normalised, pooled
from liberatai_core.aggregator.guard import divided, guard
from liberatai_core.aggregator.methods import ENSEMBLES, LABELLED, chosen, method_of
from liberatai_core.contract.messages import Training
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.dataset import load_npz
from liberatai_core.learning.distillation import DistillSettings, distill, usual_copies, usual_steps
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract

JOB = "aggregator"
SHARE = 4
"""Unlabeled and labelled samples are at most one in four of the training samples each."""
SERVER_EPOCHS, SERVER_AUGMENT = 4, 0.6
"""Of a server without devices, in a round: its few samples are shown more often, changed as in a teaching."""
WORST = 0.1
"""Share of the devices whose mean accuracy is "worst10"."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Who has which samples.

    Attributes:
        people: private samples of the devices, and the test samples.
        public: what the coordinator has; its labelled samples decide weights and guard.
    """

    people: Population
    public: Public
    choices: tuple[StructureChoice, ...]

    @property
    def ids(self) -> list[str]:
        """Structure ids, in the order of `choices`."""
        return [structure_of(one.family, one.params, self.people.data).id for one in self.choices]

    @property
    def owners(self) -> list[int]:
        """Place of every device's structure: dealt out in turn."""
        return [number % len(self.choices) for number in range(len(self.people.devices))]

    @property
    def labelled(self) -> tuple[Floats, Labels]:
        """The coordinator's labelled samples."""
        if self.public.validation is None:
            raise RuntimeError("a world without labelled samples")
        return self.public.validation


@dataclass(frozen=True, kw_only=True, eq=False)
class Ended:
    """What an arm left.

    Attributes:
        test, labelled: log-probabilities of the devices' weights, by structure, shape (n, classes).
        class_counts: by structure, shape (classes,).
        together: log-probabilities of the version's own ensemble on the test samples.
        guard: what the version says about its ensemble.
    """

    test: dict[str, Floats]
    labelled: dict[str, Floats]
    class_counts: dict[str, NDArray[np.float64]]
    seconds: float
    together: Floats | None = None
    guard: str = ""


# --- data and models -----------------------------------------------------------------------------


def world(options: argparse.Namespace) -> World:
    """Return who has what: public samples are drawn from those of all devices."""
    people, _ = population(options)
    x = np.concatenate([one[0] for one in people.devices])
    y = np.concatenate([one[1] for one in people.devices])
    owner = np.repeat(np.arange(len(people.devices)), [len(one[1]) for one in people.devices])
    lot = np.random.default_rng(options.seed).permutation(len(y))
    public, labelled = (min(wanted, len(y) // SHARE) for wanted in (options.public, options.validation))
    unlabeled, known, private = np.split(lot, [public, public + labelled])
    devices = [(x[rows], y[rows]) for rows in (np.sort(private[owner[private] == one]) for one in set(owner))]
    same = {"none": None, "same": x[unlabeled]}
    return World(
        people=Population(
            data=people.data, devices=[one for one in devices if len(one[1])], test=people.test
        ),
        public=Public(
            unlabeled=same[options.unlabeled]
            if options.unlabeled in same
            else foreign(options.unlabeled.removeprefix("other:"), people.data, public, options.seed),
            validation=(x[known], y[known]),
        ),
        choices=ladder(people.data)[: options.structures],
    )


def foreign(path: str, data: DataContract, number: int, seed: int) -> Floats:
    """Return unlabeled samples of another file, resampled to the shape of the data and normalised."""
    samples = load_npz(Path(path)).x
    rows = np.random.default_rng(seed).permutation(len(samples))[:number]
    x = samples[rows]
    if x.ndim == len(data.input_shape):
        x = x[:, None]
    if x.ndim != len(data.input_shape) + 1:
        raise SystemExit(f"{path}: samples of {x.ndim - 1} axes, the data has {len(data.input_shape)}")
    for axis, size in enumerate(data.input_shape, start=1):
        x = np.take(x, np.arange(size) * x.shape[axis] // size, axis=axis)
    return np.ascontiguousarray((x - x.mean()) / (x.std() or 1.0), dtype=np.float32)


def ladder(data: DataContract) -> tuple[StructureChoice, ...]:
    """Return unlike structures for this data, the smallest first."""
    match len(data.input_shape):
        case 3:
            found: list[tuple[str, dict[str, Any]]] = [
                ("ds_cnn", {"width": 32}),
                ("cnn", {"width": 8}),
                ("mlp", {"hidden": 32}),
                ("cnn", {"width": 16, "hidden": 96}),
                ("cnn", {"width": 24, "hidden": 192}),
                ("mlp", {"hidden": 256, "layers": 2}),
            ]
        case 2:
            found = [("cnn1d", {"width": width}) for width in (4, 8, 16, 32, 48, 64)]
        case _:
            found = [("mlp", {"hidden": hidden, "layers": 2}) for hidden in (8, 16, 32, 64, 128, 256)]
    found.sort(key=lambda one: structure_of(one[0], one[1], data).parameters)
    return tuple(StructureChoice(family=family, params=params) for family, params in found)


# --- arms ----------------------------------------------------------------------------------------


def job_of(options: argparse.Namespace, data: DataContract, choices: tuple[StructureChoice, ...]) -> JobSpec:
    """Return the job of a federated arm; it teaches if its coordinator has unlabeled samples."""
    return JobSpec(
        name=JOB,
        data=data,
        structures=choices,
        rounds=Rounds(count=options.rounds, overselect=1.0),
        training=Training(
            epochs=options.epochs,
            batch_size=32,
            learning_rate=options.learning_rate,
            balance=options.balance,
            augment=options.augment,
        ),
        sparsify=Sparsify(method="dense"),
        # Arms with and without teaching differ in nothing else; `benchmarks.nested` compares that.
        aggregate=Aggregate(
            nested="off", ensemble=options.method, trials=options.trials, validation="validation.npz"
        ),
        teach=Teach(
            method=options.teach_method,
            validation=options.teach_validation,
            teachers=options.teachers,
            every=options.teach_every,
            steps=options.teach_steps,
            copies=options.copies,
        ),
        seed=options.seed,
    )


def run_arm(work: tuple[str, int, argparse.Namespace, World]) -> Ended:
    """Run one arm: (its name, the place of its structure or -1, options, world)."""
    name, place, options, given = work
    began = time.perf_counter()
    if name == "centralised":
        ended = centralised(options, given, given.choices[place])
    elif name == "server":
        ended = server_only(options, given)
    else:
        taught = name == "taught"
        public = given.public if taught else Public(validation=given.public.validation)
        choices = given.choices if place < 0 else given.choices[place : place + 1]
        owners = given.owners if place < 0 else [0] * len(given.people.devices)
        ended = federated(options, given, public, choices, owners)
    took = time.perf_counter() - began
    told = "  ".join(f"{sid} {accuracy(one, given.people.test[1]):.1%}" for sid, one in ended.test.items())
    print(f"{name:14} {took:5.0f} s  {told}", file=sys.stderr, flush=True)
    return Ended(**{**{key: getattr(ended, key) for key in Ended.__dataclass_fields__}, "seconds": took})


def centralised(options: argparse.Namespace, given: World, choice: StructureChoice) -> Ended:
    """Train one structure on all private samples."""
    data = given.people.data
    structure = structure_of(choice.family, choice.params, data)
    x = np.concatenate([one[0] for one in given.people.devices])
    y = np.concatenate([one[1] for one in given.people.devices])
    settings = TrainSettings(
        epochs=options.epochs * options.rounds,
        learning_rate=options.learning_rate,
        balance=0.0,
        augment=options.augment,
    )
    start = initial_weights(structure, data, options.seed)
    weights = train(structure, data, start, x, y, settings, options.seed).weights
    test = log_probabilities(structure, data, weights, given.people.test[0])
    return Ended(test={structure.id: test}, labelled={}, class_counts={}, seconds=0.0)


def server_only(options: argparse.Namespace, given: World) -> Ended:
    """Train every structure on the coordinator's labels; what they agree on teaches each of them."""
    data, (known, y), test = given.people.data, given.labelled, given.people.test[0]
    if given.public.unlabeled is None:
        raise RuntimeError("a server without unlabeled samples")
    structures = [structure_of(one.family, one.params, data) for one in given.choices]
    weights = {one.id: initial_weights(one, data, options.seed) for one in structures}
    x = np.concatenate([given.public.unlabeled, known])
    copies = np.repeat(
        [usual_copies(len(given.public.unlabeled)), usual_copies(len(y))], [len(x) - len(y), len(y)]
    )
    shown = len(x) + int(copies.sum())
    settings = TrainSettings(
        epochs=SERVER_EPOCHS, learning_rate=options.learning_rate, balance=0.0, augment=SERVER_AUGMENT
    )
    truth = np.log(np.eye(data.classes)[y] + np.finfo(np.float32).tiny).astype(np.float32)
    for number in range(options.rounds):
        for one in structures:
            seed = derive_seed(options.seed, f"server|{one.id}", number)
            weights[one.id] = train(one, data, weights[one.id], known, y, settings, seed).weights
        answers = np.stack([log_probabilities(one, data, weights[one.id], x) for one in structures])
        said = normalised(answers.astype(np.float64).mean(axis=0))
        said[len(said) - len(y) :] = truth
        for one in structures:
            seed = derive_seed(options.seed, f"taught|{one.id}", number)
            lesson = DistillSettings(steps=usual_steps(shown, DistillSettings().batch_size))
            weights[one.id] = distill(one, data, weights[one.id], x, said, lesson, seed, copies=copies)
    asked = {one.id: log_probabilities(one, data, weights[one.id], test) for one in structures}
    together = normalised(np.stack(list(asked.values())).astype(np.float64).mean(axis=0))
    return Ended(test=asked, labelled={}, class_counts={}, seconds=0.0, together=together)


def federated(
    options: argparse.Namespace,
    given: World,
    public: Public,
    choices: tuple[StructureChoice, ...],
    owners: list[int],
) -> Ended:
    """Run a job to its end."""
    data, test = given.people.data, given.people.test[0]
    job = job_of(options, data, choices)
    now = newest(job, given.people, public=public, structures=owners)
    asked = {sid: log_probabilities(one.structure, data, one.view, test) for sid, one in now.members.items()}
    labelled = {
        sid: log_probabilities(one.structure, data, one.view, given.labelled[0])
        for sid, one in now.members.items()
    }
    return Ended(
        test=asked,
        labelled=labelled,
        class_counts={sid: one.class_counts for sid, one in now.members.items()},
        seconds=0.0,
        together=answer(now.ensemble, np.stack([asked[sid] for sid in now.ensemble.members])),
        guard=f"{now.ensemble.method}: {now.ensemble.guard}",
    )


# --- ensembles -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """What methods see of an arm, and what they are judged by.

    Attributes:
        labelled, test: log-probabilities, shape (members, n, classes).
        class_counts: shape (members, classes).
    """

    labelled: Floats
    y: Labels
    test: Floats
    y_test: Labels
    class_counts: NDArray[np.float64]


def members_of(given: World, ended: Ended) -> Members:
    """Return an arm's members in the order of their ids."""
    ids = sorted(ended.test)
    return Members(
        labelled=np.stack([ended.labelled[sid] for sid in ids]),
        y=given.labelled[1],
        test=np.stack([ended.test[sid] for sid in ids]),
        y_test=given.people.test[1],
        class_counts=np.stack([ended.class_counts[sid] for sid in ids]),
    )


def ensembles(options: argparse.Namespace, members: Members) -> tuple[dict[str, dict[str, Any]], Pool]:
    """Return what every method reaches and takes, and the pool of the default one."""
    fitted, judging = divided(members.y, derive_seed(options.seed, "labels", 0))
    default = chosen("auto", labels=len(fitted), counted=True)
    found, pools = {}, {}
    for name in ENSEMBLES:
        evidence = Evidence(
            class_counts=members.class_counts,
            balance=options.balance,
            log_probs=members.labelled[:, fitted],
            y=members.y[fitted],
            seed=options.seed,
        )
        if name == "tpe":
            method_of(name, 1)(evidence)  # imports Optuna: a coordinator does that once
        began = time.perf_counter()
        pools[name] = method_of(name, options.trials)(evidence)
        seconds = time.perf_counter() - began
        rows = judging if name in LABELLED else np.arange(len(members.y))
        held = members.labelled[:, rows]
        decision = guard(pooled(pools[name], held), held, members.y[rows])
        together = pooled(pools[name], members.test)
        used = together if decision.use == "ensemble" else members.test[decision.use]
        found[name] = {
            "accuracy": round(accuracy(used, members.y_test), 4),
            "unguarded": round(accuracy(together, members.y_test), 4),
            "seconds": round(seconds, 4),
            "guard": decision.reason,
        }
    return found, pools[default]


def worst(given: World, ended: Ended) -> float:
    """Return the mean accuracy of the worst devices' own models.

    A device's accuracy is that of its structure on test samples which are as often of each class as its own.
    """
    y = given.people.test[1]
    by_class = {
        sid: np.array(
            [
                accuracy(one[y == label], y[y == label]) if (y == label).any() else 0.0
                for label in range(given.people.data.classes)
            ]
        )
        for sid, one in ended.test.items()
    }
    ids, scores = given.ids, []
    for (_, own), place in zip(given.people.devices, given.owners, strict=True):
        shares = np.bincount(own, minlength=given.people.data.classes) / len(own)
        scores.append(float(shares @ by_class[ids[place]]))
    scores.sort()
    return float(np.mean(scores[: max(1, round(WORST * len(scores)))]))


# --- what is told --------------------------------------------------------------------------------


def summary(
    options: argparse.Namespace, given: World, ended: Mapping[tuple[str, int], Ended]
) -> dict[str, Any]:
    """Return all figures; accuracies are shares of the test samples."""
    y, ids = given.people.test[1], given.ids

    def of(one: Ended) -> dict[str, float]:
        return {sid: round(accuracy(one.test[sid], y), 4) for sid in ids if sid in one.test}

    family = ended["family", -1]
    taught = ended.get(("taught", -1), family)
    if taught.together is None:
        raise RuntimeError("a federated arm without an ensemble")
    methods, pool = ensembles(options, members_of(given, family))
    before, after = of(family), of(taught)
    fitted, _ = divided(given.labelled[1], 0)
    default = chosen("auto", labels=len(fitted), counted=True)
    best = max(before, key=lambda sid: before[sid])
    picture(pool, sorted(family.test), options.picture, f"{default}, {told(options)}")
    if options.members is not None:
        np.savez(options.members, **vars(members_of(given, family)))
    return {
        "centralised": {
            sid: of(ended["centralised", place])[sid]
            for place, sid in enumerate(ids)
            if ("centralised", place) in ended
        },
        "fedavg_all": {
            sid: of(ended["all", place])[sid] for place, sid in enumerate(ids) if ("all", place) in ended
        },
        "fedavg_family": before,
        "server_only": of(ended["server", -1]) if ("server", -1) in ended else {},
        "ensemble": methods,
        "best_member": {"structure": best, "accuracy": before[best]},
        "default_method": {"name": default, **methods[default]},
        "students": {sid: {"before": before[sid], "after": after[sid]} for sid in ids},
        "smallest": {"structure": ids[0], "before": before[ids[0]], "after": after[ids[0]]},
        "figures": figures(given, ended, before, after, accuracy(taught.together, y)),
        "taught_ensemble": {"accuracy": round(accuracy(taught.together, y), 4), "guard": taught.guard},
        "worst10": {"before": round(worst(given, family), 4), "after": round(worst(given, taught), 4)},
        "seconds": {f"{name} {place}": round(one.seconds, 1) for (name, place), one in ended.items()},
    }


def figures(
    given: World,
    ended: Mapping[tuple[str, int], Ended],
    before: Mapping[str, float],
    after: Mapping[str, float],
    ensemble: float,
) -> dict[str, float]:
    """Return what the table says in single numbers, points; those of arms that ran."""
    ids, y = given.ids, given.people.test[1]
    last = len(ids) - 1

    def arm(name: str, place: int) -> float | None:
        found = ended.get((name, place))
        return None if found is None else accuracy(found.test[ids[place]], y)

    best = max(ensemble, *after.values())
    own = float(np.mean([after[ids[place]] for place in given.owners]))
    found = {
        "ensemble_over_best_student": ensemble - max(after.values()),
        "smallest_gain": after[ids[0]] - before[ids[0]],
        "least_gain": min(after[sid] - before[sid] for sid in ids),
        "worst_student_under_ensemble": min(after.values()) - ensemble,
    }
    common, largest, central = arm("all", 0), arm("all", last), arm("centralised", last)
    server = ended.get(("server", -1))
    if server is not None:
        alone = {sid: accuracy(one, y) for sid, one in server.test.items()}
        found["mean_student_over_server_only"] = float(np.mean([after[sid] - alone[sid] for sid in ids]))
    found["mean_student"] = float(np.mean([after[sid] for sid in ids]))
    if common is not None:
        found["own_models_over_common_structure"] = own - common
    if largest is not None:
        found["largest_over_largest_on_all"] = after[ids[last]] - largest
    if central is not None:
        found["best_over_centralised_largest"] = best - central
    return {name: round(100 * value, 2) for name, value in found.items()}


def told(options: argparse.Namespace) -> str:
    """Return the setting in a few words."""
    name = Path(options.data).stem if options.data else "digits"
    alpha = "natural" if options.natural else f"alpha {options.alpha:g}"
    return f"{name}, {alpha}, {options.rounds} rounds, seed {options.seed}"


def table(found: Mapping[str, Any]) -> None:
    """Print structures and methods."""
    print(f"{'structure':24} {'central':>8} {'all':>8} {'server':>8} {'family':>8} {'taught':>8}")
    for sid, row in found["students"].items():
        others = [found[name].get(sid) for name in ("centralised", "fedavg_all", "server_only")]
        values = [*others, row["before"], row["after"]]
        print(f"{sid:24}", *(f"{value:8.1%}" if value is not None else f"{'-':>8}" for value in values))
    print(f"{'taught ensemble':24} {found['taught_ensemble']['accuracy']:44.1%}")
    print(f"worst tenth of the devices: {found['worst10']['before']:.1%} -> {found['worst10']['after']:.1%}")
    for name, value in found["figures"].items():
        print(f"{name.replace('_', ' '):36} {value:+7.2f} points")
    print(f"\n{'method':16} {'guarded':>8} {'alone':>8} {'seconds':>9}  guard")
    for name, row in sorted(found["ensemble"].items(), key=lambda item: -item[1]["unguarded"]):
        print(
            f"{name:16} {row['accuracy']:8.1%} {row['unguarded']:8.1%} {row['seconds']:9.3f}  {row['guard']}"
        )


def picture(pool: Pool, ids: list[str], path: Path, title: str) -> None:
    """Draw the weights of every member and class."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a picture is wanted

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(ids)), layout="constrained")
    drawn = axes.imshow(pool.weights, aspect="auto", cmap="Blues", vmin=0)
    classes = pool.weights.shape[1]
    axes.set(xlabel="class", xticks=range(classes), yticks=range(len(ids)), yticklabels=ids, title=title)
    for (row, column), weight in np.ndenumerate(pool.weights):
        dark = weight > 0.6 * pool.weights.max()
        color = "white" if dark else "black"
        axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=color, fontsize=7)
    figure.colorbar(drawn, ax=axes, label="weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it is, and every default."""


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--data", help=".npz with x and y; default: the digits of scikit-learn")
    parser.add_argument("--alpha", default="0.3", help='label skew of artificial devices, or "natural"')
    parser.add_argument("--structures", type=int, default=4, help="2 to 6 unlike ones")
    parser.add_argument("--devices", type=int, default=20, help="artificial devices, dealt to structures")
    parser.add_argument("--rounds", type=int, help="of every arm (default 25)")
    parser.add_argument("--samples", type=int, default=25_000, help="training samples of a Dirichlet split")
    parser.add_argument("--public", type=int, default=4_000, help="unlabeled samples of the coordinator")
    parser.add_argument("--validation", type=int, default=600, help="labelled samples of the coordinator")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument("--unlabeled", default="same", help="same, none (no teaching), or other:FILE.npz")
    parser.add_argument("--epochs", type=int, default=2, help="local epochs")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of the devices")
    parser.add_argument("--balance", type=float, default=1.0, help="of all federated arms, see docs/jobs.md")
    parser.add_argument("--augment", type=float, default=0.0, help="of the devices' training")
    parser.add_argument("--teach-every", type=int, default=1, help="rounds")
    parser.add_argument("--teach-steps", type=int, help="batches of a round's teaching")
    parser.add_argument("--copies", type=int, help="changed ones beside each unlabeled sample")
    parser.add_argument(
        "--teach-method",
        choices=("ensemble", "task_vectors"),
        default=Teach().method,
        help="see docs/jobs.md",
    )
    parser.add_argument(
        "--teach-validation",
        choices=("none", "inputs", "labels"),
        default=Teach().validation,
        help="what of the labelled samples teaches, of those that find the ensemble's weights",
    )
    parser.add_argument(
        "--teachers",
        choices=("auto", "devices", "ensemble"),
        default=Teach().teachers,
        help="who teaches: the devices' models, the structures' ensemble, or what labels do not contradict",
    )
    parser.add_argument("--method", choices=("auto", *ENSEMBLES), default="auto", help="of the teacher")
    parser.add_argument("--trials", type=int, default=50, help="of every search")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("all", "centralised", "all-ends", "centralised-ends"),
        metavar="ARM",
        help="arms beside family and taught: all, centralised, all-ends, centralised-ends (the smallest and "
        "the largest structure); none given: only those two; without it: all, centralised",
    )
    parser.add_argument("--members", type=Path, help="write the members' predictions to this .npz")
    parser.add_argument("--seed", type=int, default=0, help="of data, devices and training")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="arms at a time")
    parser.add_argument(
        "--picture", type=Path, default=Path(".cache/aggregator.png"), help="heat map of the weights"
    )
    parser.add_argument("--quick", action="store_true", help="few samples and rounds")
    options = parser.parse_args(arguments)
    options.natural = options.alpha == "natural"
    try:
        options.alpha = None if options.natural else float(options.alpha)
    except ValueError:
        parser.error(f"--alpha: a number above 0 or natural, not {options.alpha}")
    if options.alpha is not None and not 0 < options.alpha <= 1e6:
        parser.error("--alpha: a number above 0 or natural")
    if not 2 <= options.structures <= 6 or options.devices < options.structures:
        parser.error("--structures: 2 to 6, and at most as many as devices")
    if options.rounds is None:
        options.rounds = 8 if options.quick else 25
    if options.quick:
        options.samples, options.public = min(options.samples, 4_000), min(options.public, 500)
    return options


def main() -> int:
    """Run all arms and tell."""
    options = parsed()
    try:
        given = world(options)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    places = range(len(given.choices))
    wanted = {"centralised", "all"} if options.only is None else set(options.only)
    # The longest first: they decide when the last worker ends.
    keys = [("taught", -1), ("server", -1), ("family", -1)][2 * (given.public.unlabeled is None) :]
    outer = (places[0], places[-1])
    keys += [
        (name, place)
        for place in reversed(places)
        for name in ("all", "centralised")
        if name in wanted or (f"{name}-ends" in wanted and place in outer)
    ]
    sizes = [structure_of(one.family, one.params, given.people.data).parameters for one in given.choices]
    private = sum(len(y) for _, y in given.people.devices)
    public = 0 if given.public.unlabeled is None else len(given.public.unlabeled)
    print(
        f"{told(options)}: {len(given.people.devices)} devices with {private} samples, {public} unlabeled, "
        f"{len(given.labelled[1])} labelled, {len(given.people.test[1])} test; parameters {sizes}",
        file=sys.stderr,
        flush=True,
    )
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(keys))) as pool:
        ends = pool.map(run_arm, [(name, place, options, given) for name, place in keys], chunksize=1)
    found = summary(options, given, dict(zip(keys, ends, strict=True)))
    table(found)
    found |= {
        "name": "aggregator",
        "data": Path(options.data).stem if options.data else "digits",
        "alpha": "natural" if options.natural else options.alpha,
        "structures": dict(zip(given.ids, sizes, strict=True)),
        "devices": len(given.people.devices),
        "rounds": options.rounds,
        "unlabeled": {"source": options.unlabeled, "samples": public},
        "labelled": len(given.labelled[1]),
        "seed": options.seed,
        "picture": str(options.picture),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
