"""Means, server steps, ensembles and the guard, against sums made by hand."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from liberatai_core.aggregator.ensemble import Evidence, Pool, accuracy, combine, pooled
from liberatai_core.aggregator.guard import guard, unguarded
from liberatai_core.aggregator.label_free import class_weights, label_free, log_priors
from liberatai_core.aggregator.mean import Update, aggregate, mean
from liberatai_core.aggregator.methods import ENSEMBLES
from liberatai_core.aggregator.server_optimizer import SERVER_OPTIMIZERS, fedadam, fedavgm, plain
from liberatai_core.aggregator.stacking import stacking
from liberatai_core.aggregator.tpe import tpe
from liberatai_core.aggregator.uniform import uniform
from liberatai_core.errors import DuplicateError, NonFiniteError, SchemaError, StructureError
from liberatai_core.weights import to_bytes


def vector(*values: Any) -> Any:
    return np.array(values, dtype=np.float32)


def logs(*rows: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float64))


# --- mean ----------------------------------------------------------------------------------------


def test_mean_weighs_by_samples() -> None:
    """(1 * 1 + 3 * 5) / 4 = 4 and (1 * 2 + 3 * -2) / 4 = -1."""
    rule = mean()
    state = rule.add(rule.init(2), vector(1, 2), 1, None)
    state = rule.add(state, vector(5, -2), 3, None)
    assert rule.finish(state).tolist() == [4.0, -1.0]
    assert rule.finish(state).dtype == np.float32


def test_mean_caps_what_a_device_says_about_itself() -> None:
    """A device that claims a million samples counts like one with two."""
    rule = mean(cap=2)
    state = rule.add(rule.init(1), vector(0), 2, None)
    assert rule.finish(rule.add(state, vector(1), 1_000_000, None)).tolist() == [0.5]


def test_mean_divides_each_coordinate_by_those_that_cover_it() -> None:
    """Coordinate 0: only the first update; 1: both; 2: nobody, so nothing changes."""
    rule = mean()
    first = np.array([True, True, False])
    second = np.array([False, True, False])
    state = rule.add(rule.init(3), vector(2, 2, 9), 1, first)
    state = rule.add(state, vector(7, 6, 9), 3, second)
    assert rule.finish(state).tolist() == [2.0, 5.0, 0.0]


def test_mean_mixes_covering_and_full_updates() -> None:
    rule = mean()
    state = rule.add(rule.init(2), vector(1, 1), 1, None)
    state = rule.add(state, vector(3, 3), 1, np.array([False, True]))
    assert rule.finish(state).tolist() == [1.0, 2.0]


def test_mean_of_nothing_changes_nothing() -> None:
    rule = mean()
    assert rule.finish(rule.init(3)).tolist() == [0.0, 0.0, 0.0]


def test_add_leaves_the_old_state_alone() -> None:
    rule = mean()
    before = rule.init(1)
    rule.add(before, vector(1), 1, None)
    assert before.values.tolist() == [0.0]
    assert before.weights.tolist() == [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mean_refuses_what_is_not_finite(bad: Any) -> None:
    rule = mean()
    with pytest.raises(NonFiniteError):
        rule.add(rule.init(2), vector(0, bad), 1, None)


def test_mean_refuses_wrong_shapes_and_counts() -> None:
    rule = mean()
    with pytest.raises(StructureError):
        rule.add(rule.init(2), vector(1), 1, None)
    with pytest.raises(StructureError):
        rule.add(rule.init(2), vector(1, 2), 1, np.array([True]))
    with pytest.raises(SchemaError):
        rule.add(rule.init(2), vector(1, 2), 0, None)
    with pytest.raises(ValueError, match="cap"):
        mean(cap=0)


def test_the_same_updates_give_the_same_bytes_in_any_order() -> None:
    """Sums of floats depend on the order; the ids fix it."""
    random = np.random.default_rng(0)
    updates = [
        Update(
            id=f"{i:02d}",
            difference=(random.standard_normal(101) * 10.0 ** random.integers(-6, 6)).astype(np.float32),
            samples=i + 1,
        )
        for i in range(30)
    ]
    wanted = to_bytes(aggregate(mean(), 101, updates))
    for seed in range(5):
        mixed = [updates[i] for i in np.random.default_rng(seed).permutation(30)]
        assert to_bytes(aggregate(mean(), 101, mixed)) == wanted


def test_one_id_twice_is_refused() -> None:
    twice = [Update(id="a", difference=vector(1), samples=1)] * 2
    with pytest.raises(DuplicateError):
        aggregate(mean(), 1, twice)


# --- server optimisers -----------------------------------------------------------------------------


def test_plain_adds_the_rate_times_the_difference() -> None:
    rule = plain(0.5)
    state, weights = rule.step(rule.init(2), vector(1, 2), vector(2, -4))
    assert weights.tolist() == [2.0, 0.0]
    assert rule.step(state, weights, vector(0, 0))[1].tolist() == [2.0, 0.0]


def test_fedavgm_keeps_half_of_the_last_step() -> None:
    """Momentum 0.5: the steps are 4, then 0.5 * 4 + 1 = 3."""
    rule = fedavgm(1.0, 0.5)
    state, weights = rule.step(rule.init(1), vector(0), vector(4))
    assert weights.tolist() == [4.0]
    assert rule.step(state, weights, vector(1))[1].tolist() == [7.0]


def test_fedadam_follows_the_paper() -> None:
    """m = 0.1 * 2, v = 0.99 * tau^2 + 0.01 * 4, step = 0.1 * m / (sqrt v + tau)."""
    rule = fedadam(rate=0.1, decay_1=0.9, decay_2=0.99, tau=0.5)
    _, weights = rule.step(rule.init(1), vector(1), vector(2))
    assert weights[0] == pytest.approx(1 + 0.1 * 0.2 / (np.sqrt(0.99 * 0.25 + 0.04) + 0.5), rel=1e-6)


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_server_optimisers_refuse_bad_differences(name: str) -> None:
    rule = SERVER_OPTIMIZERS[name]()
    with pytest.raises(StructureError):
        rule.step(rule.init(2), vector(1, 2), vector(1))
    with pytest.raises(NonFiniteError):
        rule.step(rule.init(1), vector(1), vector(np.nan))


def test_server_state_of_another_structure_is_refused() -> None:
    rule = fedadam()
    with pytest.raises(StructureError):
        rule.step(rule.init(3), vector(1), vector(1))


# --- combining -------------------------------------------------------------------------------------


def test_linear_pool_by_hand() -> None:
    """Class 0: (0.8 + 0.2) / 2; class 1: 0.25 * 0.2 + 0.75 * 0.8 = 0.65; then divided by 1.15."""
    members = np.stack([logs([0.8, 0.2]), logs([0.2, 0.8])])
    out = combine(members, np.array([[0.5, 0.25], [0.5, 0.75]]), kind="linear")
    assert np.exp(out) == pytest.approx(np.array([[0.5 / 1.15, 0.65 / 1.15]]), rel=1e-6)


def test_log_pool_by_hand() -> None:
    """Products of square roots: sqrt(0.8 * 0.2) = 0.4 for both classes, so one half each."""
    members = np.stack([logs([0.8, 0.2]), logs([0.2, 0.8])])
    assert np.exp(combine(members, np.full((2, 2), 0.5))) == pytest.approx(np.array([[0.5, 0.5]]))


def test_priors_are_taken_out() -> None:
    """A member that saw class 0 nine times as often says 0.9 : 0.1 about a sample that shows nothing."""
    members = logs([0.9, 0.1])[None]
    out = combine(members, np.ones((1, 2)), log_priors=logs([0.9, 0.1]))
    assert np.exp(out) == pytest.approx(np.array([[0.5, 0.5]]))


def test_bias_is_added() -> None:
    out = combine(logs([0.5, 0.5])[None], np.ones((1, 2)), bias=np.log([3.0, 1.0]))
    assert np.exp(out) == pytest.approx(np.array([[0.75, 0.25]]))


def test_one_certain_and_wrong_member_has_no_veto() -> None:
    """Probability zero is clipped: three members at 0.999 outvote it."""
    members = np.stack([logs([1.0, 0.0]), logs([0.001, 0.999]), logs([0.001, 0.999]), logs([0.001, 0.999])])
    out = combine(members, np.full((4, 2), 0.25))
    assert np.isfinite(out).all()
    assert out.argmax() == 1


def test_results_are_log_probabilities() -> None:
    random = np.random.default_rng(1)
    members = np.log(random.dirichlet(np.ones(5), size=(3, 20)))
    for kind in ("log", "linear"):
        out = combine(members, random.random((3, 5)), kind=kind)
        assert out.shape == (20, 5)
        assert out.dtype == np.float32
        assert np.exp(out).sum(axis=1) == pytest.approx(np.ones(20), rel=1e-5)


def test_combine_refuses_what_does_not_fit() -> None:
    members = np.log(np.full((2, 3, 4), 0.25))
    with pytest.raises(SchemaError):
        combine(members[0], np.ones((2, 4)))
    with pytest.raises(SchemaError):
        combine(members, np.ones((3, 4)))
    with pytest.raises(SchemaError):
        combine(members, np.ones((2, 4)), bias=np.ones(3))
    with pytest.raises(SchemaError):
        combine(members, np.ones((2, 4)), bias=np.ones(4), kind="linear")
    with pytest.raises(SchemaError):
        combine(members, -np.ones((2, 4)), kind="linear")
    with pytest.raises(NonFiniteError):
        combine(members, np.full((2, 4), np.nan))
    members[0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        combine(members, np.ones((2, 4)))


# --- finding weights ---------------------------------------------------------------------------------


def test_class_weights_are_roots_of_counts() -> None:
    """sqrt(8 + 1) : sqrt(0 + 1) = 3 : 1."""
    assert class_weights(np.array([[8, 0], [0, 0]])).tolist() == [[0.75, 0.5], [0.25, 0.5]]


def test_log_priors_are_smoothed_shares() -> None:
    """(2 + 1) / 4 and (0 + 1) / 4, half strength: the square roots of the shares."""
    found = np.exp(log_priors(np.array([[2, 0]]), strength=0.5))
    assert found == pytest.approx(np.sqrt(np.array([[0.75, 0.25]])))


def test_balanced_members_carry_no_prior() -> None:
    counts = np.array([[5, 1], [1, 5]])
    assert label_free(Evidence(class_counts=counts, balance=1.0)).log_priors is None
    assert label_free(Evidence(class_counts=counts)).log_priors is not None


def test_label_free_refuses_bad_counts() -> None:
    for counts, error in (
        (np.array([1, 2]), SchemaError),
        (np.array([[1, -2]]), SchemaError),
        (np.array([[1.0, np.inf]]), NonFiniteError),
    ):
        with pytest.raises(error):
            label_free(Evidence(class_counts=counts))


def experts(samples: int, seed: int) -> Any:
    """Two members, each right about its own two classes and blind between the other two."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, samples)
    scores = random.normal(0, 1.0, (2, samples, 4))
    rows = np.arange(samples)
    for member, own in enumerate(([0, 1], [2, 3])):
        knows = np.isin(y, own)
        scores[member, rows[knows], y[knows]] += 4
    shifted = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
    return shifted, y, np.array([[50, 50, 1, 1], [1, 1, 50, 50]])


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_every_method_beats_both_experts(name: str) -> None:
    """Weights are found on 300 samples and judged on 2000 others."""
    log_probs, y, counts = experts(300, 0)
    pool = ENSEMBLES[name](Evidence(class_counts=counts, balance=1.0, log_probs=log_probs, y=y, seed=1))
    fresh, labels, _ = experts(2000, 1)
    best = max(accuracy(member, labels) for member in fresh)
    assert accuracy(pooled(pool, fresh), labels) > best + 0.05


