"""Bytes of the file against accuracy: ours at several budgets and every baseline by name; see --help.

One teacher is trained here (or taken from `.cache/teachers`, which git ignores) on labelled samples. From
then on nothing but its weights and unlabeled inputs is used, except where a row says `labels_used`; test
samples are only asked at the end. Every row is a file that was written, restored and asked: `file_bytes` is
its whole length, `ratio` is 4 bytes per parameter divided by it, `lost_points` is the teacher's accuracy less
its own.

`codebook_ijcnn2020` and `codebook_access2022` are the original methods (Thonglek et al., IJCNN 2020 and IEEE
Access 2022). Their lossless coder is the product's own, since the papers' is not known; `packed_bytes` is the
size with plain indices of equal width. They get as many retraining steps as ours. `fixed_width` is counted
without entropy coding, as its name says. `codebook_ijcnn2020_labelled` is the paper's control, which reads
labels. `ours_labelled` is that of ours, for the largest budget: labels stand for the original's answers.

`--unlabeled same`: the training inputs without their labels. `--unlabeled other:FILE`: inputs of another
file, resized bilinearly to the height and width of the data; a colour axis is averaged away or grey repeated;
then every channel is brought to mean 0 and deviation 1, as the training inputs are.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.teachers import (
    NETS,
    QUICK_SAMPLES,
    QUICK_TEST,
    QUICK_WIDTH,
    Floats,
    Labels,
    World,
    structure,
    teacher,
    world,
)
from liberatai_core.compressor import artifact, codebook_access2022, codebook_ijcnn2020, fixed_width, int8
from liberatai_core.compressor.artifact import Coding
from liberatai_core.compressor.codebook import smallest_bytes
from liberatai_core.errors import BudgetError, LiberataiError
from liberatai_core.learning.baselines import LEARNING_RATE, agreement, retrained, retrained_with_labels
from liberatai_core.learning.device import computing_on
from liberatai_core.learning.distillation import DistillSettings
from liberatai_core.learning.fitting import FitSettings, fit
from liberatai_core.learning.retraining import RetrainSettings, retrain
from liberatai_core.learning.sensitivity import importance, sensitivity
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
RATIOS = (8.0, 16.0, 32.0, 50.0, 80.0)
POINTS_LOST = 1.0
LEAST_USE = 0.95
"""A file below this share of its budget is a miss, as one above the budget."""
SEARCHES = 3
"""Bisections of the ratio between the last budget that held one point and the first that did not."""
OURS, OURS_LABELLED, IJCNN, LABELLED, ACCESS = (
    "ours",
    "ours_labelled",
    "codebook_ijcnn2020",
    "codebook_ijcnn2020_labelled",
    "codebook_access2022",
)
FIXED, INT8 = "fixed_width", "int8"
METHODS = (OURS, OURS_LABELLED, IJCNN, LABELLED, ACCESS, FIXED, INT8)
ALONE, QUICK_ALONE = (0.002, 0.01, 0.05), (0.01,)
"""`codebook_ijcnn2020`: what a layer may lose when it alone is quantised; one row each."""
TOGETHER, QUICK_TOGETHER = (0.01, 0.03, 0.10), (0.03,)
"""`codebook_access2022`: what a configuration may lose before retraining; one row each."""
KS, QUICK_KS = codebook_ijcnn2020.KS, (8, 32, 256)
"""Of the sensitivity table: a column less is a sixth of its evaluations."""
WIDTHS_OF_INDICES, QUICK_WIDTHS_OF_INDICES = (8, 6, 5, 4, 3), (8, 5, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One compressed model; `setting` says how a baseline was configured, `why` what our search decided."""

    method: str
    setting: str
    budget_bytes: int | None
    file_bytes: int
    packed_bytes: int | None
    ratio: float
    accuracy: float
    lost_points: float
    labels_used: bool
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """A teacher and what is needed to judge files made from it."""

    options: argparse.Namespace
    world: World
    structure: Structure
    weights: Vector
    accuracy: float

    def say(self, text: str) -> None:
        """Print a line of progress."""
        _say(self.options, text)

    def ask(self, structure: Structure, file: bytes) -> float:
        """Return the accuracy on the test samples of what a file restores to."""
        return _accuracy(structure, self.world.data, artifact.restore(file, structure), self.world.test)

    def row(
        self,
        method: str,
        setting: str,
        codings: Sequence[Coding],
        seconds: float,
        *,
        labels_used: bool = False,
        packed: bool = False,
    ) -> Row:
        """Return the row of a baseline; `packed`: its size is that without entropy coding."""
        file = artifact.write(codings, self.structure)
        plain = codebook_ijcnn2020.packed_bytes(self.structure, codings)
        size = plain if packed else len(file)
        found = self.ask(self.structure, file)
        made = Row(
            method=method,
            setting=setting,
            budget_bytes=None,
            file_bytes=size,
            packed_bytes=plain,
            ratio=self.ratio(size),
            accuracy=found,
            lost_points=100 * (self.accuracy - found),
            labels_used=labels_used,
            seconds=seconds,
        )
        self.say(_line(made))
        return made

    def ratio(self, size: int) -> float:
        """Return how many times smaller than float32 a file of this size is."""
        return 4 * self.structure.parameters / size


