"""Baseline: every value as float32 (FedAvg: McMahan et al., AISTATS 2017, arXiv:1602.05629).

The baseline `client_sampling` is this one with fewer clients per round, which is the way to save bytes that
Thonglek et al. (ICFEC 2022) compare with; `clients_for_bytes` says how many.
"""

from liberatai_core.sparsifier import codec
from liberatai_core.sparsifier.top_k import State
from liberatai_core.structure import Structure, require_length
from liberatai_core.weights import Vector, require_finite


def sparsify(
    state: State,
    difference: Vector,
    structure: Structure,
    density: float,  # noqa: ARG001 - one call shape for all methods
    *,
    seed: int = 0,  # noqa: ARG001
    decay: float = 1.0,  # noqa: ARG001
) -> tuple[State, bytes]:
    """Return the state (only the round counts) and an update with all values; `top_k.densify` reads it.

    Args:
        state: result of `top_k.init`; its residual is not used.
        difference: float32, shape (parameters,).
        structure: the named tensors of the flat vector.
        density: not used.
        seed: not used.
        decay: not used.

    Raises:
        StructureError: the difference does not belong to the structure.
        NonFiniteError: a value is NaN or infinite.
    """
    require_length(difference, structure)
    require_finite(difference, "difference")
    return State(state.residual, state.rounds + 1, state.storage), codec.encode_dense(difference)


def clients_for_bytes(clients: int, update_bytes: float, parameters: int) -> int:
    """Return how many clients with dense updates spend what `clients` with smaller ones do; at least one.

    Args:
        clients: clients per round of the other method.
        update_bytes: mean size of its updates.
        parameters: length of the vector.

    Raises:
        ValueError: an argument is not positive.
    """
    if clients < 1 or not update_bytes > 0 or parameters < 1:
        raise ValueError(f"{clients} clients, {update_bytes} bytes, {parameters} parameters")
    return max(1, int(clients * update_bytes / (4 * parameters)))
