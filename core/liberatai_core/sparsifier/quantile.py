"""Baseline: send the plain values above one quantile of the magnitudes (Thonglek et al., ICFEC 2022).

The fraction Q that is not sent is one number per model; what is not sent is forgotten (no error
feedback) and values stay float32. `top_k.densify` reads its updates.

The paper's saving counts values only (`values_only_bytes`), 4 bytes each; the real update has positions,
too, 8 bytes per value. It leaves open what a coordinate counts that only some clients sent: the rules
`mean` (zero) and `mean_over_senders` of `aggregator.mean` are the two readings.
"""

import numpy as np

from liberatai_core.sparsifier import codec, top_k
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,
    *,
    seed: int = 0,  # noqa: ARG001 - one call shape for all methods
    decay: float = 1.0,  # noqa: ARG001
) -> tuple[State, bytes]:
    """Return the state (only the round counts) and an update with all values above the quantile.

    Args:
        state: result of `top_k.init`; its residual is not used.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: 1 - Q, in (0, 1].
        seed: not used.
        decay: not used.

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


def values_only_bytes(data: bytes, structure: Structure) -> int:
    """Return what the paper counts for an update: 4 bytes per value, nothing for its position.

    Raises:
        LiberataiError: whatever `codec.decode` refuses.
    """
    return 4 * int(np.count_nonzero(top_k.densify(data, structure)))
