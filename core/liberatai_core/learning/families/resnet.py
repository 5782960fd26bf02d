"""ResNet: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liberatai_core.learning.families.parts import (
    MAX_WIDTH,
    Norm,
    block,
    integer,
    norm_of,
    normed,
    one_of,
    only,
    shape,
    start_as_he,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

if TYPE_CHECKING:
    import torch

LARGE = 64
"""Sides up to this keep their resolution in the stem, as for CIFAR; larger ones are quartered, as for
ImageNet."""
EXPANSION = 4
"""A bottleneck's output channels per inner channel."""


DEPTH = 20


@dataclass(frozen=True, slots=True)
class _Plan:
    """Blocks of each stage, channels of the first one in the paper, and the kind of block."""

    blocks: tuple[int, ...]
    width: int
    bottleneck: bool = False


PLANS = {
    20: _Plan((3, 3, 3), 16),
    32: _Plan((5, 5, 5), 16),
    44: _Plan((7, 7, 7), 16),
    56: _Plan((9, 9, 9), 16),
    18: _Plan((2, 2, 2, 2), 64),
    34: _Plan((3, 4, 6, 3), 64),
    50: _Plan((3, 4, 6, 3), 64, bottleneck=True),
}
"""Depth -> stages: 6n+2 for CIFAR (section 4.2), 18, 34 and 50 for ImageNet (table 1)."""


def resnet(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Stages of residual blocks, each after the first halving the image and doubling the width.

    Where the shape changes, the shortcut is a 1x1 convolution (the paper's option B). A bottleneck halves
    in its 3x3 convolution. The last norm of a block starts at zero, so that a new model is shallow (Goyal
    et al., arXiv:1706.02677, section 5.1). The head sees the mean over all positions.

    Params: depth (20, 32, 44, 56 in three stages; 18, 34, 50 in four; default 20), width (channels of the
    first stage; default 16 for three stages, 64 for four), norm (group or batch, default group).
    """
    from torch import nn

    channels, height, width = shape(data, 3, "resnet")
    only(params, "resnet", {"depth", "width", "norm"})
    plan = PLANS[one_of(params, "resnet", "depth", tuple(PLANS), DEPTH)]
    base = integer(params, "resnet", "width", MAX_WIDTH, plan.width)
    norm = norm_of(params, "resnet")
    layers: OrderedDict[str, nn.Module]
    if max(height, width) <= LARGE:
        layers = block("0", nn.Conv2d(channels, base, 3, padding=1, bias=False), base, norm)
    else:
        layers = block("0", nn.Conv2d(channels, base, 7, stride=2, padding=3, bias=False), base, norm)
        layers["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = base
    for stage, blocks in enumerate(plan.blocks, start=1):
        inner = base * 2 ** (stage - 1)
        out = inner * EXPANSION if plan.bottleneck else inner
        for number in range(1, blocks + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            branch = (_bottleneck if plan.bottleneck else _basic)(channels, inner, stride, norm)
            layers[f"block{stage}_{number}"] = _residual(branch, channels, out, stride, norm)
            channels = out
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    return start_as_he(with_head(layers, channels, data.classes))


def _basic(channels: int, out: int, stride: int, norm: Norm) -> "OrderedDict[str, torch.nn.Module]":
    from torch import nn

    first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    second = nn.Conv2d(out, out, 3, padding=1, bias=False)
    return OrderedDict(**block("1", first, out, norm), **normed("2", second, out, norm))


def _bottleneck(channels: int, inner: int, stride: int, norm: Norm) -> "OrderedDict[str, torch.nn.Module]":
    from torch import nn

    out = inner * EXPANSION
    middle = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
    return OrderedDict(
        **block("1", nn.Conv2d(channels, inner, 1, bias=False), inner, norm),
        **block("2", middle, inner, norm),
        **normed("3", nn.Conv2d(inner, out, 1, bias=False), out, norm),
    )


def _residual(
    branch: "OrderedDict[str, torch.nn.Module]", channels: int, out: int, stride: int, norm: Norm
) -> "torch.nn.Module":
    from torch import nn

    from liberatai_core.learning.families.modules import Residual

    last = next(reversed(branch.values()))
    if isinstance(last.weight, nn.Parameter):
        nn.init.zeros_(last.weight)
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(
            normed("", nn.Conv2d(channels, out, 1, stride=stride, bias=False), out, norm)
        )
    return Residual(nn.Sequential(branch), shortcut, nn.ReLU())