# --- ours ----------------------------------------------------------------------------------------


def ours(bench: Bench) -> Iterator[Row]:
    """Yield a row per budget; with --search also those of a bisection for one point lost."""
    options = bench.options
    whole = 4 * bench.structure.parameters
    budgets = [int(whole / ratio) for ratio in options.budgets]
    possible = [budget for budget in budgets if budget >= smallest_bytes(bench.structure)]
    if len(possible) < len(budgets):
        least = smallest_bytes(bench.structure)
        bench.say(
            f"{OURS}: {len(budgets) - len(possible)} of {len(budgets)} budgets left out: the smallest "
            f"possible file has {least} bytes, {whole / least:.0f} times less than float32"
        )
    rows = _fitted(bench, possible) if possible else []
    yield from rows
    for _ in range(SEARCHES if options.search else 0):
        held = [row.ratio for row in rows if row.lost_points <= POINTS_LOST]
        failed = [row.ratio for row in rows if row.lost_points > POINTS_LOST]
        low = max(held, default=1.0)
        high = min((ratio for ratio in failed if ratio > low), default=2 * max(low, *failed, 2.0))
        more = _fitted(bench, [int(whole / math.sqrt(low * high))])
        rows += more
        yield from more


def _fitted(bench: Bench, budgets: Sequence[int]) -> list[Row]:
    options, given = bench.options, bench.world
    settings = FitSettings(
        steps=options.steps, batch_size=options.batch_size, smaller=not options.same_structure
    )
    told = {"what": ""}

    def progress(what: str, done: int, planned: int) -> None:
        if what != told["what"] or done == planned:
            bench.say(f"{OURS}: {what} {done}/{planned}")
            told["what"] = what

    variants = fit(
        bench.structure,
        given.data,
        bench.weights,
        budgets,
        given.unlabeled,
        settings,
        options.seed,
        on_progress=progress,
    )
    rows = []
    for variant in variants:
        found = bench.ask(variant.structure, variant.file)
        rows.append(
            Row(
                method=OURS,
                setting=f"{variant.method}, {variant.structure.id}",
                budget_bytes=variant.budget_bytes,
                file_bytes=len(variant.file),
                packed_bytes=None,
                ratio=bench.ratio(len(variant.file)),
                accuracy=found,
                lost_points=100 * (bench.accuracy - found),
                labels_used=False,
                seconds=variant.seconds,
                why=variant.why,
            )
        )
        bench.say(_line(rows[-1]))
    return rows


