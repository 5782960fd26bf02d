"""Per-class weights by Bayesian optimisation with a random forest, as SMAC does it, see `searches.py`.

Hutter, Hoos & Leyton-Brown, "Sequential Model-Based Optimization for General Algorithm Configuration",
LION 2011: mean and deviation of the trees' answers, expected improvement. The trees split at random places
(Geurts et al., "Extremely Randomized Trees", Machine Learning 2006), the best of some random splits.
"""

import math

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import Method
from liberatai_core.aggregator.searches import modelled, searched

TREES = 10
"""As many as SMAC grows."""
LEAF = 3
"""Samples below which a node is not split any more, as in SMAC."""
START, CANDIDATES = 10, 300

Doubles = NDArray[np.float64]


def smac(trials: int = 50) -> Method:
    """Return the method with this many trials; it needs `log_probs`, `y` and `seed`."""
    return searched(modelled(predicted, start=START, candidates=CANDIDATES), trials)


def predicted(points: Doubles, scores: Doubles, candidates: Doubles) -> tuple[Doubles, Doubles]:
    """Return mean and deviation of the score at candidates; the same for the same arguments.

    Args:
        points: tried, shape (n, d).
        scores: theirs, shape (n,).
        candidates: shape (k, d).
    """
    random = np.random.default_rng(len(points))
    answers = np.empty((TREES, len(candidates)))
    for answer in answers:
        drawn = random.integers(0, len(points), len(points))
        _grow(points[drawn], scores[drawn], candidates, np.arange(len(candidates)), answer, random)
    return answers.mean(axis=0), answers.std(axis=0)


def _grow(
    points: Doubles,
    scores: Doubles,
    candidates: Doubles,
    rows: NDArray[np.int64],
    answer: Doubles,
    random: np.random.Generator,
) -> None:
    """Write a tree's answers about candidates[rows] into `answer`; nodes that nobody asks do not grow."""
    waiting = [(points, scores, rows)]
    while waiting:
        inside, values, asked = waiting.pop()
        split = _split(inside, values, random) if len(values) >= LEAF and len(asked) else None
        if split is None:
            answer[asked] = values.mean()
            continue
        place, cut = split
        left, below = inside[:, place] < cut, candidates[asked, place] < cut
        waiting.append((inside[left], values[left], asked[below]))
        waiting.append((inside[~left], values[~left], asked[~below]))


def _split(points: Doubles, scores: Doubles, random: np.random.Generator) -> tuple[int, float] | None:
    """Return the (coordinate, cut) of some random ones that leaves the smallest variance, None for none."""
    places = random.permutation(points.shape[1])[: math.ceil(points.shape[1] * 5 / 6)]
    low, high = points[:, places].min(axis=0), points[:, places].max(axis=0)
    cuts = low + random.random(places.size) * (high - low)
    left = points[:, places] < cuts
    below = left.sum(axis=0)
    usable = (below > 0) & (below < len(points))
    if not usable.any() or scores.max() == scores.min():
        return None
    total, above = (left * scores[:, None]).sum(axis=0), len(points) - below
    rest = scores.sum() - total
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(usable, total**2 / below + rest**2 / above, -np.inf)
    best = int(np.argmax(gain))
    return int(places[best]), float(cuts[best])
