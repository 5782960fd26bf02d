"""MobileNetV2: Sandler et al., "Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381."""

from collections.abc import Mapping

from liberatai_core.learning.families.layers import (
    Convolution,
    Mean,
    Network,
    NormKind,
    Residual,
    Sequence,
)
from liberatai_core.learning.families.parts import (
    Layers,
    block,
    integer,
    norm_of,
    normed,
    only,
    sequence,
    shape,
    square,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

PERCENT = 100
MAX_PERCENT = 400
"""Sixteen times the paper's parameters, 36 million: more than any of its applications."""
MULTIPLE = 8
"""Channels are rounded to a multiple of this, as in the authors' code."""
LARGE = 64
"""Sides above this are halved five times as for ImageNet, others three times as is usual for CIFAR."""
STEM, LAST = 32, 1280
CUT = 6.0
"""Where its ReLUs cut off, so that eight bits are enough."""
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


def mobilenet(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Inverted residuals: wide depthwise convolutions between narrow maps, which alone are added up.

    The width multiplier also applies to the last convolution, which the paper keeps at 1280 for its 1000
    classes. The last norm of a residual branch starts at zero, as in `resnet`.

    Params: width (percent of the paper's channels, default 100), norm (group or batch, default group).
    """
    channels, height, width = shape(data, 3, "mobilenet")
    only(params, "mobilenet", {"width", "norm"})
    percent = integer(params, "mobilenet", "width", MAX_PERCENT, PERCENT)
    norm = norm_of(params, "mobilenet")
    large = max(height, width) > LARGE
    out = _scaled(STEM, percent)
    layers = _block6("0", square(channels, out, 3, stride=2 if large else 1), norm)
    channels = out
    for stage, (expansion, paper_width, blocks, stage_stride) in enumerate(STAGES, start=1):
        out = _scaled(paper_width, percent)
        for number in range(1, blocks + 1):
            first = number == 1
            stride = stage_stride if first and (large or stage > 2) else 1
            layers[f"block{stage}_{number}"] = _inverted(channels, out, expansion, stride, norm, first=first)
            channels = out
    last = _scaled(LAST, percent)
    layers |= _block6("9", square(channels, last, 1), norm)
    layers["mean"] = Mean()
    return with_head(layers, last, data.classes, he=1.0)


def _inverted(
    channels: int, out: int, expansion: int, stride: int, norm: NormKind, *, first: bool
) -> Sequence | Residual:
    inner = channels * expansion
    layers: Layers = _block6("1", square(channels, inner, 1), norm) if expansion > 1 else {}
    layers |= _block6("2", square(inner, inner, 3, stride=stride, groups=inner), norm)
    layers |= normed("3", square(inner, out, 1), norm)
    if first:  # by place, not by equal widths: members of one family keep one set of shortcuts and names
        return sequence(layers)
    return Residual(sequence(layers), Sequence(), relu=False)


def _block6(suffix: str, layer: Convolution, norm: NormKind) -> Layers:
    return block(suffix, layer, norm, limit=CUT)


def _scaled(channels: int, percent: int) -> int:
    """Return the nearest multiple of 8, at least 8, and not below nine tenths of the exact value."""
    exact = channels * percent / 100
    near = max(MULTIPLE, int(exact + MULTIPLE / 2) // MULTIPLE * MULTIPLE)
    return near + MULTIPLE if near < 0.9 * exact else near
