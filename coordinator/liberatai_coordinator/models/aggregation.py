"""From one version to the next: a function of the version before and a frozen, sorted set of updates.

    updates ─▶ mean per structure ─▶ ensemble over structures, guarded ─▶ taught back ─▶ deltas for devices

Nothing here reads a network or a disk, the clock only measures the teaching, and every seed is derived from
the job's: the same set of updates gives byte-identical weights, whatever crashed in between (promise P4). The
devices' view lags behind the coordinator's state by what a delta left out; the next difference contains it
(EF21-P, DESIGN §5).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.ensembles import combine
from liberatai_coordinator.models.members import Member, Public, derive_seed, trained_part
from liberatai_coordinator.models.teachers import Teacher
from liberatai_coordinator.models.teaching import teach
from liberatai_coordinator.models.updates import Decoded, packed
from liberatai_coordinator.store.manifests import Ensemble
from liberatai_core.aggregator import nested, rules
from liberatai_core.aggregator import server_optimizer as optimizers
from liberatai_core.aggregator.packed import Packed, unpack, without_zeros
from liberatai_core.aggregator.staleness import damped
from liberatai_core.compressor.artifact import FULL, Coding, write
from liberatai_core.contract.messages import Update
from liberatai_core.errors import NonFiniteError
from liberatai_core.sparsifier import methods
from liberatai_core.sparsifier.schedule import density_at
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import Structure, trains_head
from liberatai_core.weights import Vector, require_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Late:
    """What the updates of a version in a buffered job do not say themselves; the ledger does.

    Attributes:
        staleness: by update id: versions made between the one it started from and this one.
        devices: per structure, how many have a task, in this version or over several.
    """

    staleness: Mapping[bytes, int] = field(default_factory=dict)
    devices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Meaning:
    """What the updates of a round mean for one structure.

    Attributes:
        difference: of its trained part; None if nothing was merged.
        contributions: of its own updates, in their order.
        frozen: what was not merged, and why.
    """

    difference: Vector | None
    contributions: tuple[rules.Contribution, ...]
    frozen: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Advanced:
    """The next version, before it is written down.

    Attributes:
        deltas: per structure, what devices apply to their view.
        keyframes: the same of methods whose downlink is the whole model: what replaces the view.
        ensemble: of the devices' views.
        teach_seconds: wall time of the distillation (advisory; part of no digest).
        refreshed: structures with a frozen backbone that got the newest one: devices fetch a keyframe.
        contributions: per device, what its update gave.
        frozen: per structure of which nothing, or only a part, was merged although it had updates, why.
        untaught: per structure that the teaching made worse, and that stays as it was merged, by how much.
        teachers: who taught, in words.
    """

    members: Mapping[str, Member]
    deltas: Mapping[str, bytes]
    keyframes: Mapping[str, bytes]
    ensemble: Ensemble
    teach_seconds: float
    refreshed: frozenset[str] = frozenset()
    contributions: Mapping[str, rules.Contribution] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    untaught: Mapping[str, str] = field(default_factory=dict)
    teachers: str = ""


def first(job: JobSpec, structure: Structure, view: Vector) -> Member:
    """Return a structure's member of version 0."""
    return Member(
        structure=structure,
        master=view,
        view=view,
        class_counts=np.zeros(job.data.classes),
        optimizer=_server(job).init(trained_part(job, structure).part.parameters),
    )


def advance(
    job: JobSpec,
    number: int,
    members: Mapping[str, Member],
    updates: Sequence[Update],
    public: Public,
    late: Late | None = None,
    decoded: Mapping[bytes, Decoded] | None = None,
) -> Advanced:
    """Return the version that follows from `members` and these updates of round `number`.

    Args:
        job: settings.
        number: the round, 1 …
        members: the version before, by structure id.
        updates: sorted by update id; all verified against their structure already.
        public: the coordinator's own data.
        late: of a buffered job, what else its updates' weights follow from.
        decoded: by update id, what the check of an update has read; what is not there, or was read from
            other bytes, is decoded here. The result is the same, byte for byte.
    """
    late = late or Late()
    by_structure = {sid: _of(updates, sid) for sid in sorted(members)}
    read = _Reader(job, late, decoded or {})
    merges = _merges(job, number, members, by_structure, read)
    merged = {
        sid: _moved(job, members[sid], by_structure[sid], merges.get(sid), late) for sid in by_structure
    }
    started = time.perf_counter()
    # A frozen backbone gets what its network was taught with the next refresh.
    pupils = {sid: one for sid, one in merged.items() if twin_of(one.structure, merged) is None}
    taught = teach(job, number, pupils, public, _teachers(job, members, by_structure, read))
    merged |= taught.members
    teach_seconds = time.perf_counter() - started
    members_after, deltas, keyframes = {}, {}, {}
    newer = refreshed(job, number, merged)
    for sid, member in {**merged, **newer}.items():
        if methods.METHODS[job.sparsify.method].whole_downlink:
            members_after[sid], keyframes[sid] = replace(member, view=member.master), plain(member)
        else:
            density = _density(job, number, member.structure)
            members_after[sid], deltas[sid] = _publish(job, member, density)
    return Advanced(
        members=members_after,
        deltas=deltas,
        keyframes=keyframes,
        ensemble=combine(job, members_after, public),
        teach_seconds=teach_seconds,
        refreshed=frozenset(newer),
        contributions={
            update.device: given
            for sid, merge in merges.items()
            for update, given in zip(by_structure[sid], merge.contributions, strict=True)
        },
        frozen={sid: merge.frozen for sid, merge in merges.items() if merge.frozen},
        untaught=taught.untaught,
        teachers=taught.teachers,
    )


