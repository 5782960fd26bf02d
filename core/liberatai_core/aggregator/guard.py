"""The guard: the ensemble is not used if held-out labels show that a member is better.

"Show" means beyond chance. Few labels and several members make a winner's curse: on 100 digits the luckiest
of three members looked better than an ensemble that was better than all of them on unseen ones. So both are
compared on the same samples (McNemar, Psychometrika 1947): with b samples that only the member gets right and
c that only the ensemble does, the guard falls back if

    b - c > Z * sqrt(b + c)

With many labels that becomes the plain comparison. The published table of the original method (ICMLA 2020)
would have triggered it three times.

Labels that found the weights would flatter the ensemble: `divided` sets some apart for the guard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FloatArray, accuracy, require_labels, require_members
from liberatai_core.errors import SchemaError

Z = 1.645
"""One-sided 5 %: how sure the guard must be that the member is better."""


FITTED_SHARE = 2 / 3
"""Of the labels, for finding weights: that takes more of them than comparing two models on what is left."""


LEAST_JUDGING = 0.75
"""Of the guard's share of the labels, that it gets at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to use, and why.

    Attributes:
        use: "ensemble", or the index of the member to fall back to.
        ensemble_accuracy: on the held-out labels, 0 … 1; None without labels.
        best_member_accuracy: the same of the best member.
        reason: one line for people.
    """

    use: Literal["ensemble"] | int
    ensemble_accuracy: float | None
    best_member_accuracy: float | None
    reason: str


def guard(
    ensemble: FloatArray, members: FloatArray, y: NDArray[np.int64], names: Sequence[str] = ()
) -> Decision:
    """Compare on held-out labels; the ensemble stays unless a member is better beyond chance.

    Args:
        ensemble: log-probabilities, shape (n, classes).
        members: log-probabilities, shape (members, n, classes).
        y: labels that neither training nor the search for weights has seen, shape (n,). If there are
            none, this is `unguarded`.
        names: of the members, for people; their numbers by default.

    Raises:
        SchemaError: shapes do not fit.
        NonFiniteError: a member's prediction is NaN.
    """
    _require_pair(ensemble, members)
    require_labels(ensemble, y)
    if len(y) == 0:
        return unguarded(ensemble, members)
    scores = [accuracy(member, y) for member in members]
    best = int(np.argmax(scores))
    together = accuracy(ensemble, y)
    right, right_alone = ensemble.argmax(axis=1) == y, members[best].argmax(axis=1) == y
    only_member = int(np.sum(right_alone & ~right))
    only_ensemble = int(np.sum(right & ~right_alone))
    fall_back = only_member - only_ensemble > Z * math.sqrt(only_member + only_ensemble)
    text = f"ensemble {together:.1%}, best member {scores[best]:.1%} on {len(y)} held-out labels"
    if fall_back:
        text += f": falling back to {names[best] if names else f'member {best}'}"
    elif together < scores[best]:
        text += ": no more than chance, the ensemble stays"
    return Decision(
        use=best if fall_back else "ensemble",
        ensemble_accuracy=together,
        best_member_accuracy=scores[best],
        reason=text,
    )


def divided(y: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that may find the weights, and those that the guard judges by.

    Every class is divided in the same shares, by lot: a class with one sample goes to the weights. Where that
    leaves the guard less than `LEAST_JUDGING` of its share, because classes have one or two samples, every
    third of all is the guard's instead, class by class. The same labels and seed give the same rows, so no
    sample changes sides from round to round.

    Args:
        y: labels, shape (n,).
        seed: of the lot.

    Returns:
        Two sorted arrays of row numbers that together are 0 … n-1.
    """
    random = np.random.default_rng(seed)
    lot = random.permutation(len(y))
    lot = lot[np.argsort(y[lot], kind="stable")]
    place = np.arange(len(y)) - np.searchsorted(y[lot], y[lot])
    # The n-th sample of a class is one of the guard's if the share of those before it passes a whole number.
    rest = 1 - FITTED_SHARE
    judging = _passes(place, rest)
    if judging.sum() < LEAST_JUDGING * rest * len(y):
        judging = _passes(np.arange(len(y)), rest)
    return np.sort(lot[~judging]), np.sort(lot[judging])


def _passes(place: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Whether the share of those up to a place passes a whole number there."""
    passes: NDArray[np.bool_] = np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9)
    return passes


def unguarded(ensemble: FloatArray, members: FloatArray) -> Decision:
    """Use the ensemble without held-out labels, and say that nobody has checked it.

    Args:
        ensemble: log-probabilities on unlabeled samples, shape (n, classes).
        members: log-probabilities, shape (members, n, classes).

    Raises:
        SchemaError: shapes do not fit.
        NonFiniteError: a member's prediction is NaN.
    """
    _require_pair(ensemble, members)
    text = "no held-out labels: that the ensemble is not worse than its best member is unchecked"
    if len(ensemble):
        agreeing = float(np.mean(members.argmax(axis=2) == ensemble.argmax(axis=1)))
        text += f"; members agree with it on {agreeing:.0%} of the samples"
    return Decision(use="ensemble", ensemble_accuracy=None, best_member_accuracy=None, reason=text)


def _require_pair(ensemble: FloatArray, members: FloatArray) -> None:
    require_members(members)
    require_members(ensemble[None])
    if ensemble.shape != members.shape[1:]:
        raise SchemaError(f"ensemble {ensemble.shape} and members {members.shape} do not fit together")
