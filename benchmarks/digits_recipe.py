"""The demo's job in one process: UCI digits on eight unlike devices, without a network.

Claim: after 12 rounds every structure and their ensemble are accurate on held-out digits although no
device has all classes in plenty, labels never leave the devices, and few bytes travel in either direction.

    python -m benchmarks.digits_recipe --seeds 0 1 2 3 4
    python -m benchmarks.digits_recipe --baseline        # also dense FedAvg of the same structures

Per seed: 360 samples for the test (only the report sees them), 300 public without labels, 100 labelled ones
for the guard, the rest (about 1037) over the devices with Dirichlet label skew. Accuracies are those of the
weights that devices hold after the last downlink. Bytes are the lengths of the encoded keyframes, updates
and deltas; `--framing` adds what messages cost per device and round.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from liberatai_core.aggregator.ensemble import Evidence, accuracy, pooled
from liberatai_core.aggregator.guard import guard
from liberatai_core.aggregator.label_free import label_free
from liberatai_core.aggregator.mean import Update, aggregate, mean
from liberatai_core.compressor import artifact, codebook
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.families import initial_weights, structure_of
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.sparsifier import top_k
from liberatai_core.structure import DataContract, Parameter, Structure
from liberatai_core.weights import Vector

DATA = DataContract(input_shape=(1, 8, 8), classes=10)
TEST, PUBLIC, LABELLED, SMALLEST = 360, 300, 100, 20
MAX_DRAWS = 1000
"""Attempts to give every device `SMALLEST` samples."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result, besides the seed.

    Attributes:
        structures: family and parameters of each.
        density_up: share of the parameters that an update carries, per structure.
        density_down: the same for the published delta.
        keyframe_bits: of the first model, per weight; random weights lose nothing by coarse rounding.
        train: on the devices.
        distill: on the coordinator; None: the ensemble does not teach.
        dense: send everything as float32 (the baseline).
    """

    structures: tuple[tuple[str, dict[str, Parameter]], ...]
    density_up: tuple[float, ...]
    density_down: tuple[float, ...]
    train: TrainSettings
    distill: DistillSettings | None
    keyframe_bits: float = 2.0
    devices: int = 8
    rounds: int = 12
    alpha: float = 0.3
    dense: bool = False

    def assigned(self) -> list[int]:
        """Return the structure of every device: the first ones get the first structure, in equal shares."""
        return [device * len(self.structures) // self.devices for device in range(self.devices)]


RECIPE = Recipe(
    structures=(
        ("cnn", {"width": 16, "hidden": 96}),
        ("ds_cnn", {"width": 64}),
        ("mlp", {"hidden": 256, "layers": 2}),
    ),
    density_up=(0.04, 0.1, 0.03),
    density_down=(0.04, 0.1, 0.03),
    train=TrainSettings(epochs=6, batch_size=32, learning_rate=0.05, momentum=0.9, balance=1.0, augment=0.5),
    distill=DistillSettings(
        steps=300, batch_size=32, optimizer="sgd", learning_rate=0.03, temperature=2.0, copies=4, augment=0.8
    ),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Who has which samples; `devices` and the others are row numbers of `x` and `y`."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    test: NDArray[np.int64]
    public: NDArray[np.int64]
    labelled: NDArray[np.int64]
    devices: list[NDArray[np.int64]]


@dataclass
class Result:
    """What one seed gave; accuracies on the test samples, bytes over all devices and rounds.

    Attributes:
        seed: of split, weights and training.
        ensemble: of the devices' weights, always all structures.
        guarded: of what the guard chose with the labelled samples: the ensemble or its best member.
        structures: of the devices' weights, one per structure.
        masters: of the coordinator's weights, which the devices do not have yet.
        guard: the guard's reason.
        payload_bytes: keyframes, updates and deltas as encoded.
        dense_bytes: float32 up and down in every round.
        train_s: CPU time of all devices together.
        teach_s: CPU time of distillation.
        total_s: CPU time of everything.
    """

    seed: int
    ensemble: float = 0.0
    guarded: float = 0.0
    structures: tuple[float, ...] = ()
    masters: tuple[float, ...] = ()
    guard: str = ""
    payload_bytes: int = 0
    dense_bytes: int = 0
    train_s: float = 0.0
    teach_s: float = 0.0
    total_s: float = 0.0


def split(devices: int, alpha: float, seed: int) -> Split:
    """Return a seeded split of the digits; classes are dealt out by Dirichlet shares (arXiv:1909.06335)."""
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, *DATA.input_shape)
    y = labels.astype(np.int64)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    test, public, labelled, rest = np.split(order, np.cumsum([TEST, PUBLIC, LABELLED]))
    for _ in range(MAX_DRAWS):
        parts: list[list[int]] = [[] for _ in range(devices)]
        for label in range(DATA.classes):
            rows = random.permutation(rest[y[rest] == label])
            cuts = (np.cumsum(random.dirichlet(np.full(devices, alpha)))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= SMALLEST:
            dealt = [np.array(part) for part in parts]
            return Split(x=x, y=y, test=test, public=public, labelled=labelled, devices=dealt)
    raise SystemExit(
        f"no split gives {devices} devices {SMALLEST} samples each: fewer devices or a larger alpha"
    )


@dataclass
class Group:
    """One structure: the coordinator's weights, and what the devices hold."""

    structure: Structure
    master: Vector
    view: Vector
    samples: NDArray[np.int64]


