"""The sparse methods by name, in one call shape: (state, difference) -> (state, bytes) -> difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import CodecError, LiberataiError
from liberatai_core.sparsifier import codec, dense, quantile, random_k, small, ternary, top_k
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector


class Sparsify(Protocol):
    """(state, difference, structure, density, seed, decay) -> (next state, update)."""

    def __call__(
        self,
        state: State,
        difference: Vector,
        structure: Structure,
        density: float,
        *,
        seed: int = 0,
        decay: float = 1.0,
    ) -> tuple[State, bytes]:
        """Return the next state and the update of one round; see the method's module for what may be raised.

        Args:
            state: result of `top_k.init` or of the round before.
            difference: float32, shape (parameters,): trained weights minus base version.
            structure: the named tensors of the flat vector.
            density: fraction of the parameters to send, in (0, 1].
            seed: 0 … 2^64 - 1, for methods that draw; `densify` needs the same.
            decay: what an old residual is worth, in [0, 1] (`schedule.decay`), for methods with feedback.
        """


@dataclass(frozen=True, slots=True)
class Method:
    """One way to send a difference.

    Attributes:
        sparsify: see `Sparsify`.
        streams: first bytes of the updates that it makes; a receiver refuses all others.
        feedback: whether what is not sent is kept and sent later.
        rule: name of the server's rule in `aggregator.mean.RULES`.
        whole_downlink: the server sends the whole model as float32, as plain averaging does.
    """

    sparsify: Sparsify
    streams: tuple[int, ...]
    feedback: bool
    rule: str = "mean"
    whole_downlink: bool = False


def _topk(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,  # noqa: ARG001 - one call shape for all methods
    decay: float = 1.0,
) -> tuple[State, bytes]:
    return top_k.sparsify(state, difference, structure, density, decay=decay)


METHODS: dict[str, Method] = {
    "topk": Method(_topk, (codec.SPARSE,), feedback=True),
    "topk_small_dense": Method(small.sparsify, (codec.SPARSE, small.SMALL), feedback=True),
    "dense": Method(dense.sparsify, (codec.DENSE,), feedback=False, whole_downlink=True),
    # Dense updates of fewer clients per round: `dense.clients_for_bytes` says how many.
    "client_sampling": Method(dense.sparsify, (codec.DENSE,), feedback=False, whole_downlink=True),
    "quantile": Method(quantile.sparsify, (codec.PLAIN,), feedback=False, whole_downlink=True),
    "quantile_over_senders": Method(
        quantile.sparsify, (codec.PLAIN,), feedback=False, rule="mean_over_senders", whole_downlink=True
    ),
    "random_k": Method(random_k.sparsify, (random_k.RANDOM,), feedback=False),
    "random_k_feedback": Method(random_k.sparsify_feedback, (random_k.RANDOM,), feedback=True),
    "ternary_no_feedback": Method(ternary.sparsify, (codec.SPARSE,), feedback=False),
}
"""By name, as a job chooses them. `quantile` counts what a client did not send as zero."""

DEFAULT = "topk"


def require_stream(name: str, data: bytes) -> None:
    """Refuse an update that the named method does not make, by its first byte.

    Raises:
        CodecError: no such method, an empty update, or another method's.
    """
    if name not in METHODS or not data or data[0] not in METHODS[name].streams:
        raise CodecError(f"{name[:32]}: update starts with {data[:1].hex() or 'nothing'}")


def densify(data: bytes, structure: Structure, seed: int = 0) -> Vector:
    """Return the difference that any method's update means: float32, shape (parameters,).

    Args:
        data: the update.
        structure: the named tensors of the flat vector.
        seed: the one given to `sparsify`; only updates without positions need it.

    Raises:
        LiberataiError: the update is broken or of another structure.
    """
    positions, values = entries(data, structure, seed)
    difference = np.zeros(structure.parameters, np.float32)
    difference[positions] = values
    return difference


def entries(data: bytes, structure: Structure, seed: int = 0) -> tuple[NDArray[np.int64], Vector]:
    """Return what any method's update says: positions (int64, strictly increasing) and values (float32).

    Args:
        data: the update.
        structure: the named tensors of the flat vector.
        seed: the one given to `sparsify`; only updates without positions need it.

    Raises:
        LiberataiError: the update is broken or of another structure.
    """
    if data[:1] == bytes([random_k.RANDOM]):
        return random_k.entries(data, structure, seed)
    if data[:1] == bytes([small.SMALL]):
        return small.entries(data, structure)
    return codec.decode(data, structure.parameters)


def entries_all(updates: Sequence[tuple[bytes, Structure, int]]) -> list[codec.Entries | LiberataiError]:
    """Return for each (data, structure, seed) what `entries` returns or raises, positions as int32.

    No update depends on another; many of one structure together take a fraction of the time.
    """
    streams = [
        (place, data, structure.parameters)
        for place, (data, structure, _) in enumerate(updates)
        if data[:1] not in _OWN_STREAMS
    ]
    decoded = codec.decode_all([(data, parameters) for _, data, parameters in streams])
    by_place = dict(zip((place for place, _, _ in streams), decoded, strict=True))
    return [by_place[place] if place in by_place else _one(*update) for place, update in enumerate(updates)]


_OWN_STREAMS = {bytes([random_k.RANDOM]), bytes([small.SMALL])}


def _one(data: bytes, structure: Structure, seed: int) -> codec.Entries | LiberataiError:
    try:
        positions, values = entries(data, structure, seed)
    except LiberataiError as error:
        return error.with_traceback(None)
    return positions.astype(np.int32), values
