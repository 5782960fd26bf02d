"""How the differences of one structure become one: the mean, or a rule that a minority cannot steer.

Every rule but `mean` first clips lengths (`norm_clip`), then merges:

| name | merges by | memory, in float64 values |
|---|---|---|
| `mean` | sample-weighted mean | model |
| `norm_clip` | sample-weighted mean | model |
| `trimmed_mean` | trimmed mean of those that sent a coordinate | all sent values |
| `median` | their median | all sent values |
| `centred_clipping` | centred clipping of buckets | all sent values + devices^2 |
| `nnm_trimmed_mean` | trimmed mean of nearest-neighbour mixtures | all sent values + devices^2 |
| `neighbour_vote` | mean of all but the f that are fewest devices' neighbours | all sent values + devices^2 |
| `screened_mean` | sample-weighted mean of all but at most f that stand out | all sent values + devices^2 |

Sample counts are a device's own word. `mean` caps them by the job; `norm_clip` and `screened_mean` also by
the median of the round, which a minority cannot raise beyond honest counts; the others give every device one
voice.

Updates come sparse and are merged sparse. A rule that holds them reads each once; `mean` and `norm_clip` read
again what exceeds a quarter of the model's values.

Updates are sorted by id, sums are exact or ranked, and selections rest on exact scalar products: the same
updates give the same bytes in whichever order they came.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator import mean
from liberatai_core.aggregator.centred_clipping import centred_weights
from liberatai_core.aggregator.median import median_of_senders
from liberatai_core.aggregator.neighbour_vote import elected
from liberatai_core.aggregator.nnm import mixed, neighbours
from liberatai_core.aggregator.norm_clip import clip_factors
from liberatai_core.aggregator.packed import Packed, blocks, compact, dot, gram, norm, pack, scaled
from liberatai_core.aggregator.screen import passed
from liberatai_core.aggregator.trimmed_mean import trimmed_mean, trimmed_mean_of_senders
from liberatai_core.errors import DuplicateError, SchemaError, StructureError, TooLargeError
from liberatai_core.weights import Vector, require_finite

Name = Literal[
    "mean",
    "norm_clip",
    "trimmed_mean",
    "median",
    "centred_clipping",
    "nnm_trimmed_mean",
    "neighbour_vote",
    "screened_mean",
]
Verdict = Literal["accepted", "clipped", "refused", "frozen"]
Doubles = NDArray[np.float64]

ROBUST: Name = "screened_mean"
"""What a job that fears hostile devices should name; measured by `benchmarks/robustness.py`."""
MAX_COMPARED = 4096
"""Most devices that rules compare pair by pair: 4096^2 scalar products take 128 MiB."""
_KEPT = 4
"""`mean` and `norm_clip` keep updates with a quarter of the model's values together, as long as these are the
first ones: most rounds of sparse updates are then decoded once, and memory stays that of a few models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """One device's update, read when it is needed so that not all are in memory at once.

    Attributes:
        id: unique name; fixes the order of summation.
        samples: number of samples it was trained on, at least 1.
        read: -> its difference, shape (parameters,), float32; the same one at every call.
        sent: -> the same without its zeros, if it comes like that; None: `read` is asked.
    """

    id: str
    samples: int
    read: Callable[[], Vector]
    sent: Callable[[], Packed] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which rule, and against how many.

    Attributes:
        rule: see the table of this module.
        hostile: share of the devices that may be hostile, 0 … 0.49.
        clip: longest difference that a robust rule leaves as it is, in medians of the lengths.
        cap: most samples that a device counts for.
        over: how `mean` and `norm_clip` count what was not sent, by its name in `mean.RULES`.
        seed: of the buckets of `centred_clipping`.
    """

    rule: Name = "mean"
    hostile: float = 0.0
    clip: float = 2.0
    cap: int = mean.MAX_SAMPLES
    over: str = "mean"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one update gave.

    Attributes:
        id: of the update.
        norm: length of its difference.
        cosine: of the angle between it and the result; 0 where one of them is zero.
        verdict: "clipped": it was shortened; "refused": nothing of it counts, or what does was trimmed;
            "frozen": nobody's counts, there were too few.
    """

    id: str
    norm: float
    cosine: float
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """What a set of updates means.

    Attributes:
        difference: shape (parameters,), float32; zero if frozen.
        contributions: by id.
        frozen: why nothing was merged; "" if it was.
    """

    difference: Vector
    contributions: tuple[Contribution, ...]
    frozen: str = ""


