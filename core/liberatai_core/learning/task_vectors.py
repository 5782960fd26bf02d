"""Task vectors: every teacher teaches a student of its own, and what they changed is added up with shares.

TAKFL (Morafah et al., "Towards Diverse Device Heterogeneous Federated Learning via Task Arithmetic Knowledge
Integration", NeurIPS 2024):

    w_g = argmin_w KL(p_g || p_w) + LOYALTY KL(p_0 || p_w), from w_0      for every teacher g
    w   = w_0 + sum_g s_g (w_g - w_0),  s_g >= 0, sum_g s_g = 1

One average of all teachers dilutes what a good one says; here a student takes from each as much as serves it.
The second term keeps it near what it was (p_0); as both divergences look at the same student, together they
are one, to the mixture (p_g + LOYALTY p_0) / (1 + LOYALTY), so that the engine of `distillation.py` serves.
The shares are those of CANDIDATES drawn ones which give the least cross-entropy on labels; without labels all
are equal. It takes as many distillations as there are teachers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import DataError
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.training import log_probabilities
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

LOYALTY = 0.1
"""Weight of the student's own answers beside a teacher's."""
CANDIDATES = 32
"""Shares drawn evenly from the simplex, beside equal ones and each teacher alone."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Integrated:
    """Result of a teaching by several.

    Attributes:
        weights: of the student, shape (parameters,).
        shares: of the teachers, shape (teachers,), sum 1.
    """

    weights: Vector
    shares: NDArray[np.float64]


def integrate(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    x_unlabeled: NDArray[np.float32],
    teachers: NDArray[np.float32],
    settings: DistillSettings,
    seed: int,
    *,
    labelled: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    gain: Vector | None = None,
    copies: NDArray[np.int64] | None = None,
) -> Integrated:
    """Let every teacher teach apart and add up the changes; byte-identical for equal arguments.

    Args:
        structure: of the student.
        data: the job's data contract.
        weights: of the student before, shape (parameters,).
        x_unlabeled: inputs, shape (n, *input_shape).
        teachers: their log-probabilities for `x_unlabeled`, shape (teachers, n, classes).
        settings: of each distillation.
        seed: fixes the distillations and the candidates.
        labelled: inputs and labels by which the shares are chosen.
        gain: as of `training.train`.
        copies: as of `distillation.distill`.

    Raises:
        DataError: no teachers, no samples, or shapes do not fit.
        StructureError: weights or gain are not of this structure.
        TrainingError: a student's weights became infinite or NaN.
    """
    if teachers.shape[1:] != (len(x_unlabeled), data.classes) or len(teachers) == 0:
        wanted = ("teachers", len(x_unlabeled), data.classes)
        raise DataError(f"teachers' outputs must have shape {wanted}, not {teachers.shape}")
    own = np.exp(log_probabilities(structure, data, weights, x_unlabeled))
    changes = []
    for number, said in enumerate(teachers):
        both = (np.exp(said) + LOYALTY * own) / (1 + LOYALTY)
        target = np.log(np.maximum(both, np.finfo(np.float32).tiny))
        of_this = (seed + number) % 2**31
        alone = distill(
            structure, data, weights, x_unlabeled, target, settings, of_this, gain=gain, copies=copies
        )
        changes.append(alone - weights)
    vectors = np.stack(changes)

    def taught(shares: NDArray[np.float64]) -> Vector:
        return np.asarray(weights + shares.astype(np.float32) @ vectors, np.float32)

    equal = np.full(len(vectors), 1 / len(vectors))
    if labelled is None or len(labelled[1]) == 0:
        return Integrated(weights=taught(equal), shares=equal)
    x, y = labelled
    drawn = np.random.default_rng(seed).dirichlet(np.ones(len(vectors)), CANDIDATES)
    candidates = np.concatenate([equal[None], np.eye(len(vectors)), drawn])
    surprise = [
        -float(log_probabilities(structure, data, taught(shares), x)[np.arange(len(y)), y].mean())
        for shares in candidates
    ]
    best = candidates[int(np.argmin(surprise))]
    return Integrated(weights=taught(best), shares=best)
