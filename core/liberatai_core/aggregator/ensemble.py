"""The ensemble: unlike members' predictions become one.

Three pools, all with one weight per member m and class c:

    log:     z_c(x) = sum_m W[m, c] * (log p_m(c|x) - log_priors[m, c]) + bias[c]
    linear:  y_c(x) = sum_m W[m, c] * p_m(c|x)                   (the original method, ICMLA 2020)
    vote:    y_c(x) = sum_m W[m, c] * ([c = argmax p_m(x)] + p_m(c|x) / 1000)

The log pool needs agreement, the linear pool takes any member's word; see Hinton, "Training Products of
Experts by Minimizing Contrastive Divergence", Neural Computation 2002. A vote hears only what each member
thinks most likely, and the probabilities decide where votes are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.errors import NonFiniteError, SchemaError

FloatArray = NDArray[np.float32] | NDArray[np.float64]
Counts = NDArray[np.int64] | NDArray[np.float64]

Kind = Literal["log", "linear", "vote"]

TIE = 1e-3
"""Share of the probabilities in a vote: less than one vote of many members, and enough to break a tie."""
FLOOR = 1e-6
"""Probabilities are clipped here before a weighted sum of logarithms: one member that is certain and
wrong must not veto all others."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pool:
    """How members are combined.

    Attributes:
        weights: shape (members, classes), float64.
        log_priors: log class shares that each member learnt from, shape (members, classes); subtracted.
        bias: added per class at the end, shape (classes,).
        kind: "log", "linear" or "vote"; only a log pool has priors or a bias.
    """

    weights: NDArray[np.float64]
    log_priors: NDArray[np.float64] | None = None
    bias: NDArray[np.float64] | None = None
    kind: Kind = "log"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What a method may look at to find the weights; every method says what it needs.

    Attributes:
        class_counts: samples of every class that each member learnt from, shape (members, classes).
        balance: strength of the balanced softmax in training: 1 means that members carry no class prior.
        log_probs: members' log-probabilities on labelled validation data, shape (members, n, classes).
        y: the labels, shape (n,).
        seed: of a random search.
    """

    class_counts: Counts
    balance: float = 0.0
    log_probs: FloatArray | None = None
    y: NDArray[np.int64] | None = None
    seed: int = 0


Method = Callable[[Evidence], Pool]
"""One way to find the weights; see `ENSEMBLES` in `methods.py`."""


def pooled(pool: Pool, log_probs: FloatArray) -> NDArray[np.float32]:
    """Return `combine` with the settings of `pool`."""
    return combine(log_probs, pool.weights, log_priors=pool.log_priors, bias=pool.bias, kind=pool.kind)


def combine(
    log_probs: FloatArray,
    weights: FloatArray,
    *,
    log_priors: FloatArray | None = None,
    bias: FloatArray | None = None,
    kind: Kind = "log",
) -> NDArray[np.float32]:
    """Return the ensemble's log-probabilities, shape (n, classes), float32.

    Args:
        log_probs: members' log-probabilities, shape (members, n, classes).
        weights: shape (members, classes).
        log_priors: see `Pool`.
        bias: see `Pool`.
        kind: see `Pool`.

    Raises:
        SchemaError: shapes do not fit, or a pool other than "log" has negative weights, priors or a bias.
        NonFiniteError: an input is NaN, or a weight, prior or bias infinite.
    """
    require_members(log_probs)
    members, _, classes = log_probs.shape
    for name, value, shape in (
        ("weights", weights, (members, classes)),
        ("log_priors", log_priors, (members, classes)),
        ("bias", bias, (classes,)),
    ):
        if value is not None and value.shape != shape:
            raise SchemaError(f"ensemble {name}: shape {value.shape}, wanted {shape}")
        if value is not None and not np.isfinite(value).all():
            raise NonFiniteError(f"ensemble {name}: a value is not finite")
    if kind != "log":
        if log_priors is not None or bias is not None or (weights < 0).any():
            raise SchemaError(f"ensemble: a {kind} pool has weights from 0 and neither priors nor bias")
        return _mixed(np.exp(log_probs.astype(np.float64)), weights, vote=kind == "vote")
    evidence = np.maximum(log_probs.astype(np.float64), np.log(FLOOR))
    if log_priors is not None:
        evidence = evidence - log_priors[:, None, :]
    scores: NDArray[np.float64] = np.einsum("mnc,mc->nc", evidence, weights.astype(np.float64))
    return normalised(scores if bias is None else scores + bias)


def _mixed(probabilities: NDArray[np.float64], weights: FloatArray, *, vote: bool) -> NDArray[np.float32]:
    if vote:
        named = np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)]
        probabilities = named + TIE * probabilities
    mixed = np.einsum("mnc,mc->nc", probabilities, weights.astype(np.float64))
    return normalised(np.log(np.maximum(mixed, FLOOR)))


def normalised(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return log softmax over the last axis, float32."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(
        np.float32
    )
    return result


def require_members(log_probs: FloatArray) -> None:
    """Raise unless this is (members >= 1, n, classes >= 2) without NaN; -inf (probability 0) is fine."""
    if log_probs.ndim != 3 or log_probs.shape[0] < 1 or log_probs.shape[2] < 2:
        raise SchemaError(
            f"ensemble: log-probabilities of shape {log_probs.shape}, wanted (members, n, classes)"
        )
    if np.isnan(log_probs).any() or (log_probs == np.inf).any():
        raise NonFiniteError("ensemble: a log-probability is NaN or +inf")


def accuracy(log_probs: FloatArray, y: NDArray[np.int64]) -> float:
    """Return the share of rows whose largest value stands at the label."""
    return float(np.mean(log_probs.argmax(axis=1) == y))


def checked_counts(class_counts: Counts) -> NDArray[np.float64]:
    """Return class counts as float64.

    Raises:
        SchemaError: not (members >= 1, classes >= 2), or a count is negative.
        NonFiniteError: a count is NaN or infinite.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] < 1 or counts.shape[1] < 2:
        raise SchemaError(f"class counts have shape {counts.shape}, wanted (members, classes)")
    if not np.isfinite(counts).all():
        raise NonFiniteError("a class count is not finite")
    if (counts < 0).any():
        raise SchemaError("a class count is negative")
    return counts


def labelled(evidence: Evidence) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return the validation predictions and labels, checked against each other.

    Raises:
        SchemaError: there are none, or shapes or labels do not fit.
        NonFiniteError: a prediction is NaN.
    """
    log_probs, y = evidence.log_probs, evidence.y
    if log_probs is None or y is None or len(y) == 0:
        raise SchemaError("ensemble: this method needs labelled validation samples")
    require_members(log_probs)
    require_labels(log_probs, y)
    if evidence.class_counts.shape != (log_probs.shape[0], log_probs.shape[2]):
        raise SchemaError(
            f"class counts have shape {evidence.class_counts.shape}: not those of these members"
        )
    return log_probs, y


def require_labels(log_probs: FloatArray, y: NDArray[np.int64]) -> None:
    """Raise SchemaError unless `y` has one label 0 … classes-1 per row of (…, n, classes)."""
    if y.shape != log_probs.shape[-2:-1]:
        raise SchemaError(f"labels have shape {y.shape}, wanted {log_probs.shape[-2:-1]}")
    if y.size and (int(y.min()) < 0 or int(y.max()) >= log_probs.shape[-1]):
        raise SchemaError(f"labels must be 0 to {log_probs.shape[-1] - 1}")
