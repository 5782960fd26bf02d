"""Supervised training of one structure on one device's data, from and to the flat weight vector.

Optional parts, each with its source:
- proximal term mu/2 |w - w0|^2: Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx),
  MLSys 2020, arXiv:1812.06127;
- balanced softmax: Ren et al., NeurIPS 2020, arXiv:2007.10740; against label skew: Zhang et al.,
  "Federated Learning with Label Distribution Skew via Logits Calibration" (FedLC), ICML 2022,
  arXiv:2209.00189. The logarithm of the device's own class shares is added to the logits during training
  only, so classes that the device does not have are not unlearned;
- mixup: Zhang et al., ICLR 2018, arXiv:1710.09412.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, DataError, TrainingError
from liberatai_core.learning._flat import FlatModule, flat_module, learned, reproducible
from liberatai_core.learning.augmentation import augment
from liberatai_core.learning.families import require_torch
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector, require_finite

if TYPE_CHECKING:
    import torch

CLASS_SMOOTHING = 0.1
"""Added to every class count before the logarithm: a class the device lacks keeps a finite share. With a
tenth of a sample it is some e^-7 for a device of 100 samples, so its logit is left almost alone."""


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a device trains in one round.

    Attributes:
        epochs: passes over the device's data, 1 … 1000.
        max_steps: stop after this many batches, 0 for no limit, at most 1e7.
        batch_size: samples of one step, 1 … 65536.
        learning_rate: step size, above 0, at most 100.
        optimizer: "sgd" (with `momentum`) or "adam".
        momentum: of SGD, 0 … 0.999.
        weight_decay: L2 penalty, 0 … 10.
        clip_norm: largest gradient norm, 0 for no limit.
        proximal: FedProx's mu, 0 … 1e3.
        balance: 0 plain softmax, 1 balanced softmax, at most 4.
        label_smoothing: 0 … 0.5.
        augment: strength of the changes of inputs (`augmentation.py`), 0 … 4.
        mixup: parameter of the Beta distribution, 0 for none, at most 10.
    """

    epochs: int = 5
    max_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    proximal: float = 0.0
    balance: float = 1.0
    label_smoothing: float = 0.0
    augment: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside the ranges given above, all faults at once."""
        require_ranges(self, "training", TRAIN_RANGES)
        if self.learning_rate == 0:
            raise ConfigError("training", ["learning_rate: must be above 0"])
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                "training", [f"optimizer: {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}"]
            )


TRAIN_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 1000),
    "max_steps": (0, 1e7),
    "batch_size": (1, 65_536),
    "learning_rate": (0, 100),
    "momentum": (0, 0.999),
    "weight_decay": (0, 10),
    "clip_norm": (0, 1e6),
    "proximal": (0, 1e3),
    "balance": (0, 4),
    "label_smoothing": (0, 0.5),
    "augment": (0, 4),
    "mixup": (0, 10),
}
"""What a device accepts from a job: wide enough for every known recipe, narrow enough to end."""


def require_ranges(settings: msgspec.Struct, where: str, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ConfigError with one line for each field that is not a number in its range."""
    faults = []
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            faults.append(f"{name}: must be from {low:g} to {high:g}, not {value!r}")
    if faults:
        raise ConfigError(where, faults)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainResult:
    """What one training gave.

    Attributes:
        weights: flat, finite.
        loss: mean training loss of the last epoch.
        samples: number of different samples seen.
        seconds: wall time.
    """

    weights: Vector
    loss: float
    samples: int
    seconds: float


OnStep = Callable[[int, int], None]
"""Called after every step with (steps done, steps planned); may raise TrainingError to stop."""


