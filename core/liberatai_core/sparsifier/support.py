"""Shared support: the coordinator names the coordinates of a round, so no device sends positions.

By a seed (a random mask: Konečný et al., arXiv:1610.05492) or by a list of blocks. All updates of a round
then have one support, which is what secure aggregation needs, and rules that compare devices coordinate by
coordinate; the support says nothing about anybody's data.

Only integers decide which coordinates a seed names: every block has a 64-bit hash (SplitMix64: Steele, Lea
& Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), and the blocks with the smallest
hashes are chosen. No version of numpy and no machine can change that.

What is sent is the gathered sub-vector, quantised and written as `top_k` does at density 1; a sub-structure
with the same tensors keeps one scale per tensor.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import BombError, IndexOrderError, IndexRangeError
from liberatai_core.sparsifier import top_k
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure, Tensor, require_length
from liberatai_core.weights import Vector, require_finite

Positions = NDArray[np.int64]
"""Coordinates of the flat vector, strictly increasing, shape (k,), k at least 1."""

MAX_SEED = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 16
"""Blocks hashed at a time: bounded memory, whatever the structure."""


def positions_from_seed(structure: Structure, density: float, seed: int, *, block_size: int = 1) -> Positions:
    """Return the coordinates that a seed names: exactly round(density x parameters), at least one.

    Args:
        structure: gives the number of parameters.
        density: fraction of the parameters, in (0, 1].
        seed: 0 … 2^64 - 1.
        block_size: neighbouring coordinates that are chosen together; the last block chosen may be cut.

    Returns:
        int64, strictly increasing.

    Raises:
        ValueError: density, seed or block size out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} must lie in (0, 1]")
    count = max(1, round(density * structure.parameters))
    return draw(structure.parameters, count, seed, block_size=block_size)


