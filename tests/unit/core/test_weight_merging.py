import numpy as np
import pytest

from liberatai_core.aggregator import task_arithmetic, ties
from liberatai_core.errors import LiberataiError

BASE = np.array([1, 1, 1, 1, 1], np.float32)
ONE = BASE + np.array([4, 0, 2, -1, 0.1], np.float32)
TWO = BASE + np.array([0, 2, -1, -3, 0.2], np.float32)


def test_scale_one_is_the_weighted_mean_and_a_model_alone_is_itself():
    assert np.allclose(task_arithmetic.merged(BASE, [ONE, TWO], [1, 3]), 0.25 * ONE + 0.75 * TWO)
    assert np.array_equal(task_arithmetic.merged(BASE, [ONE], [2]), ONE)
    both = task_arithmetic.merged(BASE, [ONE, TWO], [1, 1], scale=2)
    assert np.allclose(both, BASE + (ONE - BASE) + (TWO - BASE))


def test_ties_trims_elects_and_averages_those_that_agree():
    whole = ties.merged(BASE, [ONE, TWO], [1, 1], density=1)
    assert np.allclose(whole - BASE, [4, 2, 2, -2, 0.15], atol=1e-6)
    trimmed = ties.merged(BASE, [ONE, TWO], [1, 1], density=0.4)
    assert np.allclose(trimmed - BASE, [4, 2, 2, -3, 0], atol=1e-6)
    assert np.array_equal(ties.merged(BASE, [BASE, BASE], [1, 1]), BASE)


def test_the_order_of_models_does_not_matter():
    for merged in (task_arithmetic.merged, ties.merged):
        assert np.array_equal(merged(BASE, [ONE, TWO], [1, 2]), merged(BASE, [TWO, ONE], [2, 1]))


@pytest.mark.parametrize(
    ("models", "shares", "more"),
    [
        ([], [], {}),
        ([ONE], [1, 1], {}),
        ([ONE, TWO[:-1]], [1, 1], {}),
        ([ONE, TWO], [0, 0], {}),
        ([ONE, TWO], [-1, 2], {}),
        ([ONE, TWO], [np.nan, 2], {}),
        ([ONE, np.full(5, np.inf, np.float32)], [1, 1], {}),
        ([np.full(5, 3e38, np.float32)], [1], {"scale": 3.0}),
    ],
)
def test_what_cannot_be_merged_is_refused(models, shares, more):
    for merged in (task_arithmetic.merged, ties.merged):
        with pytest.raises(LiberataiError):
            merged(BASE, models, shares, **more)
    with pytest.raises(LiberataiError):
        ties.merged(BASE, [ONE], [1], density=0)