class _Reads:
    """Differences of a set, checked when they are read, and kept as long as there is room.

    Args:
        senders: whose they are.
        parameters: length of every difference.
        room: how many values are kept, together.
    """

    def __init__(self, senders: Sequence[Sender], parameters: int, room: float) -> None:
        self.senders, self.parameters, self.room = senders, parameters, room
        self.kept: dict[int, Packed] = {}
        self.norms: dict[int, float] = {}

    def difference(self, place: int) -> Packed:
        """Return the difference of one sender.

        Raises:
            StructureError: it has another length.
            NonFiniteError: it contains NaN or infinity.
        """
        if place in self.kept:
            return self.kept[place]
        sender = self.senders[place]
        difference = self._checked(sender.sent() if sender.sent else sender.read())
        if place not in self.norms:
            self.norms[place] = norm(difference)
            # Squares of float32 cannot overflow here.
            if not math.isfinite(self.norms[place]):
                require_finite(difference.values, "update")
        if difference.values.size <= self.room:
            self.room -= difference.values.size
            self.kept[place] = difference = compact(difference)
        return difference

    def norm(self, place: int) -> float:
        """Return the length of the difference of one sender."""
        if place not in self.norms:
            self.difference(place)
        return self.norms[place]

    def __iter__(self) -> Iterator[Packed]:
        return map(self.difference, range(len(self.senders)))

    def _checked(self, difference: Packed | Vector) -> Packed:
        shape = (difference.parameters,) if isinstance(difference, Packed) else difference.shape
        if shape != (self.parameters,):
            raise StructureError(f"update of shape {shape}, wanted ({self.parameters},)")
        return difference if isinstance(difference, Packed) else pack(difference)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Set:
    """A checked set of updates: what they are, what each is multiplied by, and how many are feared."""

    parameters: int
    senders: tuple[Sender, ...]
    reads: _Reads
    factors: Doubles
    f: int
    settings: Settings

    @property
    def norms(self) -> tuple[float, ...]:
        """Lengths of the differences."""
        return tuple(map(self.reads.norm, range(len(self.senders))))


def feared(hostile: float, devices: int) -> int:
    """Return how many of these devices may be hostile: the share, rounded up."""
    # A share such as 0.2 is a little more than a fifth in binary, and 10 devices are not to become 3.
    return math.ceil(hostile * devices - 1e-9)


