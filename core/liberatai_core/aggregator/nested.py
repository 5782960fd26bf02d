"""Members of one family in one space of coordinates: what they share is merged from all their devices.

A narrower member has the leading channels of every tensor of the largest one (Diao et al., "HeteroFL", ICLR
2021, arXiv:2010.01264), a shallower one the leading blocks of every stage (Kim et al., "DepthFL", ICLR 2023;
Liu et al., "InclusiveFL", KDD 2022, arXiv:2204.09911). The head of a shallower member reads other features,
so it is its own. The space of a group is the flat vector of its largest member, followed by what others have
alone.

Behind a flattened map an input of a dense layer is one place of one channel, channel by channel: leading
channels are leading inputs, because all members of a family have maps of one size. Depthwise convolutions
and norms have one axis of channels. Groups of a group norm are runs of channels, so leading channels are
leading groups.

Every coordinate is divided by the weight of those that cover it. The space is cut into slices that are
covered by the same members, and every slice is merged by the rule of the job among the devices of those
members alone (`rules.merge`). So any rule works, sums stay exact whatever the order, and a slice with fewer
than 2 f + 1 devices is frozen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator import rules
from liberatai_core.aggregator.packed import Packed, entries, pack
from liberatai_core.errors import StructureError, TooLargeError
from liberatai_core.structure import TRAIN, Structure, Tensor, trains_head
from liberatai_core.weights import Vector

Positions = NDArray[np.int64]
Extent = Literal["width", "depth", "both", "none"]
"""By what members may differ: "none" is for structures that differ in what is trained of them alone."""

FAMILIES = frozenset({"cnn", "cnn1d", "ds_cnn", "mlp", "mobilenet", "resnet", "vgg"})
"""Whose leading channels and blocks mean the same in every member; of installed families nobody knows."""
SIZES = frozenset({"width", "hidden", "depth", "layers", TRAIN})
"""Parameters by which members of a group may differ: sizes, and what is trained of one."""
MAX_MEMBERS = 8
"""Members of a group: there are at most 2^8 - 1 sets of members, and so many slices."""

_HEAD = "head."
_OWN = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Members of a family that nest.

    Attributes:
        size: coordinates of the space.
        places: structure id -> where its values lie in the space, int64, shape (parameters,), no place twice;
            the largest member comes first.
    """

    size: int
    places: Mapping[str, Positions]

    @property
    def largest(self) -> str:
        """Structure id of the member whose flat vector begins the space."""
        return next(iter(self.places))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Covered:
    """The devices of one member.

    Attributes:
        places: where the values that they train lie in the space, int64, no place twice.
        senders: whose differences have one value per place.
    """

    places: Positions
    senders: Sequence[rules.Sender]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """What a set of updates of a group means.

    Attributes:
        difference: of the space, float32; zero where nothing was merged.
        moved: which coordinates were merged, bool, of the space.
        contributions: by id.
        frozen: slices that were not merged although devices cover them, each with the reason.
    """

    difference: Vector
    moved: NDArray[np.bool_]
    contributions: tuple[rules.Contribution, ...]
    frozen: tuple[tuple[Positions, str], ...]

    def why(self, places: Positions) -> str:
        """Return which share of these places is frozen and why; "" if nothing is."""
        told = []
        for frozen, reason in self.frozen:
            share = np.isin(places, frozen, assume_unique=True).mean()
            if share:
                told.append(f"{share:.0%} of it: {reason}")
        return "; ".join(told)


def groups(structures: Sequence[Structure], extent: Extent) -> list[Group]:
    """Return the groups of two members or more, each structure in at most one.

    The largest structure of a family takes the largest ones that nest in it, at most `MAX_MEMBERS` together,
    then the largest of the others does.

    Args:
        structures: of one job.
        extent: by what members may differ: channels, blocks, or both.
    """
    waiting = sorted(structures, key=lambda one: (-one.parameters, trains_head(one), one.id))
    found = []
    while waiting:
        large, *others = waiting
        inside = [one for one in others if nests(large, one, extent)][: MAX_MEMBERS - 1]
        waiting = [one for one in others if one not in inside]
        if inside:
            found.append(_group(large, inside))
    return found


