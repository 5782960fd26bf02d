"""From one version to the next: a function of the version before and a frozen, sorted set of updates.

    updates ─▶ mean per structure ─▶ ensemble over structures, guarded ─▶ taught back ─▶ deltas for devices

Nothing here reads a network or a disk, the clock only measures the teaching, and every seed is derived from
the job's: the same set of updates gives byte-identical weights, whatever crashed in between (promise P4). The
devices' view lags behind the coordinator's state by what a delta left out; the next difference contains it
(EF21-P, DESIGN §5).
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_core.aggregator import mean
from liberatai_core.aggregator import server_optimizer as optimizers
from liberatai_core.aggregator.ensemble import Evidence, Method, Pool, pooled
from liberatai_core.aggregator.guard import guard
from liberatai_core.aggregator.label_free import label_free
from liberatai_core.aggregator.tpe import tpe
from liberatai_core.aggregator.uniform import uniform
from liberatai_core.compressor.artifact import FULL, Coding, write
from liberatai_core.contract.messages import Update, part_seed, work_seed
from liberatai_core.errors import NonFiniteError
from liberatai_core.learning.distillation import DistillSettings, consensus, distill, pool
from liberatai_core.learning.training import log_probabilities
from liberatai_core.sparsifier import methods
from liberatai_core.sparsifier.schedule import density_at
from liberatai_core.sparsifier.subspace import Subspace, subspace
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector, require_finite

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One structure of a version.

    Attributes:
        master: the coordinator's float32 weights, shape (parameters,).
        view: the exact weights that devices hold, shape (parameters,).
        class_counts: samples of each class behind the structure, shape (classes,), sums over devices.
        optimizer: state of the server optimiser.
    """

    structure: Structure
    master: Vector
    view: Vector
    class_counts: NDArray[np.float64]
    optimizer: optimizers.ServerState


@dataclass(frozen=True, kw_only=True, eq=False)
class Public:
    """What the coordinator itself has: unlabeled inputs, and perhaps a labelled sample for the guard."""

    unlabeled: Floats | None = None
    validation: tuple[Floats, NDArray[np.int64]] | None = None


class Ensemble(msgspec.Struct, frozen=True, kw_only=True):
    """How a version's structures are combined: `aggregator.ensemble.Pool` in plain numbers, and the guard.

    Attributes:
        method: "uniform", "label_free" or "tpe".
        members: structure ids, in the order of the rows below.
        weights: (members, classes).
        log_priors: (members, classes), or () for none.
        bias: (classes,), or () for none.
        kind: "log" or "linear".
        use: "ensemble", or the id of the structure that the guard fell back to.
        guard: what the guard saw, in words.
    """

    method: str
    members: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    log_priors: tuple[tuple[float, ...], ...] = ()
    bias: tuple[float, ...] = ()
    kind: Literal["log", "linear"] = "log"
    use: str = "ensemble"
    guard: str = ""

    def combine(self, log_probs: Floats) -> Floats:
        """Return log-probabilities (n, classes) from those of the members (members, n, classes)."""
        if self.use != "ensemble":
            alone: Floats = log_probs[self.members.index(self.use)]
            return alone
        return pooled(self.pool, log_probs)

    @property
    def pool(self) -> Pool:
        """The numbers as arrays."""
        return Pool(
            weights=np.array(self.weights),
            log_priors=np.array(self.log_priors) if self.log_priors else None,
            bias=np.array(self.bias) if self.bias else None,
            kind=self.kind,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Advanced:
    """The next version, before it is written down.

    Attributes:
        deltas: per structure, what devices apply to their view.
        keyframes: the same of methods whose downlink is the whole model: what replaces the view.
        ensemble: of the devices' views.
        teach_seconds: wall time of the distillation (advisory; part of no digest).
    """

    members: Mapping[str, Member]
    deltas: Mapping[str, bytes]
    keyframes: Mapping[str, bytes]
    ensemble: Ensemble
    teach_seconds: float


def trained_share(job: JobSpec, structure: Structure) -> float:
    """Return the share of a structure's large tensors that the job trains."""
    choice = job.choice(structure.family, structure.params)
    return (choice.trained_share if choice else None) or job.sparsify.trained_share


def trained_part(job: JobSpec, structure: Structure) -> Subspace:
    """Return the coordinates of a structure that the job trains."""
    return subspace(structure, trained_share(job, structure), part_seed(job.seed, job.name, structure.id))


def difference(job: JobSpec, update: Update, part: Structure) -> Vector:
    """Return what an update means in the trained part of its structure, shape (part.parameters,).

    Raises:
        LiberataiError: for every stream that no device writes.
    """
    methods.require_stream(job.sparsify.method, update.body)
    seed = work_seed(job.seed, update.device, update.job, update.round)
    return methods.densify(update.body, part, seed)


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
    job: JobSpec, number: int, members: Mapping[str, Member], updates: Sequence[Update], public: Public
) -> Advanced:
    """Return the version that follows from `members` and these updates of round `number`.

    Args:
        job: settings.
        number: the round, 1 …
        members: the version before, by structure id.
        updates: sorted by update id; all verified against their structure already.
        public: the coordinator's own data.
    """
    merged = {sid: _merge(job, member, _of(updates, sid)) for sid, member in sorted(members.items())}
    started = time.perf_counter()
    taught = _teach(job, number, merged, public)
    teach_seconds = time.perf_counter() - started
    members_after, deltas, keyframes = {}, {}, {}
    for sid, member in taught.items():
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
    )


