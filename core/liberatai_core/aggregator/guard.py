"""The guard: the ensemble is used only if it is not worse than its best member on held-out labels.

The published table of the original method (ICMLA 2020) would have triggered it three times.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FloatArray, accuracy, require_labels, require_members
from liberatai_core.errors import SchemaError


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


def guard(ensemble: FloatArray, members: FloatArray, y: NDArray[np.int64]) -> Decision:
    """Compare on held-out labels; equal accuracy is enough for the ensemble.

    Args:
        ensemble: log-probabilities, shape (n, classes).
        members: log-probabilities, shape (members, n, classes).
        y: labels that neither training nor the search for weights has seen, shape (n,). If there are
            none, this is `unguarded`.

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
    better = together >= scores[best]
    text = f"ensemble {together:.1%}, best member {scores[best]:.1%} on {len(y)} held-out labels"
    return Decision(
        use="ensemble" if better else best,
        ensemble_accuracy=together,
        best_member_accuracy=scores[best],
        reason=text if better else f"{text}: falling back to member {best}",
    )


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