def ours_labelled(bench: Bench) -> Iterator[Row]:
    """Yield the row of our retraining with labels in the place of the original's answers."""
    options, made, data = bench.options, bench.structure, bench.world.data
    x, y = bench.world.train
    budget = int(4 * made.parameters / min(options.budgets))
    if budget < smallest_bytes(made):
        bench.say(f"{OURS_LABELLED}: the largest budget is below the smallest possible file")
        return
    began = time.perf_counter()
    fisher = importance(made, data, bench.weights, x, options.seed)
    table = sensitivity(made, data, bench.weights, x, fisher, options.seed)
    usual = FitSettings()
    settings = RetrainSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=usual.learning_rate,
        augment=usual.augment,
        mixup=usual.mixup,
    )
    answers = np.eye(data.classes, dtype=np.float32)[y]
    taught = retrain(made, data, bench.weights, budget, x, table, settings, options.seed, answers=answers)
    found = bench.ask(made, taught.file)
    row = Row(
        method=OURS_LABELLED,
        setting=f"codebook, retrained, {made.id}",
        budget_bytes=budget,
        file_bytes=len(taught.file),
        packed_bytes=None,
        ratio=bench.ratio(len(taught.file)),
        accuracy=found,
        lost_points=100 * (bench.accuracy - found),
        labels_used=True,
        seconds=time.perf_counter() - began,
    )
    bench.say(_line(row))
    yield row


# --- baselines -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codebooks:
    """What both codebook methods start from: every layer with every k, and the original's answers."""

    bench: Bench
    x: Floats
    ready: dict[tuple[str, int], Coding]
    measure: Callable[[Vector], float]
    answers: Floats
    settings: DistillSettings
    seconds: float


def codebooks(bench: Bench) -> Codebooks | None:
    """Return the codebooks, or None without unlabeled samples: then these methods have nothing to go by."""
    x = bench.world.unlabeled
    if x is None:
        bench.say("codebook_*: left out, they need unlabeled samples")
        return None
    began = time.perf_counter()
    options = bench.options
    ready = codebook_ijcnn2020.books(
        bench.structure, bench.weights, [k for k in codebook_access2022.CHOICES if k]
    )
    rows = np.random.default_rng(options.seed).permutation(len(x))[: options.scan_samples]
    measure = agreement(bench.structure, bench.world.data, bench.weights, x[np.sort(rows)])
    answers = log_probabilities(bench.structure, bench.world.data, bench.weights, x)
    settings = DistillSettings(
        steps=options.steps, batch_size=options.batch_size, learning_rate=LEARNING_RATE, copies=0
    )
    return Codebooks(
        bench=bench,
        x=x,
        ready=ready,
        measure=measure,
        answers=answers,
        settings=settings,
        seconds=time.perf_counter() - began,
    )


def ijcnn2020(given: Codebooks, *, with_control: bool) -> Iterator[Row]:
    """Yield a row per tolerance of the sensitivity table, and the labelled control of each."""
    bench, began = given.bench, time.perf_counter()
    ks = QUICK_KS if bench.options.quick else KS
    wanted = {key: coding for key, coding in given.ready.items() if key[1] in ks}
    table = codebook_ijcnn2020.scan(bench.structure, bench.weights, wanted, given.measure)
    seconds = given.seconds + time.perf_counter() - began
    bench.say(f"{IJCNN}: table of {len(table)} trials, {seconds:.0f} s")
    done: list[dict[str, int]] = []
    # Where no layer keeps to the tolerance, the most harmless one is still a row.
    least = min((trial.lost for trial in table if trial.saved_bytes > 0), default=0.0)
    for tolerance in QUICK_ALONE if bench.options.quick else ALONE:
        config = codebook_ijcnn2020.choose(table, max(tolerance, least))
        if not config or config in done:
            continue
        done.append(config)
        yield from _codebook_rows(given, IJCNN, config, seconds, with_control=with_control)


