"""Cross entropy with label smoothing (Szegedy et al., CVPR 2016, arXiv:1512.00567), and log-probabilities."""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.learning.kernels.layer import Array


def log_softmax(logits: Array) -> Array:
    """Return the logarithms of the class probabilities, shape (classes, n) as the logits."""
    shifted: Array = logits - logits.max(axis=0)
    shifted -= np.log(np.exp(shifted).sum(axis=0))
    return shifted


def cross_entropy(logits: Array, labels: NDArray[np.int64], smoothing: float) -> tuple[float, Array]:
    """Return the mean cross entropy of a batch, and its gradient by the logits.

    Args:
        logits: shape (classes, n).
        labels: shape (n,).
        smoothing: share of the target that is spread over all classes.
    """
    classes, n = logits.shape
    logs = log_softmax(logits)
    each = np.arange(n)
    spread = np.float32(smoothing / classes)
    loss = -(1 - smoothing) * float(logs[labels, each].mean())
    if smoothing:
        loss -= float(spread) * float(logs.sum(axis=0).mean())
    gradient = np.exp(logs)
    gradient[labels, each] -= np.float32(1 - smoothing)
    gradient -= spread
    gradient /= np.float32(n)
    return loss, gradient
