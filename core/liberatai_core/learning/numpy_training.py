"""Supervised training and predictions with numpy alone: what `training` does where torch is not installed.

The same loss, gradients and steps as with torch, up to rounding, and the same meaning of every setting. What
is drawn from the seed (order of samples, changes of inputs, mixtures) differs: torch has its own generator.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import TrainingError
from liberatai_core.learning.families import cost, learned, statistics_of
from liberatai_core.learning.kernels import optimizer
from liberatai_core.learning.kernels.augmentation import augment
from liberatai_core.learning.kernels.layer import Array
from liberatai_core.learning.kernels.loss import cross_entropy, log_softmax
from liberatai_core.learning.kernels.network import Network, network
from liberatai_core.learning.training import OnStep, TrainSettings, log_shares
from liberatai_core.profile import MAPS, MAPS_BYTES
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
    random = np.random.default_rng(seed)

    def batch(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        return augment(x[chosen], settings.augment, random)

    loss = descend(
        model,
        batch,
        y,
        data.classes,
        settings,
        random,
        factor=learned(structure, gain),
        most=_most_at_once(structure, data),
        on_step=on_step,
    )
    return model.flat, loss


def descend(
    model: Network,
    take: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    y: NDArray[np.int64],
    classes: int,
    settings: TrainSettings,
    random: np.random.Generator,
    *,
    factor: Vector | None,
    most: int,
    on_step: OnStep | None,
) -> float:
    """Train a network in place; return the mean loss of the last epoch.

    Args:
        model: changed in place.
        take: gives the inputs of chosen samples, shape (n, …).
        y: labels of all samples.
        classes: number of them.
        settings: see there.
        random: draws the order of samples and mixtures.
        factor: what gradients are multiplied with, None: nothing.
        most: samples that go through the network at once.
        on_step: see `training.train`.

    Raises:
        TrainingError: the loss became infinite or NaN.
    """
    start = model.flat.copy() if settings.proximal else None
    offset = np.float32(settings.balance) * log_shares(y, classes)[:, None]
    step_by = _stepping(settings, len(model.flat), own_decay=factor is None)
    batches = math.ceil(len(y) / settings.batch_size)
    planned = settings.epochs * batches
    planned = min(planned, settings.max_steps) if settings.max_steps else planned
    losses: list[float] = []
    order = np.empty(0, np.int64)
    for step in range(planned):
        if step % batches == 0:
            order, losses = random.permutation(len(y)), []
        first = (step % batches) * settings.batch_size
        chosen = order[first : first + settings.batch_size]
        losses.append(_gradient(model, take(chosen), y[chosen], offset, settings, random, most))
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
    return sum(losses) / len(losses)


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


def _most_at_once(structure: Structure, data: DataContract) -> int:
    """Return how many samples go through the network at once; batch norms need the whole batch."""
    if statistics_of(structure):
        return 1 << 62
    return max(1, MAPS_BYTES["numpy"] // (MAPS * cost(structure, data).activation_bytes_per_sample))


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
    most: int,
) -> float:
    """Write the gradient of one batch's loss into the model, a part after the other; return the loss."""
    share, other = 1.0, labels
    if settings.mixup:
        share = float(random.beta(settings.mixup, settings.mixup))
        places = random.permutation(len(batch))
        other = labels[places]
        batch = np.float32(share) * batch + np.float32(1 - share) * batch[places]
    total, loss = None, 0.0
    for part in (slice(first, first + most) for first in range(0, len(batch), most)):
        logits = model.forward(batch[part], training=True)
        logits += offset
        found, gradient = cross_entropy(logits, labels[part], settings.label_smoothing)
        if settings.mixup:
            found_other, gradient_other = cross_entropy(logits, other[part], settings.label_smoothing)
            found = share * found + (1 - share) * found_other
            gradient *= np.float32(share)
            gradient += np.float32(1 - share) * gradient_other
        whole = len(batch) <= most
        weight = 1.0 if whole else logits.shape[1] / len(batch)
        loss += weight * found
        if not whole:
            gradient *= np.float32(weight)
        model.backward(gradient)
        if not whole:
            total = model.gradient.copy() if total is None else np.add(total, model.gradient, out=total)
    if total is not None:
        model.gradient[:] = total
    return loss
