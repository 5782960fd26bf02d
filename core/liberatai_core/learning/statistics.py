"""Running statistics of batch normalisation, measured anew where the weights have changed.

A compressed model's activations are not those of the original, so its running means and variances must be
those of the new weights: cumulative averages over unlabeled samples (Izmailov et al., "Averaging Weights
Leads to Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407, section 3.2).
"""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor import artifact, cells
from liberatai_core.compressor.codebook import smallest_bytes
from liberatai_core.errors import DataError, StructureError
from liberatai_core.learning._flat import flat_module, reproducible
from liberatai_core.learning.families import require_torch, statistics_of
from liberatai_core.learning.training import require_inputs
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector, require_finite


def reestimate(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x: NDArray[np.float32],
    *,
    batch_size: int = 256,
) -> Vector:
    """Return the weights with running statistics that are averages over all these samples.

    All other values stay as they are, to the bit. A layer whose map is one value per channel cannot measure
    a batch of one sample: such a batch (only ever the last one) joins the one before it.

    Args:
        structure: whose statistics are measured; one without any gets an equal copy.
        data: the data contract.
        weights: float32, shape (parameters,).
        x: inputs without labels, shape (n, *input_shape).
        batch_size: samples of one forward pass, at least 2. The variance is the mean of those inside the
            batches, so larger is nearer to that of all samples.

    Raises:
        DataError: no samples, or another shape than the contract.
        StructureError: the weights are not of this structure, or statistics became infinite or NaN.
        NonFiniteError: a weight is NaN or infinite.
        ValueError: `batch_size` is below 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size {batch_size}: one sample has no variance")
    require_inputs(data, x)
    require_finite(weights, structure.id)
    names = statistics_of(structure)
    if not names:
        return weights.copy()
    if len(x) == 0:
        raise DataError("no samples to measure running statistics on")
    require_torch()
    import torch

    with reproducible(0), torch.no_grad():
        model = flat_module(structure, data, weights)
        norms = [m for m in model.module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
        model.module.eval()
        for norm in norms:
            norm.train()  # only these: dropout and the like would change what is measured
        seen = 0
        for rows in _batches(len(x), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(x[rows], dtype=np.float32))
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen  # the first batch replaces what was there
            model.module(batch.to(model.device))
        measured = model.weights()
    if not np.isfinite(measured).all():
        raise StructureError(f"{structure.id}: running statistics are not finite on these samples")
    return measured


def before_restating(structure: Structure, budget_bytes: int) -> int:
    """Return what a file may take before `restated`.

    Statistics that would take more than half of the budget are coded with all else, and stay as they were.
    """
    room = cells.verbatim_bytes(structure, statistics_of(structure))
    return max(budget_bytes - room, smallest_bytes(structure)) if 2 * room <= budget_bytes else budget_bytes


def restated(
    file: bytes, structure: Structure, data: DataContract, x: NDArray[np.float32], budget_bytes: int
) -> bytes:
    """Return a compressed model's file with statistics of the compressed model, if that fits the budget.

    Args:
        file: of a `compressor.artifact`.
        structure: of the model.
        data: the data contract.
        x: inputs without labels, shape (n, *input_shape).
        budget_bytes: what the file may take.

    Raises:
        DataError, StructureError: as `reestimate`.
    """
    names = statistics_of(structure)
    if not names:
        return file
    measured = reestimate(structure, data, artifact.restore(file, structure), x)
    told = cells.verbatim(file, structure, measured, names)
    return told if len(told) <= budget_bytes else file


def _batches(samples: int, size: int) -> list[slice]:
    starts = list(range(0, samples, size))
    if len(starts) > 1 and samples - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]
