"""Distillation: a student learns a teacher's outputs on unlabeled data.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531: the loss is
T^2 KL(teacher_T || student_T). For federated ensembles: Lin et al., "Ensemble Distillation for Robust
Model Fusion in Federated Learning" (FedDF), NeurIPS 2020, arXiv:2006.07242. One engine for the
aggregator (the ensemble teaches every structure) and the compressor (the original teaches the small model).

Few unlabeled samples go further with changed copies, made anew for every batch. The teacher is asked about
the samples as they are, and what it says is the target of their copies too: a change that keeps the meaning
keeps the answer (Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020,
arXiv:1904.12848). A teacher that has never seen such changes is not asked about them: its mean answer about a
sample and its copies was wrong more often. Optional mixup: Zhang et al., ICLR 2018, arXiv:1710.09412.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, DataError, TrainingError
from liberatai_core.learning._flat import FlatModule, flat_module, reproducible, undisturbed
from liberatai_core.learning.augmentation import augment
from liberatai_core.learning.families import require_torch
from liberatai_core.learning.training import require_inputs, require_ranges
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector

if TYPE_CHECKING:
    import torch

Teacher = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Inputs (n, *input_shape) -> log-probabilities (n, classes)."""


MOMENTUM = 0.9
COPIED, COPIES = 1_500, 4
"""Copies are a remedy for few samples: with them the student sees about so many different ones, but at most
so many of each. From a few thousand samples on they cost a small student more than they give."""
PASSES, STEPS = 6, (300, 1_000)
"""How often a student sees everything in one round, and the bounds of the batches that this takes."""


class DistillSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a teacher teaches.

    Attributes:
        steps: batches, 1 … 1e6.
        batch_size: samples of one step, 1 … 65536.
        learning_rate: at the start; falls to zero along a cosine. Above 0, at most 10.
        optimizer: "adam", or "sgd" with momentum 0.9: its steps are large where gradients are, so that few
            values carry most of the change, which suits a sparse difference.
        temperature: softens both distributions, 0.1 … 100.
        clip_norm: largest gradient norm, 0 for no limit.
        copies: changed ones that the student sees for every unlabeled sample that it sees as it is, 0 … 100.
        augment: strength of their changes, 0 … 4.
        mixup: parameter of the Beta distribution by which samples of a batch are mixed, 0 none, at most 10.
        loss: "kl", T^2 KL(teacher_T || student_T), or "outputs", the mean squared difference of the two
            probability vectors (Thonglek et al., IJCNN 2020).
    """

    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 2e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    temperature: float = 2.0
    clip_norm: float = 0.0
    copies: int = 4
    augment: float = 1.0
    mixup: float = 0.0
    loss: Literal["kl", "outputs"] = "kl"

    def __post_init__(self) -> None:
        """Refuse values outside the ranges given above, all faults at once."""
        require_ranges(self, "distillation", DISTILL_RANGES)
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError("distillation", [f"optimizer: {self.optimizer!r} is neither adam nor sgd"])
        if self.loss not in LOSSES:
            raise ConfigError("distillation", [f"loss: {self.loss!r} is none of {', '.join(LOSSES)}"])
        if self.learning_rate == 0:
            raise ConfigError("distillation", ["learning_rate: must be above 0"])


DISTILL_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 1e6),
    "batch_size": (1, 65_536),
    "learning_rate": (0, 10),
    "temperature": (0.1, 100),
    "clip_norm": (0, 1e6),
    "copies": (0, 100),
    "augment": (0, 4),
    "mixup": (0, 10),
}


def usual_copies(samples: int) -> int:
    """Return how many changed copies of each of so many unlabeled samples serve a student best."""
    return min(COPIES, COPIED // max(samples, 1))


def usual_steps(samples: int, batch_size: int) -> int:
    """Return the batches of so many samples, copies among them, that teach a student in one round."""
    return min(max(math.ceil(PASSES * samples / batch_size), STEPS[0]), STEPS[1])


def distill(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x_unlabeled: NDArray[np.float32],
    teacher: Teacher | NDArray[np.float32],
    settings: DistillSettings,
    seed: int,
    *,
    gain: Vector | None = None,
    copies: NDArray[np.int64] | None = None,
) -> Vector:
    """Teach a student and return its new weights; byte-identical for equal arguments on one machine.

    Args:
        structure: of the student.
        data: the job's data contract.
        weights: of the student before, shape (parameters,).
        x_unlabeled: inputs, shape (n, *input_shape).
        teacher: log-probabilities for `x_unlabeled`, shape (n, classes), or a function that returns them.
        settings: see there.
        seed: fixes copies, order and dropout.
        gain: as of `training.train`.
        copies: changed ones of each sample, shape (n,), in the place of `settings.copies`.

    Raises:
        DataError: no samples, or shapes do not fit.
        StructureError: weights or gain are not of this structure.
        TrainingError: the weights became infinite or NaN.
    """
    require_torch()
    import torch

    require_inputs(data, x_unlabeled)
    if len(x_unlabeled) == 0:
        raise DataError("no unlabeled samples to distil on")
    if gain is not None:
        require_length(gain, structure)
    log_probs = teacher(x_unlabeled) if callable(teacher) else teacher
    samples = len(x_unlabeled)
    if log_probs.shape != (samples, data.classes) or not np.isfinite(log_probs).all():
        raise DataError(
            f"teacher's outputs must be finite, shape {(samples, data.classes)}, not {log_probs.shape}"
        )
    rows = torch.from_numpy(_shown(np.full(samples, settings.copies) if copies is None else copies, samples))
    with undisturbed(structure), reproducible(seed):
        generator = torch.Generator().manual_seed(seed)
        model = flat_module(structure, data, weights)
        factor = None if gain is None else torch.from_numpy(gain.copy()).to(model.device)
        inputs = torch.from_numpy(np.ascontiguousarray(x_unlabeled, dtype=np.float32))
        softened = torch.from_numpy(np.ascontiguousarray(log_probs, dtype=np.float32)) / settings.temperature
        target = torch.softmax(softened, dim=1)
        mix = np.random.default_rng(seed)
        order = torch.empty(0, dtype=torch.int64)

        def batch_of(_step: int) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal order
            if len(order) < min(settings.batch_size, len(rows)):
                order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            batch, wanted, changed = inputs[rows[chosen]], target[rows[chosen]], chosen >= samples
            if changed.any():
                batch[changed] = augment(batch[changed], settings.augment, generator)
            if not settings.mixup:
                return batch, wanted
            share = float(mix.beta(settings.mixup, settings.mixup))
            other = torch.randperm(len(batch), generator=generator)
            return torch.lerp(batch[other], batch, share), torch.lerp(wanted[other], wanted, share)

        def collect() -> None:
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_([model.flat], settings.clip_norm)
            if factor is not None:
                model.gradient.mul_(factor)

        optimizer: torch.optim.Optimizer = torch.optim.Adam([model.flat], lr=settings.learning_rate)
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD([model.flat], lr=settings.learning_rate, momentum=MOMENTUM)
        teach(model, optimizer, batch_of, settings, collect=collect)
        taught = model.weights()
    if not np.isfinite(taught).all():
        raise TrainingError(f"{structure.id}: weights are not finite after distillation: lower learning_rate")
    return taught


def _shown(copies: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Return the sample behind everything that is shown: all samples as they are, then their copies."""
    if copies.shape != (samples,) or copies.min() < 0:
        raise DataError(f"copies must be counts of shape {(samples,)}, not {copies.shape}")
    every = np.arange(samples)
    return np.concatenate([every, *(every[copies > one] for one in range(int(copies.max())))])


