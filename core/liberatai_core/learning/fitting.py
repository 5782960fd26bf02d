"""Fit a model into byte budgets, without labels: measure, search, retrain, and say what was lost.

For every budget, from the largest to the smallest, the file is searched (`compressor`) with the sensitivity
that was measured once, then retrained (`retraining.py`), starting from the float weights behind the file
before it. Where that loses much, a smaller member of the same family is taught by the original and
compressed in its place: beyond some 30 times a smaller network beats squeezing a large one (EPR's VGG-16:
101 KB at 90.0 %, Oktay et al., arXiv:1906.06624, beside 47 KB at 91.1 %, Elsken et al., arXiv:1804.09081).
The better one on samples that taught neither is kept.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from liberatai_core.compressor import artifact, codebook
from liberatai_core.errors import BudgetError, StructureError
from liberatai_core.learning import families, statistics
from liberatai_core.learning.distillation import DistillSettings, distill
from liberatai_core.learning.retraining import RetrainSettings, retrain
from liberatai_core.learning.sensitivity import importance, sensitivity
from liberatai_core.learning.training import (
    log_probabilities,
    require_inputs,
    require_ranges,
    require_samples,
)
from liberatai_core.structure import DataContract, Structure, require_length
from liberatai_core.weights import Vector, require_finite

HELD_OUT = 512
"""Unlabeled samples that teach nothing and judge: agreement to about one per cent …"""
HELD_SHARE = 10
"""… but at most a tenth of all."""
FEW = 20
"""With fewer samples none is held out: the judgement is then about the samples that taught."""
GUESSING = 1.5
"""Times the share that guessing would get: who agrees no more often is told to be no better than that."""
GOOD = 0.95
"""Agreement with the original from which no smaller member is tried: it would cost as much again."""
DENSE = 4.0
"""Budgets of more bits per weight are never better spent on a smaller member."""
MEMBER_BITS = 2.5
"""Bits per weight that a smaller member is given: where its own retraining loses little."""


class FitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is fitted.

    Attributes:
        steps: batches of retraining for every budget, 1 … 1e6.
        batch_size: samples of one step, 1 … 65536.
        retrain: teach the compressed model; else the search only.
        smaller: try smaller members of the family where much is lost.
        learning_rate: of retraining, in units of its own (`retraining.RetrainSettings`).
        augment: strength of the changes of the unlabeled samples, 0 … 4.
        mixup: parameter of the Beta distribution by which samples are mixed, 0 none, at most 10.
    """

    steps: int = 600
    batch_size: int = 128
    retrain: bool = True
    smaller: bool = True
    learning_rate: float = 0.001
    augment: float = 1.0
    mixup: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values outside the ranges given above, all faults at once."""
        require_ranges(self, "fit", FIT_RANGES)


FIT_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 1e6),
    "batch_size": (1, 65_536),
    "learning_rate": (1e-9, 10),
    "augment": (0, 4),
    "mixup": (0, 10),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
    """A compressed model, what it costs and what it lost.

    Attributes:
        structure: of the file; another one than the original's if a smaller member served better.
        file: for `compressor.artifact.restore`.
        budget_bytes: what it was fitted into.
        divergence: mean KL(original || variant) on held-out unlabeled samples, nats; NaN without samples.
        agreement: share of held-out unlabeled samples with the same top class; NaN without samples.
        accuracy: on the test set; None if there is none.
        method: what was done, in words.
        why: what else was tried, or what is lost, in words.
        seconds: wall time.
    """

    structure: Structure
    file: bytes
    budget_bytes: int
    divergence: float
    agreement: float
    accuracy: float | None
    method: str
    why: str
    seconds: float


OnProgress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps planned)."""


def fit(
    structure: Structure,
    data: DataContract,
    weights: Vector,
    budgets: Sequence[int],
    x_unlabeled: NDArray[np.float32] | None,
    settings: FitSettings,
    seed: int,
    *,
    test: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
    on_progress: OnProgress | None = None,
    cache: Path | None = None,
) -> list[Variant]:
    """Return one variant per budget, in the order of the budgets.

    Byte-identical for equal arguments on one machine. No label is read but those of `test`, which only
    reports.

    Args:
        structure: of the original.
        data: its data contract.
        weights: the original.
        budgets: bytes of the files.
        x_unlabeled: inputs, shape (n, *input_shape); None: weights alone decide, nothing is retrained.
        settings: see there.
        seed: fixes samples and their order.
        test: inputs and labels for the accuracies of the result.
        on_progress: what is going on.
        cache: a folder in which an interrupted retraining is continued.

    Raises:
        BudgetError: a budget is below the smallest possible file; the text names that size.
        DataError: inputs of another shape, or no samples.
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
        TrainingError: retraining diverged.
    """
    require_length(weights, structure)
    require_finite(weights, structure.id)
    if test is not None:
        require_samples(data, *test)
    for budget in budgets:
        if budget < codebook.smallest_bytes(structure):
            raise BudgetError(
                f"{budget} bytes: the smallest possible file of {structure.id} has "
                f"{codebook.smallest_bytes(structure)} bytes"
            )
    bench = _Bench(structure, data, weights, x_unlabeled, settings, seed, test, on_progress, cache)
    found: dict[int, Variant] = {}
    shadow: Vector | None = None
    before: int | None = None
    for budget in sorted(set(budgets), reverse=True):
        variant, shadow = bench.fitted(budget, shadow, before)
        found[budget] = _warned(variant, data.classes)
        before = budget
    return [found[budget] for budget in budgets]


