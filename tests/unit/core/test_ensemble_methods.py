"""Every way to find an ensemble's weights, by name: votes and shares by hand, searches by what they find."""

import math
from typing import Any

import numpy as np
import pytest

from liberatai_core.aggregator import gp, smac
from liberatai_core.aggregator.by_samples import by_samples
from liberatai_core.aggregator.ensemble import Evidence, Pool, accuracy, combine, pooled
from liberatai_core.aggregator.grid import LEVELS
from liberatai_core.aggregator.grid import _walk as grid_walk
from liberatai_core.aggregator.guard import FITTED_SHARE, divided
from liberatai_core.aggregator.label_free import class_weights
from liberatai_core.aggregator.majority_vote import majority_vote
from liberatai_core.aggregator.methods import (
    COUNTED,
    ENSEMBLES,
    LABELLED,
    SEARCHES,
    chosen,
    method_of,
    replaced,
)
from liberatai_core.aggregator.pso import _walk as pso_walk
from liberatai_core.aggregator.random_search import _sampler as random_sampler
from liberatai_core.aggregator.searches import (
    LOWEST,
    MAX_TRIALS,
    UNIFORM,
    best_of,
    expected_improvement,
    modelled,
    normal,
    optuna_search,
)
from liberatai_core.aggregator.stacking import fit, stacking
from liberatai_core.aggregator.tpe import _sampler as tpe_sampler
from liberatai_core.aggregator.uniform import uniform
from liberatai_core.errors import NonFiniteError, SchemaError

WALKS = {
    "grid": grid_walk,
    "random": optuna_search(random_sampler),
    "pso": pso_walk,
    "gp": modelled(gp.predicted, start=gp.START, candidates=gp.CANDIDATES),
    "tpe": optuna_search(tpe_sampler),
    "smac": modelled(smac.predicted, start=smac.START, candidates=smac.CANDIDATES),
}
each_search = pytest.mark.parametrize("name", sorted(SEARCHES))


def logs(*rows: Any) -> Any:
    return np.log(np.array(rows, dtype=np.float64))


def members(samples: int, seed: int, *, classes: int = 5) -> Any:
    """Three members of unlike strength per class: (log-probabilities, labels, class counts)."""
    random = np.random.default_rng(seed)
    strength = np.random.default_rng(99).uniform(0, 4, (3, classes))
    y = random.integers(0, classes, samples)
    scores = random.normal(0, 1.5, (3, samples, classes))
    for member, own in enumerate(strength):
        scores[member, np.arange(samples), y] += own[y]
    shifted = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
    return shifted, y, (strength**2 * 30).astype(np.int64)


def evidence(samples: int = 200, seed: int = 0, **changed: Any) -> Evidence:
    log_probs, y, counts = members(samples, seed)
    return Evidence(**({"class_counts": counts, "log_probs": log_probs, "y": y, "balance": 1.0} | changed))


# --- votes and shares --------------------------------------------------------------------------------


def test_two_weak_votes_beat_a_certain_one() -> None:
    """Two of three say class 0 with 0.51; the mean of the probabilities would say class 1."""
    three = np.stack([logs([0.51, 0.49]), logs([0.51, 0.49]), logs([0.001, 0.999])])
    counts = np.ones((3, 2), dtype=np.int64)
    assert pooled(majority_vote(Evidence(class_counts=counts)), three).argmax() == 0
    assert pooled(uniform(Evidence(class_counts=counts)), three).argmax() == 1


def test_probabilities_decide_where_votes_are_equal() -> None:
    two = np.stack([logs([0.6, 0.4]), logs([0.1, 0.9])])
    counts = np.ones((2, 2), dtype=np.int64)
    assert pooled(majority_vote(Evidence(class_counts=counts)), two).argmax() == 1


def test_probabilities_never_outweigh_a_vote_of_64_members() -> None:
    """33 votes against 31, and those 31 are certain: the smallest majority of the largest job."""
    rows = [logs([0.501, 0.499])] * 33 + [logs([1e-6, 1 - 1e-6])] * 31
    counts = np.ones((64, 2), dtype=np.int64)
    assert pooled(majority_vote(Evidence(class_counts=counts)), np.stack(rows)).argmax() == 0


