"""Supervised training and predictions with numpy alone: what `training` does where torch is not installed.

The same loss, gradients and steps as with torch, up to rounding, and the same meaning of every setting. What
is drawn from the seed (order of samples, changes of inputs, mixtures) differs: torch has its own generator.
"""

import math

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import TrainingError
from liberatai_core.learning.families import learned
from liberatai_core.learning.kernels import optimizer
from liberatai_core.learning.kernels.augmentation import augment
from liberatai_core.learning.kernels.layer import Array
from liberatai_core.learning.kernels.loss import cross_entropy, log_softmax
from liberatai_core.learning.kernels.network import Network, network
from liberatai_core.learning.training import OnStep, TrainSettings, log_shares
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

PREDICTED = 64
"""Samples of one forward pass: their maps stay in the cache of a small processor."""


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
    model = network(structure, data, weights)
    start = model.flat.copy() if settings.proximal else None
    factor = learned(structure, gain)
    offset = np.float32(settings.balance) * log_shares(y, data.classes)[:, None]
    step_by = _stepping(settings, len(weights), own_decay=factor is None)
    random = np.random.default_rng(seed)
    batches = math.ceil(len(x) / settings.batch_size)
    planned = settings.epochs * batches
    planned = min(planned, settings.max_steps) if settings.max_steps else planned
    losses: list[float] = []
    order = np.empty(0, np.int64)
    for step in range(planned):
        if step % batches == 0:
            order, losses = random.permutation(len(x)), []
        first = (step % batches) * settings.batch_size
        chosen = order[first : first + settings.batch_size]
        batch = augment(x[chosen], settings.augment, random)
        losses.append(_gradient(model, batch, y[chosen], offset, settings, random))
        gradient = model.gradient
        if start is not None:
            gradient += np.float32(settings.proximal) * (model.flat - start)
        if settings.clip_norm:
            optimizer.clip(gradient, settings.clip_norm)
        if factor is not None:
            gradient *= factor
            if settings.weight_decay:
                # The optimiser's own weight decay would move what the gain keeps as it is.
                gradient += np.float32(settings.weight_decay) * model.flat * (factor > 0)
        step_by(model.flat, gradient)
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"loss is {losses[-1]} at step {step + 1}: lower learning_rate or check the data"
            )
        if on_step is not None:
            on_step(step + 1, planned)
    return model.flat, sum(losses) / len(losses)


def log_probabilities(
    structure: Structure, data: DataContract, weights: Vector, x: NDArray[np.float32], batch_size: int
) -> NDArray[np.float32]:
    """See `training.log_probabilities`."""
    model = network(structure, data, weights)
    out = np.empty((len(x), data.classes), dtype=np.float32)
    size = min(batch_size, PREDICTED)
    for start in range(0, len(x), size):
        out[start : start + size] = log_softmax(model.forward(x[start : start + size], training=False)).T
    return out


def _stepping(settings: TrainSettings, parameters: int, *, own_decay: bool) -> optimizer.Step:
    decay = settings.weight_decay if own_decay else 0.0
    if settings.optimizer == "adam":
        return optimizer.adam(parameters, settings.learning_rate, decay)
    return optimizer.sgd(parameters, settings.learning_rate, settings.momentum, decay)


def _gradient(
    model: Network,
    batch: NDArray[np.float32],
    labels: NDArray[np.int64],
    offset: Array,
    settings: TrainSettings,
    random: np.random.Generator,
) -> float:
    """Write the gradient of one batch's loss into the model; return the loss."""
    share, other = 1.0, labels
    if settings.mixup:
        share = float(random.beta(settings.mixup, settings.mixup))
        places = random.permutation(len(batch))
        other = labels[places]
        batch = np.float32(share) * batch + np.float32(1 - share) * batch[places]
    logits = model.forward(batch, training=True)
    logits += offset
    loss, gradient = cross_entropy(logits, labels, settings.label_smoothing)
    if settings.mixup:
        loss_other, gradient_other = cross_entropy(logits, other, settings.label_smoothing)
        loss = share * loss + (1 - share) * loss_other
        gradient *= np.float32(share)
        gradient += np.float32(1 - share) * gradient_other
    model.backward(gradient)
    return loss
