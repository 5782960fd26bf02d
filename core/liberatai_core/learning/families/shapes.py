"""What layers with weights make of shapes, without their weights.

Torch has device "meta" for that, but it then computes shapes in Python, and imports its compiler and sympy to
do so: seconds, at every start of a coordinator that has a job.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALL_INPUT = 1 << 14
"""Values of a sample up to which maps between layers are small enough to be made: 64 x 64 in colour."""


def without_weights(module: "torch.nn.Module") -> bool:
    """Let all layers of a module that have weights give an empty output of the right shape.

    Returns:
        False, and the module is as it was, if a layer is none of torch's usual ones.
    """
    forwards = []
    for layer in module.modules():
        if not any(True for _ in layer.parameters(recurse=False)) and not any(
            True for _ in layer.buffers(recurse=False)
        ):
            continue
        forward = _forward(layer)
        if forward is None:
            return False
        forwards.append((layer, forward))
    for layer, forward in forwards:
        layer.forward = forward
    return True


def _forward(layer: "torch.nn.Module") -> "Callable[[torch.Tensor], torch.Tensor] | None":
    import torch

    if isinstance(layer, torch.nn.GroupNorm | torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
        return torch.empty_like
    if type(layer) is torch.nn.Linear:
        features = layer.out_features
        return lambda inputs: inputs.new_empty((*inputs.shape[:-1], features))
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d) and not isinstance(layer.padding, str):
        return _convolution(layer, layer.padding)
    return None


def _convolution(
    layer: "torch.nn.Conv1d | torch.nn.Conv2d", padding: tuple[int, ...]
) -> "Callable[[torch.Tensor], torch.Tensor]":
    def forward(inputs: "torch.Tensor") -> "torch.Tensor":
        sizes = inputs.shape[2:]
        fields = zip(sizes, layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
        out = [
            (size + 2 * border - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, border, dilation in fields
        ]
        return inputs.new_empty((len(inputs), layer.out_channels, *out))

    return forward