def merge(settings: Settings, parameters: int, senders: Sequence[Sender]) -> Merged:
    """Return what a set of updates means; byte-identical whatever their order.

    With fewer than 2 f + 1 updates a robust rule merges nothing: the hostile ones could be the majority.

    Args:
        settings: the rule.
        parameters: length of every difference.
        senders: at least one.

    Raises:
        DuplicateError: two updates have one id.
        StructureError: an update has another length.
        NonFiniteError: an update contains NaN or infinity.
        SchemaError: no update, or one that counts no sample.
        TooLargeError: more devices than the rule can compare.
        ValueError: unknown rule, or a setting out of range.
    """
    _require(settings, senders)
    ordered = tuple(sorted(senders, key=lambda sender: sender.id))
    rule = RULES[settings.rule]
    reads = _Reads(ordered, parameters, parameters // _KEPT if rule is _weighted else math.inf)
    robust = settings.rule != "mean"
    f = feared(settings.hostile, len(ordered)) if robust else 0
    group = _Set(
        parameters=parameters,
        senders=ordered,
        reads=reads,
        factors=np.ones(len(ordered)),
        f=f,
        settings=settings,
    )
    if robust:
        group = replace(group, factors=clip_factors(group.norms, settings.clip))
    if len(ordered) < 2 * f + 1:
        frozen = f"{len(ordered)} updates, {2 * f + 1} are needed against {f} hostile ones"
        refused = tuple(
            Contribution(id=sender.id, norm=length, cosine=0.0, verdict="frozen")
            for sender, length in zip(ordered, group.norms, strict=True)
        )
        return Merged(difference=np.zeros(parameters, np.float32), contributions=refused, frozen=frozen)
    result, counted = rule(group)
    return Merged(difference=result, contributions=_contributions(group, result, counted))


def _weighted(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
    """Return the mean with capped weights, one difference in memory at a time."""
    cap = group.settings.cap if group.settings.rule == "mean" else _usual_samples(group)
    rule = mean.RULES[group.settings.over](cap)
    addends = (
        (scaled(difference, factor) if factor < 1 else difference, sender.samples, None)
        for sender, difference, factor in zip(group.senders, group.reads, group.factors, strict=True)
    )
    state = rule.add_all(rule.init(group.parameters), addends)
    return rule.finish(state), np.ones(len(group.senders), dtype=np.bool_)


def _ranked(rule: Callable[[Doubles, int], Doubles]) -> Callable[[_Set], tuple[Vector, NDArray[np.bool_]]]:
    """Return a rule that looks at every coordinate alone."""

    def merged(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
        result = np.zeros(group.parameters, dtype=np.float32)
        for place, values in blocks(_packed(group)):
            result[place] = rule(values * group.factors[:, None], group.f)
        return result, np.ones(len(group.senders), dtype=np.bool_)

    return merged


def _centred(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
    packed = _packed(group)
    weights = centred_weights(_products(packed, group.factors), group.settings.clip, group.settings.seed)
    rule, devices = mean.mean(1), len(packed)
    shares = devices * (weights * group.factors)
    addends = ((scaled(one, share), 1, None) for one, share in zip(packed, shares, strict=True))
    state = rule.add_all(rule.init(group.parameters), addends)
    return rule.finish(state), np.ones(devices, dtype=np.bool_)


def _mixed(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
    packed = _packed(group)
    near = neighbours(_products(packed, group.factors), group.f)
    result = np.zeros(group.parameters, dtype=np.float32)
    for place, values in blocks(packed):
        result[place] = trimmed_mean(mixed(values * group.factors[:, None], near), group.f)
    # What at most f mixtures contain is among the f values that are cut, wherever it is an extreme.
    return result, near.sum(axis=0) > group.f


def _voted(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
    packed = _packed(group)
    counted = elected(_products(packed, group.factors), group.f)
    return _mean_of(group, packed, counted, cap=1)


def _screened(group: _Set) -> tuple[Vector, NDArray[np.bool_]]:
    packed = _packed(group)
    # Lengths are a mark of their own: products of what was sent, before clipping.
    counted = passed(_products(packed, np.ones(len(packed))), group.f)
    return _mean_of(group, packed, counted, cap=_usual_samples(group))


def _mean_of(
    group: _Set, packed: Sequence[Packed], counted: NDArray[np.bool_], cap: int
) -> tuple[Vector, NDArray[np.bool_]]:
    rule = mean.mean(cap)
    addends = (
        (scaled(one, factor), sender.samples, None)
        for one, sender, factor, counts in zip(packed, group.senders, group.factors, counted, strict=True)
        if counts
    )
    return rule.finish(rule.add_all(rule.init(group.parameters), addends)), counted


def _usual_samples(group: _Set) -> int:
    """Return the median of the sample counts, within the cap."""
    return min(group.settings.cap, statistics.median_low([sender.samples for sender in group.senders]))


RULES: dict[Name, Callable[[_Set], tuple[Vector, NDArray[np.bool_]]]] = {
    "mean": _weighted,
    "norm_clip": _weighted,
    "trimmed_mean": _ranked(trimmed_mean_of_senders),
    "median": _ranked(lambda values, _f: median_of_senders(values)),
    "centred_clipping": _centred,
    "nnm_trimmed_mean": _mixed,
    "neighbour_vote": _voted,
    "screened_mean": _screened,
}
"""By name, as a job chooses them: result, and whose updates count in it."""


def _packed(group: _Set) -> list[Packed]:
    return list(group.reads)


def _products(packed: Sequence[Packed], factors: Doubles) -> Doubles:
    if len(packed) > MAX_COMPARED:
        raise TooLargeError(f"{len(packed)} updates to compare, at most {MAX_COMPARED}")
    return gram(packed) * factors[:, None] * factors[None, :]


def _contributions(group: _Set, result: Vector, counted: NDArray[np.bool_]) -> tuple[Contribution, ...]:
    length, found = norm(result), []
    for place, (sender, own) in enumerate(zip(group.senders, group.norms, strict=True)):
        both = own * length
        cosine = dot(group.reads.difference(place), result) / both if both else 0.0
        shortened: Verdict = "clipped" if group.factors[place] < 1 else "accepted"
        verdict: Verdict = shortened if counted[place] else "refused"
        found.append(Contribution(id=sender.id, norm=own, cosine=cosine, verdict=verdict))
    return tuple(found)


def _require(settings: Settings, senders: Sequence[Sender]) -> None:
    if settings.rule not in RULES or settings.over not in mean.RULES:
        raise ValueError(f"no rule {settings.rule} over {settings.over}")
    if settings.over != "mean" and settings.rule not in ("mean", "norm_clip"):
        raise ValueError(f"{settings.rule} does not go with {settings.over}")
    if not 0 <= settings.hostile < 0.5 or not settings.clip > 0:
        raise ValueError(f"hostile {settings.hostile} must lie in [0, 0.5), clip {settings.clip} above 0")
    if not senders:
        raise SchemaError("no update to merge")
    if len({sender.id for sender in senders}) != len(senders):
        raise DuplicateError("two updates have one id")
    if any(sender.samples < 1 for sender in senders):
        raise SchemaError("an update counts no sample")