def run(recipe: Recipe, seed: int) -> Result:
    """Run the whole job once."""
    began = time.process_time()
    data, result = split(recipe.devices, recipe.alpha, seed), Result(seed)
    assigned = recipe.assigned()
    counts = np.array([np.bincount(data.y[rows], minlength=DATA.classes) for rows in data.devices])
    groups = []
    for number, (family, params) in enumerate(recipe.structures):
        structure = structure_of(family, params, DATA)
        first, size = _keyframe(structure, seed * 100 + number, recipe)
        mine = [device for device, group in enumerate(assigned) if group == number]
        result.payload_bytes += size * len(mine)
        groups.append(Group(structure, first, first, counts[mine].sum(axis=0)))
    residuals = [top_k.init(groups[number].structure.parameters) for number in assigned]
    for round_ in range(recipe.rounds):
        _train_round(recipe, data, groups, residuals, result, 10_000 * seed + 100 * round_)
        if recipe.distill is not None:
            began_teaching = time.process_time()
            _teach(recipe.distill, recipe.train.balance, data, groups, 10_000 * seed + round_)
            result.teach_s += time.process_time() - began_teaching
        for number, group in enumerate(groups):
            delta, size = _compressed(group.master - group.view, group.structure, recipe, number)
            group.view = group.view + delta
            result.payload_bytes += size * assigned.count(number)
    result.dense_bytes = sum(8 * groups[number].structure.parameters for number in assigned) * recipe.rounds
    _report(result, recipe, data, groups)
    result.total_s = time.process_time() - began
    return result


def _keyframe(structure: Structure, seed: int, recipe: Recipe) -> tuple[Vector, int]:
    """Return the first weights as devices decode them, and the bytes of the file."""
    weights = initial_weights(structure, DATA, seed)
    if recipe.dense:
        return weights, 4 * structure.parameters
    budget = int(recipe.keyframe_bits * structure.parameters / 8)
    file = codebook.compress(weights, structure, max(budget, codebook.smallest_bytes(structure)))
    return artifact.restore(file, structure), len(file)


def _train_round(
    recipe: Recipe, data: Split, groups: list[Group], residuals: list[top_k.State], result: Result, seed: int
) -> None:
    """Let every device train and send; add the mean difference of each structure to its master."""
    updates: list[list[Update]] = [[] for _ in groups]
    for device, (number, rows) in enumerate(zip(recipe.assigned(), data.devices, strict=True)):
        group = groups[number]
        began = time.process_time()
        trained = train(
            group.structure, DATA, group.view, data.x[rows], data.y[rows], recipe.train, seed + device
        )
        result.train_s += time.process_time() - began
        difference = trained.weights - group.view
        if recipe.dense:
            sent, size = difference, 4 * difference.size
        else:
            residuals[device], update = top_k.sparsify(
                residuals[device], difference, group.structure, recipe.density_up[number]
            )
            sent, size = top_k.densify(update, group.structure), len(update)
        result.payload_bytes += size
        updates[number].append(Update(id=f"{device:04d}", difference=sent, samples=len(rows)))
    for group, received in zip(groups, updates, strict=True):
        group.master = group.master + aggregate(mean(), group.structure.parameters, received)


def _teach(settings: DistillSettings, balance: float, data: Split, groups: list[Group], seed: int) -> None:
    """Let the ensemble of the masters teach each of them on the public samples."""
    public = data.x[data.public]
    members = np.stack([log_probabilities(g.structure, DATA, g.master, public) for g in groups])
    weights = label_free(Evidence(class_counts=np.stack([g.samples for g in groups]), balance=balance))
    target = pooled(weights, members)
    for group in groups:
        group.master = distill(group.structure, DATA, group.master, public, target, settings, seed)


def _compressed(difference: Vector, structure: Structure, recipe: Recipe, number: int) -> tuple[Vector, int]:
    """Return a delta as devices decode it, and its bytes; what is left out stays in master - view."""
    if recipe.dense:
        return difference, 4 * difference.size
    empty = top_k.init(structure.parameters)
    _, delta = top_k.sparsify(empty, difference, structure, recipe.density_down[number])
    return top_k.densify(delta, structure), len(delta)


