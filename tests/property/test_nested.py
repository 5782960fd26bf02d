"""Merging over unlike covers: equal to the plain formula, whatever the order, and blind outside the cover."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liberatai_core.aggregator import nested, packed
from liberatai_core.aggregator.rules import RULES, Sender, Settings, feared, merge
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import to_bytes


def drawn(seed: int, size: int, members: int, devices: int) -> dict[str, nested.Covered]:
    """Return members with random covers, in random order of places, and random updates, dense and sparse."""
    random = np.random.default_rng(seed)
    found = {}
    for member in range(members):
        places = random.permutation(size)[: random.integers(1, size + 1)]
        senders = []
        for device in range(random.integers(0, devices + 1)):
            values = (random.normal(size=places.size) * 2.0 ** random.integers(-20, 20)).astype(np.float32)
            values[random.random(places.size) < random.random()] = 0
            read = partial(np.array, values)
            sent = partial(packed.pack, values) if random.random() < 0.5 else None
            samples = int(random.integers(1, 9999))
            senders.append(Sender(id=f"{member}-{device}", samples=samples, read=read, sent=sent))
        found[f"m{member}"] = nested.Covered(places=places, senders=tuple(senders))
    return found


SETS = {
    "seed": st.integers(0, 2**32),
    "size": st.integers(1, 300),
    "members": st.integers(1, 4),
    "devices": st.integers(0, 5),
}


@settings(max_examples=60, deadline=None)
@given(**SETS, cap=st.integers(1, 5000))
def test_the_mean_is_that_of_a_plain_loop(seed: int, size: int, members: int, devices: int, cap: int) -> None:
    group = drawn(seed, size, members, devices)
    total, weights = np.zeros(size), np.zeros(size)
    scale = np.zeros(size)
    for one in group.values():
        for sender in one.senders:
            for place, value in zip(one.places, sender.read(), strict=True):
                weight = min(sender.samples, cap)
                total[place] += weight * float(value)
                scale[place] += weight * abs(float(value))
                weights[place] += weight
    merged = nested.merge(Settings(cap=cap), size, group)
    assert np.array_equal(merged.moved, weights > 0)
    at = weights > 0
    assert not merged.difference[~at].any()
    # float32 rounds the result once; the loop rounds in float64, relative to the size of the summands.
    bound = 2**-23 * np.abs(total[at]) / weights[at] + 1e-12 * scale[at] / weights[at] + 1e-44
    assert (np.abs(merged.difference[at] - total[at] / weights[at]) <= bound).all()


@settings(max_examples=60, deadline=None)
@given(**SETS, rule=st.sampled_from(sorted(RULES)), hostile=st.floats(0, 0.49), data=st.data())
def test_no_order_of_members_or_devices_changes_a_bit(
    seed: int, size: int, members: int, devices: int, rule: Any, hostile: float, data: st.DataObject
) -> None:
    group = drawn(seed, size, members, devices)
    asked = Settings(rule=rule, hostile=hostile, seed=3)
    shuffled = {
        sid: nested.Covered(places=group[sid].places, senders=data.draw(st.permutations(group[sid].senders)))
        for sid in data.draw(st.permutations(sorted(group)))
    }
    one, other = nested.merge(asked, size, group), nested.merge(asked, size, shuffled)
    assert to_bytes(one.difference) == to_bytes(other.difference)
    assert one.contributions == other.contributions
    assert np.array_equal(one.moved, other.moved)
    assert one.why(np.arange(size)) == other.why(np.arange(size))


@settings(max_examples=60, deadline=None)
@given(**SETS, hostile=st.floats(0.01, 0.49), rule=st.sampled_from(sorted(set(RULES) - {"mean"})))
def test_a_coordinate_moves_only_with_enough_devices(
    seed: int, size: int, members: int, devices: int, hostile: float, rule: Any
) -> None:
    group = drawn(seed, size, members, devices)
    count = np.zeros(size, dtype=int)
    for one in group.values():
        count[one.places] += len(one.senders)
    merged = nested.merge(Settings(rule=rule, hostile=hostile), size, group)
    enough = np.array([number > 0 and number >= 2 * feared(hostile, int(number)) + 1 for number in count])
    assert np.array_equal(merged.moved, enough)
    assert not merged.difference[~enough].any()
    frozen = [places for places, _ in merged.frozen]
    told = np.sort(np.concatenate(frozen)) if frozen else np.zeros(0, dtype=int)
    assert np.array_equal(told, np.flatnonzero((count > 0) & ~enough))


@settings(max_examples=40, deadline=None)
@given(
    sides=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    kernel=st.integers(1, 3),
    classes=st.integers(2, 4),
    maps=st.integers(1, 4),
    data=st.data(),
)
def test_a_slice_comes_back_from_the_largest_one(
    sides: list[int], kernel: int, classes: int, maps: int, data: st.DataObject
) -> None:
    """Values of a member that are put at their places are read back, and change no other place."""

    def of(first: int, second: int) -> Structure:
        return Structure(
            family="cnn",
            params={"width": first},
            tensors=(
                Tensor("conv1.weight", (first, 1, kernel, kernel)),
                Tensor("norm1.weight", (first,)),
                Tensor("conv2.weight", (second, first, kernel, kernel)),
                Tensor("head.weight", (classes, second * maps)),
                Tensor("head.bias", (classes,)),
            ),
        )

    large = of(*sides)
    small = of(*(data.draw(st.integers(1, side)) for side in sides))
    if large == small:
        assert np.array_equal(nested.index_map(large, small), np.arange(large.parameters))
        return
    places = nested.index_map(large, small)
    assert len(np.unique(places)) == small.parameters
    whole = np.full(large.parameters, -1, dtype=np.float32)
    whole[places] = np.arange(small.parameters)
    assert np.array_equal(whole[places], np.arange(small.parameters))
    assert (whole == -1).sum() == large.parameters - small.parameters


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_group_of_one_member_is_what_the_rule_alone_makes(rule: Any) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(7, 50)).astype(np.float32)
    senders = [Sender(id=f"{n}", samples=n + 1, read=partial(np.array, one)) for n, one in enumerate(values)]
    places = random.permutation(80)[:50]
    alone = merge(Settings(rule=rule, hostile=0.2), 50, senders)
    grouped = nested.merge(
        Settings(rule=rule, hostile=0.2), 80, {"m": nested.Covered(places=places, senders=senders)}
    )
    assert np.allclose(grouped.difference[places], alone.difference, rtol=1e-5, atol=1e-7)
    assert [one.verdict for one in grouped.contributions] == [one.verdict for one in alone.contributions]
