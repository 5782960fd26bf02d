"""Smaller members of a built-in family: which there are, and how one is cut out of a larger one.

A channel is one index of a space that several tensors share: the outputs of a convolution, its norm, and the
inputs of what follows; the maps that shortcuts add up share one. Which tensors share which follows from
their order and names, so that it holds for every family of sequences and residual blocks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import StructureError
from liberatai_core.learning.families import mobilenet, resnet, vgg
from liberatai_core.learning.families.parts import STATISTICS
from liberatai_core.structure import Parameter, Structure, to_tensors
from liberatai_core.weights import Vector

NARROW = 8
"""Below this width a shallower member comes first: fewer channels in the first stage lose too much."""

HEAD = "head.weight"
_IN_BLOCK = re.compile(r"([^.]+)\.(branch|shortcut)\.")

CHANNELS = (1, 2, 3, 4, 6, 8, 10, 12, 14, *range(16, 32, 4), *range(32, 8193, 8))
"""Multiples of 8 can be normalised in 8 groups."""
PERCENTS = tuple(range(5, 401, 5))

Params = dict[str, Parameter]


@dataclass(frozen=True, slots=True)
class _Size:
    """Which parameter is a family's size, and what it is if nothing is said.

    Attributes:
        name: the parameter.
        depths: groups of depths of one kind, each falling.
        default_depth: what `depth` is if nothing is said.
        defaults: depth -> size if nothing is said; the key 0 stands for every other depth.
        along: a parameter that shrinks in proportion, where it is given.
        steps: sizes to try, rising: a few sizes are a large share of a small one.
    """

    name: str
    defaults: Mapping[int, int] = field(default_factory=dict)
    depths: tuple[tuple[int, ...], ...] = ()
    default_depth: int = 0
    along: str = ""
    steps: tuple[int, ...] = CHANNELS


SIZES = {
    "cnn": _Size("width", along="hidden"),
    "cnn1d": _Size("width"),
    "ds_cnn": _Size("width"),
    "mlp": _Size("hidden"),
    "mobilenet": _Size("width", defaults={0: mobilenet.PERCENT}, steps=PERCENTS),
    "resnet": _Size(
        "width",
        defaults={depth: plan.width for depth, plan in resnet.PLANS.items()},
        depths=((56, 44, 32, 20), (50, 34, 18)),
        default_depth=resnet.DEPTH,
    ),
    "vgg": _Size(
        "width",
        defaults={0: vgg.WIDTH},
        depths=((19, 16, 13, 11),),
        default_depth=vgg.DEPTH,
        along="hidden",
    ),
}
"""Built-in family -> what makes it smaller."""


def ladders(family: str, params: Mapping[str, Parameter]) -> Iterator[list[Params]]:
    """Yield the parameters of smaller members, each list falling in size: the lists to try one after another.

    The first has the same depth, the next ones fewer layers and at most the same width; the last one has
    the fewest layers and goes on below the width at which fewer layers come first.
    """
    size = SIZES[family]
    depth = int(params.get("depth", size.default_depth))
    own = int(params.get(size.name, size.defaults.get(depth, size.defaults.get(0, 0))))
    group = next((group for group in size.depths if depth in group), (depth,))
    shallower = [other for other in group if other <= depth]
    falling = [s for s in reversed(size.steps) if s <= own]
    narrowest = NARROW if len(shallower) > 1 else 1
    for other in shallower:
        yield [
            _with(params, size, s, own, None if other == depth else other)
            for s in falling
            if s >= narrowest and (s < own or other < depth)
        ]
    yield [_with(params, size, s, own, shallower[-1] or None) for s in falling if s < min(narrowest, own)]


def _with(params: Mapping[str, Parameter], size: _Size, new: int, own: int, depth: int | None) -> Params:
    changed = {**params, size.name: new}
    if depth is not None:
        changed["depth"] = depth
    if size.along in changed:
        changed[size.along] = max(1, int(changed[size.along]) * new // own)
    return changed


# --- cutting one member out of another ------------------------------------------------------------


@dataclass(slots=True)
class _Spaces:
    """Spaces of channels of one structure, as a union-find forest: shortcuts make two of them one.

    Attributes:
        parents: of every space; a root is its own.
        axes: tensor name -> space of axis 0, and of axis 1 where that runs over channels.
        gains: names of norms' weights and biases.
    """

    parents: list[int] = field(default_factory=list)
    axes: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    gains: list[str] = field(default_factory=list)

    def new(self) -> int:
        """Return a new space."""
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def root(self, space: int) -> int:
        """Return the representative of a space."""
        while self.parents[space] != space:
            space = self.parents[space]
        return space


def _spaces(structure: Structure) -> _Spaces:
    """Follow the channels through the tensors, which stand in the order in which they are used."""
    spaces = _Spaces()
    here = spaces.new()
    channels = 0  # of `here`; those of the input are not known
    block = way = ""
    entry = branch_end = here
    for tensor in structure.tensors:
        found = _IN_BLOCK.match(tensor.name)
        now = (found[1], found[2]) if found else ("", "")
        if now != (block, way):
            if way == "shortcut" or (way == "branch" and now != (block, "shortcut")):
                other = branch_end if way == "shortcut" else entry
                spaces.parents[spaces.root(here)] = spaces.root(other)
            if now == (block, "shortcut"):
                branch_end, here = here, entry
            else:
                entry = here
            block, way = now
        if len(tensor.shape) == 1:  # a norm, or the bias of the head
            spaces.axes[tensor.name] = (here, None)
            if tensor.name.rpartition(".")[2] not in STATISTICS:
                spaces.gains.append(tensor.name)
        elif len(tensor.shape) > 2 and tensor.shape[:2] == (channels, 1):  # depthwise: channels stay apart
            spaces.axes[tensor.name] = (here, None)
        else:
            into, here = here, spaces.new()
            channels = tensor.shape[0]
            spaces.axes[tensor.name] = (here, into)
    return spaces


def cut(weights: Vector, structure: Structure, member: Structure) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of the smaller member: of each space the channels that matter most, in their order.

    A channel matters by its norms' scales and offsets times what its consumers weigh it with. Weights before
    a norm stay as they are, for their scale does not matter there; those of the head grow by the share of
    inputs that it lost.

    Raises:
        StructureError: a tensor of the member is missing, has another rank or kernel or is larger.
    """
    spaces = _spaces(structure)
    tensors = to_tensors(weights, structure)
    ranking = _ranking(tensors, spaces)
    found = {}
    for small in member.tensors:
        large = tensors.get(small.name)
        if large is None or not _holds(large.shape, small.shape):
            raise StructureError(f"{member.id}: {small.name} cannot be cut out of {structure.id}")
        out, into = spaces.axes[small.name]
        kept = large[_kept(ranking.get(spaces.root(out)), large.shape[0], small.shape[0])]
        if into is not None and large.shape[1] != small.shape[1]:
            kept = kept[:, _kept(ranking.get(spaces.root(into)), large.shape[1], small.shape[1])]
            if small.name == HEAD:
                kept = kept * np.float32(large.shape[1] / small.shape[1])
        found[small.name] = kept
    return found


