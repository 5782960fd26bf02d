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

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import ConfigError, DataError, TrainingError
from liberatai_core.learning import runtimes
from liberatai_core.learning.families import require_torch
from liberatai_core.learning.runtimes import Runtime
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector, require_finite

OPTIMIZERS = ("sgd", "adam")
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
    runtime: Runtime | None = None,
) -> TrainResult:
    """Train on labelled samples and return new weights; byte-identical for equal arguments on one machine.

    Torch and numpy compute the same up to rounding, but draw another order of samples from one seed.

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
        runtime: what computes; None: torch where it is installed, else numpy.

    Raises:
        MissingExtraError: the runtime is not installed, or none for this family is.
        DataError: no samples, or shapes and labels are not of the contract.
        StructureError: weights or gain are not of this structure.
        TrainingError: the loss or the weights became infinite or NaN.
    """
    require_samples(data, x, y)
    if gain is not None:
        require_length(gain, structure)
    started = time.perf_counter()
    using = _using(runtime or runtimes.preferred(structure.family))
    trained, loss = using.fit(structure, data, weights, x, y, settings, seed, gain, on_step)
    if not np.isfinite(trained).all():
        raise TrainingError(f"{structure.id}: weights are not finite after training: lower learning_rate")
    return TrainResult(weights=trained, loss=loss, samples=len(x), seconds=time.perf_counter() - started)


def log_probabilities(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: NDArray[np.float32],
    batch_size: int = 512,
    *,
    runtime: Runtime | None = None,
) -> NDArray[np.float32]:
    """Return the logarithms of the predicted class probabilities, shape (n, classes), float32.

    Raises:
        DataError: `x` has another shape than the contract.
        StructureError: the weights are not of this structure.
        NonFiniteError: the weights contain NaN or infinity.
        MissingExtraError: the runtime is not installed, or none for this family is.
    """
    require_inputs(data, x)
    require_finite(weights, structure.id)
    using = _using(runtime or runtimes.preferred(structure.family))
    found: NDArray[np.float32] = using.log_probabilities(structure, data, weights, x, batch_size)
    return found


def _using(runtime: Runtime) -> Any:
    """Return the module that trains and predicts with a runtime."""
    if runtime == "torch":
        require_torch()
    return import_module(f"liberatai_core.learning.{runtime}_training")


def require_inputs(data: DataContract, x: NDArray[np.float32]) -> None:
    """Raise DataError unless `x` is (n, *input_shape)."""
    if x.ndim == 0 or x.shape[1:] != data.input_shape:
        raise DataError(f"inputs have shape {x.shape}, wanted (n, {', '.join(map(str, data.input_shape))})")


def require_samples(data: DataContract, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
    """Raise DataError unless there is at least one sample and labels fit inputs and contract."""
    require_inputs(data, x)
    require_labels(data, len(x), y)


def require_labels(data: DataContract, samples: int, y: NDArray[np.int64]) -> None:
    """Raise DataError unless there is at least one sample and labels fit their number and the contract."""
    if samples == 0:
        raise DataError("no samples to train on")
    if y.shape != (samples,):
        raise DataError(f"labels have shape {y.shape}, wanted ({samples},)")
    if int(y.min()) < 0 or int(y.max()) >= data.classes:
        raise DataError(f"labels must be 0 to {data.classes - 1}, found {int(y.min())} to {int(y.max())}")


def log_shares(y: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return the logarithms of the smoothed class shares of these labels, shape (classes,)."""
    counts = np.bincount(y, minlength=classes) + CLASS_SMOOTHING
    shares: NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
    return shares