def test_a_vote_gives_the_shares_of_the_votes() -> None:
    three = np.stack([logs([0.9, 0.1]), logs([0.9, 0.1]), logs([0.1, 0.9])])
    found = np.exp(combine(three, np.full((3, 2), 1 / 3), kind="vote"))
    assert found == pytest.approx(np.array([[2 / 3, 1 / 3]]), abs=1e-3)


@pytest.mark.parametrize("kind", ["linear", "vote"])
def test_votes_and_means_take_neither_priors_nor_bias_nor_negative_weights(kind: Any) -> None:
    one = logs([0.5, 0.5])[None]
    for wrong in (
        {"weights": np.ones((1, 2)), "bias": np.zeros(2)},
        {"weights": np.ones((1, 2)), "log_priors": np.zeros((1, 2))},
        {"weights": np.array([[1.0, -0.1]])},
    ):
        with pytest.raises(SchemaError):
            combine(one, wrong.pop("weights"), kind=kind, **wrong)


def test_by_samples_weighs_by_all_samples_of_a_member() -> None:
    """(29 + 1) : (9 + 1) = 3 : 1, in every class."""
    found = by_samples(Evidence(class_counts=np.array([[9, 20], [9, 0]])))
    assert found.weights.tolist() == [[0.75, 0.75], [0.25, 0.25]]
    assert found.kind == "linear"


def test_by_samples_without_counts_is_the_uniform_average() -> None:
    nothing = Evidence(class_counts=np.zeros((4, 3)))
    assert by_samples(nothing).weights.tolist() == uniform(nothing).weights.tolist()


@pytest.mark.parametrize("method", [majority_vote, by_samples, uniform])
def test_methods_without_labels_refuse_bad_counts(method: Any) -> None:
    for counts, error in (
        (np.array([1, 2]), SchemaError),
        (np.array([[1, -2]]), SchemaError),
        (np.array([[1.0, np.nan]]), NonFiniteError),
    ):
        with pytest.raises(error):
            method(Evidence(class_counts=counts))


# --- searches ----------------------------------------------------------------------------------------


@each_search
def test_a_search_repeats_itself_and_its_weights_sum_to_one(name: str) -> None:
    given = evidence(seed=3)
    first, second = (method_of(name, 25)(given) for _ in range(2))
    assert first.kind == "linear"
    assert first.weights.shape == (3, 5)
    assert first.weights.sum(axis=0) == pytest.approx(np.ones(5))
    assert first.weights.tolist() == second.weights.tolist()


@each_search
def test_another_seed_searches_elsewhere(name: str) -> None:
    tried: list[list[Any]] = []
    for seed in (1, 2):
        walk = WALKS[name](np.full(6, UNIFORM), seed)
        tried.append([next(walk).tolist(), walk.send(0.0).tolist()])
    assert tried[0][0] == tried[1][0] == [UNIFORM] * 6
    assert tried[0][1] != tried[1][1]


@each_search
def test_one_trial_is_the_uniform_average(name: str) -> None:
    assert method_of(name, 1)(evidence()).weights == pytest.approx(np.full((3, 5), 1 / 3))


@each_search
def test_a_search_does_not_end_below_the_uniform_average_on_its_own_labels(name: str) -> None:
    for seed in range(3):
        given = evidence(60, seed)
        assert given.log_probs is not None
        assert given.y is not None
        found = accuracy(pooled(method_of(name, 8)(given), given.log_probs), given.y)
        assert found >= accuracy(pooled(uniform(given), given.log_probs), given.y)


@each_search
def test_a_search_keeps_to_its_budget_and_to_the_cube(name: str) -> None:
    tried: list[Any] = []

    def score(point: Any) -> float:
        tried.append(point)
        return float(point[0])

    best = best_of(WALKS[name](np.full(4, UNIFORM), 0), score, 37)
    assert len(tried) == 37
    assert min(point.min() for point in tried) >= LOWEST
    assert max(point.max() for point in tried) <= 1.0
    assert best.tolist() == max(tried, key=lambda point: float(point[0])).tolist()


