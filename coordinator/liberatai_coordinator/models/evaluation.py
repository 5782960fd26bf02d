"""How well a version answers: by what devices tell of their own hold-outs, and on labels of the coordinator.

Pure: values in, values out. Nothing here decides anything; no figure finds a weight or chooses a device.

What devices tell are sums, (correct, total), and nobody can check them. So no device outweighs the others: in
every group a device counts for at most the lower median of the group's totals, its right answers shortened by
the same factor. At least half of n devices then count in full, so that one is never more than 2 / n of a
figure, whatever it claims; what it claims to get right still counts with that share.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import FloatArray, accuracy, require_labels
from liberatai_core.aggregator.guard import divided
from liberatai_core.aggregator.methods import LABELLED
from liberatai_core.errors import SchemaError

MIN_TOTAL: Final = 10
"""Questions that a device must have answered to be among the worst. With three, one that is right in 80 % of
all cases shows 67 % or less every second time; with ten its figure still spreads by 13 points."""
WORST_SHARE: Final = 0.1
MAX_PROFILES: Final = 32
"""Devices choose these names: the rarest share one group, so that a round's record stays small."""
NO_PROFILE: Final = "no profile"
OTHER_PROFILES: Final = "other profiles"


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How a group of devices does on what they hold out of their own data.

    Attributes:
        accuracy: right answers per question; a device counts for at most the lower median of its group's
            questions. None: nobody held anything out.
        correct, total: the sums as devices told them, not capped.
        devices: that held something out.
    """

    accuracy: float | None = None
    correct: int = 0
    total: int = 0
    devices: int = 0


class WorstTenth(msgspec.Struct, frozen=True, kw_only=True):
    """The devices that a model serves worst: mean accuracy, how many they are, and of how many."""

    accuracy: float
    devices: int
    of: int


class LocalScores(msgspec.Struct, frozen=True, kw_only=True):
    """What the devices of one round scored on their own hold-outs; the ledger keeps it with the round.

    Attributes:
        version: that they scored: the one that the round began with.
        structures: by structure id.
        profiles: by the profile that the device names, else by the form of file that suits it.
        worst: None if no device held out enough.
        late: devices that scored an older version (buffered jobs); they count all the same.
    """

    version: int
    all: Score = Score()
    structures: dict[str, Score] = {}
    profiles: dict[str, Score] = {}
    worst: WorstTenth | None = None
    late: int = 0


class CentralScores(msgspec.Struct, frozen=True, kw_only=True):
    """What one version reaches on labelled data of the coordinator; the ledger keeps it with the round.

    Attributes:
        version: that was scored: the one that the round made.
        samples: labels that it was scored on.
        structures: accuracy by structure id.
        ensemble: of what the version answers, as the guard decided.
    """

    version: int
    samples: int
    structures: dict[str, float] = {}
    ensemble: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one device told of its hold-out.

    Attributes:
        profile: that the device names; "" for none.
        correct, total: 0 ≤ correct ≤ total.
        late: it scored an older version than the round began with.
    """

    device: str
    structure: str
    profile: str
    correct: int
    total: int
    late: bool = False


def local(version: int, told: Sequence[Told]) -> LocalScores | None:
    """Return how the devices of one round scored a version; None if none of them held anything out.

    Args:
        version: that the round began with.
        told: at most one per device.

    Raises:
        SchemaError: a device counts twice, or its counts cannot be.
    """
    if len({one.device for one in told}) != len(told):
        raise SchemaError("evaluation: a device told twice")
    answered = [one for one in told if one.total]
    if not answered:
        return None
    names = _profile_names(answered)
    return LocalScores(
        version=version,
        all=score(answered),
        structures={
            sid: score([one for one in answered if one.structure == sid])
            for sid in sorted({one.structure for one in answered})
        },
        profiles={
            name: score([one for one in answered if names[one.device] == name])
            for name in sorted(set(names.values()))
        },
        worst=worst(answered),
        late=sum(one.late for one in answered),
    )


def score(told: Sequence[Told]) -> Score:
    """Return how a group of devices did, none of them with more weight than the module allows.

    Raises:
        SchemaError: counts that cannot be.
    """
    for one in told:
        if not 0 <= one.correct <= one.total:
            raise SchemaError(f"evaluation: {one.device} has {one.correct} right of {one.total}")
    answered = [one for one in told if one.total]
    if not answered:
        return Score()
    cap = median_low(one.total for one in answered)
    weights = [min(one.total, cap) for one in answered]
    right = sum(weight * one.correct / one.total for weight, one in zip(weights, answered, strict=True))
    return Score(
        # Rounding errors of a sum must not make more than all of it.
        accuracy=min(1.0, right / sum(weights)),
        correct=sum(one.correct for one in answered),
        total=sum(one.total for one in answered),
        devices=len(answered),
    )


def worst(told: Sequence[Told]) -> WorstTenth | None:
    """Return the mean accuracy of the worst tenth of the devices with `MIN_TOTAL` questions or more."""
    shares = sorted(one.correct / one.total for one in told if one.total >= MIN_TOTAL)
    if not shares:
        return None
    number = max(1, int(np.ceil(WORST_SHARE * len(shares))))
    return WorstTenth(accuracy=fmean(shares[:number]), devices=number, of=len(shares))


def _profile_names(told: Sequence[Told]) -> dict[str, str]:
    """Return the name of each device's group, by device."""
    own = {one.device: one.profile or NO_PROFILE for one in told}
    counts = Counter(own.values())
    if len(counts) <= MAX_PROFILES:
        return own
    kept = set(sorted(counts, key=lambda name: (-counts[name], name))[: MAX_PROFILES - 1])
    return {device: name if name in kept else OTHER_PROFILES for device, name in own.items()}


def guard_rows(y: NDArray[np.int64], method: str, seed: int) -> NDArray[np.int64]:
    """Return the rows of `aggregate.validation` that did not find an ensemble's weights: the guard's.

    Args:
        y: all labels, shape (n,).
        method: that found the weights, by name.
        seed: by which the labels were divided.
    """
    return divided(y, seed)[1] if method in LABELLED else np.arange(len(y))


def central(
    version: int,
    members: Sequence[str],
    log_probs: FloatArray,
    together: FloatArray,
    y: NDArray[np.int64],
) -> CentralScores | None:
    """Return what a version reaches on labels of the coordinator; None if there are none.

    Args:
        version: that answered.
        members: structure ids.
        log_probs: of the members, shape (members, n, classes).
        together: of the version as a whole, shape (n, classes).
        y: labels, shape (n,).

    Raises:
        SchemaError: shapes do not fit.
    """
    if len(members) != len(log_probs) or together.shape != log_probs.shape[1:]:
        raise SchemaError(f"evaluation: {len(members)} members, {log_probs.shape}, {together.shape}")
    require_labels(together, y)
    if not len(y):
        return None
    return CentralScores(
        version=version,
        samples=len(y),
        structures={sid: accuracy(own, y) for sid, own in zip(members, log_probs, strict=True)},
        ensemble=accuracy(together, y),
    )