def combine(job: JobSpec, members: Mapping[str, Member], public: Public) -> Ensemble:
    """Return the guarded ensemble of the devices' views."""
    views = {sid: member.view for sid, member in members.items()}
    return _ensemble(job, members, views, public)


def outputs(
    members: Mapping[str, Member], weights: Mapping[str, Vector], data: DataContract, x: Floats
) -> Floats:
    """Return the members' log-probabilities, shape (members, n, classes), in the order of their ids."""
    return np.stack([log_probabilities(members[s].structure, data, weights[s], x) for s in sorted(members)])


def _of(updates: Sequence[Update], sid: str) -> list[Update]:
    return [update for update in updates if update.structure == sid]


def _server(job: JobSpec) -> optimizers.ServerOptimizer:
    build, rate = optimizers.SERVER_OPTIMIZERS[job.aggregate.server_optimizer], job.aggregate.server_rate
    return build() if rate is None else build(rate)


def _merge(job: JobSpec, member: Member, updates: Sequence[Update]) -> Member:
    if not updates:
        return member
    part = trained_part(job, member.structure)
    decoded = [
        mean.Update(
            id=update.update_id.hex(),
            difference=difference(job, update, part.part),
            samples=update.samples,
        )
        for update in updates
    ]
    rule = mean.RULES[methods.METHODS[job.sparsify.method].rule]
    together = mean.aggregate(rule(job.aggregate.sample_cap), part.part.parameters, decoded)
    optimizer, moved = _server(job).step(member.optimizer, part.gather(member.master), together)
    require_finite(moved, member.structure.id)
    master = part.replaced(member.master, moved)
    counts = [update.class_counts for update in updates if update.class_counts is not None]
    usable = [c for c in counts if len(c) == len(member.class_counts)]
    class_counts = np.array(usable, dtype=np.float64).sum(axis=0) if usable else member.class_counts
    return replace(member, master=master, optimizer=optimizer, class_counts=class_counts)


def _teach(job: JobSpec, number: int, members: Mapping[str, Member], public: Public) -> Mapping[str, Member]:
    """Distil the guarded ensemble of the merged states into every structure (FedDF, arXiv:2006.07242)."""
    if public.unlabeled is None or number % job.teach.every:
        return members
    settings = DistillSettings(
        **{name: getattr(job.teach, name) for name in DistillSettings.__struct_fields__}
    )
    masters = {sid: member.master for sid, member in members.items()}
    teacher = _ensemble(job, members, masters, public)
    x = pool(public.unlabeled, settings, derive_seed(job.seed, "pool", number))
    answers = teacher.combine(outputs(members, masters, job.data, x))
    targets = consensus(answers, len(public.unlabeled))
    return {
        sid: replace(
            member,
            master=distill(
                member.structure,
                job.data,
                member.master,
                x,
                targets,
                settings,
                derive_seed(job.seed, f"teach|{sid}", number),
                gain=trained_part(job, member.structure).gain,
            ),
        )
        for sid, member in members.items()
    }


def _density(job: JobSpec, number: int, structure: Structure) -> float:
    """Return the share of the trained part that goes down; nothing follows the last version."""
    choice, rounds = job.choice(structure.family, structure.params), job.rounds.count
    usual = (choice.density if choice else None) or job.sparsify.down_density
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


def _ensemble(
    job: JobSpec, members: Mapping[str, Member], weights: Mapping[str, Vector], public: Public
) -> Ensemble:
    ids = tuple(sorted(members))
    counts = np.stack([members[sid].class_counts for sid in ids])
    held_out = outputs(members, weights, job.data, public.validation[0]) if public.validation else None
    labels = public.validation[1] if public.validation else None
    name, method = _method(job, known=bool(counts.sum() > 0))
    found = method(
        Evidence(
            class_counts=counts, balance=job.training.balance, log_probs=held_out, y=labels, seed=job.seed
        )
    )
    made = Ensemble(
        method=name,
        members=ids,
        weights=_rows(found.weights),
        log_priors=() if found.log_priors is None else _rows(found.log_priors),
        bias=() if found.bias is None else tuple(map(float, found.bias)),
        kind=found.kind,
        guard="not checked: the job has no labelled validation data",
    )
    if held_out is None or labels is None:
        return made
    decision = guard(made.combine(held_out), held_out, labels)
    use = "ensemble" if decision.use == "ensemble" else ids[decision.use]
    return msgspec.structs.replace(made, use=use, guard=decision.reason)


def _method(job: JobSpec, *, known: bool) -> tuple[str, Method]:
    """Return how to combine; without class counts the label-free rule has nothing to go by."""
    if job.aggregate.ensemble == "tpe":
        return "tpe", tpe(job.aggregate.trials)
    return (
        ("label_free", label_free)
        if job.aggregate.ensemble == "label_free" and known
        else ("uniform", uniform)
    )


def _rows(values: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in values)


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """Return a seed for one purpose and round: 31 bits of a hash, so no two purposes share a stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{number}".encode()).digest()[:4], "big") >> 1