@pytest.mark.parametrize("name", ["pso", "gp", "tpe", "smac"])
def test_searches_that_learn_beat_chance_at_the_same_budget(name: str) -> None:
    """A smooth hill in eight dimensions, 60 trials, three seeds."""
    top = np.random.default_rng(7).uniform(0.1, 0.9, 8)

    def hill(point: Any) -> float:
        return -float(((point - top) ** 2).sum())

    def reached(which: str) -> float:
        ends = [best_of(WALKS[which](np.full(8, LOWEST), seed), hill, 60) for seed in range(3)]
        return float(np.mean([hill(end) for end in ends]))

    assert reached(name) > reached("random") + 0.05


def test_the_grid_has_no_point_twice_and_ends_when_all_are_tried() -> None:
    tried: list[Any] = []

    def score(point: Any) -> float:
        tried.append(tuple(point.tolist()))
        return 0.0

    best = best_of(grid_walk(np.full(2, UNIFORM), 0), score, 1000)
    assert len(tried) == len(set(tried)) == len(LEVELS) ** 2
    assert best.tolist() == [UNIFORM, UNIFORM]


def test_of_equal_trials_the_first_one_wins() -> None:
    """Accuracy comes in steps: the uniform average stays unless something is better."""
    assert best_of(pso_walk(np.full(3, UNIFORM), 0), lambda _: 0.5, 30).tolist() == [UNIFORM] * 3


@each_search
def test_trials_are_bounded_for_every_search(name: str) -> None:
    for trials in (0, -1, MAX_TRIALS + 1):
        with pytest.raises(ValueError, match="trials"):
            method_of(name, trials)


@pytest.mark.parametrize("name", sorted(LABELLED))
def test_methods_that_look_at_labels_refuse_what_does_not_fit(name: str) -> None:
    log_probs, y, counts = members(20, 1)
    broken = log_probs.copy()
    broken[1, 3, 2] = np.nan
    for changed, error in (
        ({"log_probs": None}, SchemaError),
        ({"y": None}, SchemaError),
        ({"y": y[:0], "log_probs": log_probs[:, :0]}, SchemaError),
        ({"y": y[:5]}, SchemaError),
        ({"y": y + 5}, SchemaError),
        ({"y": y - 5}, SchemaError),
        ({"class_counts": counts[:, :2]}, SchemaError),
        ({"log_probs": broken}, NonFiniteError),
    ):
        with pytest.raises(error):
            method_of(name, 2)(evidence(20, 1, **changed))


def test_optunas_own_words_are_heard_again_after_a_search() -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        method_of("tpe", 3)(evidence())
        assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    finally:
        optuna.logging.set_verbosity(before)


def test_raw_weights_are_divided_by_their_sum_over_members() -> None:
    assert normal(np.array([0.25, 0.5, 0.75, 0.5]), 2).tolist() == [[0.25, 0.5], [0.75, 0.5]]


# --- what searches believe ---------------------------------------------------------------------------


def test_the_gaussian_process_knows_what_it_saw_and_doubts_the_rest() -> None:
    random = np.random.default_rng(0)
    points = random.random((30, 2))
    scores = np.sin(3 * points[:, 0]) + points[:, 1]
    scores = (scores - scores.mean()) / scores.std()
    mean, deviation = gp.predicted(points, scores, np.concatenate([points, [[9.0, 9.0]]]))
    assert mean[:-1] == pytest.approx(scores, abs=0.1)
    assert deviation[:-1].max() < 0.2
    assert deviation[-1] == pytest.approx(1.0, abs=1e-3)
    assert mean[-1] == pytest.approx(0.0, abs=0.05)


def test_the_gaussian_process_predicts_a_smooth_function_between_its_points() -> None:
    grid = np.linspace(0, 1, 9)
    scores = np.cos(4 * grid)
    mean, _ = gp.predicted(grid[:, None], scores, np.array([[0.31], [0.69]]))
    assert mean == pytest.approx(np.cos(4 * np.array([0.31, 0.69])), abs=0.05)


