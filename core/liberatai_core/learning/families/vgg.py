"""VGG: Simonyan & Zisserman, "Very Deep Convolutional Networks", ICLR 2015, arXiv:1409.1556."""

from collections.abc import Mapping

from liberatai_core.learning.families.layers import Flatten, MaxPool, Network
from liberatai_core.learning.families.parts import (
    MAX_HIDDEN,
    MAX_WIDTH,
    Layers,
    block,
    dense,
    dense_head,
    integer,
    norm_of,
    one_of,
    only,
    shape,
    square,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Depth -> 3x3 convolutions of each stage (table 1, A, B, D, E); the depth counts three dense layers, too."""
DEPTH, WIDTH = 16, 64
START = 3.0
"""Before a norm the scale of weights changes nothing but the size of steps relative to them (van Laarhoven,
arXiv:1706.05350). At three times He's deviation this long chain without shortcuts takes the default
learning rate of 0.05 (depth 16, width 8, 3 epochs on 2000 images of Fashion-MNIST: 68 % correct, 23 % at
once He's, 10 % at torch's own), and Adam does not mind."""


def vgg(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Five stages of 3x3 convolutions, each halving the image and doubling the width up to 8 times.

    Halving stops where the shorter side is 1. Every layer has a norm, which the paper does not know; it
    also stands for the paper's dropout in dense layers.

    Params: depth (11, 13, 16 or 19, default 16), width (channels of the first stage, default 64 as in the
    paper), hidden (units of two dense layers before the last one; default none, as is usual for small
    images), norm (group or batch, default group).
    """
    channels, height, width = shape(data, 3, "vgg")
    only(params, "vgg", {"depth", "width", "hidden", "norm"})
    depth = one_of(params, "vgg", "depth", tuple(CONVOLUTIONS), DEPTH)
    base = integer(params, "vgg", "width", MAX_WIDTH, WIDTH)
    norm = norm_of(params, "vgg")
    layers: Layers = {}
    for stage, count in enumerate(CONVOLUTIONS[depth], start=1):
        out = base * min(2 ** (stage - 1), 8)
        for layer in range(1, count + 1):
            layers |= block(f"{stage}_{layer}", square(channels, out, 3), norm)
            channels = out
        if min(height, width) >= 2:
            layers[f"pool{stage}"] = MaxPool()
            height, width = height // 2, width // 2
    features = channels * height * width
    if "hidden" not in params:
        return with_head(layers, features, data.classes, he=START)
    hidden = integer(params, "vgg", "hidden", MAX_HIDDEN)
    layers["flat"] = Flatten()
    for layer in (1, 2):
        layers |= block(str(layer), dense(features, hidden), norm, name="dense")
        features = hidden
    return dense_head(layers, features, data.classes, he=START)