def _report(result: Result, recipe: Recipe, data: Split, groups: list[Group]) -> None:
    pool_ = label_free(
        Evidence(class_counts=np.stack([g.samples for g in groups]), balance=recipe.train.balance)
    )
    x, y = data.x[data.test], data.y[data.test]
    members = np.stack([log_probabilities(g.structure, DATA, g.view, x) for g in groups])
    result.structures = tuple(accuracy(member, y) for member in members)
    result.masters = tuple(accuracy(log_probabilities(g.structure, DATA, g.master, x), y) for g in groups)
    held = np.stack([log_probabilities(g.structure, DATA, g.view, data.x[data.labelled]) for g in groups])
    decision = guard(pooled(pool_, held), held, data.y[data.labelled])
    result.guard = decision.reason
    together = pooled(pool_, members)
    result.ensemble = accuracy(together, y)
    result.guarded = accuracy(together if decision.use == "ensemble" else members[decision.use], y)


def summary(results: list[Result], recipe: Recipe, framing: int) -> dict[str, object]:
    """Return medians, worst cases and the ratio of bytes, with everything needed to repeat the run."""
    together = [result.ensemble for result in results]
    guarded = [result.guarded for result in results]
    single = np.array([result.structures for result in results])
    framed = framing * recipe.devices * recipe.rounds
    ratios = [result.dense_bytes / (result.payload_bytes + framed) for result in results]
    return {
        "seeds": [result.seed for result in results],
        "ensemble": {"median": float(np.median(together)), "worst": min(together), "all": together},
        "guarded": {"median": float(np.median(guarded)), "worst": min(guarded)},
        "structures": {
            f"{family}": {"median": float(np.median(column)), "worst": float(column.min())}
            for (family, _), column in zip(recipe.structures, single.T, strict=True)
        },
        "payload_bytes": int(np.median([result.payload_bytes for result in results])),
        "framing_bytes": framed,
        "dense_fedavg_bytes": results[0].dense_bytes,
        "times_fewer_bytes": round(float(np.median(ratios)), 1),
        "cpu_seconds": {
            "train": round(float(np.median([result.train_s for result in results])), 2),
            "teach": round(float(np.median([result.teach_s for result in results])), 2),
            "total": round(float(np.median([result.total_s for result in results])), 2),
        },
    }


def run_all(recipe: Recipe, seeds: list[int]) -> list[Result]:
    """Run every seed and print its line as soon as it is known."""
    names = " ".join(f"{family:>7}" for family, _ in recipe.structures)
    print(f"{'seed':>4} {'ensemble':>9} {'guarded':>8} {names} {'payload':>12} {'CPU s':>7}")
    results = []
    for seed in seeds:
        result = run(recipe, seed)
        columns = " ".join(f"{value:7.3f}" for value in result.structures)
        ending = f"{result.payload_bytes:12,d} {result.total_s:7.1f}"
        print(f"{seed:4d} {result.ensemble:9.3f} {result.guarded:8.3f} {columns} {ending}", flush=True)
        results.append(result)
    return results


def main() -> int:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--devices", type=int, default=RECIPE.devices)
    parser.add_argument("--rounds", type=int, default=RECIPE.rounds)
    parser.add_argument("--alpha", type=float, default=RECIPE.alpha, help="label skew: small is strong")
    for way in ("up", "down"):
        usual = list(getattr(RECIPE, f"density_{way}"))
        parser.add_argument(f"--density-{way}", type=float, nargs="+", default=usual, help="per structure")
    parser.add_argument("--framing", type=int, default=1000, help="bytes of messages per device and round")
    parser.add_argument(
        "--baseline", action="store_true", help="also run dense FedAvg of the same structures"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, three rounds")
    options = parser.parse_args()
    seeds, rounds = (options.seeds[:1], 3) if options.quick else (options.seeds, options.rounds)
    recipe = replace(
        RECIPE,
        devices=options.devices,
        rounds=rounds,
        alpha=options.alpha,
        density_up=tuple(options.density_up),
        density_down=tuple(options.density_down),
    )
    if not len(recipe.density_up) == len(recipe.density_down) == len(recipe.structures):
        parser.error(f"a density needs {len(recipe.structures)} values, one per structure")
    print(f"digits, {recipe.devices} devices, alpha {recipe.alpha}, {recipe.rounds} rounds")
    results = run_all(recipe, seeds)
    found = summary(results, recipe, options.framing)
    if options.baseline:
        dense = replace(
            recipe, dense=True, distill=None, train=TrainSettings(epochs=recipe.train.epochs, balance=0.0)
        )
        print("dense FedAvg per structure, plain softmax, no teaching:")
        plain = run_all(dense, seeds)
        found["dense_fedavg"] = summary(plain, dense, options.framing)
    found["name"] = "digits_recipe"
    found["devices"], found["rounds"], found["alpha"] = recipe.devices, recipe.rounds, recipe.alpha
    found["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
