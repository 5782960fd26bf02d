"""Supervised training and predictions with torch: what `training` does where torch is installed."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import TrainingError
from liberatai_core.learning._flat import FlatModule, flat_module, reproducible
from liberatai_core.learning.augmentation import augment
from liberatai_core.learning.families import learned
from liberatai_core.learning.training import OnStep, TrainSettings, log_shares
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

if TYPE_CHECKING:
    import torch


def fit(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    settings: TrainSettings,
    seed: int,
    gain: Vector | None,
    on_step: OnStep | None,
) -> tuple[Vector, float]:
    """Return new weights and the mean loss of the last epoch; see `training.train`."""
    with reproducible(seed):
        model = flat_module(structure, data, weights)
        loss = _fit(model, data, x, y, settings, seed, learned(structure, gain), on_step)
        return model.weights(), loss


def log_probabilities(
    structure: Structure, data: DataContract, weights: Vector, x: NDArray[np.float32], batch_size: int
) -> NDArray[np.float32]:
    """See `training.log_probabilities`."""
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