def nests(large: Structure, member: Structure, extent: Extent) -> bool:
    """Return whether one structure is a narrower or shallower member of the family of another one."""
    if large.family != member.family or large.family not in FAMILIES:
        return False
    if _fixed(large) != _fixed(member) or ("hidden" in large.params) != ("hidden" in member.params):
        return False
    if extent == "none" and large.tensors != member.tensors:
        return False
    if extent == "width" and _names(large) != _names(member):
        return False
    tensors = {tensor.name: tensor for tensor in large.tensors}
    own = _own(large, member)
    inner = [tensor for tensor in member.tensors if tensor.name not in own]
    if not all(tensor.name in tensors and _leads(tensors[tensor.name], tensor) for tensor in inner):
        return False
    if extent == "depth" and any(tensors[tensor.name].shape != tensor.shape for tensor in inner):
        return False
    maps = _maps(large)
    return all(maps.get(name) == places for name, places in _maps(member).items() if name not in own)


def index_map(large: Structure, member: Structure) -> Positions:
    """Return where each value of a member lies in the largest one's flat vector, shape (parameters,).

    Returns:
        int64; -1 for the head of a shallower member, which is its own.

    Raises:
        StructureError: the member does not nest.
    """
    if not nests(large, member, "both"):
        raise StructureError(f"{member.id} does not nest in {large.id}")
    tensors = {tensor.name: (tensor, place) for tensor, place in large.slices()}
    own, found = _own(large, member), []
    for small in member.tensors:
        if small.name in own:
            found.append(np.full(small.size, _OWN, np.int64))
            continue
        tensor, place = tensors[small.name]
        whole = np.arange(place.start, place.stop).reshape(tensor.shape)
        found.append(whole[tuple(slice(side) for side in small.shape)].ravel())
    return np.concatenate(found)


def merge(settings: rules.Settings, size: int, members: Mapping[str, Covered]) -> Merged:
    """Return what the updates of all members of a group mean; byte-identical whatever their order.

    Lengths are clipped and neighbours are found slice by slice. Every update is read as often as the rule
    reads, for every slice that its member covers.

    Args:
        settings: the rule.
        size: coordinates of the space.
        members: by structure id; a member without senders covers nothing.

    Raises:
        LiberataiError: as `rules.merge`.
        StructureError: a place outside the space.
    """
    covering = {sid: one for sid, one in sorted(members.items()) if one.senders}
    if len(covering) > MAX_MEMBERS:
        raise TooLargeError(f"{len(covering)} nested members, at most {MAX_MEMBERS}")
    difference = np.zeros(size, np.float32)
    moved = np.zeros(size, np.bool_)
    frozen = []
    told: dict[str, list[tuple[rules.Contribution, float]]] = {}
    for places, inside in _slices(size, covering):
        senders = [
            sender
            for sid, where in inside.items()
            for sender in _cut(covering[sid].senders, where, len(covering[sid].places))
        ]
        found = rules.merge(settings, len(places), senders)
        if found.frozen:
            frozen.append((places, found.frozen))
        else:
            difference[places] = found.difference
            moved[places] = True
        length = math.sqrt(float(np.square(found.difference, dtype=np.float64).sum()))
        for given in found.contributions:
            told.setdefault(given.id, []).append((given, length))
    contributions = tuple(_joined(told[uid]) for uid in sorted(told))
    return Merged(difference=difference, moved=moved, contributions=contributions, frozen=tuple(frozen))


def _slices(size: int, members: Mapping[str, Covered]) -> Iterator[tuple[Positions, dict[str, Positions]]]:
    """Yield the places that one set of members covers, and where their values lie in each member's."""
    cover = np.zeros(size, np.int64)
    inverse = {}
    for bit, (sid, one) in enumerate(members.items()):
        if one.places.size and not 0 <= int(one.places.min()) <= int(one.places.max()) < size:
            raise StructureError(f"{sid}: a place outside the space of {size} coordinates")
        cover[one.places] |= 1 << bit
        inverse[sid] = np.zeros(size, np.int64)
        inverse[sid][one.places] = np.arange(len(one.places))
    for which in np.unique(cover):
        if which:
            places = np.flatnonzero(cover == which)
            inside = [sid for bit, sid in enumerate(members) if int(which) >> bit & 1]
            yield places, {sid: inverse[sid][places] for sid in inside}


