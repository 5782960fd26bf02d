"""Retraining without labels: the original teaches its compressed copy on unlabeled samples.

Two phases, both on the distillation loop of `distillation.py`:

1. *Quantised training*: float weights behind the quantised ones are trained through the quantiser
   (straight-through estimator: Bengio, Leonard & Courville, arXiv:1308.3432; for trained quantisers with a
   rate: Wiedemann et al., "Entropy-Constrained Training of Deep Neural Networks", IJCNN 2019,
   arXiv:1812.07520). The quantisers are searched anew every few steps, for a budget that shrinks from a mild
   one to the one asked for, so that weights have time to move to where they cost little.
2. *Centroids*: the indices stay, so the file cannot grow; the values that they stand for, biases and
   normalisation go on learning (Han, Mao & Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149, with the
   teacher's outputs in the place of labels: Thonglek et al., IJCNN 2020).

The teacher is asked about every changed copy of a sample itself (Beyer et al., "Knowledge distillation: A
good teacher is patient and consistent", CVPR 2022, arXiv:2106.05237).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor import artifact, codebook
from liberatai_core.compressor.cells import cells_of, recentred
from liberatai_core.errors import DataError, TrainingError
from liberatai_core.learning import device, statistics
from liberatai_core.learning._flat import FlatModule, flat_module, reproducible
from liberatai_core.learning.augmentation import augment, mirror_images, shift_images
from liberatai_core.learning.dataset import UNREADABLE
from liberatai_core.learning.distillation import DistillSettings, teach
from liberatai_core.learning.training import require_inputs, require_ranges
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector, digest, require_finite

if TYPE_CHECKING:
    import torch

MILD = 8
"""The first budget is an eighth of float32, where hardly anything is lost without training."""
MIRRORED = 0.7
"""Agreement of the original with itself on mirrored images from which they are more samples of the same kind:
a network that was taught pictures of things has about 0.8, one of digits or spectrograms far less."""
UNEVEN = 0.75
"""Share of the classes (exp of the entropy of what the original says) below which samples are drawn evenly:
photos have about half of Fashion-MNIST's ten, its own pictures all."""
EVEN_LOOK, EVEN_MOST = 512, 20_000
"""Samples that show whether classes are even, and that are drawn from if not."""
DRIFT = 0.004
"""Share of the budget that is kept free for what weights change after the last search."""
LEAST_SENSITIVE = 2e-3
"""Divergence (nats) below which a tensor is taught no faster: a step would be a twentieth of its weights."""
UNKNOWN = 0.05
"""Taken for a tensor whose sensitivity was not measured."""
CENTROID_RATE = 0.3
"""Learning rate of the second phase, as a share of the first one's: the values are close to their end."""


class RetrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a compressed model is retrained.

    Attributes:
        steps: batches of both phases together, 1 … 1e6.
        batch_size: samples of one step, 1 … 65536.
        learning_rate: of Adam, at the start of the first phase, in units that cost about one nat of
            divergence each (`_units`): what is normalised has no scale of its own. 1e-9 … 10.
        temperature: softens teacher and student, 0.1 … 100.
        augment: strength of the changes of inputs (`augmentation.py`), 0 … 4: half of the images are moved
            by a tenth of their side at most, and mirrored if the original answers alike; other inputs as in
            training.
        mixup: parameter of the Beta distribution by which samples are mixed, 0 none, at most 10.
        refresh: steps between two searches for quantisers while the budget shrinks, 1 … 1e6.
        ramp: share of the first phase in which the budget shrinks, 0 … 1.
        centroids: share of the steps for the second phase, 0 … 1.
    """

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 0.001
    temperature: float = 2.0
    augment: float = 1.0
    mixup: float = 0.5
    refresh: int = 50
    ramp: float = 0.5
    centroids: float = 0.15

    def __post_init__(self) -> None:
        """Refuse values outside the ranges given above, all faults at once."""
        require_ranges(self, "retraining", RETRAIN_RANGES)


RETRAIN_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 1e6),
    "batch_size": (1, 65_536),
    "learning_rate": (1e-9, 10),
    "temperature": (0.1, 100),
    "augment": (0, 4),
    "mixup": (0, 10),
    "refresh": (1, 1e6),
    "ramp": (0, 1),
    "centroids": (0, 1),
}

OnStep = Callable[[int, int], None]
"""Called after every step with (steps done, steps planned)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retrained:
    """Result of a retraining.

    Attributes:
        file: the compressed model, within the budget.
        shadow: the float weights behind it, from which a smaller budget may start; shape (parameters,).
    """

    file: bytes
    shadow: Vector


