"""What a layer of a network in numpy is."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Layer(Protocol):
    """Computes and remembers what its own backward pass needs, until the next forward pass."""

    def forward(self, x: Array, *, training: bool) -> Array:
        """Return the output for a batch, the batch on the last axis; without `training` nothing is kept."""
        ...

    def backward(self, dy: Array, *, wanted: bool) -> Array:
        """Write the gradients of the layer's own weights for that of its output; return that of its input.

        Args:
            dy: gradient of the loss by the output of the last forward pass; may be overwritten.
            wanted: whether the returned gradient is used; if not, anything may be returned.
        """
        ...