def test_the_forest_learns_a_step_and_is_sure_of_a_constant() -> None:
    random = np.random.default_rng(0)
    points = random.random((80, 3))
    asked = random.random((200, 3))
    mean, _ = smac.predicted(points, np.where(points[:, 1] < 0.5, -1.0, 1.0), asked)
    clear = np.abs(asked[:, 1] - 0.5) > 0.15
    assert np.mean(np.sign(mean[clear]) == np.sign(asked[clear, 1] - 0.5)) > 0.95
    mean, deviation = smac.predicted(points, np.full(80, 2.5), asked)
    assert mean == pytest.approx(np.full(200, 2.5))
    assert deviation == pytest.approx(np.zeros(200))


def test_expected_improvement_is_the_mean_of_what_is_better() -> None:
    """Against a million drawn values; and without doubt it is the plain difference, or nothing."""
    draws = np.random.default_rng(0).standard_normal(1_000_000)
    for mean, deviation in ((0.0, 1.0), (-0.5, 0.3), (0.8, 2.0)):
        drawn = np.maximum(mean + deviation * draws - 0.2, 0.0).mean()
        found = expected_improvement(np.array([mean]), np.array([deviation]), 0.2)
        assert found[0] == pytest.approx(drawn, abs=2e-3)
    sure = expected_improvement(np.array([1.0, -1.0]), np.zeros(2), 0.2)
    assert sure == pytest.approx(np.array([0.8, 0.0]))


# --- stacking ----------------------------------------------------------------------------------------


def cost(inputs: Any, y: Any, start: Any, ridge: float, table: Any) -> float:
    """The cost that stacking minimises, written down once more without any trick."""
    scores = sum(inputs[row] * table[row] for row in range(len(table)))
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    penalty = 0.5 * ridge * ((table - start) ** 2).sum()
    return float(penalty - np.log(shares[np.arange(len(y)), y]).mean())


def problem(samples: int, seed: int, *, classes: int = 5) -> Any:
    log_probs, y, counts = members(samples, seed, classes=classes)
    inputs = np.concatenate([log_probs, np.ones_like(log_probs[:1])])
    return inputs, y, np.concatenate([class_weights(counts), np.zeros((1, classes))])


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_stacking_finds_the_lowest_cost(ridge: float) -> None:
    """The slope of the plainly written cost is zero in every coordinate, so in a convex bowl it is the bottom."""
    inputs, y, start = problem(300, 0)
    table = fit(inputs, y, start, ridge)
    for place in np.ndindex(table.shape):
        one = np.zeros_like(table)
        one[place] = 1e-4
        ahead = cost(inputs, y, start, ridge, table + one)
        behind = cost(inputs, y, start, ridge, table - one)
        assert abs(ahead - behind) / 2e-4 < 1e-4


def test_stacking_converges_from_a_bad_start_and_with_hopeless_labels() -> None:
    """Full Newton steps would overshoot: log-probabilities go down to -14 and no weight explains the labels."""
    random = np.random.default_rng(0)
    inputs = random.uniform(-14, 0, (4, 250, 6))
    y = random.integers(0, 6, 250)
    far = np.full((4, 6), 20.0)
    table = fit(inputs, y, far, 1e-3)
    assert np.isfinite(table).all()
    assert cost(inputs, y, far, 1e-3, table) < cost(inputs, y, far, 1e-3, np.full((4, 6), 0.0))


def test_an_overwhelming_prior_leaves_the_rule_without_labels() -> None:
    inputs, y, start = problem(250, 1)
    assert fit(inputs, y, start, 1e6) == pytest.approx(start, abs=1e-5)


def test_more_labels_move_the_weights_further_from_the_rule_without_labels() -> None:
    moved = []
    for copies in (1, 4):
        log_probs, y, counts = members(250, 2)
        many = Evidence(
            class_counts=counts,
            balance=1.0,
            log_probs=np.tile(log_probs, (1, copies, 1)),
            y=np.tile(y, copies),
        )
        moved.append(float(np.abs(stacking(many).weights - class_weights(counts)).max()))
    assert moved[1] > 1.2 * moved[0] > 0


