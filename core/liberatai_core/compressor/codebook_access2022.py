"""The original method with an automatic search of its configuration. A baseline by name.

Thonglek, Takahashi, Ichikawa, Nakasan, Nakada, Takano, Leelaprute and Iida, "Automated Quantization and
Retraining for Neural Network Models Without Labeled Data", IEEE Access 10, 2022, doi
10.1109/ACCESS.2022.3190627: the same quantisation and retraining as `codebook_ijcnn2020`, the number of
centroids of every layer found by a search, several points of size against quality to pick from.

The paper's search algorithm is not known to us. Here it is the multi-objective tree-structured Parzen
estimator (Ozaki et al., GECCO 2020) of Optuna, which needs few trials; it starts from the configurations that
give all layers one k, so its points are at least as good as those. 4 centroids are allowed besides the
numbers of the first paper: where they lose nothing, the baseline becomes stronger.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from liberatai_core.compressor.codebook_ijcnn2020 import KS, Config
from liberatai_core.errors import MissingExtraError

CHOICES = (0, 4, *KS)
"""Centroids that the search may give a layer; 0 leaves it float."""
MAX_TRIALS = 2000
"""The time of a sampler that models all trials grows with their square: 2000 take minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A configuration, its size in bytes, and how much quality it loses before retraining."""

    config: Mapping[str, int]
    size: int
    lost: float


def search(
    layers: Sequence[str],
    score: Callable[[Config], tuple[int, float]],
    trials: int,
    seed: int,
    *,
    choices: Sequence[int] = CHOICES,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Point]:
    """Return the configurations that none of the tried ones beats in both size and loss, the largest first.

    Args:
        layers: names of the layers' weights.
        score: configuration -> (bytes, quality lost); should be the same for the same configuration.
        trials: budget, 1 … 2000; the first ones give all layers one k, the finest first.
        seed: of the sampler.
        choices: centroids that a layer may get, 0 for none.
        on_progress: called with (done, planned).

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    if not 1 <= trials <= MAX_TRIALS:
        raise ValueError(f"trials must be 1 to {MAX_TRIALS}, not {trials}")
    try:
        import optuna  # noqa: PLC0415  (the other methods work without it)
    except ImportError as error:
        raise MissingExtraError("optuna is not installed: pip install 'liberatai[coordinator]'") from error
    points: list[Point] = []
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed)
        )
        for k in sorted(choices, reverse=True):
            study.enqueue_trial(dict.fromkeys(layers, k))
        for number in range(trials):
            trial = study.ask()
            chosen = {layer: int(trial.suggest_categorical(layer, list(choices))) for layer in layers}
            config = {layer: k for layer, k in chosen.items() if k}
            size, lost = score(config)
            study.tell(trial, [float(size), lost])
            points.append(Point(config=config, size=size, lost=lost))
            if on_progress is not None:
                on_progress(number + 1, trials)
    finally:
        optuna.logging.set_verbosity(before)
    return pareto(points)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats, the largest first; of equal ones the first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.size, one.lost)):
        if not kept or point.lost < kept[-1].lost:
            kept.append(point)
    return kept[::-1]


def pick(points: Sequence[Point], tolerances: Sequence[float]) -> list[Point]:
    """Return for each tolerance the smallest point that loses at most so much; each point once.

    A tolerance that no point meets gives nothing.
    """
    found: list[Point] = []
    for tolerance in tolerances:
        fitting = [point for point in points if point.lost <= tolerance]
        if fitting:
            best = min(fitting, key=lambda point: (point.size, point.lost))
            if best not in found:
                found.append(best)
    return found
