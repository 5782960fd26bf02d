"""A late update counts for less, in the same bytes everywhere."""

import math

import numpy as np
import pytest

from liberatai_core.aggregator.staleness import damped, damping
from liberatai_core.errors import SchemaError


@pytest.mark.parametrize(("staleness", "wanted"), [(0, 1.0), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_the_weight_is_one_over_the_root_of_one_plus_the_staleness(staleness: int, wanted: float) -> None:
    assert damping(staleness) == pytest.approx(wanted, rel=1e-7)


def test_a_fresh_difference_stays_bit_for_bit_as_it_is() -> None:
    difference = np.random.default_rng(0).normal(size=100).astype(np.float32)
    assert damped(difference, 0) is difference


def test_a_late_difference_is_shortened_in_float32() -> None:
    difference = np.random.default_rng(1).normal(size=100).astype(np.float32)
    late = damped(difference, 1)
    assert late.dtype == np.float32
    assert late.tobytes() == (difference * np.float32(1 / math.sqrt(2))).tobytes()
    assert damped(difference, 3).tobytes() == (difference / np.float32(2)).tobytes()


def test_no_update_starts_from_a_later_version() -> None:
    with pytest.raises(SchemaError):
        damping(-1)
