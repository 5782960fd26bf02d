"""Accuracy by bytes on the wire: plain float32 averaging, the quantile method, and ours; see --help.

All arms train the same way on the same devices in the same order; only what travels differs. Bytes are those
of whole MQTT packets in both directions, first download included (`benchmarks.simulation`). The target is the
plain arm's final accuracy less one point; "final" is the mean over the last five rounds, and an arm has
reached the target in the first round from which the mean over three rounds holds it.

The quantile method (Thonglek et al., ICFEC 2022) sends the plain values above a quantile of the magnitudes;
its own count leaves out positions and the way down, so both counts stand side by side.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.simulation import Floats, Labels, Population, Simulation
from liberatai_coordinator.config import (
    DOWN_TO_ALL,
    DOWN_TO_SOME,
    Aggregate,
    JobSpec,
    Rounds,
    Sparsify,
    StructureChoice,
)
from liberatai_coordinator.models.members import trained_part
from liberatai_core.contract.messages import Step, Training, weights_name
from liberatai_core.errors import LiberataiError
from liberatai_core.learning.dataset import load_npz
from liberatai_core.learning.families import structure_of
from liberatai_core.sparsifier.quantile import values_only_bytes
from liberatai_core.structure import DataContract, Parameter

SMALL, LARGE = 250_000, 1_500_000
"""Most parameters of the small model, fewest of the large one."""
LAST, HOLD = 5, 3
"""Rounds over which "final" and "reached" are means."""
MARGIN = 0.01
SMALLEST = 10
"""Samples that every artificial device gets."""
AWAY = 10
"""Rounds that the device of `catch_up_share` missed."""
QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One arm: a name, what travels, and how many rounds."""

    name: str
    sparsify: Sparsify
    aggregate: Aggregate
    rounds: int
    quantile: float | None = None


@dataclass(kw_only=True)
class Curve:
    """What an arm gave, round by round: accuracy, bytes up and down so far, of these the bodies."""

    name: str
    quantile: float | None
    parameters: int
    trained: int
    accuracy: list[float] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    bodies: list[int] = field(default_factory=list)
    values_only: int = 0
    updates: int = 0
    catch_up: int = 0
    seconds: float = 0.0

    @property
    def final(self) -> float:
        """Mean accuracy over the last rounds."""
        return float(np.mean(self.accuracy[-LAST:]))

    def reached(self, target: float) -> int | None:
        """Return the place of the first round that reaches the target and holds it on average."""
        for place, found in enumerate(self.accuracy):
            if found >= target and np.mean(self.accuracy[place : place + HOLD]) >= target:
                return place
        return None


# --- data and model ------------------------------------------------------------------------------


def population(options: argparse.Namespace) -> tuple[Population, bool]:
    """Return who has which samples, and whether these are real owners: else a Dirichlet split."""
    random = np.random.default_rng(options.seed)
    x, y, test, owner = _samples(options.data)
    if test is None:
        test = _held_out(y, owner, random)
    train = np.flatnonzero(~test)
    owned = owner is not None and options.alpha is None
    if not owned:
        train = np.sort(random.permutation(train)[: options.samples])
        alpha = 0.5 if options.alpha is None else options.alpha
        parts = _dirichlet(y[train], options.devices, alpha, random)
    else:
        train = train[owner[train] >= 0]
        parts = [np.flatnonzero(owner[train] == one) for one in np.unique(owner[train])]
    mean, deviation = x[train].mean(), x[train].std()
    x = ((x - mean) / deviation).astype(np.float32)
    asked = np.sort(random.permutation(np.flatnonzero(test))[: options.test])
    data = DataContract(input_shape=x.shape[1:], classes=int(y.max()) + 1)
    devices = [(x[train[part]], y[train[part]]) for part in parts]
    return Population(data=data, devices=devices, test=(x[asked], y[asked])), owned


def _samples(path: str | None) -> tuple[Floats, Labels, Any, Any]:
    """Return inputs as families take them, labels, and where known test marks and owners."""
    if path is None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only where it is asked for

        pixels, labels = load_digits(return_X_y=True)
        return (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64), None, None
    samples = load_npz(Path(path))
    if samples.y is None:
        raise SystemExit(f"{path}: no labels: a benchmark needs the key y")
    x = samples.x
    if x.ndim == 3:
        # A picture without a colour axis, or a signal of few channels, which come first.
        if min(x.shape[1:]) >= 16:
            x = x[:, None]
        elif x.shape[1] > x.shape[2]:
            x = np.ascontiguousarray(x.transpose(0, 2, 1))
    return x, samples.y, samples.test, samples.device