def test_stacking_serves_many_classes_and_members() -> None:
    """32 members and 50 classes: a matrix of second derivatives would have 1650 rows."""
    random = np.random.default_rng(3)
    y = random.integers(0, 50, 400)
    scores = random.normal(0, 1, (32, 400, 50))
    scores[:, np.arange(400), y] += random.uniform(0, 3, (32, 1))
    log_probs = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
    found = stacking(Evidence(class_counts=np.ones((32, 50)), balance=1.0, log_probs=log_probs, y=y))
    assert found.weights.shape == (32, 50)
    assert accuracy(pooled(found, log_probs), y) > max(accuracy(one, y) for one in log_probs)


# --- who sees which labels, and which method is used -------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, 2, 7, 100, 999])
def test_no_label_both_finds_weights_and_judges(samples: int) -> None:
    y = np.random.default_rng(samples).integers(0, 10, samples)
    fitted, judging = divided(y, 5)
    assert np.concatenate([fitted, judging]).size == samples
    assert sorted([*fitted.tolist(), *judging.tolist()]) == list(range(samples))


@pytest.mark.parametrize(("classes", "each"), [(100, 2), (150, 2), (60, 5), (300, 1)])
def test_the_guard_gets_its_share_of_many_classes_with_few_labels(classes: int, each: int) -> None:
    y = np.repeat(np.arange(classes), each)
    fitted, judging = divided(y, 0)
    assert len(judging) >= 0.75 * (1 - FITTED_SHARE) * len(y) - 1
    assert np.bincount(y[judging]).max() <= math.ceil(each / 2)
    assert sorted([*fitted, *judging]) == list(range(len(y)))


def test_why_another_method_is_used_is_said() -> None:
    assert replaced("auto", "label_free", labels=0, counted=True) == ""
    assert replaced("tpe", "tpe", labels=9, counted=True) == ""
    said = replaced("stacking", "label_free", labels=67, counted=True)
    assert said == "; label_free instead of stacking: stacking needs 200 labels to find weights, 67 are there"
    assert "share_class_counts" in replaced("label_free", "uniform", labels=0, counted=False)


def test_every_class_is_divided_alike_and_by_lot() -> None:
    y = np.repeat(np.arange(4), [300, 30, 3, 1])
    fitted, judging = divided(y, 0)
    assert np.bincount(y[fitted], minlength=4).tolist() == [200, 20, 2, 1]
    assert np.bincount(y[judging], minlength=4).tolist() == [100, 10, 1, 0]
    assert len(fitted) == pytest.approx(FITTED_SHARE * len(y), abs=1)
    assert divided(y, 0)[0].tolist() == fitted.tolist()
    assert divided(y, 1)[0].tolist() != fitted.tolist()


@pytest.mark.parametrize(
    ("asked", "labels", "counted", "used"),
    [
        ("auto", 0, False, "uniform"),
        ("auto", 0, True, "label_free"),
        ("auto", 199, True, "label_free"),
        ("auto", 200, True, "stacking"),
        ("auto", 200, False, "stacking"),
        ("stacking", 199, True, "label_free"),
        ("stacking", 199, False, "uniform"),
        ("label_free", 5000, True, "label_free"),
        ("label_free", 5000, False, "uniform"),
        ("by_samples", 0, False, "uniform"),
        ("majority_vote", 0, False, "majority_vote"),
        ("tpe", 10, False, "tpe"),
    ],
)
def test_the_method_that_is_used_has_what_it_needs(asked: str, labels: int, counted: bool, used: str) -> None:
    assert chosen(asked, labels=labels, counted=counted) == used


def test_every_method_says_truly_whether_it_needs_labels() -> None:
    _, _, counts = members(1, 0)
    for name in ENSEMBLES:
        if name in LABELLED:
            with pytest.raises(SchemaError):
                method_of(name, 2)(Evidence(class_counts=counts))
        else:
            assert isinstance(method_of(name)(Evidence(class_counts=counts)), Pool)
    assert COUNTED.isdisjoint(LABELLED)


def test_an_unknown_method_is_no_method() -> None:
    with pytest.raises(KeyError):
        method_of("annealing")
