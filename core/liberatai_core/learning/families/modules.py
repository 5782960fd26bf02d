"""Torch modules from the description of a network. Imported only where torch is."""

from collections import OrderedDict

import torch
from torch import nn

from liberatai_core.learning.families.layers import (
    Convolution,
    Dense,
    Flatten,
    Layer,
    MaxPool,
    Mean,
    Network,
    Norm,
    Relu,
    Residual,
    Sequence,
)


def module_of(network: Network) -> nn.Module:
    """Return a new module with random weights; layers draw them in the order of the description."""
    module = _module(network.body, axes=0)
    if network.he:
        _start_as_he(module, network.he)
    return module


def _module(layer: Layer, axes: int) -> nn.Module:
    """Return one layer as a module; `axes`: of the maps that enter it, where that is known."""
    match layer:
        case Sequence(layers):
            return _sequence(layers, axes)
        case Residual(branch, shortcut, relu):
            return BothWays(
                _module(branch, 2),
                _module(shortcut, 2) if shortcut.layers else nn.Identity(),
                nn.ReLU() if relu else nn.Identity(),
            )
        case Convolution(into, out, kernel, stride, padding, groups):
            kind = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
            return kind(into, out, kernel, stride=stride, padding=padding, groups=groups, bias=False)  # type: ignore[arg-type]
        case Dense(into, out, bias):
            return nn.Linear(into, out, bias=bias)
        case Norm(channels, "group", groups):
            return nn.GroupNorm(groups, channels)
        case Norm(channels):
            return BatchNorm(channels)
        case Relu(limit):
            return _relu(limit)
        case MaxPool(kernel, stride, padding):
            pool = nn.MaxPool1d if axes == 1 else nn.MaxPool2d
            return pool(kernel, stride=stride, padding=padding)
        case Mean():
            return nn.AdaptiveAvgPool2d(1)
        case Flatten():
            return nn.Flatten()


def _relu(limit: float | None) -> nn.Module:
    if limit is None:
        return nn.ReLU()
    return nn.ReLU6() if limit == 6 else nn.Hardtanh(0.0, limit)


def _sequence(layers: tuple[tuple[str, Layer], ...], axes: int) -> nn.Module:
    found: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in layers:
        found[name] = _module(layer, axes)
        if isinstance(layer, Convolution):
            axes = len(layer.kernel)
    return nn.Sequential(found)


def _start_as_he(module: nn.Module, factor: float) -> None:
    """Draw all convolutions of images anew: normal, deviation factor * sqrt(2 / fan-in).

    He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:  # there it has no values
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data.mul_(factor)


class BatchNorm(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the only one for maps of any rank
    """Batch normalisation whose whole state is in the flat vector, and that survives a batch of one value.

    Ioffe & Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167. The number of batches seen is
    dropped: it is an integer, and only a momentum of None needs it. One value per channel has no variance;
    it is normalised with the running statistics instead of stopping the training.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x`, shape (n, channels, …), and in training mode follow its statistics."""
        measure = self.training and x.numel() > x.shape[1]
        out: torch.Tensor = nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=measure,
            momentum=self.momentum if self.momentum is not None else 0.0,
            eps=self.eps,
        )
        return out


class BothWays(nn.Module):
    """`after(branch(x) + shortcut(x))`: He et al., CVPR 2016, arXiv:1512.03385."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.after = after
        last = next(reversed(list(branch.children())))
        if isinstance(last.weight, nn.Parameter):
            nn.init.zeros_(last.weight)  # a new model is shallow: Goyal et al., arXiv:1706.02677, 5.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, in, height, width) to (n, out, height', width')."""
        out: torch.Tensor = self.after(self.branch(x) + self.shortcut(x))
        return out