def refreshed(job: JobSpec, number: int, members: Mapping[str, Member]) -> dict[str, Member]:
    """Return the structures with a frozen backbone that get the newest one of their network, if it is time.

    The head comes along: it was merged with the one of that network, and is valid for its backbone only.
    """
    every = job.head.refresh_rounds
    # In the first rounds a backbone changes most: a head on an old one would be worth little.
    if (number > every and number % every) or number >= job.rounds.count:
        return {}
    found = {}
    for sid, member in members.items():
        twin = twin_of(member.structure, members)
        if twin is not None and not np.array_equal(twin.master, member.master):
            found[sid] = replace(member, master=twin.master)
    return found


def twin_of(structure: Structure, members: Mapping[str, Member]) -> Member | None:
    """Return the member of the same network that is trained whole, if of this one the head alone is."""
    if not trains_head(structure):
        return None
    return next(
        (
            one
            for one in members.values()
            if not trains_head(one.structure)
            and one.structure.family == structure.family
            and one.structure.tensors == structure.tensors
        ),
        None,
    )


def _teachers(
    job: JobSpec, members: Mapping[str, Member], updates: Mapping[str, Sequence[Update]], read: "_Reader"
) -> list[Teacher]:
    """Return the models of a round's devices: what they hold, and the difference that each tells."""
    return [
        Teacher(
            id=update.update_id.hex(),
            structure=members[sid].structure,
            counts=_told(job, update),
            weights=partial(read.model, update, members[sid]),
        )
        for sid, some in updates.items()
        for update in some
    ]


def _told(job: JobSpec, update: Update) -> NDArray[np.float64]:
    """Return how many samples of each class a device trained on; equal shares if it does not tell."""
    counts = update.class_counts
    if counts is None or len(counts) != job.data.classes:
        return np.full(job.data.classes, update.samples / job.data.classes)
    return np.asarray(counts, np.float64)


def _of(updates: Sequence[Update], sid: str) -> list[Update]:
    found = [update for update in updates if update.structure == sid]
    return sorted(found, key=lambda update: update.update_id)


def _server(job: JobSpec) -> optimizers.ServerOptimizer:
    rules = job.aggregate
    given = {} if rules.server_rate is None else {"rate": rules.server_rate}
    if rules.server_optimizer == "fedavgm":
        given["momentum"] = rules.server_momentum
    return optimizers.SERVER_OPTIMIZERS[rules.server_optimizer](**given)


def groups(job: JobSpec, structures: Iterable[Structure]) -> list[nested.Group]:
    """Return the groups of structures whose members share coordinates.

    If the job does not nest, only a network and the same one with a frozen backbone share them.
    """
    return nested.groups(list(structures), "none" if job.nested == "off" else job.nested)


def _merges(
    job: JobSpec,
    number: int,
    members: Mapping[str, Member],
    updates: Mapping[str, Sequence[Update]],
    read: "_Reader",
) -> dict[str, _Meaning]:
    """Return what the updates mean for every structure that they speak about."""
    found: dict[str, _Meaning] = {}
    for group in groups(job, (member.structure for member in members.values())):
        found |= _merge_group(job, number, group, members, updates, read)
    for sid, some in updates.items():
        if some and sid not in found:
            part = trained_part(job, members[sid].structure).part
            one = rules.merge(_rule(job, number, sid), part.parameters, read.senders(part, some))
            found[sid] = _Meaning(
                difference=None if one.frozen else one.difference,
                contributions=one.contributions,
                frozen=one.frozen,
            )
    return found


def _merge_group(
    job: JobSpec,
    number: int,
    group: nested.Group,
    members: Mapping[str, Member],
    updates: Mapping[str, Sequence[Update]],
    read: "_Reader",
) -> dict[str, _Meaning]:
    """Return what the updates of a group's members mean for each of them; nothing if there are none."""
    covered = {}
    for sid, places in group.places.items():
        trained = trained_part(job, members[sid].structure)
        covered[sid] = nested.Covered(
            places=places if trained.gain is None else places[trained.positions],
            senders=read.senders(trained.part, updates[sid]),
        )
    if not any(one.senders for one in covered.values()):
        return {}
    merged = nested.merge(_rule(job, number, group.largest), group.size, covered)
    given = {one.id: one for one in merged.contributions}
    return {
        sid: _Meaning(
            difference=merged.difference[one.places] if merged.moved[one.places].any() else None,
            contributions=tuple(given[sender.id] for sender in one.senders),
            frozen=merged.why(one.places),
        )
        for sid, one in covered.items()
    }


