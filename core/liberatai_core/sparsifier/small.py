"""Top-k with error feedback in which biases and other small tensors are sent whole, at 4 bits and a sign.

Their few values move in every round and weigh much (Sattler et al., arXiv:1903.02891, and Lin et al.,
arXiv:1712.01887, treat them apart, too). It pays only while they are a small part of what may be sent: where
they would take more than half of it, the update is the plain one of `top_k`.

Stream: u8 6 | u32 bytes of the first part | part over the small tensors' values | part over all parameters.
Both parts are streams of `codec`; the second has zeros where the first speaks.
"""

import numpy as np

from liberatai_core.errors import CodecError
from liberatai_core.sparsifier import codec, support, top_k
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

SMALL = 6
"""First byte; `codec` and `random_k` have the numbers below."""
SMALL_VALUES = 256
"""A tensor with at most this many values is sent whole: biases and norms of layers up to 256 wide. Part of
the format: both ends derive the small tensors from it."""
_HEAD = 5


def small_positions(structure: Structure) -> support.Positions:
    """Return the coordinates of all small tensors; none of them, or all parameters, are possible."""
    runs = [
        np.arange(place.start, place.stop)
        for tensor, place in structure.slices()
        if tensor.size <= SMALL_VALUES
    ]
    return np.concatenate([np.empty(0, np.int64), *runs]).astype(np.int64)


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,  # noqa: ARG001 - one call shape for all methods
    decay: float = 1.0,
) -> tuple[State, bytes]:
    """Return the next state and an update of at most round(density x parameters) values.

    What is sent and the new residual add up to decay * residual + difference (float32), bit for bit.

    Args:
        state: result of `top_k.init` or of the round before.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector; scales are per tensor.
        density: fraction of the parameters to send, small tensors included, in (0, 1].
        seed: not used.
        decay: what an old residual is worth, in [0, 1].

    Raises:
        As `top_k.sparsify`.
    """
    places = small_positions(structure)
    count = round(density * structure.parameters)
    if places.size == 0 or 2 * places.size > count:
        return top_k.sparsify(state, difference, structure, density, decay=decay)
    total = support.accumulated(state, difference, structure, decay)
    part = support.part_of(structure, places)
    kept, first = top_k.sparsify(top_k.init(places.size), total[places], part, 1.0)
    total[places] = 0
    nothing = np.broadcast_to(np.float32(0), total.shape)
    share = (count - places.size) / structure.parameters
    after, second = top_k.sparsify(State(total), nothing, structure, share)
    after.residual[places] = kept.residual
    update = bytes([SMALL]) + len(first).to_bytes(4, "little") + first + second
    return support.stored(State(after.residual, state.rounds + 1, state.storage)), update


def densify(data: bytes, structure: Structure) -> Vector:
    """Return the difference that an update means: float32, shape (parameters,), zero where not sent.

    Raises:
        As `entries`.
    """
    positions, values = entries(data, structure)
    dense = np.zeros(structure.parameters, np.float32)
    dense[positions] = values
    return dense


def entries(data: bytes, structure: Structure) -> tuple[support.Positions, Vector]:
    """Return the positions (int64, strictly increasing) and values (float32) of an update.

    Raises:
        CodecError: not this stream, a structure without small tensors, or parts that overlap.
        LiberataiError: whatever `codec.decode` refuses in a part.
    """
    places = small_positions(structure)
    size = int.from_bytes(data[1:_HEAD], "little")
    if data[:1] != bytes([SMALL]) or size > len(data) - _HEAD or places.size == 0:
        raise CodecError("update with small tensors: wrong first byte, length or structure")
    if {data[_HEAD : _HEAD + 1], data[_HEAD + size : _HEAD + size + 1]} != {bytes([codec.SPARSE])}:
        raise CodecError("update with small tensors: a part that is no sparse stream")
    positions, values = codec.decode(data[_HEAD + size :], structure.parameters)
    if np.isin(positions, places, assume_unique=True).any():
        raise CodecError("update with small tensors: a value stands in both parts")
    inner, others = codec.decode(data[_HEAD : _HEAD + size], places.size)
    positions, values = np.concatenate([positions, places[inner]]), np.concatenate([values, others])
    order = np.argsort(positions, kind="stable")
    return positions[order], values[order]