def access2022(given: Codebooks) -> Iterator[Row]:
    """Yield a row per point that is picked from the search's Pareto set."""
    bench, began = given.bench, time.perf_counter()
    sizes = {tensor.name: tensor.size for tensor in bench.structure.tensors}
    names = codebook_ijcnn2020.layers(bench.structure)

    def score(config: codebook_ijcnn2020.Config) -> tuple[int, float]:
        saved = sum(
            codebook_ijcnn2020.saved_bytes(given.ready[layer, k], sizes[layer]) for layer, k in config.items()
        )
        codings = codebook_ijcnn2020.quantise(bench.structure, bench.weights, given.ready, config)
        lost = 1 - given.measure(codebook_ijcnn2020.decoded(bench.structure, codings))
        return 4 * bench.structure.parameters - saved, lost

    points = codebook_access2022.search(names, score, bench.options.trials, bench.options.seed)
    seconds = given.seconds + time.perf_counter() - began
    bench.say(f"{ACCESS}: {len(points)} points from {bench.options.trials} trials, {seconds:.0f} s")
    found = [point for point in points if point.config]
    least = min((point.lost for point in found), default=0.0)
    tolerances = QUICK_TOGETHER if bench.options.quick else TOGETHER
    for point in codebook_access2022.pick(found, [max(least, tolerance) for tolerance in tolerances]):
        yield from _codebook_rows(given, ACCESS, point.config, seconds, with_control=False)


def _codebook_rows(
    given: Codebooks,
    method: str,
    config: codebook_ijcnn2020.Config,
    seconds: float,
    *,
    with_control: bool,
) -> Iterator[Row]:
    bench = given.bench
    made, data, seed = bench.structure, bench.world.data, bench.options.seed
    codings = codebook_ijcnn2020.quantise(made, bench.weights, given.ready, config)
    ks = sorted(config.values())
    setting = f"{len(config)}/{len(codebook_ijcnn2020.layers(made))} layers, k {ks[0]}-{ks[-1]}"
    began = time.perf_counter()
    taught = retrained(made, data, codings, given.x, given.answers, given.settings, seed)
    yield bench.row(method, setting, taught, seconds + time.perf_counter() - began)
    if with_control:
        began = time.perf_counter()
        x, y = bench.world.train
        control = retrained_with_labels(made, data, codings, x, y, given.settings, seed)
        spent = seconds + time.perf_counter() - began
        yield bench.row(LABELLED, setting, control, spent, labels_used=True)