def draw(parameters: int, count: int, seed: int, *, block_size: int = 1) -> Positions:
    """Return `count` of the coordinates 0 … parameters - 1, in whole blocks but for the last one chosen.

    Raises:
        ValueError: count, seed or block size out of range.
    """
    if not 1 <= count <= parameters or not 1 <= block_size <= parameters:
        raise ValueError(f"{count} coordinates in blocks of {block_size} of {parameters}")
    key = seed_hash(seed)
    blocks = -(-parameters // block_size)
    # The last block of the structure may be short: then one block more is needed.
    chosen = _smallest(blocks, min(blocks, -(-count // block_size) + 1), key)
    filled = np.cumsum(np.minimum(block_size, parameters - chosen * block_size))
    needed = int(np.searchsorted(filled, count)) + 1
    surplus = int(filled[needed - 1]) - count
    last = int(chosen[needed - 1])
    stop = min((last + 1) * block_size, parameters) - surplus
    positions = _spread(np.sort(chosen[:needed]), block_size, parameters)
    if surplus == 0:
        return positions
    return positions[(positions < stop) | (positions >= (last + 1) * block_size)]


def positions_from_blocks(structure: Structure, block_size: int, blocks: Sequence[int]) -> Positions:
    """Return the coordinates of a list of blocks, which may come from anywhere.

    Args:
        structure: gives the number of parameters.
        block_size: coordinates per block; the last block of the structure may be shorter.
        blocks: numbers of the blocks, strictly increasing, from 0.

    Raises:
        BombError: more blocks than the structure has.
        IndexRangeError: the block size or a block lies outside the structure, or no block is named.
        IndexOrderError: blocks are unsorted or doubled.
    """
    parameters = structure.parameters
    if not 1 <= block_size <= parameters:
        raise IndexRangeError(f"blocks of {block_size} in a structure of {parameters}")
    most = -(-parameters // block_size)
    if len(blocks) > most:
        raise BombError(f"{len(blocks)} blocks named, the structure has {most}")
    numbers = np.asarray(blocks)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise IndexRangeError("block list: empty, or not whole numbers below 2^64")
    if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= most:
        raise IndexRangeError(f"block list: empty, or a block lies outside 0 … {most - 1}")
    numbers = numbers.astype(np.int64)
    if (np.diff(numbers) <= 0).any():
        raise IndexOrderError("block list: blocks are unsorted or doubled")
    return _spread(numbers, block_size, parameters)


def sparsify_on(
    state: State,
    difference: Vector,
    structure: Structure,
    positions: Positions,
    levels: int | None = None,
    *,
    decay: float = 1.0,
) -> tuple[State, bytes]:
    """Return the next state and an update over the named coordinates, without positions.

    With u = decay * residual + difference (float32): what is sent and the new residual add up to u, bit for
    bit on the named coordinates; elsewhere the new residual is u.

    Args:
        state: result of `top_k.init` or of the round before.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector; scales are per tensor.
        positions: of `positions_from_seed` or `positions_from_blocks`.
        levels: magnitudes per value, 1 … 255; default: 4 bits, sign included in the code.
        decay: what an old residual is worth, in [0, 1].

    Raises:
        StructureError: state or difference do not belong to the structure.
        NonFiniteError: a value is NaN or infinite, or the sum overflows.
        IndexRangeError, IndexOrderError: positions are not as `Positions` says.
        ValueError: levels or decay out of range.
    """
    total = accumulated(state, difference, structure, decay)
    part = part_of(structure, positions)
    after, update = top_k.sparsify(top_k.init(positions.size), total[positions], part, 1.0, levels=levels)
    total[positions] = after.residual
    return stored(State(total, state.rounds + 1, state.storage)), update


def densify_on(data: bytes, structure: Structure, positions: Positions) -> Vector:
    """Return the difference that such an update means: float32, shape (parameters,), zero elsewhere.

    Raises:
        LiberataiError: positions are not as `Positions` says, or whatever `codec.decode` refuses.
    """
    values = top_k.densify(data, part_of(structure, positions))
    dense = np.zeros(structure.parameters, np.float32)
    dense[positions] = values
    return dense


def part_of(structure: Structure, positions: Positions) -> Structure:
    """Return the structure of the gathered sub-vector: the tensors that positions lie in, flat.

    Raises:
        IndexRangeError: no position, or one outside the structure.
        IndexOrderError: positions are unsorted or doubled.
    """
    if positions.ndim != 1 or positions.dtype != np.int64 or positions.size == 0:
        raise IndexRangeError(
            f"positions are {positions.dtype} {positions.shape}, wanted int64, at least one"
        )
    if (np.diff(positions) <= 0).any():
        raise IndexOrderError("positions are unsorted or doubled")
    if positions[0] < 0 or positions[-1] >= structure.parameters:
        raise IndexRangeError(f"a position lies outside 0 … {structure.parameters - 1}")
    ends = np.searchsorted(positions, [place.stop for _, place in structure.slices()])
    counts = np.diff(ends, prepend=0).tolist()
    tensors = tuple(
        Tensor(tensor.name, (count,))
        for tensor, count in zip(structure.tensors, counts, strict=True)
        if count
    )
    return Structure(family=structure.family, params=structure.params, tensors=tensors)


def accumulated(state: State, difference: Vector, structure: Structure, decay: float) -> Vector:
    """Return decay * residual + difference as a new vector, float32, shape (parameters,).

    Raises:
        StructureError: state or difference do not belong to the structure.
        NonFiniteError: a value is NaN or infinite, or the sum overflows.
        ValueError: decay is not in [0, 1].
    """
    require_length(difference, structure)
    require_length(state.residual, structure)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay {decay} must lie in [0, 1]")
    require_finite(difference, "difference")
    total: Vector = state.residual * np.float32(decay)
    with np.errstate(over="ignore"):
        total += difference
    require_finite(total, "difference + residual")
    return total


def stored(state: State) -> State:
    """Return the state as the disk will give it back: rounded where the storage is float16."""
    if state.storage == "float32":
        return state
    # Rounding can carry the largest value to the next power of two, and then the step doubles.
    while True:
        again = top_k.state_from_bytes(top_k.state_to_bytes(state), state.residual.size)
        if np.array_equal(again.residual, state.residual):
            return state
        state = again


def seed_hash(seed: int) -> int:
    """Return 64 bits in which neighbouring seeds are unlike.

    Raises:
        ValueError: the seed is not in 0 … 2^64 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} must lie in 0 … 2^64 - 1")
    return int(_mixed(np.array([seed], np.uint64))[0])


def _spread(blocks: Positions, block_size: int, parameters: int) -> Positions:
    """Return the coordinates of sorted blocks."""
    if block_size == 1:
        return blocks
    positions = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
    return positions[positions < parameters]


def _smallest(blocks: int, count: int, key: int) -> Positions:
    """Return the numbers of the `count` blocks with the smallest hashes, in the order of the hashes."""
    # Nearly always one pass: a bound that a few more than `count` hashes lie below.
    share = min(1.0, (count + 8 * count**0.5 + 16) / blocks)
    while True:
        bound = min(MAX_SEED, int(share * MAX_SEED))
        found = [(hashes[near], start + near) for start, hashes, near in _below(blocks, key, bound)]
        hashes = np.concatenate([part for part, _ in found])
        if hashes.size >= count:
            numbers = np.concatenate([part for _, part in found])
            return numbers[np.argsort(hashes)[:count]]
        share *= 2


def _below(blocks: int, key: int, bound: int) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64]]]:
    """Yield per chunk its first block, its hashes, and the places of those not above the bound."""
    for start in range(0, blocks, _CHUNK):
        numbers = np.arange(start + 1, min(start + _CHUNK, blocks) + 1, dtype=np.uint64)
        hashes = _mixed(numbers * np.uint64(_GOLDEN) + np.uint64(key))
        yield start, hashes, np.flatnonzero(hashes <= np.uint64(bound))


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of SplitMix64; one to one, so different blocks have different hashes."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