def test_searched_weights_sum_to_one_per_class_and_follow_the_seed() -> None:
    log_probs, y, counts = experts(200, 2)
    evidence = Evidence(class_counts=counts, log_probs=log_probs, y=y, seed=3)
    first, second = tpe(20)(evidence), tpe(20)(evidence)
    assert first.weights.sum(axis=0) == pytest.approx(np.ones(4))
    assert first.weights.tolist() == second.weights.tolist()


def test_search_is_at_least_the_uniform_average_on_its_own_labels() -> None:
    log_probs, y, counts = experts(200, 4)
    evidence = Evidence(class_counts=counts, log_probs=log_probs, y=y)
    searched = accuracy(pooled(tpe(5)(evidence), log_probs), y)
    assert searched >= accuracy(pooled(uniform(evidence), log_probs), y)


def test_stacking_beats_uniform_where_members_differ() -> None:
    log_probs, y, counts = experts(1000, 5)
    evidence = Evidence(class_counts=counts, balance=1.0, log_probs=log_probs, y=y)
    fresh, labels, _ = experts(4000, 6)
    stacked = accuracy(pooled(stacking(evidence), fresh), labels)
    assert stacked > accuracy(pooled(uniform(evidence), fresh), labels)


def test_stacking_with_few_labels_is_the_label_free_rule() -> None:
    log_probs, y, counts = experts(150, 7)
    evidence = Evidence(class_counts=counts, log_probs=log_probs, y=y)
    assert stacking(evidence).weights.tolist() == label_free(evidence).weights.tolist()