def plain(bench: Bench, wanted: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of the methods that train nothing."""
    widths = QUICK_WIDTHS_OF_INDICES if bench.options.quick else WIDTHS_OF_INDICES
    for bits in widths if FIXED in wanted else ():
        began = time.perf_counter()
        codings = fixed_width.quantise(bench.structure, bench.weights, bits)
        yield bench.row(FIXED, f"{bits} bits", codings, time.perf_counter() - began, packed=True)
    if INT8 in wanted:
        began = time.perf_counter()
        codings = int8.quantise(bench.structure, bench.weights)
        yield bench.row(INT8, "per tensor", codings, time.perf_counter() - began)


def _accuracy(made: Structure, data: DataContract, weights: Vector, test: tuple[Floats, Labels]) -> float:
    return float(np.mean(log_probabilities(made, data, weights, test[0]).argmax(axis=1) == test[1]))


# --- what is told --------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Run all methods on one net and return what the last line says."""
    with computing_on(options.device):
        return _measured(options)


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    given = world(options)
    made = structure(options, given.data)
    _say(
        options,
        f"{made.id}, {made.parameters:,d} parameters, {given.name}: {len(given.train[0])} to train on, "
        f"{len(given.test[0])} to test, {0 if given.unlabeled is None else len(given.unlabeled)} unlabeled",
    )
    weights = teacher(options, given, made, lambda text: _say(options, text))
    top = _accuracy(made, given.data, weights, given.test)
    bench = Bench(options=options, world=given, structure=made, weights=weights, accuracy=top)
    bench.say(f"teacher: {top:.2%}, {4 * made.parameters:,d} bytes")
    rows = list(_rows(bench, options.only or METHODS))
    if not rows:
        raise BudgetError("nothing was measured: no method has a budget that it can meet")
    if options.picture is not None:
        picture(rows, top, f"{made.id}, {given.name}, seed {options.seed}", options.picture)
    return summary(bench, rows) | {"seconds": round(time.perf_counter() - began, 1)}


def _rows(bench: Bench, wanted: Sequence[str]) -> Iterator[Row]:
    if OURS in wanted:
        yield from ours(bench)
    if OURS_LABELLED in wanted and bench.world.unlabeled is not None:
        yield from ours_labelled(bench)
    if {IJCNN, LABELLED, ACCESS} & set(wanted):
        given = codebooks(bench)
        if given is not None and {IJCNN, LABELLED} & set(wanted):
            yield from ijcnn2020(given, with_control=LABELLED in wanted)
        if given is not None and ACCESS in wanted:
            yield from access2022(given)
    yield from plain(bench, wanted)


def summary(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the JSON of one net."""
    options, given = bench.options, bench.world
    own = [row for row in rows if row.method == OURS]
    return {
        "net": options.net,
        "structure": bench.structure.id,
        "params": bench.structure.parameters,
        "teacher_accuracy": round(bench.accuracy, 5),
        "rows": [_rounded(row) for row in rows],
        "best_ratio_at_1pt": best_ratios(rows),
        "budget_misses": sum(missed(row) for row in own),
        "seed": options.seed,
        "data": given.name,
        "train_samples": len(given.train[0]),
        "test_samples": len(given.test[0]),
        "unlabeled": options.unlabeled.split(":")[0],
        "unlabeled_samples": 0 if given.unlabeled is None else len(given.unlabeled),
        "quick": options.quick,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "device": _device(options.device)},
        "versions": _versions(),
    }


def best_ratios(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return per method the largest ratio that loses at most one point; None if none does."""
    best: dict[str, float | None] = {}
    for row in rows:
        held = best.setdefault(row.method, None)
        if row.lost_points <= POINTS_LOST and (held is None or row.ratio > held):
            best[row.method] = round(row.ratio, 2)
    return best


def missed(row: Row) -> bool:
    """Return whether a file is above its budget or leaves too much of it."""
    assert row.budget_bytes is not None
    return not LEAST_USE * row.budget_bytes <= row.file_bytes <= row.budget_bytes


def _rounded(row: Row) -> dict[str, Any]:
    digits = {"ratio": 2, "accuracy": 5, "lost_points": 3, "seconds": 1}
    return {
        name: round(value, digits[name]) if name in digits else value for name, value in asdict(row).items()
    }


def _device(name: str) -> str:
    import torch  # noqa: PLC0415 - learning imports it when it is needed

    return torch.cuda.get_device_name() if name == "cuda" else name


def _versions() -> dict[str, str]:
    import torch  # noqa: PLC0415 - learning imports it when it is needed

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }


def _line(row: Row) -> str:
    budget = f"{row.budget_bytes:11,d}" if row.budget_bytes is not None else " " * 11
    packed = f"{row.packed_bytes:11,d}" if row.packed_bytes is not None else " " * 11
    return (
        f"{row.method:27} {budget} {row.file_bytes:11,d} {packed} {row.ratio:7.1f}x {row.accuracy:7.2%} "
        f"{row.lost_points:+7.2f} {row.seconds:6.0f} s  {row.setting}"
    )


def _say(options: argparse.Namespace, text: str) -> None:
    print(f"[{options.net}] {text}" if options.suite else text, file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> None:
    """Print one line per row."""
    print(
        f"{found['structure']}, {found['params']:,d} parameters, {found['data']}, seed {found['seed']}: "
        f"teacher {found['teacher_accuracy']:.2%}"
    )
    print(
        f"{'method':27} {'budget':>11} {'file':>11} {'packed':>11} {'ratio':>8} {'accuracy':>8} {'lost':>6} "
        f"{'time':>7}"
    )
    for row in found["rows"]:
        print(_line(Row(**row)))
    ratios = ", ".join(
        f"{name} {'none' if ratio is None else f'{ratio:.1f}x'}"
        for name, ratio in found["best_ratio_at_1pt"].items()
    )
    print(f"largest ratio at one point lost: {ratios}; budget misses: {found['budget_misses']}")


def picture(rows: Sequence[Row], top: float, title: str, path: Path) -> None:
    """Draw accuracy by ratio, one line per method."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a picture is wanted

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    marks = dict(zip(METHODS, ("o", "^", "s", "x", "D", "v", "P"), strict=True))
    for method in METHODS:
        points = sorted((row.ratio, 100 * row.accuracy) for row in rows if row.method == method)
        if not points:
            continue
        ratios, found = zip(*points, strict=True)
        own = method == OURS
        axes.plot(
            ratios,
            found,
            marker=marks[method],
            label=method,
            linewidth=2.4 if own else 1.2,
            markersize=7 if own else 5,
            linestyle="--" if method in (LABELLED, OURS_LABELLED) else "-",
            zorder=3 if own else 2,
        )
    axes.axhline(100 * top, color="black", linewidth=1, label=f"original {top:.1%}")
    axes.axhspan(100 * top - POINTS_LOST, 100 * top, color="black", alpha=0.08, label="one point lost")
    axes.set(xscale="log", xlabel="times smaller than float32 (whole file)", ylabel="accuracy [%]")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    # Collapsed models would squeeze what matters into a few pixels.
    shown = [100 * row.accuracy for row in rows if row.lost_points <= 15]
    low = min([100 * top - 2, *shown])
    axes.set_ylim(low - 1.0, max([100 * top, *shown]) + 1.0)
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="lower left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- the quick suite and the command line ----------------------------------------------------------

SUITE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    # Net, files in --data-dir, further options; the longest first, two run at the same time.
    ("ds_cnn", ("speech_commands12.npz",), "--samples 2500 --epochs 10 --steps 60"),
    ("vgg16", ("fashion_mnist.npz",), "--width 0.25 --samples 8000 --epochs 5 --steps 100"),
    (
        "resnet20",
        ("cifar10_sub_train.npz", "cifar10_sub_test.npz"),
        "--width 0.5 --samples 4000 --epochs 10 --steps 60 --test-samples 1000",
    ),
    ("cnn", (), "--epochs 15 --steps 100"),
)
"""Six minutes on two cores: what the numbers are chosen for. They show that everything works and in which
order methods come; teachers and retraining this short are far from what a net can do."""


def suite(options: argparse.Namespace) -> dict[str, Any]:
    """Run the quick suite, two nets at the same time, and return all results."""
    began = time.perf_counter()
    cases = []
    for net, names, more in SUITE:
        files = [options.data_dir / name for name in names]
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            print(f"{net}: left out, no {absent[0]} in --data-dir", file=sys.stderr, flush=True)
            continue
        arguments = ["--net", net, "--suite", "quick", "--quick", "--seed", str(options.seed), *more.split()]
        arguments += ["--batch-size", "64", "--cache", str(options.cache), "--same-structure"]
        arguments += ["--scan-samples", "128", "--trials", "24", "--budgets", "8", "20", "50"]
        arguments += ["--data", str(files[0])] if files else []
        arguments += ["--test", str(files[1])] if len(files) > 1 else []
        arguments += ["--only", *options.only] if options.only else []
        arguments += ["--picture", str(options.cache / f"compressor-{net}.png")]
        cases.append(parsed(arguments))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_case, cases, chunksize=1)
    return {
        "suite": "quick",
        "results": results,
        "best_ratio_at_1pt": {one["net"]: one["best_ratio_at_1pt"] for one in results if "rows" in one},
        "budget_misses": sum(one["budget_misses"] for one in results if "rows" in one),
        "failed": [one["net"] for one in results if "rows" not in one],
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _case(options: argparse.Namespace) -> dict[str, Any]:
    """Run one net of the suite; a refusal must not cost the others."""
    try:
        return measured(options)
    except LiberataiError as error:
        return {"net": options.net, "error": f"{error.code}: {error}"}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=sorted(NETS), default="cnn")
    parser.add_argument("--data", default="digits", help=".npz with x and y, or digits (default)")
    parser.add_argument("--test", help=".npz with test samples, where --data has none; else a fifth of it")
    parser.add_argument("--width", type=float, help="share of the net's usual width (default 1; see --quick)")
    parser.add_argument("--norm", choices=("group", "batch"), default="group")
    parser.add_argument("--unlabeled", default="same", help="same (default), other:FILE.npz, or none")
    parser.add_argument(
        "--quick", action="store_true", help="at most 12000 samples, few epochs; vgg16: width 0.25"
    )
    parser.add_argument("--suite", choices=("quick",), help="several nets on the files of --data-dir")
    parser.add_argument("--data-dir", type=Path, default=Path(), help="where the suite's files lie")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where networks compute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=list(RATIOS),
        help="of ours: float32 bytes divided by these",
    )
    parser.add_argument(
        "--only", nargs="+", choices=METHODS, default=[], metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--search", action="store_true", help="bisect our budget for one point lost")
    parser.add_argument("--same-structure", action="store_true", help="ours: no smaller member of the family")
    parser.add_argument("--epochs", type=int, help="of the teacher (default: by the net)")
    usual_fit = FitSettings()
    parser.add_argument(
        "--steps", type=int, default=usual_fit.steps, help="of retraining, ours and the baselines'"
    )
    parser.add_argument("--batch-size", type=int, default=usual_fit.batch_size, help="of retraining")
    parser.add_argument("--samples", type=int, help="to train on (default all; --quick 12000)")
    parser.add_argument("--test-samples", type=int, help="to test with (default all; --quick 2500)")
    parser.add_argument("--scan-samples", type=int, help="to measure layers with (default 1024; --quick 256)")
    parser.add_argument("--trials", type=int, help="of codebook_access2022 (default 150; --quick 40)")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of trained teachers (default .cache)"
    )
    parser.add_argument("--picture", type=Path, help="PNG (default compressor.png in --cache)")
    parser.add_argument("--result", type=Path, help="also write the last line to this file")
    options = parser.parse_args(arguments)
    quick = options.quick
    usual = {
        "width": QUICK_WIDTH.get(options.net, 1.0) if quick else 1.0,
        "samples": QUICK_SAMPLES if quick else None,
        "test_samples": QUICK_TEST if quick else None,
        "scan_samples": 256 if quick else 1024,
        "trials": 40 if quick else 150,
        "picture": options.cache / "compressor.png",
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not (options.unlabeled in ("same", "none") or options.unlabeled.startswith("other:")):
        parser.error("--unlabeled: same, none or other:FILE.npz")
    if options.width <= 0 or min(options.budgets) <= 1:
        parser.error("--width must be above 0, --budgets above 1")
    return options


def main() -> int:
    """Run and tell."""
    options = parsed()
    try:
        if options.suite:
            found = suite(options)
            for one in found["results"]:
                if "rows" in one:
                    table(one)
                else:
                    print(f"{one['net']}: {one['error']}")
        else:
            found = measured(options)
            table(found)
    except LiberataiError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        return 1
    text = json.dumps(found)
    if options.result is not None:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
