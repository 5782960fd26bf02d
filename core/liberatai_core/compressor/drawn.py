"""A new model as a recipe of some hundred bytes: every device draws the same random weights itself.

Random initial weights need not travel. A tensor of the reference initialisation that is constant (gains,
zero biases) is written as its value, a small one as it is, and any other as the seed of a uniform draw
with the same standard deviation: levels times a power of two, so that later sums are exact
(`sparsifier.merge`).
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor.artifact import (
    CONSTANT,
    DRAWN,
    FULL,
    GRID,
    HALF,
    Coding,
    levels_of,
    read,
    write,
)
from liberatai_core.errors import CodecError
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

REACH_BITS = 10
"""512 to 1023 levels on either side of zero: finer than any first step of training."""
SMALLEST = 64
"""Tensors below this many values travel as they are: a standard deviation of so few says little."""


def draw(reference: Vector, structure: Structure, seed: int, *, reach_bits: int = REACH_BITS) -> bytes:
    """Return the file of a new model whose tensors are spread like those of `reference`.

    Args:
        reference: float32, shape (parameters,): what the family's own initialisation gave.
        structure: the named tensors of the flat vector.
        seed: 0 … 2^32 - 1 - tensors; one model for one seed.
        reach_bits: levels on either side of zero are more than half, at most 2 to this power; fewer ones make
            the files of slices (`cut`) shorter.

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
        [_coding(reference[place], seed + number, reach_bits) for number, (_, place) in enumerate(slices)],
        structure,
    )


def cut(recipe: bytes, large: Structure, own: bytes, member: Structure, places: NDArray[np.int64]) -> bytes:
    """Return the file of a smaller model whose weights are values of a larger one's recipe, bit for bit.

    What is drawn in the larger one travels as levels of equal width; a tensor that is there whole stays a
    recipe.

    Args:
        recipe: what `draw` gave for the larger structure.
        large: its structure.
        own: what `draw` gave for the smaller one: of tensors that the larger one does not have.
        member: the smaller structure.
        places: of every weight in the larger one's flat vector, shape (member.parameters,); at or above its
            length: an own one.

    Raises:
        CodecError: one of the two is no recipe, or damaged.
        TooLargeError, BombError, NonFiniteError: a file is damaged.
    """
    wholes, owns = read(recipe, large), read(own, member)
    if any(coding.quantised for coding in (*wholes, *owns)):
        raise CodecError(f"{member.id}: a compressed model is no recipe to cut from")
    starts = np.cumsum([0, *(tensor.size for tensor in large.tensors)])
    codings = []
    for (_, place), alone in zip(member.slices(), owns, strict=True):
        here = places[place]
        if here[0] >= large.parameters:
            codings.append(alone)
            continue
        number = int(np.searchsorted(starts, here[0], side="right")) - 1
        codings.append(_cut(wholes[number], here - starts[number], large.tensors[number].size))
    return write(codings, member)


def _cut(coding: Coding, inside: NDArray[np.int64], size: int) -> Coding:
    """Return the coding of some values of a tensor, given their places in it."""
    if coding.kind == CONSTANT or inside.size == size:
        return coding
    if coding.values is not None:
        return replace(coding, values=coding.values[inside])
    levels = 2 * coding.reach + 1
    indices = levels_of(coding.seed, coding.reach, size)[inside] + coding.reach
    return Coding(
        GRID,
        coding.scale,
        low=-coding.reach,
        levels=levels,
        raw_bits=(levels - 1).bit_length(),
        indices=indices,
    )


def _coding(values: Vector, seed: int, reach_bits: int) -> Coding:
    if (values == values[0]).all():
        return Coding(CONSTANT, np.float32(values[0]))
    bound = float(values.std(dtype=np.float64)) * math.sqrt(3)
    step = 2.0 ** (math.ceil(math.log2(bound)) - reach_bits)
    # What is not spread around zero, or too fine for float32, is no random draw: it travels.
    centred = abs(float(values.mean(dtype=np.float64))) < bound / 4
    if values.size < SMALLEST or not centred or step < np.finfo(np.float32).tiny:
        halves = values.astype(np.float16)
        fits = np.isfinite(halves).all() and (np.abs(values).max() > np.finfo(np.float16).tiny)
        return Coding(HALF, values=halves) if fits else Coding(FULL, values=values)
    # Whole levels up to r spread like a uniform draw up to r + 1/2: with few levels that matters.
    reach = bound / step if reach_bits == REACH_BITS else max(1.0, bound / step - 0.5)
    return Coding(DRAWN, np.float32(step), reach=round(reach), seed=seed)
