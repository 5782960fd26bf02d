"""Train the last layer alone, on features of a frozen backbone that are computed once and kept in eight bits.

The features of a sample are what the last dense layer reads. They are computed by whatever is there (torch,
onnxruntime or numpy), and kept as one byte each with a scale per feature, so that all epochs of all rounds
cost one forward pass per backbone. The head is trained in numpy, with the settings of any other training;
inputs cannot be changed any more: `augment` does nothing, `mixup` mixes features.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import StructureError, TrainingError
from liberatai_core.learning import numpy_training
from liberatai_core.learning.families import layers, network_of
from liberatai_core.learning.inference import AT_ONCE, Engine, features_by
from liberatai_core.learning.kernels.dense import Dense
from liberatai_core.learning.kernels.loss import log_softmax
from liberatai_core.learning.kernels.network import Network
from liberatai_core.learning.training import (
    OnStep,
    TrainResult,
    TrainSettings,
    require_inputs,
    require_labels,
)
from liberatai_core.structure import DataContract, Structure, head_places, require_length, to_tensors
from liberatai_core.weights import Vector, require_finite

Floats = NDArray[np.float32]
LEVELS = 255


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Features of samples, one byte each.

    Attributes:
        values: uint8, shape (n, features).
        scale, lowest: a feature is lowest + scale * value, float32, shape (features,).
    """

    values: NDArray[np.uint8]
    scale: Floats
    lowest: Floats

    def __len__(self) -> int:
        return len(self.values)

    def of(self, chosen: NDArray[np.bool_]) -> "Features":
        """Return the features of some samples."""
        return Features(self.values[chosen], self.scale, self.lowest)

    def floats(self, chosen: "NDArray[np.int64] | slice" = slice(None)) -> Floats:
        """Return the features of some samples, float32."""
        found: Floats = self.values[chosen] * self.scale
        found += self.lowest
        return found


def features(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: Floats,
    engine: Engine | None = None,
) -> Features:
    """Return what the last layer of a network reads of these samples.

    Args:
        structure: of a built-in family.
        data: the job's contract.
        weights: the network's, shape (parameters,); the head's own do not matter.
        x: inputs, shape (n, *input_shape).
        engine: what computes; None: see `inference.LIGHT`.

    Raises:
        DataError: `x` has another shape.
        StructureError, NonFiniteError: the weights are not of this structure, or not finite.
        MissingExtraError: the engine is not installed.
    """
    require_inputs(data, x)
    require_length(weights, structure)
    require_finite(weights, structure.id)
    forward = features_by(structure, data, weights, engine)
    parts = [forward(np.ascontiguousarray(x[i : i + AT_ONCE])) for i in range(0, len(x), AT_ONCE)]
    found = np.concatenate(parts) if parts else np.zeros((0, _head(structure, data).into), np.float32)
    lowest = found.min(axis=0, initial=np.inf) if len(found) else np.zeros(found.shape[1], np.float32)
    highest = found.max(axis=0, initial=-np.inf) if len(found) else lowest
    scale = ((highest - lowest) / np.float32(LEVELS)).astype(np.float32)
    steps = np.rint((found - lowest) / np.where(scale > 0, scale, 1))
    return Features(steps.astype(np.uint8), scale, lowest.astype(np.float32))


def log_probabilities(structure: Structure, weights: Vector, given: Features) -> Floats:
    """Return the logarithms of the class probabilities, shape (n, classes)."""
    matrix, bias = _matrix(weights, structure)
    return log_softmax(matrix @ given.floats().T + bias[:, None]).T


def train_head(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    given: Features,
    y: NDArray[np.int64],
    settings: TrainSettings,
    seed: int,
    *,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Return weights of which only the head is new; byte-identical for equal arguments.

    Args:
        structure: of a built-in family.
        data: the job's contract.
        weights: start, shape (parameters,).
        given: features of the samples.
        y: labels, shape (n,).
        settings: of any training; `augment` does nothing.
        seed: fixes the order of samples.
        on_step: as in `training.train`.

    Raises:
        DataError: no samples, or labels that are not of the contract.
        TrainingError: the loss or the weights became infinite or NaN.
    """
    require_labels(data, len(given), y)
    started = time.perf_counter()
    head = _head(structure, data)
    places = head_places(structure)
    flat = weights[places].astype(np.float32)
    gradient = np.zeros_like(flat)
    cut = head.out * head.into
    (matrix, bias), (d_matrix, d_bias) = (
        (vector[:cut].reshape(head.out, head.into), vector[cut:]) for vector in (flat, gradient)
    )
    model = Network(Dense(matrix, bias, d_matrix, d_bias), flat, gradient)
    mean_loss = numpy_training.descend(
        model,
        given.floats,
        y,
        data.classes,
        settings,
        np.random.default_rng(seed),
        factor=None,
        most=len(y),
        on_step=on_step,
    )
    if not np.isfinite(flat).all():
        raise TrainingError(f"{structure.id}: weights are not finite after training: lower learning_rate")
    trained = weights.copy()
    trained[places] = flat
    return TrainResult(weights=trained, loss=mean_loss, samples=len(y), seconds=time.perf_counter() - started)


def _head(structure: Structure, data: DataContract) -> layers.Dense:
    name, layer = network_of(structure, data).body.layers[-1]
    if not isinstance(layer, layers.Dense) or name != "head":
        raise StructureError(f"{structure.id}: its last layer is no dense one: it has no head to train")
    return layer


def _matrix(weights: Vector, structure: Structure) -> tuple[Floats, Floats]:
    tensors = to_tensors(weights, structure)
    return tensors["head.weight"], tensors["head.bias"]
