"""A module whose parameters are views into one flat tensor: one optimizer step for the whole model.

Small models spend most of a training step in per-tensor overhead; with one flat parameter the
optimizer, clipping and the proximal term are one operation each, and loading and storing is a copy.
Running statistics of batch norms are views into it, too: torch updates them in place in training mode, and
their gradient stays zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from liberatai_core.learning.device import chosen
from liberatai_core.learning.families import (
    FAMILIES,
    build,
    require_buildable,
    require_same,
    require_torch,
)
from liberatai_core.learning.families.torch_state import TORCH_STATE
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class FlatModule:
    """`module` computes with the values of `flat`; its gradients arrive in `gradient` (= `flat.grad`)."""

    module: "torch.nn.Module"
    flat: "torch.nn.Parameter"
    gradient: "torch.Tensor"

    @property
    def device(self) -> "torch.device":
        """Where it computes, and its inputs must be."""
        return self.flat.device

    def weights(self) -> Vector:
        """Return a copy of the current weights."""
        values: Vector = self.flat.detach().cpu().numpy().copy()
        return values


def flat_module(structure: Structure, data: DataContract, weights: Vector) -> FlatModule:
    """Return a module of this structure that holds a copy of these weights.

    Raises:
        StructureError: the weights have another length, or the family builds other tensors.
    """
    require_torch()
    import torch

    require_length(weights, structure)
    device = chosen()
    # Shapes are compared before memory is taken: parameters and tensors may come in one message.
    require_buildable(structure, data)
    if structure.family in FAMILIES:
        module = build(structure.family, structure.params, data, device="meta")
        module.to_empty(device=device)  # all state is overwritten below: random values would only cost time
    else:
        module = build(structure.family, structure.params, data).to(device)
        require_same(structure, module)
    flat = torch.nn.Parameter(torch.from_numpy(np.array(weights, dtype=np.float32)).to(device))
    gradient = torch.zeros_like(flat.data)
    flat.grad = gradient
    state = module.state_dict(keep_vars=True)
    for tensor, place in structure.slices():
        part = state[tensor.name]
        part.data = flat.data[place].view(tensor.shape)
        if isinstance(part, torch.nn.Parameter):
            part.grad = gradient[place].view(tensor.shape)
    return FlatModule(module, flat, gradient)


@contextmanager
def undisturbed(structure: Structure) -> Iterator[None]:
    """Keep other threads out of torch while a structure works that may draw from its one random state.

    What an installed family does nobody knows; built-in ones draw nothing, others from their own generators.
    """
    with nullcontext() if structure.family in FAMILIES else TORCH_STATE:
        yield


@dataclass(slots=True)
class _Before:
    """How torch was before the first of several threads made it reproducible."""

    inside: int = 0
    threads: int = 1
    strict: bool = False
    warn_only: bool = False
    random: "torch.Tensor | None" = None


_BEFORE: Final = _Before()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Run torch on one thread, with deterministic algorithms and its own random state; restore all.

    One thread, because the order of a parallel sum depends on the number of cores. Torch has these settings
    once per process: of several threads that are inside, the last one restores them.
    """
    require_torch()
    import torch

    with TORCH_STATE:
        if not _BEFORE.inside:
            _BEFORE.threads = torch.get_num_threads()
            _BEFORE.strict = torch.are_deterministic_algorithms_enabled()
            _BEFORE.warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            _BEFORE.random = torch.get_rng_state()
        _BEFORE.inside += 1
        own = torch.get_rng_state()
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        with TORCH_STATE:
            _BEFORE.inside -= 1
            torch.set_rng_state(own)
            if not _BEFORE.inside and _BEFORE.random is not None:
                torch.use_deterministic_algorithms(mode=_BEFORE.strict, warn_only=_BEFORE.warn_only)
                torch.set_num_threads(_BEFORE.threads)
                torch.set_rng_state(_BEFORE.random)
