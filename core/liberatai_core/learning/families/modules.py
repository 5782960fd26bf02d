"""Torch modules of built-in families that torch itself does not have. Imported only where torch is."""

import torch
from torch import nn


class _SteadyBatchNorm(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the only common base
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


class BatchNorm1d(_SteadyBatchNorm, nn.BatchNorm1d):
    """For (n, channels) and (n, channels, length)."""


class BatchNorm2d(_SteadyBatchNorm, nn.BatchNorm2d):
    """For (n, channels, height, width)."""


class Residual(nn.Module):
    """`after(branch(x) + shortcut(x))`: He et al., CVPR 2016, arXiv:1512.03385."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, in, height, width) to (n, out, height', width')."""
        out: torch.Tensor = self.after(self.branch(x) + self.shortcut(x))
        return out
