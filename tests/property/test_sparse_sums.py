"""Sums of updates against exact fractions: dense or sparse, in any order and in any shards."""

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liberatai_core.aggregator.mean import RULES, Addend, Sum
from liberatai_core.aggregator.packed import entries
from liberatai_core.weights import Vector, to_bytes

CAP = 10_000
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def values(generator: np.random.Generator, size: int, kind: str) -> Vector:
    """Few bits of one magnitude, all bits of like magnitudes, or anything that a float32 can be."""
    if kind == "ternary":
        scale = np.ldexp(1 + generator.integers(0, 128) / 128, int(generator.integers(-16, 0)))
        return np.asarray(generator.choice([-1, 1], size) * scale, np.float32)
    if kind == "usual":
        return (generator.laplace(size=size) * 10.0 ** generator.integers(-6, 2)).astype(np.float32)
    drawn = generator.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(drawn) & (np.abs(drawn) < 1e37), drawn, np.float32(0)).astype(np.float32)


def drawn(seed: int, size: int, number: int, kinds: list[str]) -> list[tuple[Vector, int, Any]]:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        dense = values(generator, size, str(generator.choice(kinds)))
        dense[generator.random(size) > generator.choice([0.01, 0.3, 1.0])] = 0
        cover = generator.random(size) < 0.5 if generator.random() < 0.2 else None
        found.append((dense, int(generator.integers(1, 2 * CAP)), cover))
    return found


def sparse(update: tuple[Vector, int, Any], generator: np.random.Generator) -> Addend:
    """Return the same update as positions and values, some of its zeros among them."""
    dense, samples, cover = update
    told = np.flatnonzero((dense != 0) | (generator.random(dense.size) < 0.1))
    return entries(dense.size, told, dense[told]), samples, cover


@quick
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 300),
    number=st.integers(0, 20),
    kinds=st.lists(st.sampled_from(["ternary", "usual", "wild"]), min_size=1, max_size=3),
    name=st.sampled_from(sorted(RULES)),
)
def test_sparse_and_dense_updates_have_the_same_bytes_in_any_order_and_shard(
    seed: int, size: int, number: int, kinds: list[str], name: str
) -> None:
    rule, generator = RULES[name](CAP), np.random.default_rng(seed)
    updates = drawn(seed, size, number, kinds)
    one_by_one = rule.init(size)
    for difference, samples, cover in updates:
        one_by_one = rule.add(one_by_one, difference, samples, cover)
    wanted = to_bytes(rule.finish(one_by_one))

    def same(state: Sum) -> bool:
        assert state.updates == number
        assert state.values.tobytes() == one_by_one.values.tobytes()
        np.testing.assert_array_equal(np.broadcast_to(state.weights, size), _whole(one_by_one, size))
        return to_bytes(rule.finish(state)) == wanted

    assert same(rule.add_all(rule.init(size), updates))
    for _ in range(3):
        mixed = [sparse(updates[place], generator) for place in generator.permutation(number)]
        assert same(rule.add_all(rule.init(size), mixed))
        cut = int(generator.integers(0, number + 1))
        shards = [rule.add_all(rule.init(size), part) for part in (mixed[:cut], mixed[cut:])]
        assert same(rule.merge(*shards))
        assert same(rule.merge(shards[1], shards[0]))


def _whole(state: Sum, size: int) -> Any:
    return np.broadcast_to(state.weights, size)


@quick
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 30),
    number=st.integers(1, 12),
    kinds=st.lists(st.sampled_from(["ternary", "usual", "wild"]), min_size=1, max_size=3),
)
def test_the_sum_is_the_exact_one_rounded_once(seed: int, size: int, number: int, kinds: list[str]) -> None:
    rule, generator = RULES["mean"](CAP), np.random.default_rng(seed)
    updates = drawn(seed, size, number, kinds)
    state = rule.add_all(rule.init(size), [sparse(update, generator) for update in updates])
    for place in range(size):
        exact = sum(
            Fraction(float(dense[place])) * min(samples, CAP)
            for dense, samples, cover in updates
            if cover is None or cover[place]
        )
        assert state.values[place] == float(exact)
