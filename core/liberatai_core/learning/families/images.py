"""Small convolutional networks for images."""

import math
from collections.abc import Mapping

from liberatai_core.learning.families.layers import Flatten, MaxPool, Network
from liberatai_core.learning.families.parts import (
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_WIDTH,
    SIDE,
    Layers,
    block,
    dense,
    dense_head,
    halvings,
    integer,
    norm_of,
    only,
    shape,
    square,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter


def cnn(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """3x3 convolutions, doubling in width where the image halves, then a dense head.

    Params: width (channels of the first stage), layers (convolutions per stage, default 1),
    hidden (units of a dense layer before the last one, default none), norm (group or batch, default group).
    """
    channels, height, width = shape(data, 3, "cnn")
    only(params, "cnn", {"width", "layers", "hidden", "norm"})
    out = base = integer(params, "cnn", "width", MAX_WIDTH)
    per_stage = integer(params, "cnn", "layers", MAX_LAYERS, default=1)
    norm = norm_of(params, "cnn")
    layers: Layers = {}
    sizes = halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = MaxPool()
        for layer in range(1, per_stage + 1):
            layers |= block(f"{stage}_{layer}", square(channels, out, 3), norm)
            channels = out
        out = min(2 * out, 4 * base)
    features = channels * math.prod(sizes[-1])
    if "hidden" in params:
        hidden = integer(params, "cnn", "hidden", MAX_HIDDEN)
        layers |= {"flat": Flatten(), **block("", dense(features, hidden), norm, name="dense")}
        return dense_head(layers, hidden, data.classes)
    return with_head(layers, features, data.classes)


def ds_cnn(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Depthwise separable convolutions: few parameters and MACs (Howard et al., arXiv:1704.04861).

    The first layer halves the image, as in the paper: most of the cost would be there.

    Params: width (channels of every layer), layers (separable layers per stage, default 1), norm (group or
    batch, default group).
    """
    channels, height, width = shape(data, 3, "ds_cnn")
    only(params, "ds_cnn", {"width", "layers", "norm"})
    out = integer(params, "ds_cnn", "width", MAX_WIDTH)
    per_stage = integer(params, "ds_cnn", "layers", MAX_LAYERS, default=1)
    norm = norm_of(params, "ds_cnn")
    stride = 2 if min(height, width) > SIDE else 1
    layers = block("stem", square(channels, out, 3, stride=stride), norm)
    height, width = -(-height // stride), -(-width // stride)  # a strided convolution rounds up
    sizes = halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = MaxPool()
        for layer in range(1, per_stage + 1):
            layers |= block(f"deep{stage}_{layer}", square(out, out, 3, groups=out), norm)
            layers |= block(f"point{stage}_{layer}", square(out, out, 1), norm)
    return with_head(layers, out * math.prod(sizes[-1]), data.classes)