def retrain(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    budget_bytes: int,
    x: NDArray[np.float32],
    sensitivity: Mapping[str, float],
    settings: RetrainSettings,
    seed: int,
    *,
    importance: Vector | None = None,
    start: Vector | None = None,
    start_bytes: int | None = None,
    answers: NDArray[np.float32] | None = None,
    cache: Path | None = None,
    on_step: OnStep | None = None,
) -> Retrained:
    """Compress into a budget while the original teaches; byte-identical for equal arguments on one machine.

    Args:
        structure: of the model.
        data: its data contract.
        weights: the original, the teacher.
        budget_bytes: of the file.
        x: unlabeled inputs, shape (n, *input_shape).
        sensitivity: per tensor (`sensitivity.py`).
        settings: see there.
        seed: fixes order and changes of the samples.
        importance: per weight (`sensitivity.py`).
        start: float weights to start from, e.g. those behind a larger file; default the original.
        start_bytes: size of the first, mild budget; default an eighth of float32.
        answers: probabilities for `x`, shape (n, classes), in the place of the original's answers: how
            benchmarks compare with labels.
        cache: a folder; an interrupted retraining with equal arguments goes on from the last search for
            quantisers, and ends with the same bytes.
        on_step: progress.

    Raises:
        BudgetError: the budget is below the smallest possible file.
        DataError: no samples, or another shape.
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        TrainingError: the weights became infinite or NaN.
    """
    require_inputs(data, x)
    require_finite(weights, structure.id)
    if len(x) == 0:
        raise DataError("no unlabeled samples to retrain on")
    if answers is not None and answers.shape != (len(x), data.classes):
        raise DataError(f"answers have shape {answers.shape}, wanted {(len(x), data.classes)}")
    course = _Course(structure, data, weights, x, sensitivity, importance, answers, settings, seed)
    # Refuses a budget that is too small before anything takes long.
    codebook.compress(weights, structure, min(budget_bytes, codebook.smallest_bytes(structure)))
    coded = statistics.before_restating(structure, budget_bytes)
    saved = None
    if cache is not None:
        saved = _Saved(cache / f"{course.name(budget_bytes, start, start_bytes)}.npz")
    with reproducible(seed):
        first = start_bytes or 4 * structure.parameters // MILD
        shadow, fitted = _quantised_training(course, coded, first, start, saved, on_step)
        file = _centroids(course, coded, shadow, fitted, on_step)
        file = statistics.restated(file, structure, data, x, budget_bytes)
    if saved is not None:
        saved.remove()
    return Retrained(file=file, shadow=shadow)