def _held_out(y: Labels, owner: Any, random: np.random.Generator) -> Any:
    """Return test marks: a fifth of everybody's samples."""
    marks = np.zeros(len(y), dtype=np.bool_)
    for one in np.unique(owner) if owner is not None else [None]:
        rows = np.flatnonzero(owner == one) if owner is not None else np.arange(len(y))
        marks[random.permutation(rows)[: len(rows) // 5]] = True
    return marks


def _dirichlet(y: Labels, devices: int, alpha: float, random: np.random.Generator) -> list[Any]:
    """Deal classes out by Dirichlet shares (Hsu, Qi & Brown, arXiv:1909.06335)."""
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(devices)]
        for label in np.unique(y):
            rows = random.permutation(np.flatnonzero(y == label))
            cuts = (np.cumsum(random.dirichlet(np.full(devices, alpha)))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= SMALLEST:
            return [np.sort(np.array(part)) for part in parts]
    raise SystemExit(
        f"no split gives {devices} devices {SMALLEST} samples each: fewer devices, larger --alpha"
    )


def structure_choice(data: DataContract, size: str) -> StructureChoice:
    """Return the largest model up to SMALL parameters, or the smallest from LARGE on."""
    ladder: list[tuple[str, dict[str, Parameter]]]
    match len(data.input_shape):
        case 3 if size == "small":
            ladder = [("cnn", {"width": 16, "hidden": hidden}) for hidden in range(16, 1025, 16)]
        case 3:
            ladder = [("cnn", {"width": 16, "hidden": hidden}) for hidden in range(64, 8193, 64)]
        case 2:
            ladder = [("cnn1d", {"width": width}) for width in range(4, 513, 4)]
        case _:
            ladder = [("mlp", {"hidden": hidden, "layers": 2}) for hidden in range(16, 4097, 16)]
    found = [(choice, structure_of(*choice, data).parameters) for choice in ladder]
    fitting = [
        choice
        for choice, parameters in (reversed(found) if size == "small" else found)
        if (parameters <= SMALL if size == "small" else parameters >= LARGE)
    ]
    if not fitting:
        raise SystemExit(f"no {size} model takes inputs of shape {data.input_shape}")
    family, params = fitting[0]
    return StructureChoice(family=family, params=params)


# --- arms ----------------------------------------------------------------------------------------


def arms(options: argparse.Namespace) -> list[Plan]:
    """Return what is compared; ours is what a job gets that says nothing about it."""
    sparsify, aggregate = Sparsify(), Aggregate()
    changed = {
        name: getattr(options, name)
        for name in ("trained_share", "up_density", "down_density", "residual_decay", "warmup_rounds")
        if getattr(options, name) is not None
    }
    sparsify = msgspec.structs.replace(sparsify, **changed)
    server = {
        name: getattr(options, name)
        for name in ("server_optimizer", "server_rate", "server_momentum")
        if getattr(options, name) is not None
    }
    aggregate = msgspec.structs.replace(aggregate, **server)
    found = [Plan(name="ours", sparsify=sparsify, aggregate=aggregate, rounds=options.rounds_ours)]
    for factor in options.budgets:
        name = f"ours x{factor:g}"
        usual = DOWN_TO_SOME if options.per_round else DOWN_TO_ALL
        up, down = sparsify.up_density, sparsify.down_density or usual
        other = msgspec.structs.replace(
            sparsify, up_density=min(1.0, factor * up), down_density=min(1.0, factor * down)
        )
        found.append(Plan(name=name, sparsify=other, aggregate=aggregate, rounds=options.rounds))
    found.insert(
        0, Plan(name="dense", sparsify=Sparsify(method="dense"), aggregate=Aggregate(), rounds=options.rounds)
    )
    for q in options.quantiles:
        method = Sparsify(method="quantile", up_density=round(1 - q, 6))
        found.append(
            Plan(
                name=f"quantile {q:g}",
                sparsify=method,
                aggregate=Aggregate(),
                rounds=options.rounds,
                quantile=q,
            )
        )
    return [one for one in found if not options.only or one.name in options.only]


def job_of(options: argparse.Namespace, people: Population, choice: StructureChoice, arm: Plan) -> JobSpec:
    """Return the job of an arm."""
    everybody = options.per_round == 0 or options.per_round >= len(people.devices)
    rounds = Rounds(
        count=arm.rounds,
        target=None if everybody else options.per_round,
        overselect=1.0,
        deadline_s=600.0,
    )
    training = Training(
        epochs=options.epochs,
        batch_size=32,
        learning_rate=options.learning_rate,
        momentum=0.0,
        balance=0.0,
    )
    return JobSpec(
        name="sparsifier",
        data=people.data,
        structures=(choice,),
        rounds=rounds,
        training=training,
        sparsify=arm.sparsify,
        aggregate=msgspec.structs.replace(arm.aggregate, ensemble="uniform"),
        share_class_counts=False,
        seed=options.seed,
    )


def run_arm(work: tuple[argparse.Namespace, Population, StructureChoice, Plan]) -> Curve:
    """Run one arm to its end."""
    options, people, choice, arm = work
    began = time.perf_counter()
    structure = structure_of(choice.family, choice.params, people.data)
    job = job_of(options, people, choice, arm)
    part = trained_part(job, structure).part
    curve = Curve(
        name=arm.name, quantile=arm.quantile, parameters=structure.parameters, trained=part.parameters
    )
    with tempfile.TemporaryDirectory(prefix="liberatai-simulation-") as folder:
        simulation = Simulation(job, people, Path(folder))
        try:
            for end in simulation.run():
                curve.accuracy.append(next(iter(end.accuracy.values())))
                curve.up.append(end.traffic.up)
                curve.down.append(end.traffic.down)
                curve.bodies.append(end.traffic.up_body + end.traffic.down_body)
                curve.updates += len(end.updates)
                if arm.quantile is not None:
                    curve.values_only += sum(values_only_bytes(one, part) for one in end.updates.values())
                if end.number % 10 == 0 or end.number == arm.rounds:
                    print(
                        f"{arm.name:14} round {end.number:3d}  {curve.accuracy[-1]:6.1%}  "
                        f"{curve.up[-1] / 1e6:9.3f} MB up  {curve.down[-1] / 1e6:9.3f} MB down  "
                        f"{time.perf_counter() - began:5.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
            curve.catch_up = _catch_up(simulation, AWAY)
        finally:
            simulation.close()
    curve.seconds = time.perf_counter() - began
    return curve


def _catch_up(simulation: Simulation, rounds: int) -> int:
    """Return the bytes that a device fetches whose last round was so many before the newest version."""
    versions = simulation.versions
    sid = next(iter(versions.now.chains))
    keyframe, since = versions.now.chains[sid][0], max(0, versions.now.number - rounds)
    mark = versions.history[since][sid]
    held = Step(version=since, blob=keyframe.blob, digest=weights_name(mark.digest))
    return versions.way(sid, (keyframe, held) if since else (keyframe,), 0).size_bytes


# --- what is told --------------------------------------------------------------------------------


def summary(curves: list[Curve]) -> dict[str, Any]:
    """Return the comparison; ratios are null where an arm did not reach the target."""
    by_name = {curve.name: curve for curve in curves}
    dense, best = by_name.get("dense"), by_name.get("ours")
    if dense is None or best is None:
        return {}
    target = dense.final - MARGIN
    there, here = dense.reached(target), best.reached(target)
    found: dict[str, Any] = {
        "dense_final": round(dense.final, 4),
        "target": round(target, 4),
        "ours_final": round(float(np.mean(best.accuracy[: len(dense.accuracy)][-LAST:])), 4),
        "rounds_dense": None if there is None else there + 1,
        "rounds_ours": None if here is None else here + 1,
        "dense_bytes": None if there is None else dense.up[there] + dense.down[there],
        "ours_bytes": None if here is None else best.up[here] + best.down[here],
        "total_ratio": None,
        "up_ratio": None,
        "down_ratio": None,
        "catch_up_share": round(best.catch_up / (4 * best.parameters), 5),
    }
    if there is not None and here is not None:
        found["total_ratio"] = round(found["dense_bytes"] / found["ours_bytes"], 1)
        found["up_ratio"] = round(dense.up[there] / best.up[here], 1)
        found["down_ratio"] = round(dense.down[there] / best.down[here], 1)
    found["quantile"] = [
        {
            "q": curve.quantile,
            "accuracy": round(curve.final, 4),
            "values_only_saving": round(1 - curve.values_only / (4 * curve.parameters * curve.updates), 4),
            "real_saving": round(1 - _total(curve) / _total(dense), 4),
        }
        for curve in curves
        if curve.quantile is not None
    ]
    return found


def _total(curve: Curve) -> int:
    return curve.up[-1] + curve.down[-1]


def table(curves: list[Curve]) -> None:
    """Print one line per arm."""
    print(
        f"{'arm':14} {'final':>7} {'rounds':>6} {'up MB':>10} {'down MB':>10} {'trained':>9} {'seconds':>8}"
    )
    for curve in curves:
        print(
            f"{curve.name:14} {curve.final:7.1%} {len(curve.accuracy):6d} {curve.up[-1] / 1e6:10.3f} "
            f"{curve.down[-1] / 1e6:10.3f} {curve.trained:9,d} {curve.seconds:8.0f}"
        )


def picture(curves: list[Curve], path: Path, title: str) -> None:
    """Draw accuracy by total bytes."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a picture is wanted

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for curve in curves:
        total = (np.array(curve.up) + np.array(curve.down)) / 1e6
        emphasis = curve.name in ("dense", "ours")
        axes.plot(
            total,
            100 * np.array(curve.accuracy),
            label=curve.name,
            linewidth=2.2 if emphasis else 1.0,
            alpha=1.0 if emphasis else 0.6,
        )
    axes.set(xscale="log", xlabel="bytes on the wire, both ways, all devices [MB]", ylabel="accuracy [%]")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="lower right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=".npz with x and y; default: the digits of scikit-learn")
    parser.add_argument(
        "--model", choices=("small", "large"), default="small", help="<= 0.25 M, >= 1.5 M parameters"
    )
    parser.add_argument("--devices", type=int, default=50, help="artificial devices (default 50)")
    parser.add_argument(
        "--alpha", type=float, help="label skew of artificial devices (default 0.5); else real owners"
    )
    parser.add_argument(
        "--per-round", type=int, help="devices per round, 0: all (default 10; real owners: all)"
    )
    parser.add_argument("--rounds", type=int, help="rounds of every arm (default 60)")
    parser.add_argument("--rounds-ours", type=int, help="rounds of our arm (default: as the others)")
    parser.add_argument("--samples", type=int, default=20_000, help="training samples of a Dirichlet split")
    parser.add_argument("--test", type=int, default=2_000, help="test samples asked after every round")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument(
        "--quantiles", type=float, nargs="*", help="of the quantile arms (default 0.1 ... 0.9)"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", help="densities of further arms of ours, times the default"
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of arms, e.g. dense ours")
    for name in (
        "trained-share",
        "up-density",
        "down-density",
        "residual-decay",
        "server-rate",
        "server-momentum",
    ):
        parser.add_argument(f"--{name}", type=float, help="of our arm")
    parser.add_argument("--warmup-rounds", type=int, help="of our arm")
    parser.add_argument("--server-optimizer", choices=("mean", "fedavgm", "fedadam"), help="of our arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="arms at the same time"
    )
    parser.add_argument("--picture", type=Path, default=Path("sparsifier.png"))
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few samples, rounds and arms")
    options = parser.parse_args(arguments)
    usual = {
        "rounds": 15 if options.quick else 60,
        "quantiles": [0.1, 0.5, 0.9] if options.quick else list(QUANTILES),
        "budgets": [] if options.quick else [0.5, 2.0],
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.rounds_ours = options.rounds_ours or options.rounds
    if options.quick:
        options.samples, options.test = min(options.samples, 4_000), min(options.test, 1_000)
    return options


def main() -> int:
    """Run all arms and tell."""
    options = parsed()
    try:
        people, owned = population(options)
        choice = structure_choice(people.data, options.model)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    if options.per_round is None:
        options.per_round = 0 if owned else 10
    structure = structure_of(choice.family, choice.params, people.data)
    told = f"{Path(options.data).stem if options.data else 'digits'}, {structure.id}, "
    told += f"{structure.parameters:,d} parameters, {len(people.devices)} devices, "
    told += f"{options.per_round or 'all'} per round, seed {options.seed}"
    print(told, file=sys.stderr, flush=True)
    plans = arms(options)
    work = [(options, people, choice, plan) for plan in plans]
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(work))) as pool:
        curves = pool.map(run_arm, work, chunksize=1)
    table(curves)
    picture(curves, options.picture, told)
    rows = [asdict(curve) for curve in curves]
    options.picture.with_suffix(".json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    found = summary(curves)
    found |= {
        "name": "sparsifier",
        "data": Path(options.data).stem if options.data else "digits",
        "model": structure.id,
        "parameters": structure.parameters,
        "trained": next((curve.trained for curve in curves if curve.name == "ours"), None),
        "devices": len(people.devices),
        "per_round": options.per_round or len(people.devices),
        "seed": options.seed,
        "settings": msgspec.to_builtins(next((p.sparsify for p in plans if p.name == "ours"), None)),
        "picture": str(options.picture),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
