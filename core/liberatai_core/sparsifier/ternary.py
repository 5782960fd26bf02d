"""Baseline: sparse ternary compression without its error feedback (Sattler et al., arXiv:1903.02891).

It shows what the residual is worth: same choice, same bytes, but what was not sent is forgotten.
"""

import numpy as np

from liberatai_core.sparsifier import top_k
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,  # noqa: ARG001 - one call shape for all methods
    decay: float = 1.0,  # noqa: ARG001
) -> tuple[State, bytes]:
    """Return the state (only the round counts) and a ternary update; `top_k.densify` reads it.

    Args:
        state: result of `top_k.init`; its residual is neither used nor changed.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: fraction of the parameters to send, in (0, 1].
        seed: not used.
        decay: not used.

    Raises:
        As `top_k.sparsify`.
    """
    fresh = State(np.zeros(difference.shape, np.float32))
    _, update = top_k.sparsify(fresh, difference, structure, density, levels=1)
    return State(state.residual, state.rounds + 1, state.storage), update
