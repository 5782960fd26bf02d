"""Steps of descent over one flat vector, with torch's formulas."""

from collections.abc import Callable

import numpy as np

from liberatai_core.weights import Vector

CLIP_EPSILON = 1e-6
"""Torch's, of the norm that gradients are divided by."""
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8

Step = Callable[[Vector, Vector], None]
"""Changes weights in place by a gradient, which it may overwrite."""


def clip(gradient: Vector, limit: float) -> None:
    """Shorten a gradient in place to a norm."""
    norm = float(np.sqrt(np.dot(gradient, gradient, out=None)))
    factor = limit / (norm + CLIP_EPSILON)
    if factor < 1:
        gradient *= np.float32(factor)


def sgd(parameters: int, rate: float, momentum: float, weight_decay: float) -> Step:
    """Return stochastic gradient descent with momentum."""
    velocity = np.zeros(parameters, np.float32)

    def step(weights: Vector, gradient: Vector) -> None:
        if weight_decay:
            gradient += np.float32(weight_decay) * weights
        if momentum:
            np.multiply(velocity, np.float32(momentum), out=velocity)
            np.add(velocity, gradient, out=velocity)
            np.multiply(velocity, np.float32(rate), out=gradient)
        else:
            gradient *= np.float32(rate)
        weights -= gradient

    return step


def adam(parameters: int, rate: float, weight_decay: float) -> Step:
    """Return Adam: Kingma & Ba, ICLR 2015, arXiv:1412.6980."""
    first, second = np.zeros(parameters, np.float32), np.zeros(parameters, np.float32)
    done = 0

    def step(weights: Vector, gradient: Vector) -> None:
        nonlocal done
        done += 1
        if weight_decay:
            gradient += np.float32(weight_decay) * weights
        for moment, beta, value in zip(
            (first, second), ADAM_BETAS, (gradient, gradient * gradient), strict=True
        ):
            np.multiply(moment, np.float32(beta), out=moment)
            np.add(moment, np.float32(1 - beta) * value, out=moment)
        deviation = np.sqrt(second)
        deviation /= np.float32(np.sqrt(1 - ADAM_BETAS[1] ** done))
        deviation += np.float32(ADAM_EPSILON)
        np.divide(first, deviation, out=deviation)
        deviation *= np.float32(rate / (1 - ADAM_BETAS[0] ** done))
        weights -= deviation

    return step
