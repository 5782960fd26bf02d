"""Every device's model as a teacher, instead of the few structures' means.

A mean over devices with unlike labels forgets what only some of them know; their models, asked apart, do not.
A device's model is what it started from and its difference, as its update tells it. Each is asked once about
the samples of the lesson, then let go: what is kept is answers, at most `LARGEST_BYTES` of them. The answers
become one by the same methods as those of structures (`aggregator.stacking` with labels, else
`aggregator.label_free`), with the samples per class that devices told.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning" (FedDF, NeurIPS 2020,
arXiv:2006.07242) teaches from clients' models, with one weight for all; Cho et al., "Heterogeneous Ensemble
Knowledge Transfer" (Fed-ET, IJCAI 2022, arXiv:2204.12703) weighs them by their confidence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.models.members import Floats, Labelled, Labels, derive_seed
from liberatai_core.aggregator.ensemble import Evidence, Pool, accuracy, pooled
from liberatai_core.aggregator.guard import guard
from liberatai_core.aggregator.label_free import label_free
from liberatai_core.aggregator.screen import USUAL, standing_out
from liberatai_core.aggregator.stacking import stacking
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import Structure
from liberatai_core.weights import Vector

LARGEST_BYTES: Final = 256 * 1024 * 1024
"""Answers in memory at once."""
LEAST: Final = 3
"""Devices: two cannot outvote one that is wrong."""
WRONG_SHARE: Final = 0.5
"""Of what the median device knows: who knows more is rare or new, not hostile."""
SCREENED_SHARE: Final = 1 / 3
"""Of the devices, that may be left out at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A device's model.

    Attributes:
        id: of its update: they are asked in this order.
        counts: samples of each class that it trained on, shape (classes,); equal shares if it does not tell.
        weights: makes its weights, shape (parameters,).
    """

    id: str
    structure: Structure
    counts: NDArray[np.float64]
    weights: Callable[[], Vector]


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What the devices say together.

    Attributes:
        log_probs: about the lesson's samples, shape (n, classes); None if they do not teach.
        why: in words, for people.
    """

    log_probs: Floats | None
    why: str


def ask(
    job: JobSpec,
    number: int,
    teachers: Sequence[Teacher],
    lesson: Floats,
    fitted: Labelled | None,
    judging: Labelled | None,
    structures: Floats | None,
) -> Said:
    """Return what these devices teach together, or why the structures' ensemble teaches instead.

    Args:
        job: settings; `teach.teachers` "auto" compares both on the labels that judge.
        number: of the round.
        teachers: of this round, in any order.
        lesson: inputs, shape (n, *input_shape).
        fitted: labelled samples that may find weights.
        judging: those that judge.
        structures: what the structures' ensemble says about those that judge.
    """
    known, judged = (0 if one is None else len(one[1]) for one in (fitted, judging))
    if job.teach.teachers == "auto" and not (known and judged):
        return Said(log_probs=None, why="structures teach: no labels compare them with the devices' models")
    n = len(lesson)
    some = _some(job, number, teachers, n + known + judged)
    if len(some) < LEAST:
        return Said(log_probs=None, why=f"structures teach: {len(some)} devices are too few")
    x = np.concatenate([lesson, *(one[0] for one in (fitted, judging) if one is not None)])
    answers = np.stack([log_probabilities(one.structure, job.data, one.weights(), x) for one in some])
    counts = _capped(job, np.stack([one.counts for one in some]))
    labelled = None if fitted is None else (answers[:, n : n + known], fitted[1])
    heard = _heard(job, answers[:, :n], counts, labelled)
    pool = _found(job, counts[heard], None if labelled is None else (labelled[0][heard], labelled[1]))
    told = pooled(pool, answers[heard])
    left = "" if heard.all() else f", {int((~heard).sum())} left out"
    why = f"{int(heard.sum())} devices' models teach{left}"
    if judging is None or structures is None:
        return Said(log_probs=told[:n], why=why)
    together, y = told[n + known :], judging[1]
    scores = f"{accuracy(together, y):.1%} against {accuracy(structures, y):.1%} of the structures"
    if job.teach.teachers == "auto" and guard(together, structures[None], y).use != "ensemble":
        return Said(
            log_probs=None, why=f"structures teach: the devices' models get {scores} on {len(y)} labels"
        )
    return Said(log_probs=told[:n], why=f"{why}: {scores} on {len(y)} labels")


def _some(job: JobSpec, number: int, teachers: Sequence[Teacher], samples: int) -> list[Teacher]:
    """Return those that are asked, in the order of their ids: all, or by lot as many as are allowed."""
    ordered = sorted(teachers, key=lambda one: one.id)
    size = max(1, samples * job.data.classes * np.dtype(np.float32).itemsize)
    most = min(job.teach.most_teachers, LARGEST_BYTES // size)
    if len(ordered) <= most:
        return ordered
    lot = np.random.default_rng(derive_seed(job.seed, "teachers", number)).permutation(len(ordered))
    return [ordered[place] for place in np.sort(lot[:most])]


def _capped(job: JobSpec, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the counts, those of a device that claims more samples than allowed made fewer.

    By robust rules nobody has more than the median device: what devices tell of themselves proves nothing.
    """
    totals = counts.sum(axis=1, keepdims=True)
    most = float(job.aggregate.sample_cap)
    if job.aggregate.rule != "mean":
        most = min(most, float(np.median(totals)))
    return np.asarray(counts * np.minimum(1.0, most / np.maximum(totals, 1.0)))


def _heard(
    job: JobSpec, answers: Floats, counts: NDArray[np.float64], known: tuple[Floats, Labels] | None
) -> NDArray[np.bool_]:
    """Return which devices count: who is wrong about the very classes that it claims stands out.

    Labels say what is right; without them what all say together does.
    """
    if known is not None and len(known[1]):
        said, right = known[0].argmax(axis=2), known[1]
    else:
        everybody = pooled(label_free(Evidence(class_counts=counts, balance=job.training.balance)), answers)
        said, right = answers.argmax(axis=2), everybody.argmax(axis=1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    present = np.bincount(right, minlength=job.data.classes)
    hits = (said == right)[:, :, None] * np.eye(job.data.classes)[right][None]
    rates = hits.sum(axis=1) / np.maximum(present, 1)
    weight = shares * (present > 0)
    knows = (weight * rates).sum(axis=1) / np.maximum(weight.sum(axis=1), np.finfo(np.float64).tiny)
    marks = standing_out(-knows)
    wrong = (marks > USUAL) & (knows < WRONG_SHARE * np.median(knows))
    worst = np.argsort(marks, kind="stable")[len(marks) - int(len(marks) * SCREENED_SHARE) :]
    heard = np.ones(len(answers), dtype=np.bool_)
    heard[worst] = ~wrong[worst]
    return heard


def _found(job: JobSpec, counts: NDArray[np.float64], known: tuple[Floats, Labels] | None) -> Pool:
    """Return the weights of the devices: by labels if there are enough, else by what they trained on."""
    log_probs, y = known if known is not None else (None, None)
    evidence = Evidence(class_counts=counts, balance=job.training.balance, log_probs=log_probs, y=y)
    return stacking(evidence) if y is not None and len(y) else label_free(evidence)
