"""A new model as a recipe of some hundred bytes: every device draws the same random weights itself.

Random initial weights need not travel. A tensor of the reference initialisation that is constant (gains,
zero biases) is written as its value, a small one as it is, and any other as the seed of a uniform draw
with the same standard deviation: levels times a power of two, so that later sums are exact
(`sparsifier.merge`).
"""

import math

import numpy as np

from liberatai_core.compressor.artifact import CONSTANT, DRAWN, FULL, HALF, Coding, write
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

REACH_BITS = 10
"""512 to 1023 levels on either side of zero: finer than any first step of training."""
SMALLEST = 64
"""Tensors below this many values travel as they are: a standard deviation of so few says little."""


def draw(reference: Vector, structure: Structure, seed: int) -> bytes:
    """Return the file of a new model whose tensors are spread like those of `reference`.

    Args:
        reference: float32, shape (parameters,): what the family's own initialisation gave.
        structure: the named tensors of the flat vector.
        seed: 0 … 2^32 - 1 - tensors; one model for one seed.

    Raises:
        StructureError: the reference is not of the structure.
        NonFiniteError: a value is NaN or infinite.
        ValueError: the seed is out of range.
    """
    require_length(reference, structure)
    require_finite(reference, "initial weights")
    if not 0 <= seed < 2**32 - len(structure.tensors):
        raise ValueError(f"seed {seed} must lie in 0 … 2^32 - {len(structure.tensors)}")
    slices = structure.slices()
    return write(
        [_coding(reference[place], seed + number) for number, (_, place) in enumerate(slices)], structure
    )


def _coding(values: Vector, seed: int) -> Coding:
    if (values == values[0]).all():
        return Coding(CONSTANT, np.float32(values[0]))
    bound = float(values.std(dtype=np.float64)) * math.sqrt(3)
    step = 2.0 ** (math.ceil(math.log2(bound)) - REACH_BITS)
    # What is not spread around zero, or too fine for float32, is no random draw: it travels.
    centred = abs(float(values.mean(dtype=np.float64))) < bound / 4
    if values.size < SMALLEST or not centred or step < np.finfo(np.float32).tiny:
        halves = values.astype(np.float16)
        fits = np.isfinite(halves).all() and (np.abs(values).max() > np.finfo(np.float16).tiny)
        return Coding(HALF, values=halves) if fits else Coding(FULL, values=values)
    return Coding(DRAWN, np.float32(step), reach=round(bound / step), seed=seed)
