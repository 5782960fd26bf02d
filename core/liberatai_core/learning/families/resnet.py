"""ResNet: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385."""

from collections.abc import Mapping
from dataclasses import dataclass

from liberatai_core.learning.families.layers import MaxPool, Mean, Network, NormKind, Residual, Sequence
from liberatai_core.learning.families.parts import (
    MAX_WIDTH,
    Layers,
    block,
    integer,
    norm_of,
    normed,
    one_of,
    only,
    sequence,
    shape,
    square,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

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


def resnet(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Stages of residual blocks, each after the first halving the image and doubling the width.

    Where the shape changes, the shortcut is a 1x1 convolution (the paper's option B). A bottleneck halves
    in its 3x3 convolution. The last norm of a block starts at zero, so that a new model is shallow (Goyal
    et al., arXiv:1706.02677, section 5.1). The head sees the mean over all positions.

    Params: depth (20, 32, 44, 56 in three stages; 18, 34, 50 in four; default 20), width (channels of the
    first stage; default 16 for three stages, 64 for four), norm (group or batch, default group).
    """
    channels, height, width = shape(data, 3, "resnet")
    only(params, "resnet", {"depth", "width", "norm"})
    plan = PLANS[one_of(params, "resnet", "depth", tuple(PLANS), DEPTH)]
    base = integer(params, "resnet", "width", MAX_WIDTH, plan.width)
    norm = norm_of(params, "resnet")
    if max(height, width) <= LARGE:
        layers = block("0", square(channels, base, 3), norm)
    else:
        layers = block("0", square(channels, base, 7, stride=2), norm)
        layers["pool0"] = MaxPool(3, stride=2, padding=1)
    channels = base
    for stage, blocks in enumerate(plan.blocks, start=1):
        inner = base * 2 ** (stage - 1)
        out = inner * EXPANSION if plan.bottleneck else inner
        for number in range(1, blocks + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            branch = (_bottleneck if plan.bottleneck else _basic)(channels, inner, stride, norm)
            layers[f"block{stage}_{number}"] = _residual(branch, channels, out, stride, norm)
            channels = out
    layers["mean"] = Mean()
    return with_head(layers, channels, data.classes, he=1.0)


def _basic(channels: int, out: int, stride: int, norm: NormKind) -> Layers:
    first = block("1", square(channels, out, 3, stride=stride), norm)
    return first | normed("2", square(out, out, 3), norm)


def _bottleneck(channels: int, inner: int, stride: int, norm: NormKind) -> Layers:
    return {
        **block("1", square(channels, inner, 1), norm),
        **block("2", square(inner, inner, 3, stride=stride), norm),
        **normed("3", square(inner, inner * EXPANSION, 1), norm),
    }


def _residual(branch: Layers, channels: int, out: int, stride: int, norm: NormKind) -> Residual:
    shortcut = Sequence()
    if stride != 1 or channels != out:
        shortcut = sequence(normed("", square(channels, out, 1, stride=stride), norm))
    return Residual(sequence(branch), shortcut, relu=True)
