"""Black-box search for per-class weights: what all searches of the original method (ICMLA 2020) share.

    y_c(x) = sum_m w[m, c] * p_m(c|x),  sum_m w[m, c] = 1 for every class c

A search maximises the accuracy on labelled validation data within a budget of trials. Its space is the unit
cube of raw weights, one coordinate per member and class, which are then divided by their sum over members
(the paper leaves open how it kept the sums; it used 50 trials). The first trial of every search is the
uniform average, so no search ends below it on the labels that it saw; of equal trials the first one wins.

A search is a generator: it yields a point and is sent its score. `tpe.py`, `random_search.py`, `grid.py`,
`pso.py`, `gp.py` and `smac.py` hold one each.
"""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from liberatai_core.aggregator.ensemble import Evidence, FloatArray, Method, Pool, labelled
from liberatai_core.errors import MissingExtraError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

MAX_TRIALS = 2000
"""The time of a sampler that models all trials grows with their square: 2000 take minutes."""
LOWEST = 1e-3
"""Smallest raw weight: keeps every sum of a class above zero."""
UNIFORM = 0.5
"""Raw weight of everybody in the first trial."""
REMEMBERED = 256
"""Trials that a model is fitted to: the newest, for fitting costs up to the cube of their number."""

Point = NDArray[np.float64]
"""Raw weights LOWEST … 1, shape (members * classes,)."""
Walk = Generator[Point, float, None]
"""Yields points to be tried, is sent the score of each; its first point is the one that it was given."""
Search = Callable[[Point, int], Walk]
"""(first point, seed) -> walk."""
Doubles = NDArray[np.float64]
Surrogate = Callable[[Doubles, Doubles, Doubles], tuple[Doubles, Doubles]]


def searched(search: Search, trials: int) -> Method:
    """Return the method that finds weights by a search.

    The method needs `log_probs`, `y` and `seed`. It raises SchemaError without labels and NonFiniteError for
    predictions that are NaN.

    Args:
        search: where to look.
        trials: the budget, 1 … 2000.
    """
    if not 1 <= trials <= MAX_TRIALS:
        raise ValueError(f"trials must be 1 to {MAX_TRIALS}, not {trials}")

    def method(evidence: Evidence) -> Pool:
        log_probs, y = labelled(evidence)
        members, _, classes = log_probs.shape
        score = _score(log_probs, y)
        walk = search(np.full(members * classes, UNIFORM), evidence.seed)
        best = best_of(walk, lambda point: score(normal(point, members)), trials)
        return Pool(weights=normal(best, members), kind="linear")

    return method


def best_of(walk: Walk, score: Callable[[Point], float], trials: int) -> Point:
    """Return the best point of a walk's first `trials` ones; a walk may end before."""
    point = next(walk)
    best, found = point, score(point)
    value = found
    for _ in range(trials - 1):
        try:
            point = walk.send(value)
        except StopIteration:
            break
        value = score(point)
        if value > found:
            best, found = point, value
    walk.close()
    return best


def normal(point: Point, members: int) -> NDArray[np.float64]:
    """Return weights of shape (members, classes) whose columns sum to 1."""
    table = point.reshape(members, -1)
    weights: NDArray[np.float64] = table / table.sum(axis=0, keepdims=True)
    return weights


def _score(log_probs: FloatArray, y: NDArray[np.int64]) -> Callable[[NDArray[np.float64]], float]:
    """Return weights -> accuracy of the linear pool, without exponentials in every trial."""
    probabilities = np.exp(log_probs.astype(np.float64))

    def score(weights: NDArray[np.float64]) -> float:
        return float(np.mean(np.einsum("mnc,mc->nc", probabilities, weights).argmax(axis=1) == y))

    return score


def optuna_search(sampler: "Callable[[int], BaseSampler]") -> Search:
    """Return a search by one of Optuna's samplers (Akiba et al., KDD 2019, arXiv:1907.10902).

    Args:
        sampler: seed -> sampler; called when Optuna has been imported, so it may import it itself.
    """

    def search(first: Point, seed: int) -> Walk:
        try:
            import optuna  # noqa: PLC0415  (the other methods work without it)
        except ImportError as error:
            raise MissingExtraError(
                "optuna is not installed: pip install 'liberatai[coordinator]'"
            ) from error
        names = [f"w{place}" for place in range(first.size)]
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction="maximize", sampler=sampler(seed))
            study.enqueue_trial(dict(zip(names, first.tolist(), strict=True)))
            while True:
                trial = study.ask()
                value = yield np.array([trial.suggest_float(name, LOWEST, 1.0) for name in names])
                study.tell(trial, value)
        finally:
            optuna.logging.set_verbosity(before)

    return search


def modelled(surrogate: Surrogate, *, start: int, candidates: int) -> Search:
    """Return a search that tries next what a model of the trials so far thinks best.

    Sequential model-based optimisation: a few random points, then always the most promising of many
    candidates, half of them anywhere, half near the best point so far.

    Args:
        surrogate: (points, scores, candidates) -> mean and deviation of every candidate's score; scores have
            mean 0 and deviation 1. The candidate with the largest expected improvement is tried.
        start: trials before the model is asked, with the first one.
        candidates: how many to compare per trial.
    """

    def search(first: Point, seed: int) -> Walk:
        random = np.random.default_rng(seed)
        points, scores = [first], [(yield first)]
        while True:
            point = random.uniform(LOWEST, 1.0, first.size)
            if len(points) >= start and max(scores) > min(scores):
                best = points[int(np.argmax(scores))]
                asked = _candidates(best, candidates, random)
                known, values = np.array(points[-REMEMBERED:]), np.array(scores[-REMEMBERED:])
                spread = float(values.std()) or 1.0
                values = (values - values.mean()) / spread
                promise = expected_improvement(*surrogate(known, values, asked), float(values.max()))
                point = asked[int(np.argmax(promise))]
            points.append(point)
            scores.append((yield point))

    return search


def expected_improvement(
    mean: NDArray[np.float64], deviation: NDArray[np.float64], best: float
) -> NDArray[np.float64]:
    """Return how much better than `best` a normal variable is on average, where it is better."""
    deviation = np.maximum(deviation, 1e-9)
    scaled = (mean - best) / deviation
    # Logistic approximation of the normal distribution: numpy has no error function.
    below = 1.0 / (1.0 + np.exp(-np.clip(1.5976 * scaled + 0.07056 * scaled**3, -500.0, 500.0)))
    density = np.exp(-0.5 * np.minimum(scaled**2, 1e3)) / np.sqrt(2.0 * np.pi)
    improvement: NDArray[np.float64] = deviation * (scaled * below + density)
    return improvement


def _candidates(best: Point, number: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Return points that differ from the best one in some coordinates, then points anywhere.

    In this order, because a model of steps gives many candidates the same promise and the first one is taken.
    """
    anywhere = random.uniform(LOWEST, 1.0, (number // 2, best.size))
    steps = random.normal(0.0, 0.2, (number - len(anywhere), best.size))
    share = random.uniform(0.05, 1.0, (len(steps), 1))  # from one coordinate up to all of them
    steps *= random.random(steps.shape) < share
    near = np.clip(best + steps, LOWEST, 1.0)
    return np.concatenate([near, anywhere])
