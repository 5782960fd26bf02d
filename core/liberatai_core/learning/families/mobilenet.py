"""MobileNetV2: Sandler et al., "Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from liberatai_core.learning.families.parts import (
    Norm,
    integer,
    norm_of,
    normed,
    only,
    shape,
    start_as_he,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

if TYPE_CHECKING:
    import torch

PERCENT = 100
MAX_PERCENT = 400
"""Sixteen times the paper's parameters, 36 million: more than any of its applications."""
MULTIPLE = 8
"""Channels are rounded to a multiple of this, as in the authors' code."""
LARGE = 64
"""Sides above this are halved five times as for ImageNet, others three times as is usual for CIFAR."""
STEM, LAST = 32, 1280
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Table 2: expansion, output channels, blocks, stride of the first block."""


def mobilenet(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Inverted residuals: wide depthwise convolutions between narrow maps, which alone are added up.

    The width multiplier also applies to the last convolution, which the paper keeps at 1280 for its 1000
    classes. The last norm of a residual branch starts at zero, as in `resnet`.

    Params: width (percent of the paper's channels, default 100), norm (group or batch, default group).
    """
    from torch import nn

    channels, height, width = shape(data, 3, "mobilenet")
    only(params, "mobilenet", {"width", "norm"})
    percent = integer(params, "mobilenet", "width", MAX_PERCENT, PERCENT)
    norm = norm_of(params, "mobilenet")
    large = max(height, width) > LARGE
    out = _scaled(STEM, percent)
    stem = nn.Conv2d(channels, out, 3, stride=2 if large else 1, padding=1, bias=False)
    layers = _block6("0", stem, out, norm)
    channels = out
    for stage, (expansion, paper_width, blocks, stage_stride) in enumerate(STAGES, start=1):
        out = _scaled(paper_width, percent)
        for number in range(1, blocks + 1):
            first = number == 1
            stride = stage_stride if first and (large or stage > 2) else 1
            layers[f"block{stage}_{number}"] = _inverted(channels, out, expansion, stride, norm, first=first)
            channels = out
    last = _scaled(LAST, percent)
    layers |= _block6("9", nn.Conv2d(channels, last, 1, bias=False), last, norm)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    return start_as_he(with_head(layers, last, data.classes))


def _inverted(
    channels: int, out: int, expansion: int, stride: int, norm: Norm, *, first: bool
) -> "torch.nn.Module":
    from torch import nn

    from liberatai_core.learning.families.modules import Residual

    inner = channels * expansion
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if expansion > 1:
        layers |= _block6("1", nn.Conv2d(channels, inner, 1, bias=False), inner, norm)
    deep = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
    layers |= _block6("2", deep, inner, norm)
    layers |= normed("3", nn.Conv2d(inner, out, 1, bias=False), out, norm)
    if first:  # by place, not by equal widths: members of one family keep one set of shortcuts and names
        return nn.Sequential(layers)
    last = next(reversed(layers.values()))
    if isinstance(last.weight, nn.Parameter):
        nn.init.zeros_(last.weight)
    return Residual(nn.Sequential(layers), nn.Identity(), nn.Identity())


def _block6(
    suffix: str, layer: "torch.nn.Module", channels: int, norm: Norm
) -> "OrderedDict[str, torch.nn.Module]":
    from torch import nn

    layers = normed(suffix, layer, channels, norm)
    layers[f"relu{suffix}"] = nn.ReLU6()
    return layers


def _scaled(channels: int, percent: int) -> int:
    """Return the nearest multiple of 8, at least 8, and not below nine tenths of the exact value."""
    exact = channels * percent / 100
    near = max(MULTIPLE, int(exact + MULTIPLE / 2) // MULTIPLE * MULTIPLE)
    return near + MULTIPLE if near < 0.9 * exact else near
