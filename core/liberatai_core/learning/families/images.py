"""Small convolutional networks for images."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from liberatai_core.learning.families.parts import (
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_WIDTH,
    SIDE,
    block,
    halvings,
    integer,
    norm_of,
    only,
    shape,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

if TYPE_CHECKING:
    import torch


def cnn(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """3x3 convolutions, doubling in width where the image halves, then a dense head.

    Params: width (channels of the first stage), layers (convolutions per stage, default 1),
    hidden (units of a dense layer before the last one, default none), norm (group or batch, default group).
    """
    from torch import nn

    channels, height, width = shape(data, 3, "cnn")
    only(params, "cnn", {"width", "layers", "hidden", "norm"})
    out = base = integer(params, "cnn", "width", MAX_WIDTH)
    per_stage = integer(params, "cnn", "layers", MAX_LAYERS, default=1)
    norm = norm_of(params, "cnn")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        for layer in range(1, per_stage + 1):
            convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers |= block(f"{stage}_{layer}", convolution, out, norm)
            channels = out
        out = min(2 * out, 4 * base)
    features = channels * math.prod(sizes[-1])
    layers["flat"] = nn.Flatten()
    if "hidden" in params:
        hidden = integer(params, "cnn", "hidden", MAX_HIDDEN)
        layers |= block("", nn.Linear(features, hidden, bias=False), hidden, norm, name="dense")
        features = hidden
    layers["head"] = nn.Linear(features, data.classes)
    return nn.Sequential(layers)


def ds_cnn(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Depthwise separable convolutions: few parameters and MACs (Howard et al., arXiv:1704.04861).

    The first layer halves the image, as in the paper: most of the cost would be there.

    Params: width (channels of every layer), layers (separable layers per stage, default 1), norm (group or
    batch, default group).
    """
    from torch import nn

    channels, height, width = shape(data, 3, "ds_cnn")
    only(params, "ds_cnn", {"width", "layers", "norm"})
    out = integer(params, "ds_cnn", "width", MAX_WIDTH)
    per_stage = integer(params, "ds_cnn", "layers", MAX_LAYERS, default=1)
    norm = norm_of(params, "ds_cnn")
    stride = 2 if min(height, width) > SIDE else 1
    layers = block("stem", nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False), out, norm)
    height, width = -(-height // stride), -(-width // stride)  # a strided convolution rounds up
    sizes = halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        for layer in range(1, per_stage + 1):
            depthwise = nn.Conv2d(out, out, 3, padding=1, groups=out, bias=False)
            layers |= block(f"deep{stage}_{layer}", depthwise, out, norm)
            layers |= block(f"point{stage}_{layer}", nn.Conv2d(out, out, 1, bias=False), out, norm)
    return with_head(layers, out * math.prod(sizes[-1]), data.classes)