@pytest.mark.parametrize("method", [stacking, tpe(2)])
def test_methods_that_need_labels_say_so(method: Any) -> None:
    log_probs, y, counts = experts(10, 8)
    for evidence in (
        Evidence(class_counts=counts),
        Evidence(class_counts=counts, log_probs=log_probs, y=y[:5]),
        Evidence(class_counts=counts, log_probs=log_probs, y=y + 4),
        Evidence(class_counts=counts[:, :3], log_probs=log_probs, y=y),
    ):
        with pytest.raises(SchemaError):
            method(evidence)


def test_trials_are_bounded() -> None:
    for trials in (0, 2001):
        with pytest.raises(ValueError, match="trials"):
            tpe(trials)


def test_pool_settings_reach_combine() -> None:
    members = logs([0.9, 0.1])[None]
    pool = Pool(weights=np.ones((1, 2)), log_priors=logs([0.9, 0.1]), bias=np.log([3.0, 1.0]))
    assert np.exp(pooled(pool, members)) == pytest.approx(np.array([[0.75, 0.25]]))


# --- guard -------------------------------------------------------------------------------------------

RIGHT, WRONG = [0.9, 0.1], [0.1, 0.9]


def test_guard_falls_back_to_a_member_that_is_better_beyond_chance() -> None:
    """Labels are all 0: on 9 of 30 samples only member 1 is right: 9 > 1.645 * 3."""
    member = logs(*[RIGHT] * 27, *[WRONG] * 3)
    members = np.stack([logs(*[WRONG] * 30), member])
    decision = guard(logs(*[RIGHT] * 18, *[WRONG] * 12), members, np.zeros(30, dtype=np.int64))
    assert decision.use == 1
    assert decision.ensemble_accuracy == pytest.approx(18 / 30)
    assert decision.best_member_accuracy == pytest.approx(27 / 30)
    assert "falling back to member 1" in decision.reason