def _cut(senders: Sequence[rules.Sender], where: Positions, values: int) -> Iterator[rules.Sender]:
    """Yield senders of some of the values: sparse updates stay sparse."""
    slots = np.full(values, _OWN, np.int64)
    slots[where] = np.arange(where.size)
    for sender in senders:
        yield rules.Sender(
            id=sender.id,
            samples=sender.samples,
            read=partial(_read, sender.read, where, values),
            sent=sender.sent and partial(_sent, sender.sent, where, slots),
        )


def _read(read: Callable[[], Vector], where: Positions, values: int) -> Vector:
    whole = read()
    if whole.shape != (values,):
        raise StructureError(f"update of shape {whole.shape}, wanted ({values},)")
    return whole[where]


def _sent(sent: Callable[[], Packed], where: Positions, slots: Positions) -> Packed:
    whole = sent()
    if whole.parameters != slots.size:
        raise StructureError(f"update of shape ({whole.parameters},), wanted ({slots.size},)")
    if whole.positions is None:
        return pack(whole.values[where])
    inside = slots[whole.positions]
    kept = np.flatnonzero(inside != _OWN)
    order = kept[np.argsort(inside[kept], kind="stable")]
    return entries(where.size, inside[order], whole.values[order])


def _joined(parts: Sequence[tuple[rules.Contribution, float]]) -> rules.Contribution:
    """Return what one update gave in all slices, from (contribution, length of the result) of each.

    The verdict is that of the slices which hold most of the update, by squared length.
    """
    norm = math.sqrt(math.fsum(one.norm**2 for one, _ in parts))
    result = math.sqrt(math.fsum(length**2 for _, length in parts))
    both = norm * result
    cosine = math.fsum(one.cosine * one.norm * length for one, length in parts) / both if both else 0.0
    weights: dict[rules.Verdict, float] = {}
    for one, _ in parts:
        weights[one.verdict] = weights.get(one.verdict, 0.0) + one.norm**2
    verdict = max(sorted(weights), key=lambda name: weights[name])
    return rules.Contribution(id=parts[0][0].id, norm=norm, cosine=cosine, verdict=verdict)


def _group(large: Structure, inside: Sequence[Structure]) -> Group:
    size, places = large.parameters, {large.id: np.arange(large.parameters)}
    for member in inside:
        found = index_map(large, member)
        alone = np.flatnonzero(found == _OWN)
        found[alone] = np.arange(size, size + alone.size)
        size += alone.size
        places[member.id] = found
    return Group(size=size, places=places)


def _fixed(structure: Structure) -> dict[str, object]:
    """Return the parameters in which members of a group are equal; the default norm need not be named."""
    return {"norm": "group"} | {key: value for key, value in structure.params.items() if key not in SIZES}


def _names(structure: Structure) -> list[str]:
    return [tensor.name for tensor in structure.tensors]


def _own(large: Structure, member: Structure) -> frozenset[str]:
    """Return the names of tensors that a member does not share although the largest one has them."""
    if _names(large) == _names(member):
        return frozenset()
    return frozenset(name for name in _names(member) if name.startswith(_HEAD))


def _leads(large: Tensor, small: Tensor) -> bool:
    """Return whether a tensor is the leading part of another one; kernels are equal."""
    return (
        len(large.shape) == len(small.shape)
        and large.shape[2:] == small.shape[2:]
        and all(old >= new for old, new in zip(large.shape, small.shape, strict=True))
    )


def _maps(structure: Structure) -> dict[str, int]:
    """Return of every dense layer behind another layer how many of its inputs belong to one channel."""
    channels, found = 0, {}
    for tensor in structure.tensors:
        if len(tensor.shape) < 2:
            continue
        if len(tensor.shape) == 2 and channels:
            found[tensor.name] = tensor.shape[1] // channels
        if len(tensor.shape) == 2 or tensor.shape[1] != 1 or tensor.shape[0] != channels:
            channels = tensor.shape[0]
    return found
