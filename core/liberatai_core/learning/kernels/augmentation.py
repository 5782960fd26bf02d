"""Changes of inputs in numpy: what `learning/augmentation.py` says, with other draws of the same kind."""

import numpy as np
from numpy.typing import NDArray

from liberatai_core.learning.augmentation import NOISE, ROTATION, SCALE, SHEAR, SHIFT

Batch = NDArray[np.float32]


def augment(x: Batch, strength: float, random: np.random.Generator) -> Batch:
    """Return changed copies of the inputs, shape as given (n, *input_shape); strength 0 returns `x`."""
    if strength == 0:
        return x
    if x.ndim == 4:
        x = affine(x, matrices(len(x), strength, random))
    else:
        amplitude = 1 + SCALE * strength * random.standard_normal((len(x), *(1,) * (x.ndim - 1)), np.float32)
        if x.ndim == 3:
            reach = strength * x.shape[-1] * SHIFT / 2
            x = shifted(x, np.rint(random.standard_normal(len(x)) * reach).astype(np.int64))
        x = x * amplitude.astype(np.float32)
    noise = random.standard_normal(x.shape, np.float32)
    noise *= np.float32(NOISE * strength * float(x.std()))
    noise += x
    return noise


def matrices(count: int, strength: float, random: np.random.Generator) -> Batch:
    """Return random affine maps of the plane, shape (count, 2, 3)."""
    angle, log_x, log_y, shear, shift_x, shift_y = strength * random.standard_normal((6, count))
    cos, sin = np.cos(ROTATION * angle), np.sin(ROTATION * angle)
    scale_x, scale_y = np.exp(SCALE * log_x), np.exp(SCALE * log_y)
    first = np.stack([scale_x * cos, -scale_y * sin + SHEAR * shear, SHIFT * shift_x], axis=1)
    second = np.stack([scale_x * sin, scale_y * cos, SHIFT * shift_y], axis=1)
    return np.stack([first, second], axis=1).astype(np.float32)


def affine(x: Batch, maps: Batch) -> Batch:
    """Return images seen through affine maps: bilinear, 0 outside.

    Args:
        x: shape (n, channels, height, width).
        maps: shape (n, 2, 3); the grid's sides have length 2, its middle is 0.
    """
    count, channels, height, width = x.shape
    across = (2 * np.arange(width, dtype=np.float32) + 1) / np.float32(width) - 1
    down = (2 * np.arange(height, dtype=np.float32) + 1) / np.float32(height) - 1
    grid = np.stack([np.tile(across, height), np.repeat(down, width), np.ones(height * width, np.float32)])
    places = maps @ grid
    column = ((places[:, 0] + 1) * np.float32(width) - 1) / 2
    row = ((places[:, 1] + 1) * np.float32(height) - 1) / 2
    # A border of zeros, and every place outside it moved onto it.
    padded = np.zeros((count, channels, height + 2, width + 2), np.float32)
    padded[:, :, 1:-1, 1:-1] = x
    flat = padded.reshape(count, channels, -1)
    left, top = np.floor(column), np.floor(row)
    right_share, bottom_share = column - left, row - top
    out = np.zeros((count, channels, height * width), np.float32)
    for step_down, share_down in ((0, 1 - bottom_share), (1, bottom_share)):
        for step_right, share_right in ((0, 1 - right_share), (1, right_share)):
            rows = np.clip(top + step_down + 1, 0, height + 1).astype(np.int64)
            columns = np.clip(left + step_right + 1, 0, width + 1).astype(np.int64)
            values = np.take_along_axis(flat, (rows * (width + 2) + columns)[:, None], axis=2)
            out += values * (share_down * share_right)[:, None]
    return out.reshape(x.shape)


def shifted(x: Batch, steps: NDArray[np.int64]) -> Batch:
    """Return signals (n, channels, length) moved by whole positions; the edge value is repeated."""
    length = x.shape[-1]
    places = np.clip(np.arange(length) - steps[:, None], 0, length - 1)
    return np.take_along_axis(x, places[:, None], axis=2)