@dataclass(frozen=True, slots=True, eq=False)
class _Course:
    """What both phases need."""

    structure: Structure
    data: DataContract
    weights: Vector
    x: NDArray[np.float32]
    sensitivity: Mapping[str, float]
    importance: Vector | None
    answers: NDArray[np.float32] | None
    settings: RetrainSettings
    seed: int

    @property
    def split(self) -> int:
        """Steps of the first phase."""
        return self.settings.steps - round(self.settings.steps * self.settings.centroids)

    def name(self, budget: int, start: Vector | None, start_bytes: int | None) -> str:
        """Return a name for these arguments: equal names mean equal results."""
        head = msgspec.msgpack.encode(
            [
                self.structure,
                self.settings,
                self.seed,
                budget,
                start_bytes,
                sorted(self.sensitivity.items()),
                str(device.chosen()),
            ]
        )
        parts = [self.weights, self.x.ravel()]
        parts += [] if start is None else [start]
        parts += [] if self.importance is None else [self.importance]
        parts += [] if self.answers is None else [self.answers.ravel()]
        words = np.frombuffer(b"".join(map(digest, parts)) + head + bytes(-len(head) % 4), "<u4")
        return digest(words.view(np.float32)).hex()[:32]

    def compressed(self, shadow: Vector, budget: int) -> bytes:
        return codebook.compress(shadow, self.structure, budget, self.sensitivity, importance=self.importance)

    def fitted(self, shadow: Vector, budget: int) -> codebook.Fitted:
        prepared = codebook.prepare(
            shadow, self.structure, self.sensitivity, self.importance, retraining=True
        )
        return codebook.fitted(prepared, budget)

    def searches(self) -> frozenset[int]:
        """Return the steps of the first phase before which quantisers are searched.

        Often while the budget shrinks, then at its end and once more: every search moves what was learnt.
        """
        ramp = round(self.settings.ramp * self.split)
        last = ramp + (self.split - ramp) // 2
        return frozenset([*range(0, ramp, self.settings.refresh), ramp, last])

    def batches(self, settings: DistillSettings) -> "Callable[[int], tuple[torch.Tensor, torch.Tensor]]":
        """Return step -> changed inputs and the original's softened answer about them."""
        import torch

        teacher = flat_module(self.structure, self.data, self.weights)
        teacher.module.eval()
        inputs = torch.from_numpy(np.ascontiguousarray(self.x, dtype=np.float32))
        varied = self._varied(teacher, inputs)
        even = self._even(teacher, inputs)
        given = None if self.answers is None else torch.from_numpy(np.ascontiguousarray(self.answers))

        def batch_of(step: int) -> "tuple[torch.Tensor, torch.Tensor]":
            # A generator per step, so that an interrupted course goes on where it was.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 62))
            if even is None:
                chosen = torch.randint(len(inputs), (settings.batch_size,), generator=generator)
            else:
                chosen = torch.multinomial(even, settings.batch_size, replacement=True, generator=generator)
            batch = varied(inputs[chosen], generator)
            answers = None if given is None else given[chosen]
            if settings.mixup:
                mix = np.random.default_rng([self.seed, step])
                other = torch.randperm(len(batch), generator=generator)
                share = float(mix.beta(settings.mixup, settings.mixup))
                batch = torch.lerp(batch[other], batch, share)
                answers = None if answers is None else torch.lerp(answers[other], answers, share)
            if answers is not None:
                return batch, answers
            batch = batch.to(teacher.device)
            with torch.no_grad():
                return batch, torch.softmax(teacher.module(batch) / settings.temperature, dim=1)

        return batch_of

    def _even(self, teacher: FlatModule, inputs: "torch.Tensor") -> "torch.Tensor | None":
        """Return weights by which classes come up alike, shape (n,), for drawing samples; None: no need.

        Samples of another kind look like a few classes to the original, and teach little about the others.
        """
        import torch

        def said(rows: "torch.Tensor") -> "torch.Tensor":
            with torch.no_grad():
                batches = [rows[first : first + 512] for first in range(0, len(rows), 512)]
                parts = [teacher.module(batch.to(teacher.device)).cpu() for batch in batches]
            return torch.softmax(torch.cat(parts), dim=1, dtype=torch.float64)

        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.seed))
        share = said(inputs[order[:EVEN_LOOK]]).mean(dim=0)
        if float(torch.special.entr(share).sum().exp()) >= UNEVEN * self.data.classes:
            return None
        some = order[:EVEN_MOST]
        probabilities = said(inputs[some])
        weights = torch.zeros(len(inputs), dtype=torch.float64)
        weights[some] = probabilities @ (1 / probabilities.sum(dim=0).clamp_min(torch.finfo().tiny))
        return weights

    def _varied(
        self, teacher: FlatModule, inputs: "torch.Tensor"
    ) -> "Callable[[torch.Tensor, torch.Generator], torch.Tensor]":
        """Return how samples are changed: half of the images move; mirrored if the original agrees."""
        import torch

        strength = self.settings.augment
        if inputs.dim() != 4 or strength == 0:
            return lambda batch, generator: augment(batch, strength, generator)
        mirrors = self._agrees(teacher, inputs) >= MIRRORED

        def varied(batch: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
            # The first half stays where it is: what a device sees is not moved, and the original may know
            # moved images less well.
            half = len(batch) // 2
            moved = torch.cat([batch[:half], shift_images(batch[half:], strength, generator)])
            return mirror_images(moved, generator) if mirrors else moved

        return varied

    def _agrees(self, teacher: FlatModule, inputs: "torch.Tensor") -> float:
        """Return on which share of some samples the original says the same about the mirrored ones."""
        import torch

        some = inputs[torch.linspace(0, len(inputs) - 1, min(len(inputs), 256)).long()].to(teacher.device)
        with torch.no_grad():
            same = teacher.module(some).argmax(dim=1) == teacher.module(some.flip(3)).argmax(dim=1)
        return float(same.float().mean())

    def distill_settings(self, steps: int, share: float) -> DistillSettings:
        own = self.settings
        return DistillSettings(
            steps=max(steps, 1),
            batch_size=min(own.batch_size, 2 * len(self.x)),
            learning_rate=share * own.learning_rate,
            temperature=own.temperature,
            augment=own.augment,
            mixup=own.mixup,
        )


def _quantised_training(
    course: _Course,
    budget: int,
    first_budget: int,
    start: Vector | None,
    saved: "_Saved | None",
    on_step: OnStep | None,
) -> tuple[Vector, codebook.Fitted | None]:
    """Return the trained float weights behind the quantised ones, and the quantisers they know."""
    import torch

    settings = course.distill_settings(course.split, 1.0)
    model = flat_module(course.structure, course.data, course.weights)
    begin = course.weights if start is None else start
    unit = torch.from_numpy(_units(course.structure, begin, course.sensitivity)).to(model.device)
    trained = torch.nn.Parameter(torch.from_numpy(begin.copy()).to(model.device) / unit)
    trained.grad = torch.zeros_like(trained)
    gradient = trained.grad
    shadow = torch.from_numpy(begin.copy()).to(model.device)
    optimizer = torch.optim.Adam([trained], lr=settings.learning_rate)
    done = saved.load(trained, optimizer) if saved is not None else 0
    ramp = course.settings.ramp * course.split
    quantisers: list[_Quantiser] = []
    fitted: codebook.Fitted | None = None
    searches = course.searches()
    at = done

    def before(step: int) -> None:
        nonlocal quantisers, fitted
        with torch.no_grad():
            torch.mul(trained.data, unit, out=shadow)
        if step in searches or fitted is None:
            if saved is not None and step > done:
                saved.store(trained, optimizer, step)
            share = min(1.0, step / ramp) if ramp else 1.0
            now = round(max(budget, first_budget) ** (1 - share) * budget**share)
            # Weights still move after the last search, and the size with them.
            now = max(round(now * (1 - DRIFT)), codebook.smallest_bytes(course.structure))
            fitted = course.fitted(shadow.cpu().numpy().copy(), now)
            quantisers = _listed(fitted, model.device)
        with torch.no_grad():
            # What no quantiser covers is stored as it is.
            model.flat.data.copy_(shadow)
            for quantiser in quantisers:
                quantiser.project(shadow, model.flat.data)

    def collect() -> None:
        nonlocal at
        torch.mul(model.gradient, unit, out=gradient)
        at += 1
        if on_step is not None:
            on_step(at, course.settings.steps)

    if course.split:
        teach(
            model, optimizer, course.batches(settings), settings, first=done, before=before, collect=collect
        )
    behind: Vector = (trained.detach() * unit).cpu().numpy().copy()
    if not np.isfinite(behind).all():
        raise TrainingError(f"{course.structure.id}: weights are not finite: lower learning_rate")
    return behind, fitted


def _units(structure: Structure, weights: Vector, sensitivity: Mapping[str, float]) -> Vector:
    """Return for every weight the unit in which rates are meant; never 0.

    A step of this size in all weights of a tensor costs about one nat of divergence: root mean square over
    square root of what a relative squared error of 1 costs. So early layers, where little noise does much
    harm, are taught with care, whatever the scale of the weights.
    """
    units = np.empty(structure.parameters, np.float32)
    for tensor, place in structure.slices():
        typical = float(np.sqrt(np.square(weights[place], dtype=np.float64).mean())) or 1.0
        units[place] = typical / math.sqrt(max(sensitivity.get(tensor.name, UNKNOWN), LEAST_SENSITIVE))
    return units


@dataclass(frozen=True, slots=True, eq=False)
class _Quantiser:
    """The scalar quantiser of one tensor: points between edges; `factor` has one entry per weight."""

    place: slice
    edges: "torch.Tensor"
    points: "torch.Tensor"
    factor: "torch.Tensor | None"

    def project(self, shadow: "torch.Tensor", out: "torch.Tensor") -> None:
        """Write the quantised weights of this tensor."""
        import torch

        part = shadow[self.place]
        if self.factor is None:
            out[self.place] = self.points[torch.bucketize(part, self.edges)]
        else:
            out[self.place] = self.points[torch.bucketize(part / self.factor, self.edges)] * self.factor


def _listed(fitted: codebook.Fitted, device: "torch.device") -> "list[_Quantiser]":
    """Return the quantisers of all tensors, ready to be applied to the flat vector."""
    import torch

    structure, found = fitted.structure, fitted.quantisers
    places = {tensor.name: place for tensor, place in structure.slices()}
    sizes = {tensor.name: tensor.size for tensor in structure.tensors}
    return [
        _Quantiser(
            places[name],
            torch.from_numpy(quantiser.edges).to(device),
            torch.from_numpy(quantiser.points).to(device),
            None
            if quantiser.factors is None
            else torch.from_numpy(quantiser.factors.repeat(sizes[name] // quantiser.factors.size)).to(device),
        )
        for name, quantiser in found.items()
    ]


def _centroids(
    course: _Course, budget: int, shadow: Vector, fitted: codebook.Fitted | None, on_step: OnStep | None
) -> bytes:
    """Return the file of the trained weights, its values trained on with indices that stay."""
    import torch

    structure = course.structure
    # The quantisers that the weights know; a new search would choose others, which they do not.
    file = course.compressed(shadow, budget) if fitted is None else fitted.file(shadow)
    if len(file) > budget:
        file = course.compressed(shadow, budget)
    steps = course.settings.steps - course.split
    if steps == 0:
        return file
    cells = cells_of(file, structure)
    model = flat_module(structure, course.data, artifact.restore(file, structure))
    movable = cells.of_weight >= 0
    of_weight = torch.from_numpy(np.where(movable, cells.of_weight, 0).astype(np.int64))
    factor = torch.from_numpy(np.where(movable, cells.factor, 0).astype(np.float32))
    free = torch.from_numpy(~cells.pinned)
    kept = torch.from_numpy(np.where(movable, 0, model.weights()).astype(np.float32))
    # In the units of the tensors, as in the first phase; cells do not reach over tensors.
    unit = torch.ones(cells.count)
    unit[of_weight[movable]] = torch.from_numpy(_units(structure, shadow, course.sensitivity)[movable])
    of_weight, factor, free, kept, unit = (
        part.to(model.device) for part in (of_weight, factor, free, kept, unit)
    )
    values = torch.nn.Parameter(_values(model, of_weight, factor, cells.count) / unit)
    values.grad = torch.zeros_like(values)
    gradient = values.grad
    at = course.split

    def before(_step: int) -> None:
        with torch.no_grad():
            model.flat.data.copy_((values.data * unit)[of_weight] * factor + kept)

    def collect() -> None:
        nonlocal at
        gradient.zero_()
        gradient.index_add_(0, of_weight, model.gradient * factor)
        gradient.mul_(free).mul_(unit)
        at += 1
        if on_step is not None:
            on_step(at, course.settings.steps)

    settings = course.distill_settings(steps, CENTROID_RATE)
    batch_of = course.batches(settings)
    optimizer = torch.optim.Adam([values], lr=settings.learning_rate)
    teach(
        model,
        optimizer,
        lambda step: batch_of(course.split + step),
        settings,
        before=before,
        collect=collect,
    )
    before(0)
    taught = model.weights()
    if not np.isfinite(taught).all():
        return file
    moved = recentred(file, structure, taught)
    return moved if len(moved) <= budget else file


def _values(
    model: FlatModule, of_weight: "torch.Tensor", factor: "torch.Tensor", count: int
) -> "torch.Tensor":
    """Return what every cell holds: its weights over their factors."""
    import torch

    power = torch.zeros(count, device=model.device).index_add_(0, of_weight, factor * factor)
    sums = torch.zeros(count, device=model.device).index_add_(0, of_weight, factor * model.flat.detach())
    return sums / power.clamp_min(torch.finfo(torch.float32).tiny)


class _Saved:
    """Where a course stood at its last search: weights and moments, in an npz file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, shadow: "torch.nn.Parameter", optimizer: "torch.optim.Optimizer") -> int:
        """Return the steps done; 0 if there is no readable file of this course."""
        import torch

        try:
            with np.load(self.path, allow_pickle=False) as archive:
                step, arrays = int(archive["step"]), [archive[key] for key in ("weights", "first", "second")]
        except (*UNREADABLE, KeyError):
            return 0
        if any(array.shape != tuple(shadow.shape) or array.dtype != np.float32 for array in arrays):
            return 0
        shadow.data.copy_(torch.from_numpy(arrays[0]))
        optimizer.state[shadow] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.from_numpy(arrays[1]).to(shadow.device),
            "exp_avg_sq": torch.from_numpy(arrays[2]).to(shadow.device),
        }
        return step

    def store(self, shadow: "torch.nn.Parameter", optimizer: "torch.optim.Optimizer", step: int) -> None:
        """Write the state before this step; a full disk costs the state, not the course."""
        state = optimizer.state[shadow]
        part = self.path.with_suffix(".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez(
                    file,
                    step=np.int64(step),
                    weights=shadow.detach().cpu().numpy(),
                    first=state["exp_avg"].cpu().numpy(),
                    second=state["exp_avg_sq"].cpu().numpy(),
                )
            part.replace(self.path)
        except OSError:
            part.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file; it has served."""
        self.path.unlink(missing_ok=True)
