"""Label-preserving changes of inputs, for training on few samples and for distillation.

Images (channel, height, width): a random affine map per sample (rotation, scale, shear, shift; Simard et
al., "Best Practices for Convolutional Neural Networks", ICDAR 2003). Signals (channel, length): a
random shift and amplitude. Vectors: an amplitude. All: Gaussian noise. `strength` 1 means rotations of about
10 degrees, 10 % of scale and shifts of about 1/16 of the side: what a person would still read.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROTATION = math.radians(10)
SCALE = 0.10
SHEAR = 0.10
SHIFT = 1 / 8
"""Standard deviation of the shift in the grid's units, where the whole side has length 2."""
REACH = 0.1
"""Share of the side by which whole images move."""
NOISE = 0.03
"""Standard deviation of the noise as a share of the batch's standard deviation."""


def augment(x: "torch.Tensor", strength: float, generator: "torch.Generator") -> "torch.Tensor":
    """Return changed copies of the inputs, shape as given (n, *input_shape); strength 0 returns `x`."""
    import torch

    if strength == 0:
        return x
    if x.dim() == 4:
        x = _affine(x, strength, generator)
    else:
        amplitude = 1 + SCALE * strength * torch.randn((len(x),) + (1,) * (x.dim() - 1), generator=generator)
        x = (_shifted(x, strength, generator) if x.dim() == 3 else x) * amplitude
    noise: torch.Tensor = torch.randn(x.shape, generator=generator)
    return x + noise * (NOISE * strength * float(x.std(correction=0)))


def _affine(x: "torch.Tensor", strength: float, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    angle, log_x, log_y, shear, shift_x, shift_y = strength * torch.randn((6, len(x)), generator=generator)
    cos, sin = torch.cos(ROTATION * angle), torch.sin(ROTATION * angle)
    scale_x, scale_y = torch.exp(SCALE * log_x), torch.exp(SCALE * log_y)
    first = torch.stack([scale_x * cos, -scale_y * sin + SHEAR * shear, SHIFT * shift_x], dim=1)
    second = torch.stack([scale_x * sin, scale_y * cos, SHIFT * shift_y], dim=1)
    grid = torch.nn.functional.affine_grid(
        torch.stack([first, second], dim=1), list(x.shape), align_corners=False
    )
    moved: torch.Tensor = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    return moved


def _shifted(x: "torch.Tensor", strength: float, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    length = x.shape[-1]
    steps = torch.round(
        torch.randn((len(x), 1), generator=generator) * (strength * length * SHIFT / 2)
    ).long()
    # Repeats the edge value instead of wrapping round: a wrap would put an edge into the middle.
    place = (torch.arange(length) - steps).clamp(0, length - 1)
    moved: torch.Tensor = x.gather(-1, place[:, None, :].expand_as(x))
    return moved


def shift_images(x: "torch.Tensor", strength: float, generator: "torch.Generator") -> "torch.Tensor":
    """Return images (n, channel, height, width) moved by whole pixels; the edge is repeated.

    Strength 1 means up to a tenth of the side in either direction, at least one pixel. Nothing is blurred,
    unlike `augment`: what comes out is as sharp as what a model was trained on.
    """
    import torch

    if strength == 0:
        return x
    count, channels, height, width = x.shape
    rows, columns = (
        _moved_places(count, side, max(1, round(strength * side * REACH)), generator)
        for side in (height, width)
    )
    every = torch.arange(count)[:, None, None, None]
    return x[every, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def mirror_images(x: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """Return images, each mirrored left to right with probability one half."""
    import torch

    chosen = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def _moved_places(count: int, side: int, reach: int, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    steps = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return (torch.arange(side) + steps).clamp(0, side - 1)
