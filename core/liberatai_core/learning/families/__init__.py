"""Families: parametrised architectures, chosen by name. Code never travels.

Built-in families stand in one literal dict. Each says what its network is made of (`layers.py`); torch's
modules (`modules.py`) and numpy's kernels (`learning/kernels`) are two ways to compute it. They use
group normalisation (Wu & He, "Group Normalization", ECCV 2018, arXiv:1803.08494): it has no running
statistics, which do not federate. For models that are trained in one place, `norm: batch` chooses batch
normalisation; its running statistics are tensors of the structure like all others (`statistics_of`).
Third parties add theirs as an installed entry point of the group "liberatai.families": a function
`build(params, data) -> torch.nn.Module` that maps a batch (n, *input_shape) to logits (n, classes).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liberatai_core.errors import MissingExtraError, StructureError
from liberatai_core.learning.families import installed, layers, members
from liberatai_core.learning.families.images import cnn, ds_cnn
from liberatai_core.learning.families.layers import Network
from liberatai_core.learning.families.mobilenet import mobilenet
from liberatai_core.learning.families.parts import STATISTICS
from liberatai_core.learning.families.resnet import resnet
from liberatai_core.learning.families.signals import cnn1d, mlp
from liberatai_core.learning.families.torch_state import TORCH_STATE
from liberatai_core.learning.families.vgg import vgg
from liberatai_core.spelling import meant
from liberatai_core.structure import (
    HEAD,
    TRAIN,
    DataContract,
    Parameter,
    Structure,
    Tensor,
    from_tensors,
    require_length,
)
from liberatai_core.weights import Vector

if TYPE_CHECKING:
    import torch

Describe = Callable[[Mapping[str, Parameter], DataContract], Network]
Build = Callable[[Mapping[str, Parameter], DataContract], "torch.nn.Module"]

FAMILIES: dict[str, Describe] = {
    "cnn": cnn,
    "cnn1d": cnn1d,
    "ds_cnn": ds_cnn,
    "mlp": mlp,
    "mobilenet": mobilenet,
    "resnet": resnet,
    "vgg": vgg,
}
"""The built-in families."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one sample costs in a forward pass; a training step costs about three times as many MACs.

    Attributes:
        macs_per_sample: multiply-accumulates of convolutions and dense layers.
        activation_bytes_per_sample: float32 outputs of all layers, kept for the backward pass.
    """

    macs_per_sample: int
    activation_bytes_per_sample: int


def describe(family: str, params: Mapping[str, Parameter], data: DataContract) -> Network:
    """Return what a built-in family makes of its parameters.

    Raises:
        StructureError: no built-in family, or wrong parameters or rank of input.
    """
    if family not in FAMILIES:
        raise StructureError(f"{family!r} is no built-in family: {', '.join(sorted(FAMILIES))}")
    # What is trained of a network changes nothing in what it is made of.
    if params.get(TRAIN, HEAD) != HEAD:
        raise StructureError(f"{family}: {TRAIN} must be {HEAD}, not {params[TRAIN]!r}")
    return FAMILIES[family]({name: value for name, value in params.items() if name != TRAIN}, data)


def network_of(structure: Structure, data: DataContract) -> Network:
    """Return what a structure of a built-in family is made of.

    Raises:
        StructureError: it is not what its family builds for this data.
    """
    network = describe(structure.family, structure.params, data)
    if layers.tensors_of(network) != structure.tensors:
        raise StructureError(
            f"{structure.id}: its tensors are not those that this family builds for this data"
        )
    return network


def structure_of(family: str, params: Mapping[str, Parameter], data: DataContract) -> Structure:
    """Return the structure that a family with these parameters has for this data.

    Tensors come in the order of torch's `state_dict`: parameters, and after those of a batch norm its
    running statistics.

    Raises:
        StructureError: unknown family, wrong parameters, wrong rank of input, or an installed family's
            module that keeps state besides its parameters.
        MissingExtraError: an installed family, and torch is not.
    """
    if family in FAMILIES:
        tensors = layers.tensors_of(describe(family, params, data))
        return Structure(family=family, params=dict(params), tensors=tensors)
    module = build(family, params, data, device="meta")
    tensors = tuple(Tensor(name=name, shape=tuple(t.shape)) for name, t in module.state_dict().items())
    return installed.require_sound(Structure(family=family, params=dict(params), tensors=tensors))


def initial_weights(structure: Structure, data: DataContract, seed: int) -> Vector:
    """Return the random weights of a new model, flat; the same for the same seed and torch release.

    torch's global random state is left as it was.

    Raises:
        StructureError: the structure is not what its family builds here.
    """
    require_torch()
    import torch

    require_buildable(structure, data)
    with TORCH_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(structure.family, structure.params, data)
    return from_tensors({name: t.cpu().numpy() for name, t in module.state_dict().items()}, structure)


def statistics_of(structure: Structure) -> frozenset[str]:
    """Return the names of tensors that training measures instead of learning (running mean and variance).

    Empty for an installed family: there they are refused.
    """
    if structure.family not in FAMILIES:
        return frozenset()
    return frozenset(t.name for t in structure.tensors if t.name.rpartition(".")[2] in STATISTICS)


def learned(structure: Structure, gain: Vector | None) -> Vector | None:
    """Return the gain (see `training.train`) with running statistics at 0: no decay or pull may move them."""
    names = statistics_of(structure)
    if not names:
        return gain
    kept = np.ones(structure.parameters, dtype=np.float32) if gain is None else gain.copy()
    for tensor, place in structure.slices():
        if tensor.name in names:
            kept[place] = 0
    return kept


def smaller(structure: Structure, data: DataContract, limit_parameters: int) -> Structure | None:
    """Return the largest smaller member of the family with at most so many parameters.

    The width shrinks first; VGG and ResNet then lose depth, before their first stage has fewer than 8
    channels. What else is fixed stays, but for dense layers inside (`hidden`), which shrink along.

    Returns:
        None if there is none, or if the family is an installed one, whose parameters nobody knows here.

    Raises:
        StructureError: the structure is not one of its family for this data.
    """
    if structure.family not in members.SIZES:
        return None
    require_buildable(structure, data)
    limit = min(limit_parameters, structure.parameters - 1)
    for ladder in members.ladders(structure.family, structure.params):
        if found := _largest(structure.family, ladder, data, limit):
            return found
    return None


def _largest(family: str, ladder: list[members.Params], data: DataContract, limit: int) -> Structure | None:
    """Return the first that fits of members that fall in size."""
    best = None
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        member = structure_of(family, ladder[middle], data)
        if member.parameters <= limit:
            best, high = member, middle
        else:
            low = middle + 1
    return best


def sliced(weights: Vector, structure: Structure, member: Structure) -> Vector:
    """Return starting weights of a smaller member, cut out of the larger one's tensors.

    Kept are the channels that matter most, the same ones in all tensors that share them, in their order
    (compare Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710).

    Args:
        weights: of the larger one, shape (structure.parameters,).
        structure: the larger one, of a built-in family.
        member: the smaller one; every tensor must be one of the larger one's, of the same rank and kernel
            and nowhere larger.

    Raises:
        StructureError: the two do not agree so, or the weights are not of the structure.
    """
    require_length(weights, structure)
    if member.family != structure.family or structure.family not in members.SIZES:
        raise StructureError(f"{member.id} cannot be cut out of {structure.id}: not of one built-in family")
    return from_tensors(members.cut(weights, structure, member), member)


def cost(structure: Structure, data: DataContract) -> Cost:
    """Return multiply-accumulates and activation memory of one sample.

    Built-in families are counted by their description. An installed one is tried: a step of training with
    two samples must go through.

    Raises:
        StructureError: the structure is not what its family builds; or an installed family does not compute
            logits (the text names the layer).
        MissingExtraError: an installed family, and torch is not.
    """
    if structure.family not in FAMILIES:
        return _tried(structure, data)
    macs, values = 0, math.prod(data.input_shape)
    for layer, shape in layers.steps(network_of(structure, data).body, data.input_shape):
        macs += layers.macs(layer, shape)
        values += math.prod(shape)
    return Cost(macs_per_sample=macs, activation_bytes_per_sample=4 * values)


def _tried(structure: Structure, data: DataContract) -> Cost:
    require_torch()
    import torch

    module = build(structure.family, structure.params, data)
    installed.require_trainable(structure, module, data)
    require_same(structure, module)
    macs = 0
    values = math.prod(data.input_shape)

    def count(layer: "torch.nn.Module", _inputs: object, output: object) -> None:
        nonlocal macs, values
        values += installed.sizes(output)
        macs += _macs(layer, output)

    for layer in module.modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_hook(count)
    with installed.blamed(structure.id), torch.no_grad():
        module(torch.zeros((1, *data.input_shape)))
    return Cost(macs_per_sample=macs, activation_bytes_per_sample=4 * values)


def _macs(layer: "torch.nn.Module", output: object) -> int:
    """Return the multiply-accumulates of a convolution, a dense or a recurrent layer; of others 0."""
    import torch

    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor):
        return 0
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return first.numel() * layer.weight[0].numel()
    if isinstance(layer, torch.nn.Linear):
        return first.numel() * layer.in_features
    if isinstance(layer, torch.nn.RNNBase):
        # Every weight once per step; the last axis of the output has the units of all directions.
        steps = first.numel() // max(first.shape[-1], 1)
        return steps * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    return 0


def build(
    family: str, params: Mapping[str, Parameter], data: DataContract, *, device: str = "cpu"
) -> "torch.nn.Module":
    """Return a new module of this family; on device "meta" it has shapes and no values (see `installed`).

    Raises:
        StructureError: see `structure_of`.
    """
    require_torch()
    import torch

    if family not in FAMILIES:
        make = installed.find(family)
        if make is None:
            hint = meant(family, known_families())
            raise StructureError(f"unknown family {family!r}{hint} (known: {', '.join(known_families())})")
        with TORCH_STATE, torch.random.fork_rng(devices=[]):
            return installed.built(family, make, params, data, device)
    from liberatai_core.learning.families.modules import module_of

    network = describe(family, params, data)
    with TORCH_STATE, torch.random.fork_rng(devices=[]), torch.device(device):
        return module_of(network)


def require_buildable(structure: Structure, data: DataContract) -> None:
    """Raise StructureError unless a structure is what its family builds here for this data."""
    if structure.family in FAMILIES:
        network_of(structure, data)
    else:
        require_same(structure, build(structure.family, structure.params, data, device="meta"))


def require_same(structure: Structure, module: "torch.nn.Module") -> None:
    """Raise StructureError unless the module's state is exactly the structure's tensors."""
    built = [(name, tuple(t.shape)) for name, t in module.state_dict().items()]
    if built != [(tensor.name, tensor.shape) for tensor in structure.tensors]:
        raise StructureError(
            f"{structure.id}: its tensors are not those that this family builds for this data"
        )


def known_families() -> list[str]:
    """Return the names of all built-in and installed families, sorted."""
    return sorted({*FAMILIES, *installed.names()})


def require_torch() -> None:
    """Raise MissingExtraError unless torch is installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch is not installed: pip install 'liberatai[train]'") from error
