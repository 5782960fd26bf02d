"""A module whose parameters are views into one flat tensor: one optimizer step for the whole model.

Small models spend most of a training step in per-tensor overhead; with one flat parameter the
optimizer, clipping and the proximal term are one operation each, and loading and storing is a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liberatai_core.learning.families import build, require_same, require_torch
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

    def weights(self) -> Vector:
        """Return a copy of the current weights."""
        values: Vector = self.flat.detach().numpy().copy()
        return values


def flat_module(structure: Structure, data: DataContract, weights: Vector) -> FlatModule:
    """Return a module of this structure that holds a copy of these weights.

    Raises:
        StructureError: the weights have another length, or the family builds other tensors.
    """
    require_torch()
    import torch

    require_length(weights, structure)
    module = build(structure.family, structure.params, data)
    require_same(structure, module)
    flat = torch.nn.Parameter(torch.from_numpy(np.array(weights, dtype=np.float32)))
    gradient = torch.zeros_like(flat.data)
    flat.grad = gradient
    for parameter, (tensor, place) in zip(module.parameters(), structure.slices(), strict=True):
        parameter.data = flat.data[place].view(tensor.shape)
        parameter.grad = gradient[place].view(tensor.shape)
    return FlatModule(module, flat, gradient)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Run torch on one thread, with deterministic algorithms and its own random state; restore all.

    One thread, because the order of a parallel sum depends on the number of cores.
    """
    require_torch()
    import torch

    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(mode=strict, warn_only=warn_only)
        torch.set_num_threads(threads)
