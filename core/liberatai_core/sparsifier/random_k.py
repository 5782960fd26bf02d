"""Baseline: k random coordinates, named by a seed, so that only values travel.

- scaled by parameters / k and without memory: the mean over many devices is unbiased (Konečný et al.,
  "Federated Learning: Strategies for Improving Communication Efficiency", arXiv:1610.05492); `sparsify`
- unscaled with error feedback (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv:1809.07599):
  scaled values would make the memory grow; `sparsify_feedback`

Stream: u8 5 | u32 k | u32 mark of the seed | k x f32, little-endian. k and the seed say the positions:
block size 1 of `support.draw`. With another seed the values would land anywhere, so the mark (upper half of
the seed's hash) is checked. Whether the devices of a round share a seed is the caller's choice.
"""

import numpy as np

from liberatai_core.errors import BombError, CodecError
from liberatai_core.sparsifier import support
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite

RANDOM = 5
"""First byte; `codec` has the numbers below."""
_HEAD = 9


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,
    decay: float = 1.0,  # noqa: ARG001 - one call shape for all methods
) -> tuple[State, bytes]:
    """Return the state (only the round counts) and random values, scaled by parameters / k.

    Args:
        state: result of `top_k.init`; its residual is neither used nor changed.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: fraction of the parameters to send, in (0, 1].
        seed: 0 … 2^64 - 1; the receiver needs the same.
        decay: not used.

    Raises:
        StructureError: the difference does not belong to the structure.
        NonFiniteError: a value is NaN or infinite, or overflows when it is scaled.
        ValueError: density or seed out of range.
    """
    require_length(difference, structure)
    require_finite(difference, "difference")
    positions = support.positions_from_seed(structure, density, seed)
    with np.errstate(over="ignore"):
        values = difference[positions] * np.float32(structure.parameters / positions.size)
    require_finite(values, "scaled difference")
    return State(state.residual, state.rounds + 1, state.storage), _write(values, seed)


def sparsify_feedback(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,
    decay: float = 1.0,
) -> tuple[State, bytes]:
    """Return the next state and random values of decay * residual + difference, unscaled.

    What is sent and the new residual add up to that sum, bit for bit.

    Args:
        state: result of `top_k.init` or of the round before.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: fraction of the parameters to send, in (0, 1].
        seed: 0 … 2^64 - 1; another one in every round, or the same coordinates are sent again.
        decay: what an old residual is worth, in [0, 1].

    Raises:
        StructureError: state or difference do not belong to the structure.
        NonFiniteError: a value is NaN or infinite, or the sum overflows.
        ValueError: density, seed or decay out of range.
    """
    total = support.accumulated(state, difference, structure, decay)
    positions = support.positions_from_seed(structure, density, seed)
    update = _write(total[positions], seed)
    total[positions] = 0
    return support.stored(State(total, state.rounds + 1, state.storage)), update


def densify(data: bytes, structure: Structure, seed: int) -> Vector:
    """Return the difference that an update means: float32, shape (parameters,), zero where not sent.

    Raises:
        As `entries`.
    """
    positions, values = entries(data, structure, seed)
    dense = np.zeros(structure.parameters, np.float32)
    dense[positions] = values
    return dense


def entries(data: bytes, structure: Structure, seed: int) -> tuple[support.Positions, Vector]:
    """Return the positions (int64, strictly increasing) and values (float32) of an update.

    Raises:
        CodecError: not this stream, a broken one, no value, or made with another seed.
        BombError: more values than parameters.
        NonFiniteError: a value is NaN or infinite.
        ValueError: the seed is out of range.
    """
    if data[:1] != bytes([RANDOM]) or len(data) < _HEAD:
        raise CodecError("random update: wrong first byte or truncated")
    count = int.from_bytes(data[1:5], "little")
    if count > structure.parameters:
        raise BombError(f"random update: {count} values for {structure.parameters} parameters")
    if count == 0 or len(data) != _HEAD + 4 * count:
        raise CodecError(f"random update: {len(data)} bytes for {count} values")
    if data[5:_HEAD] != _mark(seed):
        raise CodecError("random update: made with another seed")
    values = np.frombuffer(data, "<f4", offset=_HEAD).astype(np.float32)
    require_finite(values, "random update")
    return support.draw(structure.parameters, count, seed), values


def _write(values: Vector, seed: int) -> bytes:
    head = bytes([RANDOM]) + values.size.to_bytes(4, "little") + _mark(seed)
    return head + values.astype("<f4").tobytes()


def _mark(seed: int) -> bytes:
    return (support.seed_hash(seed) >> 32).to_bytes(4, "little")