def test_guard_keeps_an_ensemble_that_only_chance_puts_behind() -> None:
    """On 2 of 30 samples only member 1 is right: 2 < 1.645 * 1.41."""
    members = np.stack([logs(*[WRONG] * 30), logs(*[RIGHT] * 30)])
    decision = guard(logs(*[RIGHT] * 28, *[WRONG] * 2), members, np.zeros(30, dtype=np.int64))
    assert decision.use == "ensemble"
    assert "no more than chance" in decision.reason


def test_guard_keeps_an_ensemble_that_is_as_good() -> None:
    members = np.stack([logs(RIGHT, WRONG), logs(WRONG, WRONG)])
    assert guard(logs(WRONG, RIGHT), members, np.zeros(2, dtype=np.int64)).use == "ensemble"


def test_without_labels_the_guard_says_that_it_did_not_look() -> None:
    members = np.stack([logs(RIGHT, WRONG), logs(RIGHT, RIGHT)])
    for decision in (
        unguarded(logs(RIGHT, RIGHT), members),
        guard(logs(RIGHT, RIGHT)[:0], members[:, :0], np.zeros(0, dtype=np.int64)),
    ):
        assert decision.use == "ensemble"
        assert decision.ensemble_accuracy is None
        assert "unchecked" in decision.reason
    assert "75%" in unguarded(logs(RIGHT, RIGHT), members).reason


def test_guard_refuses_what_does_not_fit() -> None:
    members = np.stack([logs(RIGHT, WRONG)])
    with pytest.raises(SchemaError):
        guard(logs(RIGHT), members, np.zeros(1, dtype=np.int64))
    with pytest.raises(SchemaError):
        guard(logs(RIGHT, RIGHT), members, np.zeros(3, dtype=np.int64))


def test_importing_the_aggregator_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, liberatai_core.aggregator.guard, liberatai_core.aggregator.methods;"
        "sys.exit(bool({'torch', 'optuna', 'scipy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