def _rule(job: JobSpec, number: int, sid: str) -> rules.Settings:
    return rules.Settings(
        rule=job.aggregate.rule,
        hostile=job.aggregate.hostile,
        clip=job.aggregate.clip,
        cap=job.aggregate.sample_cap,
        over=methods.METHODS[job.sparsify.method].rule,
        seed=derive_seed(job.seed, f"buckets|{sid}", number),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """How updates are read: what the check has decoded is taken from there."""

    job: JobSpec
    late: Late
    decoded: Mapping[bytes, Decoded]

    def senders(self, part: Structure, updates: Sequence[Update]) -> list[rules.Sender]:
        return [
            rules.Sender(
                id=update.update_id.hex(),
                samples=update.samples,
                read=partial(self.dense, update, part),
                sent=partial(self.sent, update, part),
            )
            for update in updates
        ]

    def model(self, update: Update, member: Member) -> Vector:
        """Return what a device trained: the weights that it holds and its difference, shape (parameters,)."""
        part = trained_part(self.job, member.structure)
        return part.added(member.view, self.dense(update, part.part))

    def dense(self, update: Update, part: Structure) -> Vector:
        """Return what an update counts as, shape (part.parameters,)."""
        return unpack(self.sent(update, part))

    def sent(self, update: Update, part: Structure) -> Packed:
        """Return the same without its zeros, shortened if it comes late; it is never made dense."""
        found = packed(self.job, update, part, self.decoded.get(update.update_id))
        values = damped(found.values, self.late.staleness.get(update.update_id, 0))
        return found if values is found.values else without_zeros(replace(found, values=values))


def _moved(
    job: JobSpec, member: Member, updates: Sequence[Update], merged: _Meaning | None, late: Late
) -> Member:
    """Return a member after the server's step; one that no update speaks about, or frozen, stays as it is."""
    if merged is None or merged.difference is None:
        return member
    part = trained_part(job, member.structure)
    optimizer, moved = _server(job).step(member.optimizer, part.gather(member.master), merged.difference)
    require_finite(moved, member.structure.id)
    master = part.replaced(member.master, moved)
    return replace(
        member, master=master, optimizer=optimizer, class_counts=_counts(job, member, updates, late)
    )


def _counts(job: JobSpec, member: Member, updates: Sequence[Update], late: Late) -> NDArray[np.float64]:
    """Return samples of each class behind a structure, capped as samples are; by robust rules at the median.

    A version of a buffered job hears of a few devices only: their counts take the place of as large a share
    of the counts before, so that the sum follows all devices.
    """
    counts = [update.class_counts for update in updates if update.class_counts is not None]
    usable = np.array([c for c in counts if len(c) == len(member.class_counts)], dtype=np.float64)
    if not usable.size:
        return member.class_counts
    totals = usable.sum(axis=1, keepdims=True)
    robust = job.aggregate.rule != "mean"
    most = min(job.aggregate.sample_cap, np.median(totals)) if robust else job.aggregate.sample_cap
    usable *= np.minimum(1.0, most / np.maximum(totals, 1.0))
    devices = late.devices.get(member.structure.id, 0)
    older = max(0.0, 1.0 - len(usable) / devices) if devices else 0.0
    # Whole numbers, as manifests keep them: what is read back after a crash is the same.
    return np.asarray(np.floor(usable.sum(axis=0) + older * member.class_counts))


def _density(job: JobSpec, number: int, structure: Structure) -> float:
    """Return the share of the trained part that goes down; nothing follows the last version."""
    choice, rounds = job.choice(structure.family, structure.params), job.rounds.count
    usual = choice.density_or(job.down_density) if choice else job.down_density
    warm = density_at(
        min(number, rounds), rounds, usual, job.sparsify.warmup_rounds, job.sparsify.warmup_factor
    )
    return max(warm, job.sparsify.final_density) if number >= rounds else warm


def _publish(job: JobSpec, member: Member, density: float) -> tuple[Member, bytes]:
    """Return the member with the next view, and the delta that leads there."""
    part = trained_part(job, member.structure)
    behind = part.gather(member.master) - part.gather(member.view)
    if not np.isfinite(behind).all():
        raise NonFiniteError(f"{member.structure.id}: the state is not finite")
    # Powers of two: sums of deltas are exact, so that several can be merged into one (`sparsifier.merge`).
    _, delta = sparsify(init(part.part.parameters), behind, part.part, density, power_of_two=True)
    return replace(member, view=part.added(member.view, densify(delta, part.part))), delta


def plain(member: Member) -> bytes:
    """Return the whole state of a structure as a file of float32 values: the downlink of plain averaging."""
    structure, state = member.structure, member.master
    return write([Coding(FULL, values=state[place]) for _, place in structure.slices()], structure)