def _holds(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
    return (
        len(large) == len(small)
        and large[2:] == small[2:]
        and all(old >= new for old, new in zip(large, small, strict=True))
    )


def _ranking(tensors: Mapping[str, NDArray[np.float32]], spaces: _Spaces) -> dict[int, NDArray[np.intp]]:
    """Return for every space with a norm its channels, those that matter most first."""
    strength: dict[int, NDArray[np.float64]] = {}
    for name in spaces.gains:
        root = spaces.root(spaces.axes[name][0])
        strength[root] = strength.get(root, 0.0) + tensors[name].astype(np.float64) ** 2
    used: dict[int, NDArray[np.float64]] = {}
    for name, (_, into) in spaces.axes.items():
        if into is None or (root := spaces.root(into)) not in strength:
            continue
        channels = len(strength[root])
        square = tensors[name].astype(np.float64) ** 2
        by_channel = square.reshape(len(square), channels, -1).mean(axis=(0, 2))
        used[root] = used.get(root, 0.0) + by_channel / max(float(by_channel.mean()), 1e-30)
    return {root: np.argsort(-value * used.get(root, 1.0), kind="stable") for root, value in strength.items()}


def _kept(ranking: NDArray[np.intp] | None, old: int, new: int) -> NDArray[np.intp]:
    """Return the indices kept on one axis: the first channels of the ranking, in rising order.

    Behind a flattened map an axis has all places of one channel together.
    """
    places = 1 if ranking is None else old // len(ranking)
    if ranking is None or new % places:
        return np.arange(new)
    chosen = np.sort(ranking[: new // places])
    kept: NDArray[np.intp] = (chosen[:, None] * places + np.arange(places)).ravel()
    return kept
