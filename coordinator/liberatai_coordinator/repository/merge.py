"""Two commits become one: by their weights where they come from one, by what they answer where they do not.

For every structure that both have, and that a common ancestor has, differences from the ancestor are added:
the weighted mean, task arithmetic, TIES. With unlabeled inputs both sides also answer together (an ensemble
per class) and teach each structure, from the best of its starts. Which way wins is found on two thirds of the
held-out labels, and judged on the rest: a merge that is worse there than the better parent is a conflict.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.repository import tensors
from liberatai_coordinator.repository.commits import Commit
from liberatai_coordinator.repository.names import short
from liberatai_coordinator.repository.store import Loaded, Store
from liberatai_core.aggregator import task_arithmetic, ties
from liberatai_core.aggregator.ensemble import Evidence, pooled
from liberatai_core.aggregator.methods import chosen, method_of
from liberatai_core.errors import DataError, StructureError
from liberatai_core.learning.distillation import DistillSettings, distill, usual_copies, usual_steps
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

Floats = NDArray[np.float32]
Labelled = tuple[Floats, NDArray[np.int64]]
Member = tensors.Member

SCALES: Final = (1.0, 1.25, 1.5, 2.0)
"""Of task arithmetic; 2 adds both differences whole."""
DENSITIES: Final = (0.2, 0.5)
JUDGED: Final = 1 / 3
"""Share of the held-out labels that judge; the others choose."""
BATCH: Final = 64
ROUNDS: Final = 2
"""Of teaching: in the second one, what the first one made teaches along."""
TAUGHT: Final = "taught by both on unlabeled inputs"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """What a merge made.

    Attributes:
        members: structure id -> structure and weights.
        methods: structure id -> how it was made, in words.
        accuracy: structure id -> on the labels that judge; empty if there were none.
        parents: accuracy of the best structure of each side on the same labels.
        ancestor: commit that both come from; "" for none.
        conflict: why it must not be taken, in words; "" if it may.
    """

    members: Mapping[str, Member]
    methods: Mapping[str, str]
    accuracy: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[float, ...] = ()
    ancestor: str = ""
    conflict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Side:
    commit: Commit
    members: dict[str, Member]


def merge(
    store: Store,
    first: Loaded,
    second: Loaded,
    *,
    held_out: Labelled | None = None,
    unlabeled: Floats | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _what: None,
) -> Merged:
    """Merge two commits; byte-identical for equal arguments.

    Args:
        store: that has both.
        first: gives the order where it matters.
        second: the other one.
        held_out: labelled samples that choose and judge; None: the weighted mean is taken unjudged.
        unlabeled: inputs on which both sides teach.
        seed: of distillation, and of how labels are divided.
        progress: is told what is under way.

    Raises:
        StructureError: nothing that both have, and no unlabeled inputs to teach with; or no weights at all.
        DataError: the two are for unlike data.
    """
    data = _data(first.commit, second.commit)
    sides = [_Side(commit=one.commit, members=tensors.members(store, one.commit)) for one in (first, second)]
    ancestor = store.ancestor(first.digest, second.digest)
    base = tensors.members(store, store.read(ancestor).commit) if ancestor else {}
    shares = [float(max(one.commit.samples, one.commit.updates, 0)) for one in sides]
    shares = shares if all(shares) else [1.0, 1.0]
    choosing, judging = _divided(held_out, seed)
    ids = sorted({sid for one in sides for sid in one.members})
    found = {sid: list(_by_weights(sid, sides, base, shares)) for sid in ids}
    structures = {sid: shape for one in sides for sid, (shape, _) in sorted(one.members.items())}
    best = {
        sid: _best(structures[sid], data, candidates, choosing)
        for sid, candidates in found.items()
        if candidates
    }
    for _ in range(ROUNDS if unlabeled is not None and data is not None else 0):
        best = _taught_once(sides, structures, best, data, unlabeled, choosing, seed, progress)
    made = {sid: (structures[sid], weights) for sid, (_, weights) in best.items()}
    methods = {sid: how for sid, (how, _) in best.items()}
    if not made:
        why = "no structure in common" if not ancestor else f"nothing that {short(ancestor)} has, too"
        raise StructureError(f"{why}: give --unlabeled, and both teach one another")
    return _judged(Merged(members=made, methods=methods, ancestor=ancestor or ""), sides, data, judging)


def _taught_once(
    sides: Sequence[_Side],
    structures: Mapping[str, Structure],
    best: Mapping[str, tuple[str, Vector]],
    data: DataContract | None,
    unlabeled: Floats | None,
    choosing: Labelled | None,
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, tuple[str, Vector]]:
    """Let both sides, and what was merged so far, teach every structure; what is worse is not taken."""
    if data is None or unlabeled is None:
        return dict(best)
    progress("asking both")
    teachers = [member for one in sides for member in one.members.values()]
    teachers += [(structures[sid], weights) for sid, (_, weights) in best.items()]
    said = _teacher(teachers, data, unlabeled, choosing, seed)
    result: dict[str, tuple[str, Vector]] = {}
    for sid, structure in structures.items():
        progress(f"teaching {sid}")
        starts = [("", one.members[sid][1]) for one in sides if sid in one.members]
        before = [best[sid]] if sid in best else []
        start = (before or [_best(structure, data, starts, choosing)])[0]
        taught = (TAUGHT, _taught(structure, data, start[1], unlabeled, said, seed))
        result[sid] = _best(structure, data, [*before, taught], choosing)
    return result


def _data(first: Commit, second: Commit) -> DataContract | None:
    if first.data and second.data and first.data != second.data:
        raise DataError(
            f"one is for samples {first.data.input_shape} and {first.data.classes} classes, the other for "
            f"{second.data.input_shape} and {second.data.classes}: they cannot be merged"
        )
    return first.data or second.data


def _divided(held_out: Labelled | None, seed: int) -> tuple[Labelled | None, Labelled | None]:
    """Return the labels that choose, and those that judge; every class in both as far as possible."""
    if held_out is None:
        return None, None
    x, y = held_out
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    judge = np.zeros(len(y), bool)
    judge[order[:: round(1 / JUDGED)]] = True
    return (x[~judge], y[~judge]), (x[judge], y[judge])


def _by_weights(
    sid: str, sides: Sequence[_Side], base: Mapping[str, Member], shares: Sequence[float]
) -> Iterator[tuple[str, Vector]]:
    """Yield merges of weights, with how they were made; the weighted mean comes first."""
    if sid not in base or any(sid not in one.members for one in sides):
        return
    structure, ancestor = base[sid]
    if any(one.members[sid][0] != structure for one in sides):
        return
    models = [one.members[sid][1] for one in sides]
    yield "weighted mean of differences", task_arithmetic.merged(ancestor, models, shares)
    for scale in SCALES[1:]:
        made = task_arithmetic.merged(ancestor, models, shares, scale=scale)
        yield f"task arithmetic, scale {scale:g}", made
    for density in DENSITIES:
        for scale in SCALES[:2]:
            made = ties.merged(ancestor, models, shares, density=density, scale=scale)
            yield f"TIES, density {density:g}, scale {scale:g}", made


def _teacher(
    members: Sequence[Member], data: DataContract, x: Floats, choosing: Labelled | None, seed: int
) -> Floats:
    """Return what members of both sides, and merges of them, answer together: log-probabilities.

    Who knows which classes is read off their own answers where nobody has counted: a model that never saw a
    class hardly ever answers it.
    """
    said = np.stack([log_probabilities(shape, data, weights, x) for shape, weights in members])
    counts = np.exp(said.astype(np.float64)).mean(axis=1) * len(x)
    y = np.zeros(0, np.int64) if choosing is None else choosing[1]
    name = chosen("auto", labels=len(y), counted=True)
    known = None
    if choosing is not None and len(y):
        known = np.stack([log_probabilities(shape, data, weights, choosing[0]) for shape, weights in members])
    pool = method_of(name)(Evidence(class_counts=counts, log_probs=known, y=y, seed=seed))
    return pooled(pool, said)


def _taught(
    structure: Structure, data: DataContract, start: Vector, x: Floats, teacher: Floats, seed: int
) -> Vector:
    copies = usual_copies(len(x))
    steps = usual_steps(len(x) * (1 + copies), BATCH)
    settings = DistillSettings(steps=steps, batch_size=BATCH, copies=copies)
    return distill(structure, data, start, x, teacher, settings, seed)


def _best(
    structure: Structure,
    data: DataContract | None,
    candidates: Sequence[tuple[str, Vector]],
    choosing: Labelled | None,
) -> tuple[str, Vector]:
    """Return the candidate that answers best; without labels the one that was taught."""
    if choosing is None or data is None or structure.family == tensors.UNNAMED:
        taught = [one for one in candidates if one[0] == TAUGHT]
        return (taught or list(candidates))[0]
    x, y = choosing
    scores = []
    for _, weights in candidates:
        said = log_probabilities(structure, data, weights, x)
        hits = float(np.mean(said.argmax(1) == y))
        surprise = -float(said[np.arange(len(y)), y].mean())
        scores.append((-hits, surprise))
    return candidates[min(range(len(scores)), key=scores.__getitem__)]


def _judged(
    made: Merged, sides: Sequence[_Side], data: DataContract | None, judging: Labelled | None
) -> Merged:
    """Return a merge with its figures, and whether it is a conflict."""
    if judging is None or data is None or not len(judging[1]):
        return made
    accuracy = {sid: _accuracy(member, data, judging) for sid, member in made.members.items()}
    before = [{sid: _accuracy(member, data, judging) for sid, member in one.members.items()} for one in sides]
    parents = tuple(max(found.values(), default=0.0) for found in before)
    worse = []
    for sid, reached in accuracy.items():
        known = max((found[sid] for found in before if sid in found), default=0.0)
        if reached < known:
            worse.append(f"{sid}: {reached:.2%}, a parent has {known:.2%}")
    return Merged(
        members=made.members,
        methods=made.methods,
        accuracy=accuracy,
        parents=parents,
        ancestor=made.ancestor,
        conflict="; ".join(worse),
    )


def _accuracy(member: Member, data: DataContract, labelled: Labelled) -> float:
    structure, weights = member
    said = log_probabilities(structure, data, weights, labelled[0])
    return float(np.mean(said.argmax(1) == labelled[1]))