def _warned(variant: Variant, classes: int) -> Variant:
    if not variant.agreement <= GUESSING / classes:  # NaN without samples
        return variant
    told = "agrees hardly more often than guessing would: the budget is too small"
    return replace(variant, why=f"{variant.why}; {told}" if variant.why else told)


def judging(samples: int) -> int:
    """Return how many of so many unlabeled samples judge and teach nothing; 0: those that teach judge."""
    return min(HELD_OUT, max(1, samples // HELD_SHARE)) if samples >= FEW else 0


def pareto(variants: Sequence[Variant]) -> list[Variant]:
    """Return those that no other one beats in size and divergence (accuracy where both have one), by size."""
    kept: list[Variant] = []
    for variant in sorted(variants, key=lambda one: (len(one.file), _loss(one))):
        if not kept or _loss(variant) < _loss(kept[-1]) or math.isnan(_loss(variant)):
            kept.append(variant)
    return kept


def accuracy(
    structure: Structure, data: DataContract, weights: Vector, x: NDArray[np.float32], y: NDArray[np.int64]
) -> float:
    """Return the share of samples whose top class is their label.

    Raises:
        DataError: no samples, or they do not fit the contract.
        StructureError, NonFiniteError: the weights do not belong to the structure, or are not finite.
    """
    require_samples(data, x, y)
    return float((log_probabilities(structure, data, weights, x).argmax(axis=1) == y).mean())


def _loss(variant: Variant) -> float:
    return variant.divergence if variant.accuracy is None else -variant.accuracy


class _Bench:
    """The original, its samples, and what was measured once for all budgets."""

    def __init__(
        self,
        structure: Structure,
        data: DataContract,
        weights: Vector,
        x: NDArray[np.float32] | None,
        settings: FitSettings,
        seed: int,
        test: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
        on_progress: OnProgress | None,
        cache: Path | None,
    ) -> None:
        self.structure, self.data, self.weights = structure, data, weights
        self.settings, self.seed, self.test, self.cache = settings, seed, test, cache
        self.on_progress = on_progress
        self.teaching = self.judging = x
        self.sensitivity: Mapping[str, float] = {}
        self.prepared: codebook.Prepared | None = None
        self.wanted: NDArray[np.float32] | None = None
        if x is None:
            return
        require_inputs(data, x)
        if judging(len(x)):
            order = np.random.default_rng(seed).permutation(len(x))
            held = judging(len(x))
            self.judging, self.teaching = x[np.sort(order[:held])], x[np.sort(order[held:])]
        self._say("measuring the sensitivity", 0, len(structure.tensors))
        self.sensitivity = self._measured(structure, weights)
        self.wanted = log_probabilities(structure, data, weights, x if self.judging is None else self.judging)

    def fitted(self, budget: int, shadow: Vector | None, before: int | None) -> tuple[Variant, Vector | None]:
        """Return the variant of one budget, and the float weights behind the original structure's file."""
        started = time.perf_counter()
        if self.teaching is None or not self.settings.retrain:
            if self.prepared is None:
                self.prepared = codebook.prepare(self.weights, self.structure, self.sensitivity or None)
            file = self._searched(self.prepared, budget)
            why = (
                "no unlabeled samples: weights alone decided, nothing was retrained, the loss is unknown"
                if self.teaching is None
                else "not retrained"
            )
            return self._variant(self.structure, file, budget, "codebook", why, started), None
        retrained = retrain(
            self.structure,
            self.data,
            self.weights,
            budget,
            self.teaching,
            self.sensitivity,
            self._retraining(),
            self.seed,
            start=shadow,
            start_bytes=before,
            cache=self.cache,
            on_step=self._step(f"retraining for {budget} bytes"),
        )
        variant = self._variant(self.structure, retrained.file, budget, "codebook, retrained", "", started)
        if self.settings.smaller:
            variant = self._or_smaller(variant, budget, started)
        return variant, retrained.shadow

    def _or_smaller(self, variant: Variant, budget: int, started: float) -> Variant:
        """Return the better of this variant and a smaller member of the family, and say why."""
        bits = 8 * budget / self.structure.parameters
        if bits >= DENSE:
            return replace(variant, why=f"{bits:.2g} bits per weight: no smaller member was tried")
        if variant.agreement >= GOOD:
            return replace(
                variant,
                why=f"agrees with the original on {variant.agreement:.1%}: no smaller member was tried",
            )
        try:
            member = families.smaller(self.structure, self.data, int(8 * budget / MEMBER_BITS))
        except StructureError:
            member = None
        if member is None or budget < codebook.smallest_bytes(member):
            return replace(variant, why=f"{self.structure.family} has no smaller member for this budget")
        rival = self._small_variant(member, budget, started)
        better, worse = (rival, variant) if self._closer(rival, variant) else (variant, rival)
        return replace(
            better,
            why=f"{better.structure.id} agrees with the original on {better.agreement:.1%} (divergence "
            f"{better.divergence:.3g}), {worse.structure.id} in as many bytes on {worse.agreement:.1%} "
            f"({worse.divergence:.3g})",
            seconds=time.perf_counter() - started,
        )

    def _closer(self, one: Variant, other: Variant) -> bool:
        """Whether one is closer to the original: agrees more often beyond chance, else diverges less."""
        assert self.judging is not None  # noqa: S101 (only called with samples)
        shares = np.array([one.agreement, other.agreement])
        chance = 2 * math.sqrt(float((shares * (1 - shares)).sum()) / len(self.judging))
        apart = one.agreement - other.agreement
        return apart > 0 if abs(apart) > chance else one.divergence < other.divergence

    def _small_variant(self, member: Structure, budget: int, started: float) -> Variant:
        assert self.teaching is not None  # noqa: S101 (only called with samples)
        self._say(f"teaching {member.id}", 0, 1)
        try:
            start = families.sliced(self.weights, self.structure, member)
        except StructureError:
            start = families.initial_weights(member, self.data, self.seed)
        settings = DistillSettings(
            steps=self.settings.steps,
            batch_size=min(self.settings.batch_size, len(self.teaching)),
            augment=self.settings.augment,
        )
        taught = distill(
            member,
            self.data,
            start,
            self.teaching,
            lambda x: log_probabilities(self.structure, self.data, self.weights, x),
            settings,
            self.seed,
        )
        own_sensitivity = self._measured(member, taught)
        small = retrain(
            member,
            self.data,
            taught,
            budget,
            self.teaching,
            own_sensitivity,
            self._retraining(),
            self.seed,
            cache=self.cache,
            on_step=self._step(f"retraining {member.id} for {budget} bytes"),
        )
        return self._variant(member, small.file, budget, "smaller member, codebook, retrained", "", started)

    def _measured(self, structure: Structure, weights: Vector) -> dict[str, float]:
        assert self.teaching is not None  # noqa: S101 (only called with samples)
        # Within a tensor all weights count alike: weighed by their Fisher information, files of 20 … 60 times
        # were worse (docs/decisions/0015-noise-over-signal.md).
        fisher = importance(structure, self.data, weights, self.teaching, self.seed)
        return sensitivity(
            structure,
            self.data,
            weights,
            self.teaching,
            fisher,
            self.seed,
            on_trial=self._step("measuring the sensitivity"),
        )

    def _searched(self, prepared: codebook.Prepared, budget: int) -> bytes:
        """Return the file of a search alone, with running statistics of what it made, where it has any."""
        if self.teaching is None:
            return codebook.compress_prepared(prepared, budget)
        file = codebook.compress_prepared(prepared, statistics.before_restating(self.structure, budget))
        return statistics.restated(file, self.structure, self.data, self.teaching, budget)

    def _retraining(self) -> RetrainSettings:
        own = self.settings
        return RetrainSettings(
            steps=own.steps,
            batch_size=own.batch_size,
            learning_rate=own.learning_rate,
            augment=own.augment,
            mixup=own.mixup,
        )

    def _variant(
        self, structure: Structure, file: bytes, budget: int, method: str, why: str, started: float
    ) -> Variant:
        weights = artifact.restore(file, structure)
        divergence = agreement = math.nan
        if self.wanted is not None and self.judging is not None:
            found = log_probabilities(structure, self.data, weights, self.judging)
            divergence = float((np.exp(self.wanted) * (self.wanted - found)).sum(axis=1).mean())
            agreement = float((found.argmax(axis=1) == self.wanted.argmax(axis=1)).mean())
        return Variant(
            structure=structure,
            file=file,
            budget_bytes=budget,
            divergence=divergence,
            agreement=agreement,
            accuracy=None if self.test is None else accuracy(structure, self.data, weights, *self.test),
            method=method,
            why=why,
            seconds=time.perf_counter() - started,
        )

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, planned: self._say(what, done, planned)

    def _say(self, what: str, done: int, planned: int) -> None:
        if self.on_progress is not None:
            self.on_progress(what, done, planned)
