"""Baseline: send the plain values above one quantile of the magnitudes (Thonglek et al., ICFEC 2022).

The fraction Q that is not sent is one number per model; what is not sent is forgotten (no error
feedback) and values stay float32. It has the call shape of `top_k`, so both run in one experiment;
`top_k.densify` reads its updates.
"""

import numpy as np

from liberatai_core.sparsifier import codec
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite


def sparsify(state: State, difference: Vector, structure: Structure, density: float) -> tuple[State, bytes]:
    """Return the state (only the round counts) and an update with all values above the quantile.

    Args:
        state: result of `top_k.init`; its residual is not used.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: 1 - Q, in (0, 1].

    Raises:
        StructureError: the difference does not belong to the structure.
        NonFiniteError: a value is NaN or infinite.
        ValueError: density out of range.
    """
    require_length(difference, structure)
    require_finite(difference, "difference")
    if not 0 < density <= 1:
        raise ValueError(f"density {density} must lie in (0, 1]")
    magnitudes = np.abs(difference)
    chosen = np.flatnonzero((magnitudes >= np.quantile(magnitudes, 1 - density)) & (magnitudes > 0))
    update = codec.encode_plain(chosen, difference[chosen], structure.parameters)
    return State(state.residual, state.rounds + 1, state.storage), update