def train(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    settings: TrainSettings,
    seed: int,
    *,
    gain: Vector | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train on labelled samples and return new weights; byte-identical for equal arguments on one machine.

    Args:
        structure: what to train.
        data: the job's data contract.
        weights: start, shape (parameters,).
        x: inputs, shape (n, *input_shape).
        y: labels 0 … classes-1, shape (n,).
        settings: see there.
        seed: fixes the order of samples, augmentation and dropout.
        gain: shape (parameters,): gradients are multiplied with it after clipping; 0 keeps a parameter as it
            is (`sparsifier.subspace`).
        on_step: progress, and the way to stop early (raise).

    Raises:
        DataError: no samples, or shapes and labels are not of the contract.
        StructureError: weights or gain are not of this structure.
        TrainingError: the loss or the weights became infinite or NaN.
    """
    require_samples(data, x, y)
    if gain is not None:
        require_length(gain, structure)
    started = time.perf_counter()
    with reproducible(seed):
        model = flat_module(structure, data, weights)
        loss = _fit(model, data, x, y, settings, seed, learned(structure, gain), on_step)
        trained = model.weights()
    if not np.isfinite(trained).all():
        raise TrainingError(f"{structure.id}: weights are not finite after training: lower learning_rate")
    return TrainResult(weights=trained, loss=loss, samples=len(x), seconds=time.perf_counter() - started)


def log_probabilities(
    structure: Structure, data: DataContract, weights: Vector, x: NDArray[np.float32], batch_size: int = 512
) -> NDArray[np.float32]:
    """Return the logarithms of the predicted class probabilities, shape (n, classes), float32.

    Raises:
        DataError: `x` has another shape than the contract.
        StructureError: the weights are not of this structure.
        NonFiniteError: the weights contain NaN or infinity.
    """
    require_inputs(data, x)
    require_finite(weights, structure.id)
    require_torch()
    import torch

    out = np.empty((len(x), data.classes), dtype=np.float32)
    with reproducible(0), torch.no_grad():
        model = flat_module(structure, data, weights)
        model.module.eval()
        for start in range(0, len(x), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(x[start : start + batch_size], dtype=np.float32))
            out[start : start + len(batch)] = (
                torch.log_softmax(model.module(batch.to(model.device)), dim=1).cpu().numpy()
            )
    return out


def require_inputs(data: DataContract, x: NDArray[np.float32]) -> None:
    """Raise DataError unless `x` is (n, *input_shape)."""
    if x.ndim == 0 or x.shape[1:] != data.input_shape:
        raise DataError(f"inputs have shape {x.shape}, wanted (n, {', '.join(map(str, data.input_shape))})")


def require_samples(data: DataContract, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
    """Raise DataError unless there is at least one sample and labels fit inputs and contract."""
    require_inputs(data, x)
    if len(x) == 0:
        raise DataError("no samples to train on")
    if y.shape != (len(x),):
        raise DataError(f"labels have shape {y.shape}, wanted ({len(x)},)")
    if int(y.min()) < 0 or int(y.max()) >= data.classes:
        raise DataError(f"labels must be 0 to {data.classes - 1}, found {int(y.min())} to {int(y.max())}")


def _fit(
    model: FlatModule,
    data: DataContract,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    settings: TrainSettings,
    seed: int,
    gain: Vector | None,
    on_step: OnStep | None,
) -> float:
    import torch

    generator = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    labels = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    factor = None if gain is None else torch.from_numpy(gain.copy()).to(model.device)
    offset = torch.from_numpy(settings.balance * log_shares(y, data.classes)).to(model.device)
    mix = np.random.default_rng(seed)
    start = model.flat.detach().clone()
    # An optimiser's own weight decay would move what the gain keeps as it is.
    own = settings if gain is None else msgspec.structs.replace(settings, weight_decay=0.0)
    optimizer = OPTIMIZERS[settings.optimizer](model.flat, own)
    batches = math.ceil(len(x) / settings.batch_size)
    planned = settings.epochs * batches
    planned = min(planned, settings.max_steps) if settings.max_steps else planned
    model.module.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(planned):
        if step % batches == 0:
            order = torch.randperm(len(x), generator=generator)
            losses = []
        first = (step % batches) * settings.batch_size
        chosen = order[first : first + settings.batch_size]
        batch = augment(inputs[chosen], settings.augment, generator).to(model.device)
        target = labels[chosen].to(model.device)
        model.gradient.zero_()
        loss = _loss(model, batch, target, offset, settings, mix, generator)
        torch.autograd.backward(loss)
        if settings.proximal:
            model.gradient.add_(model.flat.detach() - start, alpha=settings.proximal)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([model.flat], settings.clip_norm)
        if factor is not None:
            model.gradient.mul_(factor)
            if settings.weight_decay:
                model.gradient.add_(model.flat.detach() * (factor > 0), alpha=settings.weight_decay)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"loss is {losses[-1]} at step {step + 1}: lower learning_rate or check the data"
            )
        if on_step is not None:
            on_step(step + 1, planned)
    return sum(losses) / len(losses)


def log_shares(y: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return the logarithms of the smoothed class shares of these labels, shape (classes,)."""
    counts = np.bincount(y, minlength=classes) + CLASS_SMOOTHING
    shares: NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
    return shares


def _loss(
    model: FlatModule,
    batch: "torch.Tensor",
    target: "torch.Tensor",
    offset: "torch.Tensor",
    settings: TrainSettings,
    mix: np.random.Generator,
    generator: "torch.Generator",
) -> "torch.Tensor":
    import torch

    def cross_entropy(logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        loss: torch.Tensor = torch.nn.functional.cross_entropy(
            logits, labels, label_smoothing=settings.label_smoothing
        )
        return loss

    if not settings.mixup:
        return cross_entropy(model.module(batch) + offset, target)
    share = float(mix.beta(settings.mixup, settings.mixup))
    other = torch.randperm(len(batch), generator=generator)
    logits = model.module(torch.lerp(batch[other], batch, share)) + offset
    return share * cross_entropy(logits, target) + (1 - share) * cross_entropy(logits, target[other])


def _sgd(flat: "torch.nn.Parameter", settings: TrainSettings) -> "torch.optim.Optimizer":
    import torch

    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [flat], lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    return optimizer


def _adam(flat: "torch.nn.Parameter", settings: TrainSettings) -> "torch.optim.Optimizer":
    import torch

    optimizer: torch.optim.Optimizer = torch.optim.Adam(
        [flat], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return optimizer


OPTIMIZERS: dict[str, Callable[["torch.nn.Parameter", TrainSettings], "torch.optim.Optimizer"]] = {
    "sgd": _sgd,
    "adam": _adam,
}