def teach(
    model: FlatModule,
    optimizer: "torch.optim.Optimizer",
    batch_of: "Callable[[int], tuple[torch.Tensor, torch.Tensor]]",
    settings: DistillSettings,
    *,
    first: int = 0,
    before: Callable[[int], None] | None = None,
    collect: Callable[[], None] | None = None,
) -> None:
    """Run the steps `first` … `settings.steps` - 1 of a distillation: the loop that all forms of it share.

    What is trained need not be the weights themselves: `before` writes the model's weights from what the
    optimizer trains, `collect` brings the gradient of the weights back to it.

    Args:
        model: the student.
        optimizer: of what is trained; its rate falls along a cosine.
        batch_of: step -> inputs (b, *input_shape), and the teacher's probabilities at the temperature
            (b, classes).
        settings: temperature, loss, learning rate and steps.
        first: steps done before.
        before: called with the step number before every step.
        collect: called after every backward pass.
    """
    import torch

    loss_of = LOSSES[settings.loss]
    model.module.train()
    for step in range(first, settings.steps):
        if before is not None:
            before(step)
        batch, wanted = batch_of(step)
        for group in optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * settings.learning_rate * _cosine(step, settings.steps)
        model.gradient.zero_()
        logits = model.module(batch.to(model.device))
        loss = loss_of(logits / settings.temperature, wanted.to(model.device)) * settings.temperature**2
        torch.autograd.backward(loss)
        if collect is not None:
            collect()
        optimizer.step()


def _kl(logits: "torch.Tensor", wanted: "torch.Tensor") -> "torch.Tensor":
    import torch

    divergence: torch.Tensor = torch.nn.functional.kl_div(
        torch.log_softmax(logits, dim=1), wanted, reduction="batchmean"
    )
    return divergence


def _outputs(logits: "torch.Tensor", wanted: "torch.Tensor") -> "torch.Tensor":
    import torch

    error: torch.Tensor = torch.nn.functional.mse_loss(torch.softmax(logits, dim=1), wanted)
    return error


LOSSES: "dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]" = {"kl": _kl, "outputs": _outputs}
"""Student's logits over the temperature, teacher's probabilities -> loss, before the factor T^2."""


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))
