"""Weights as 8-bit integers, one scale per tensor, symmetric about zero. A baseline by name.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, arXiv:1712.05877, weights only and after training: level = round(w / step), step = max|w| / 127.
All tensors of two and more axes; the others stay float32.
"""

import numpy as np

from liberatai_core.compressor import artifact
from liberatai_core.compressor.artifact import Coding
from liberatai_core.compressor.codebook_ijcnn2020 import layers
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

TOP = 127


def quantise(structure: Structure, weights: Vector) -> list[Coding]:
    """Return one coding per tensor.

    Raises:
        StructureError: the weights do not belong to the structure.
        NonFiniteError: a weight is NaN or infinite.
    """
    require_length(weights, structure)
    require_finite(weights, "weights")
    chosen = set(layers(structure))
    return [
        _grid(weights[place])
        if tensor.name in chosen
        else Coding(artifact.FULL, values=weights[place].copy())
        for tensor, place in structure.slices()
    ]


def _grid(weights: Vector) -> Coding:
    step = np.float32(np.abs(weights).max() / TOP)
    levels = np.rint(weights / np.float64(step)).astype(np.int64) if step > 0 else np.zeros(1, np.int64)
    low, high = int(levels.min()), int(levels.max())
    if low == high:
        return Coding(artifact.CONSTANT, np.float32(low) * step)
    indices = (levels - low).astype(np.uint8)
    return Coding(artifact.GRID, step, low=low, levels=high - low + 1, indices=indices)
