"""Where a model can bear errors: measured on unlabeled samples, once for every budget.

- `importance`: the diagonal of the true Fisher information, F_ii = E[(d log p_y / d w_i)^2] with y drawn from
  the model's own prediction (Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR
  2020, arXiv:1412.1193): no labels. One half of sum F_ii d_i^2 is the divergence KL(p_w || p_w+d) of the
  outputs to second order.
- `sensitivity`: the divergence that a relative squared error of 1 in one tensor would cause, from trials with
  one coarse tensor at a time (Thonglek et al., IJCNN 2020, scan accuracies like this), because coarse errors
  are far outside what second order sees.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DataError
from liberatai_core.learning._flat import flat_module, reproducible
from liberatai_core.learning.families import require_torch
from liberatai_core.learning.training import require_inputs
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector, require_finite

FISHER_SAMPLES = 64
"""Samples of the Fisher estimate: one backward pass each; more change the order of importances little."""
SCAN_SAMPLES = 256
"""Samples of one trial of the scan: the divergence is a mean, its error some per cent."""
DEAD_ZONE = 0.75
"""Trial quantiser: steps of 1.5 root mean squares, what is below half a step becomes zero."""
VECTOR = 10.0
"""What the second-order estimate of a vector is multiplied with: an error in a scale or a bias moves all that
a channel says, and a VGG-16 retrained at 60 times was a third closer to the original with it (seed 1)."""
LEAST = 1e-9
"""A tensor that the outputs do not notice keeps this sensitivity, so that it gets what costs nothing."""

OnTrial = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


def importance(
    structure: Structure, data: DataContract, weights: Vector, x: NDArray[np.float32], seed: int
) -> Vector:
    """Return the diagonal Fisher information of every weight, shape (parameters,), >= 0.

    Args:
        structure: of the model.
        data: its data contract.
        weights: of the model.
        x: unlabeled inputs, shape (n, *input_shape); at most FISHER_SAMPLES of them are used.
        seed: draws the samples and the predictions' classes.

    Raises:
        DataError: no samples, or another shape.
        StructureError: the weights are not of this structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    require_finite(weights, structure.id)
    inputs = _some(data, x, FISHER_SAMPLES, seed)
    require_torch()
    import torch

    with reproducible(seed):
        model = flat_module(structure, data, weights)
        model.module.eval()
        total = torch.zeros_like(model.flat.data)
        for sample in torch.from_numpy(inputs).to(model.device):
            model.gradient.zero_()
            log_p = torch.log_softmax(model.module(sample[None])[0], dim=0)
            drawn = torch.multinomial(log_p.detach().exp(), 1)
            torch.autograd.backward(log_p[drawn].sum())
            total.addcmul_(model.gradient, model.gradient)
        mean: Vector = (total / len(inputs)).cpu().numpy()
    return np.nan_to_num(mean, nan=0.0, posinf=0.0)


def sensitivity(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: NDArray[np.float32],
    fisher: Vector,
    seed: int,
    *,
    on_trial: OnTrial | None = None,
) -> dict[str, float]:
    """Return for every tensor the output divergence (nats) that a relative squared error of 1 would cause.

    Tensors with two or more axes are scanned one at a time; vectors (biases, normalisation) are many and
    small: for them it is the second-order estimate.

    Args:
        structure: of the model.
        data: its data contract.
        weights: of the model.
        x: unlabeled inputs, shape (n, *input_shape); at most SCAN_SAMPLES of them are used.
        fisher: result of `importance`.
        seed: draws the samples.
        on_trial: progress.

    Raises:
        DataError, StructureError, NonFiniteError: as `importance`.
    """
    require_finite(weights, structure.id)
    inputs = _some(data, x, SCAN_SAMPLES, seed)
    require_torch()
    import torch

    found = {}
    with reproducible(seed), torch.no_grad():
        model = flat_module(structure, data, weights)
        model.module.eval()
        batch = torch.from_numpy(inputs).to(model.device)
        wanted = torch.log_softmax(model.module(batch), dim=1)
        for done, (tensor, place) in enumerate(structure.slices()):
            part = weights[place]
            energy = float(np.square(part, dtype=np.float64).sum())
            second_order = 0.5 * float(
                np.dot(fisher[place].astype(np.float64), np.square(part, dtype=np.float64))
            )
            found[tensor.name] = max(second_order * (VECTOR if len(tensor.shape) < 2 else 1.0), LEAST)
            if len(tensor.shape) > 1 and energy > 0:
                coarse = _coarse(part)
                relative = float(np.square(coarse - part, dtype=np.float64).sum()) / energy
                model.flat.data[place] = torch.from_numpy(coarse)
                answer = torch.log_softmax(model.module(batch), dim=1)
                model.flat.data[place] = torch.from_numpy(part)
                divergence = float((wanted.exp() * (wanted - answer)).sum(dim=1).mean())
                if relative > 0 and np.isfinite(divergence):
                    found[tensor.name] = max(divergence / relative, LEAST)
            if on_trial is not None:
                on_trial(done + 1, len(structure.tensors))
    return found


def _some(data: DataContract, x: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    require_inputs(data, x)
    if len(x) == 0:
        raise DataError("no unlabeled samples to measure the sensitivity on")
    chosen = np.random.default_rng(seed).permutation(len(x))[:count]
    return np.ascontiguousarray(x[np.sort(chosen)], dtype=np.float32)


def _coarse(part: Vector) -> Vector:
    """Return about one bit per weight: zero, or multiples of 1.5 root mean squares."""
    step = np.float32(2 * DEAD_ZONE * np.sqrt(np.square(part, dtype=np.float64).mean()))
    coarse: Vector = (np.rint(part / step) * step).astype(np.float32)
    return coarse
