"""Families: parametrised architectures, chosen by name. Code never travels.

Built-in families stand in one literal dict. They use group normalisation (Wu & He, "Group
Normalization", ECCV 2018, arXiv:1803.08494): it has no running statistics, which do not federate.
Third parties add theirs as an installed entry point of the group "liberatai.families": a function
`build(params, data) -> torch.nn.Module` that maps a batch (n, *input_shape) to logits (n, classes).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from liberatai_core.errors import MissingExtraError, StructureError
from liberatai_core.structure import DataContract, Parameter, Structure, Tensor, from_tensors
from liberatai_core.weights import Vector

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "liberatai.families"
MAX_WIDTH = 1024
"""Channels of the first layer: ResNet and VGG use 64; this bounds what a message can make us allocate."""
MAX_HIDDEN = 8192
"""Units of a dense layer: VGG's largest has 4096."""
MAX_LAYERS = 16
"""Dense layers or convolutions per stage: deeper chains need skip connections to train at all."""
SIDE = 4
"""Feature maps are halved until the shorter side is at most this: small enough for a dense head to keep
positions, which matter on small images (8x8 digits), large enough to survive one more 3x3 kernel."""
LENGTH = 8
"""The same for one-dimensional signals, where a position costs one value instead of a row."""

Build = Callable[[Mapping[str, Parameter], DataContract], "torch.nn.Module"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one sample costs in a forward pass; a training step costs about three times as many MACs.

    Attributes:
        macs_per_sample: multiply-accumulates of convolutions and dense layers.
        activation_bytes_per_sample: float32 outputs of all layers, kept for the backward pass.
    """

    macs_per_sample: int
    activation_bytes_per_sample: int


def structure_of(family: str, params: Mapping[str, Parameter], data: DataContract) -> Structure:
    """Return the structure that a family with these parameters has for this data.

    Tensors come in the order of torch's `named_parameters`.

    Raises:
        StructureError: unknown family, wrong parameters, wrong rank of input, or a module that keeps
            state besides its parameters (BatchNorm: it does not federate).
        MissingExtraError: torch is not installed.
    """
    module = build(family, params, data, device="meta")
    tensors = tuple(Tensor(name=name, shape=tuple(p.shape)) for name, p in module.named_parameters())
    return Structure(family=family, params=dict(params), tensors=tensors)


def initial_weights(structure: Structure, data: DataContract, seed: int) -> Vector:
    """Return the random weights of a new model, flat; the same for the same seed and torch release.

    torch's global random state is left as it was.

    Raises:
        StructureError: the structure is not what its family builds here.
    """
    require_torch()
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(structure.family, structure.params, data)
    require_same(structure, module)
    return from_tensors({name: p.detach().numpy() for name, p in module.named_parameters()}, structure)


def cost(structure: Structure, data: DataContract) -> Cost:
    """Return multiply-accumulates and activation memory of one sample, counted on shapes only."""
    require_torch()
    import torch

    module = build(structure.family, structure.params, data, device="meta").eval()
    macs = 0
    values = math.prod(data.input_shape)

    def count(layer: "torch.nn.Module", _inputs: object, output: "torch.Tensor") -> None:
        nonlocal macs, values
        values += output.numel()
        if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            macs += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, torch.nn.Linear):
            macs += output.numel() * layer.in_features

    for layer in module.modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.empty((1, *data.input_shape), device="meta"))
    return Cost(macs_per_sample=macs, activation_bytes_per_sample=4 * values)


def build(
    family: str, params: Mapping[str, Parameter], data: DataContract, *, device: str = "cpu"
) -> "torch.nn.Module":
    """Return a new module of this family; on device "meta" it has shapes and no values.

    Raises:
        StructureError: see `structure_of`.
    """
    require_torch()
    import torch

    with torch.random.fork_rng(devices=[]), torch.device(device):
        module = builder(family)(params, data)
    state = set(module.state_dict()) - {name for name, _ in module.named_parameters()}
    if state:
        raise StructureError(f"{family}: {min(state)} is no parameter: running statistics do not federate")
    return module


def require_same(structure: Structure, module: "torch.nn.Module") -> None:
    """Raise StructureError unless the module's parameters are exactly the structure's tensors."""
    built = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    if built != [(tensor.name, tensor.shape) for tensor in structure.tensors]:
        raise StructureError(
            f"{structure.id}: its tensors are not those that this family builds for this data"
        )


def known_families() -> list[str]:
    """Return the names of all built-in and installed families, sorted."""
    return sorted({*FAMILIES, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def builder(family: str) -> Build:
    """Return the builder of a family; a built-in name cannot be replaced by an entry point.

    Raises:
        StructureError: no such family; the text lists those that exist.
    """
    if family in FAMILIES:
        return FAMILIES[family]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=family):
        loaded: Build = point.load()
        return loaded
    raise StructureError(f"unknown family {family!r}: known are {', '.join(known_families())}")


def require_torch() -> None:
    """Raise MissingExtraError unless torch is installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch is not installed: pip install 'liberatai[train]'") from error


# --- built-in families ---------------------------------------------------------------------------


def _cnn(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """3x3 convolutions, doubling in width where the image halves, then a dense head.

    Params: width (channels of the first stage), layers (convolutions per stage, default 1),
    hidden (units of a dense layer before the last one, default none).
    """
    from torch import nn

    channels, height, width = _shape(data, 3, "cnn")
    _only(params, "cnn", {"width", "layers", "hidden"})
    out = base = _integer(params, "cnn", "width", MAX_WIDTH)
    per_stage = _integer(params, "cnn", "layers", MAX_LAYERS, default=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = _halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        for layer in range(1, per_stage + 1):
            layers |= _block(f"{stage}_{layer}", nn.Conv2d(channels, out, 3, padding=1, bias=False), out)
            channels = out
        out = min(2 * out, 4 * base)
    features = channels * math.prod(sizes[-1])
    layers["flat"] = nn.Flatten()
    if "hidden" in params:
        hidden = _integer(params, "cnn", "hidden", MAX_HIDDEN)
        layers |= _block("", nn.Linear(features, hidden, bias=False), hidden, name="dense")
        features = hidden
    layers["head"] = nn.Linear(features, data.classes)
    return nn.Sequential(layers)


def _ds_cnn(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Depthwise separable convolutions: few parameters and MACs (Howard et al., arXiv:1704.04861).

    The first layer halves the image, as in the paper: most of the cost would be there.

    Params: width (channels of every layer), layers (separable layers per stage, default 1).
    """
    from torch import nn

    channels, height, width = _shape(data, 3, "ds_cnn")
    _only(params, "ds_cnn", {"width", "layers"})
    out = _integer(params, "ds_cnn", "width", MAX_WIDTH)
    per_stage = _integer(params, "ds_cnn", "layers", MAX_LAYERS, default=1)
    stride = 2 if min(height, width) > SIDE else 1
    layers = _block("stem", nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False), out)
    height, width = -(-height // stride), -(-width // stride)  # a strided convolution rounds up
    sizes = _halvings((height, width), SIDE)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        for layer in range(1, per_stage + 1):
            depthwise = nn.Conv2d(out, out, 3, padding=1, groups=out, bias=False)
            layers |= _block(f"deep{stage}_{layer}", depthwise, out)
            layers |= _block(f"point{stage}_{layer}", nn.Conv2d(out, out, 1, bias=False), out)
    return _with_head(layers, out * math.prod(sizes[-1]), data.classes)


def _cnn1d(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Convolutions of length 5 over a signal (channels, samples), doubling in width where it halves.

    Params: width (channels of the first stage).
    """
    from torch import nn

    channels, length = _shape(data, 2, "cnn1d")
    _only(params, "cnn1d", {"width"})
    out = base = _integer(params, "cnn1d", "width", MAX_WIDTH)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = _halvings((length,), LENGTH)
    for stage in range(1, len(sizes) + 1):
        if stage > 1:
            layers[f"pool{stage}"] = nn.MaxPool1d(2)
        layers |= _block(str(stage), nn.Conv1d(channels, out, 5, padding=2, bias=False), out)
        channels, out = out, min(2 * out, 4 * base)
    return _with_head(layers, channels * math.prod(sizes[-1]), data.classes)


def _mlp(params: Mapping[str, Parameter], data: DataContract) -> "torch.nn.Module":
    """Dense layers of one size; takes inputs of any rank.

    Params: hidden (units of a layer), layers (hidden layers, default 1).
    """
    from torch import nn

    _only(params, "mlp", {"hidden", "layers"})
    hidden = _integer(params, "mlp", "hidden", MAX_HIDDEN)
    count = _integer(params, "mlp", "layers", MAX_LAYERS, default=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flat=nn.Flatten())
    features = math.prod(data.input_shape)
    for layer in range(1, count + 1):
        layers |= _block(str(layer), nn.Linear(features, hidden, bias=False), hidden, name="dense")
        features = hidden
    layers["head"] = nn.Linear(features, data.classes)
    return nn.Sequential(layers)


FAMILIES: dict[str, Build] = {"cnn": _cnn, "cnn1d": _cnn1d, "ds_cnn": _ds_cnn, "mlp": _mlp}
"""The built-in families."""


def _block(
    suffix: str, layer: "torch.nn.Module", channels: int, *, name: str = "conv"
) -> "OrderedDict[str, torch.nn.Module]":
    from torch import nn

    return OrderedDict(
        [
            (f"{name}{suffix}", layer),
            (f"norm{suffix}", nn.GroupNorm(_groups(channels), channels)),
            (f"relu{suffix}", nn.ReLU()),
        ]
    )


def _with_head(layers: "OrderedDict[str, torch.nn.Module]", features: int, classes: int) -> "torch.nn.Module":
    from torch import nn

    layers["flat"] = nn.Flatten()
    layers["head"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _groups(channels: int) -> int:
    """At most 8 groups of at least 4 channels: a group of one value would be normalised to zero."""
    return max(g for g in (8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))


def _halvings(sides: tuple[int, ...], limit: int) -> list[tuple[int, ...]]:
    """Return the sizes of all stages: halved, rounded down, until the shortest side is at most `limit`."""
    sizes = [sides]
    while min(sizes[-1]) > limit:
        sizes.append(tuple(side // 2 for side in sizes[-1]))
    return sizes


def _shape(data: DataContract, rank: int, family: str) -> tuple[int, ...]:
    if len(data.input_shape) != rank:
        raise StructureError(f"{family}: takes inputs with {rank} axes, not {data.input_shape}")
    return data.input_shape


def _only(params: Mapping[str, Parameter], family: str, allowed: set[str]) -> None:
    if unknown := sorted(set(params) - allowed):
        raise StructureError(
            f"{family}: unknown parameter {unknown[0]!r}, it takes {', '.join(sorted(allowed))}"
        )


def _integer(
    params: Mapping[str, Parameter], family: str, name: str, highest: int, default: int | None = None
) -> int:
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise StructureError(f"{family}: {name} must be an integer from 1 to {highest}, not {value!r}")
    return value
