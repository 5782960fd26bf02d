"""What the compressor's baselines by name need of torch: quality without labels, and retraining.

The second stage of Thonglek et al., IJCNN 2020, doi 10.1109/IJCNN48605.2020.9207190: quantised layers are
frozen, float layers learn from the difference between the outputs of the quantised and of the original
network on unlabeled data. Its control is the same with labels. Which tensors are frozen, and the file that
comes out, stand in `compressor.codebook_ijcnn2020`.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor.artifact import Coding
from liberatai_core.compressor.codebook_ijcnn2020 import decoded, free, refreshed
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.training import TrainSettings, log_probabilities, train
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

Inputs = NDArray[np.float32]
LEARNING_RATE = 1e-3
"""Of Adam: the usual one; the paper does not say. It falls along a cosine, with labels in `STAGES` steps."""
STAGES = 6
"""With labels the rate falls in so many equal stages, each at the cosine's value in its middle."""


def agreement(
    structure: Structure, data: DataContract, weights: Vector, x: Inputs
) -> Callable[[Vector], float]:
    """Return a measure of weights: the share of samples with the original's top class; labels are not needed.

    Args:
        structure: of the original and of what is measured.
        data: the data contract.
        weights: the original ones, shape (parameters,).
        x: unlabeled inputs, shape (n, *input_shape).
    """
    wanted = log_probabilities(structure, data, weights, x).argmax(axis=1)

    def measure(trial: Vector) -> float:
        return float(np.mean(log_probabilities(structure, data, trial, x).argmax(axis=1) == wanted))

    return measure


def retrained(
    structure: Structure,
    data: DataContract,
    codings: Sequence[Coding],
    x: Inputs,
    teacher: NDArray[np.float32],
    settings: DistillSettings,
    seed: int,
) -> list[Coding]:
    """Return the codings after float layers have learnt the original's outputs; no label is read.

    Args:
        structure: the named tensors.
        data: the data contract.
        codings: one per tensor, e.g. from `codebook_ijcnn2020.quantise`.
        x: unlabeled inputs, shape (n, *input_shape).
        teacher: the original's log-probabilities for `x`, shape (n, classes).
        settings: steps, batch and rate; the loss is always the mean squared difference of the output vectors.
        seed: fixes the order of samples.
    """
    gain = free(structure, codings)
    if not gain.any():
        return list(codings)
    start = decoded(structure, codings)
    own = msgspec.structs.replace(settings, loss="outputs", temperature=1.0)
    taught = distill(structure, data, start, x, teacher, own, seed, gain=gain)
    return refreshed(structure, codings, taught)


def retrained_with_labels(
    structure: Structure,
    data: DataContract,
    codings: Sequence[Coding],
    x: Inputs,
    y: NDArray[np.int64],
    settings: DistillSettings,
    seed: int,
) -> list[Coding]:
    """Return the codings after float layers have been trained on labels: the control of `retrained`.

    Same weights, steps, batch and optimiser; cross-entropy instead of the difference to the original.

    Args:
        structure: the named tensors.
        data: the data contract.
        codings: one per tensor.
        x: inputs, shape (n, *input_shape).
        y: labels, shape (n,).
        settings: steps, batch and rate; what belongs to a teacher is ignored.
        seed: fixes the order of samples.
    """
    gain = free(structure, codings)
    if not gain.any():
        return list(codings)
    weights = decoded(structure, codings)
    stages = min(STAGES, settings.steps)
    for stage in range(stages):
        steps = settings.steps // stages + (stage < settings.steps % stages)
        falling = 0.5 * (1 + np.cos(np.pi * (stage + 0.5) / stages))
        own = TrainSettings(
            epochs=1 + steps * settings.batch_size // len(x),
            max_steps=steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate * float(falling),
            optimizer="adam",
            balance=0.0,
            clip_norm=settings.clip_norm,
        )
        weights = train(structure, data, weights, x, y, own, seed + stage, gain=gain).weights
    return refreshed(structure, codings, weights)
