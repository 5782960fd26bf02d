"""A head in one round: what devices' sums give is the ridge regression of all samples, whatever the split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liberatai_core.aggregator.ridge import LEAST, Sums, best, solved, sums, total
from liberatai_core.errors import DataError, NonFiniteError

CLASSES = 5
RANDOM = np.random.default_rng(0)
CENTRES = RANDOM.normal(size=(CLASSES, 12))
Y = RANDOM.integers(0, CLASSES, 400)
F = (CENTRES[Y] + 0.8 * RANDOM.normal(size=(400, 12))).astype(np.float32)


def central(features: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Return weights and biases by least squares of the extended system, another way than the normal equations."""
    n = len(y)
    extended = np.concatenate([features, np.ones((n, 1))], axis=1).astype(np.float64)
    penalty = np.sqrt(strength * n) * np.eye(features.shape[1], features.shape[1] + 1)
    target = np.concatenate([np.eye(CLASSES)[y], np.zeros((features.shape[1], CLASSES))])
    found: np.ndarray = np.linalg.lstsq(np.concatenate([extended, penalty]), target, rcond=None)[0]
    return found


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8), st.sampled_from([0.05, 0.5, 100.0]), st.integers(0, 2**31), st.permutations(range(8))
)
def test_any_split_in_any_order_gives_the_central_head(
    devices: int, alpha: float, seed: int, order: list[int]
) -> None:
    random = np.random.default_rng(seed)
    shares = random.dirichlet([alpha] * devices, CLASSES)
    owner = np.array([random.choice(devices, p=shares[label]) for label in Y])
    parts = [
        sums(F[owner == d], Y[owner == d], CLASSES, least=1) for d in range(devices) if (owner == d).any()
    ]
    parts = [parts[place] for place in order if place < len(parts)]
    weights, biases = solved(total(parts), 1e-3)
    wanted = central(F, Y, 1e-3)
    error = np.abs(np.vstack([weights.T, biases]) - wanted).max() / np.abs(wanted).max()
    assert error < 1e-8


def test_a_device_is_taken_out_again() -> None:
    parts = [sums(F[start::4], Y[start::4], CLASSES) for start in range(4)]
    without = total(parts) - parts[2]
    wanted = solved(total([parts[0], parts[1], parts[3]]), 1e-3)
    for one, other in zip(solved(without, 1e-3), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    assert without.samples == 300


def test_the_penalty_is_chosen_by_labelled_samples() -> None:
    strength, weights, biases = best(sums(F[:200], Y[:200], CLASSES), F[200:], Y[200:])
    assert strength in {10.0**power for power in range(-4, 5)}
    assert ((F[200:] @ weights.T + biases).argmax(axis=1) == Y[200:]).mean() > 0.8
    with pytest.raises(DataError, match="no labelled samples"):
        best(sums(F, Y, CLASSES), F[:0], Y[:0])


def test_features_that_depend_on_each_other_need_a_penalty() -> None:
    twice = np.concatenate([F, F], axis=1)
    with pytest.raises(DataError, match="a penalty of more than 0 is needed"):
        solved(sums(twice, Y, CLASSES), 0.0)
    assert np.isfinite(solved(sums(twice, Y, CLASSES), 1e-3)[0]).all()
    with pytest.raises(DataError):
        solved(sums(F[:LEAST], Y[:LEAST], CLASSES, least=1) - sums(F[:LEAST], Y[:LEAST], CLASSES), 1.0)


def test_sums_that_say_too_much_or_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than 16"):
        sums(F[: LEAST - 1], Y[: LEAST - 1], CLASSES)
    with pytest.raises(DataError, match="wanted 0 … 3"):
        sums(F, Y, 4)
    with pytest.raises(DataError):
        sums(F, Y - 1, CLASSES)
    with pytest.raises(NonFiniteError):
        sums(np.full_like(F, np.nan), Y, CLASSES)
    with pytest.raises(DataError, match="no device"):
        total([])
    with pytest.raises(DataError, match="wanted"):
        total([sums(F, Y, CLASSES), sums(F[:, :3], Y, CLASSES)])
    whole = sums(F, Y, CLASSES)
    with pytest.raises(NonFiniteError):
        solved(Sums(whole.gram * np.inf, whole.moments, 400), 1.0)
