import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from liberatai_core.compressor import exact_difference
from liberatai_core.errors import LiberataiError

WORDS = hnp.arrays(np.uint32, st.integers(0, 200))


def same(first, second):
    return np.array_equal(first.view(np.uint32), second.view(np.uint32))


@settings(max_examples=100, deadline=None)
@given(WORDS, st.data())
def test_any_bits_come_back(words, data):
    other = words.copy()
    if words.size:
        for place in data.draw(st.lists(st.integers(0, words.size - 1), max_size=20)):
            other[place] = data.draw(st.integers(0, 2**32 - 1))
    before, after = words.view(np.float32), other.view(np.float32)
    assert same(exact_difference.apply(before, exact_difference.encode(before, after)), after)


def test_few_small_changes_are_short():
    rng = np.random.default_rng(0)
    before = (0.05 * rng.normal(size=200_000)).astype(np.float32)
    after = before.copy()
    after[rng.choice(before.size, 2000, replace=False)] += np.float32(0.004)
    content = exact_difference.encode(before, after)
    assert len(content) < 0.0115 * before.nbytes
    assert same(exact_difference.apply(before, content), after)


def test_damage_is_refused_or_changes_values_only():
    rng = np.random.default_rng(1)
    before = rng.normal(size=400).astype(np.float32)
    after = before.copy()
    after[::7] *= 2
    content = exact_difference.encode(before, after)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            found = exact_difference.apply(before, bytes(damaged))
        except LiberataiError:
            continue
        assert found.shape == before.shape
    for length in range(0, len(content), 7):
        with pytest.raises(LiberataiError):
            exact_difference.apply(before, content[:length])
    with pytest.raises(LiberataiError):
        exact_difference.apply(before[:-1], content)
