"""Networks for one-dimensional signals and for plain vectors."""

import math
from collections.abc import Mapping

from liberatai_core.learning.families.layers import Convolution, Flatten, MaxPool, Network
from liberatai_core.learning.families.parts import (
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_WIDTH,
    Layers,
    block,
    dense,
    dense_head,
    halvings,
    integer,
    norm_of,
    only,
    shape,
    with_head,
)
from liberatai_core.structure import DataContract, Parameter

LENGTH = 8
"""Signals are halved until they are at most this long; longer than an image's side (`parts.SIDE`), because
a position costs one value instead of a row."""
WINDOW = 5
"""Samples that a convolution sees."""


def cnn1d(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Convolutions of length 5 over a signal (channels, samples), doubling in width where it halves.

    Params: width (channels of the first stage), norm (group or batch, default group).
    """
    channels, length = shape(data, 2, "cnn1d")
    only(params, "cnn1d", {"width", "norm"})
    out = base = integer(params, "cnn1d", "width", MAX_WIDTH)
    norm = norm_of(params, "cnn1d")
    layers: Layers = {}
    sizes = halvings((length,), LENGTH)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = MaxPool()
        layers |= block(str(stage), Convolution(channels, out, (WINDOW,), padding=WINDOW // 2), norm)
        channels, out = out, min(2 * out, 4 * base)
    return with_head(layers, channels * math.prod(sizes[-1]), data.classes)


def mlp(params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Dense layers of one size; takes inputs of any rank.

    Params: hidden (units of a layer), layers (hidden layers, default 1), norm (group or batch, default
    group).
    """
    only(params, "mlp", {"hidden", "layers", "norm"})
    hidden = integer(params, "mlp", "hidden", MAX_HIDDEN)
    count = integer(params, "mlp", "layers", MAX_LAYERS, default=1)
    norm = norm_of(params, "mlp")
    layers: Layers = {"flat": Flatten()}
    features = math.prod(data.input_shape)
    for layer in range(1, count + 1):
        layers |= block(str(layer), dense(features, hidden), norm, name="dense")
        features = hidden
    return dense_head(layers, features, data.classes)
