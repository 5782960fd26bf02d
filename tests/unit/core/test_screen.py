"""Who stands out, or stands together, is left out; nobody else is."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liberatai_core.aggregator.rules import Contribution, Sender, Settings, merge
from liberatai_core.aggregator.screen import USUAL, passed, suspicion

DEVICES, SIZE = 20, 400
HOSTILE = range(16, 20)


def fleet(seed: int = 0, likeness: float = 0.5) -> Any:
    """Return honest differences of unlike devices: a common way, and one of their own."""
    random = np.random.default_rng(seed)
    common = random.normal(size=SIZE)
    own = random.normal(size=(DEVICES, SIZE))
    return likeness * common + own


def products(x: Any) -> Any:
    return np.asarray(x) @ np.asarray(x).T


def left_out(x: Any, f: int = 4) -> list[int]:
    return np.flatnonzero(~passed(products(x), f)).tolist()


def attacked(kind: str, seed: int) -> Any:
    x = fleet(seed)
    honest = x[: HOSTILE.start]
    random = np.random.default_rng(seed + 1)
    for device in HOSTILE:
        match kind:
            case "opposite":
                x[device] *= -1
            case "inner_product":
                x[device] = -honest.mean(axis=0) / 10
            case "little":
                x[device] = honest.mean(axis=0) - 1.5 * honest.std(axis=0)
            case "noise":
                x[device] = random.normal(size=SIZE) * 10
            case _:
                x[device] = honest.mean(axis=0) + 2 * np.sin(np.arange(SIZE)) + 0.3 * x[device]
    return x


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["opposite", "inner_product", "little", "noise", "backdoor"])
def test_all_accomplices_are_left_out_and_nobody_else(kind: str, seed: int) -> None:
    assert left_out(attacked(kind, seed)) == list(HOSTILE)


@pytest.mark.parametrize("seed", range(5))
def test_an_honest_round_loses_at_most_one_device(seed: int) -> None:
    """20 draws of three marks: beyond three deviations by chance is rare, and f would be 4."""
    assert len(left_out(fleet(seed))) <= 1


def test_twins_with_rare_data_are_taken_for_accomplices() -> None:
    """The price that the module names."""
    x = fleet()
    x[1] = x[0] + 0.1 * x[1]
    x[2] = x[0] + 0.1 * x[2]
    x[3] = x[0] + 0.1 * x[3]
    assert left_out(x) == [0, 1, 2, 3]


@given(st.integers(0, 1000), st.integers(1, 9))
def test_never_more_than_f_are_left_out_and_each_stands_out(seed: int, f: int) -> None:
    x = attacked("noise", seed)
    out = left_out(x, f)
    assert len(out) <= f
    assert (suspicion(products(x), f)[out] > USUAL).all()


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_the_scale_of_all_updates_together_does_not_matter(seed: int, scale: float) -> None:
    x = attacked("backdoor", seed)
    assert left_out(x) == left_out(scale * x)


def test_without_fear_or_with_two_devices_nobody_is_left_out() -> None:
    assert left_out(attacked("noise", 0), 0) == []
    assert passed(products(fleet()[:2]), 1).all()
    assert passed(np.zeros((5, 5)), 2).all()


def test_who_sent_nothing_is_no_reason_to_fail() -> None:
    x = fleet()
    x[0] = 0
    assert np.isfinite(suspicion(products(x), 4)).all()


def contributions(x: Any, samples: list[int]) -> tuple[Contribution, ...]:
    some = [
        Sender(id=f"{place:04d}", samples=count, read=partial(np.array, one, np.float32))
        for place, (one, count) in enumerate(zip(x, samples, strict=True))
    ]
    return merge(Settings(rule="screened_mean", hostile=0.2), SIZE, some).contributions


def test_the_rule_refuses_them_and_says_so() -> None:
    found = contributions(attacked("backdoor", 3), [10] * DEVICES)
    assert [place for place, one in enumerate(found) if one.verdict == "refused"] == list(HOSTILE)


def test_claimed_samples_count_up_to_the_median() -> None:
    """One device that claims a million samples moves the result as one with the usual number does."""
    x = fleet(likeness=1.0).astype(np.float32)

    def result(claim: int) -> Any:
        some = [
            Sender(id=f"{place:04d}", samples=claim if place == 0 else 10, read=partial(np.array, one))
            for place, one in enumerate(x)
        ]
        return merge(Settings(rule="screened_mean", hostile=0.2), SIZE, some).difference

    assert result(1_000_000).tobytes() == result(10).tobytes()
    assert result(5).tobytes() != result(10).tobytes()
