"""Sums of sparse updates: the same bytes as of dense ones, decoded as rarely as memory allows."""

import tracemalloc
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

from liberatai_core.aggregator import packed
from liberatai_core.aggregator.mean import mean, mean_over_senders
from liberatai_core.aggregator.packed import Packed, entries
from liberatai_core.aggregator.rules import RULES, Sender, Settings, merge
from liberatai_core.errors import (
    CodecError,
    IndexOrderError,
    IndexRangeError,
    NonFiniteError,
    StructureError,
)
from liberatai_core.sparsifier import codec, methods, small, top_k
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, to_bytes

STRUCTURE = Structure(
    family="mlp", params={}, tensors=(Tensor("w", (40, 50)), Tensor("b", (30,)), Tensor("v", (70, 30)))
)


def places(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


def floats(*numbers: float) -> Any:
    return np.array(numbers, dtype=np.float32)


def some(parameters: int, density: float, seed: int) -> Vector:
    random = np.random.default_rng(seed)
    dense = (random.laplace(size=parameters) * 1e-3).astype(np.float32)
    dense[random.random(parameters) > density] = 0
    return dense


def sparse(dense: Vector) -> Packed:
    sent = np.flatnonzero(dense)
    return entries(dense.size, sent, dense[sent])


# --- sparse differences --------------------------------------------------------------------------


def test_positions_that_are_unsorted_doubled_or_outside_are_refused() -> None:
    for wrong in (places(3, 1), places(2, 2)):
        with pytest.raises(IndexOrderError):
            entries(5, wrong, floats(1, 2))
    for wrong in (places(-1, 2), places(1, 5)):
        with pytest.raises(IndexRangeError):
            entries(5, wrong, floats(1, 2))


def test_positions_and_values_of_unlike_shapes_or_types_are_refused() -> None:
    for positions, values in (
        (places(1), floats(1, 2)),
        (places(1, 2).astype(np.int32), floats(1, 2)),
        (places(1, 2), floats(1, 2).astype(np.float64)),
        (places(1, 2)[None], floats(1, 2)[None]),
    ):
        with pytest.raises(StructureError):
            entries(5, positions, values)


def test_a_zero_that_was_sent_is_none() -> None:
    one = entries(5, places(0, 2, 4), floats(1, 0, -2))
    assert one.positions is not None
    assert one.positions.tolist() == [0, 4]
    assert packed.unpack(one).tolist() == [1, 0, 0, 0, -2]


def test_lengths_and_products_have_the_same_bits_however_a_difference_was_packed() -> None:
    for density in (0.01, 0.3, 0.9, 1.0):
        dense, other = some(3000, density, 1), some(3000, 1.0, 2)
        ways: list[Any] = [dense, packed.pack(dense), sparse(dense), packed.compact(sparse(dense))]
        ways.append(Packed(dense.size, None, dense))
        assert len({packed.norm(one) for one in ways}) == 1
        assert len({packed.dot(one, other) for one in ways}) == 1
        for one in ways[1:]:
            assert to_bytes(packed.unpack(one)) == to_bytes(dense)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_the_entries_of_every_method_are_its_dense_difference(name: str) -> None:
    difference = some(STRUCTURE.parameters, 1.0, 3)
    state = top_k.init(STRUCTURE.parameters)
    _, update = methods.METHODS[name].sparsify(state, difference, STRUCTURE, 0.1, seed=5)
    positions, values = methods.entries(update, STRUCTURE, 5)
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    dense = methods.densify(update, STRUCTURE, 5)
    assert to_bytes(packed.unpack(entries(STRUCTURE.parameters, positions, values))) == to_bytes(dense)
    assert np.count_nonzero(dense) == np.count_nonzero(values) > 0


def test_a_value_in_both_parts_of_an_update_with_small_tensors_is_refused() -> None:
    """The bias lies at 2000 … 2029; the second part speaks about 2005, too."""

    def stream(parameters: int, *positions: int) -> bytes:
        count = len(positions)
        levels = np.ones(count, np.int16)
        one = codec.Sparse(places(*positions), levels, np.array([count]), floats(0.5))
        return codec.encode(one, parameters)

    first = stream(30, 0, 5)
    head = bytes([small.SMALL]) + len(first).to_bytes(4, "little") + first
    positions, values = methods.entries(head + stream(STRUCTURE.parameters, 3, 2030), STRUCTURE)
    assert positions.tolist() == [3, 2000, 2005, 2030]
    assert values.tolist() == [0.5] * 4
    with pytest.raises(CodecError, match="both parts"):
        methods.entries(head + stream(STRUCTURE.parameters, 3, 2005), STRUCTURE)


# --- sums ------------------------------------------------------------------------------------------


def test_a_full_array_hands_its_upper_bits_on_and_nothing_is_lost() -> None:
    """Products of 53 bits: an array takes 2^7 of them. Some of the sums end above 2^53 units."""
    rule, random = mean(1 << 29), np.random.default_rng(0)
    weight = (1 << 29) - 1
    values = (1 + random.random((400, 3)) * (1 - 2.0**-24)).astype(np.float32)
    values[:, 2] *= random.choice([-1, 1], 400)
    state = rule.add_all(rule.init(3), ((one, weight, None) for one in values))
    first = rule.add(rule.init(3), values[0], weight, None)
    assert len(state.pieces) > len(first.pieces)
    assert all(load <= 1 << 53 for load in state.loads.values())
    for exponent, piece in state.pieces.items():
        assert (np.abs(piece) <= np.ldexp(float(state.loads[exponent]), exponent)).all()
    wanted = [sum(Fraction(float(one)) for one in values[:, place]) * weight for place in range(3)]
    for place, exact in enumerate(wanted):
        assert sum(Fraction(float(piece[place])) for piece in state.pieces.values()) == exact
        assert state.values[place] == float(exact)
    doubled = rule.merge(state, state)
    assert doubled.values.tolist() == [float(2 * exact) for exact in wanted]


@pytest.mark.parametrize("tail", [2.0**-40, 2.0**-60])
def test_the_sum_is_rounded_once(tail: float) -> None:
    """2^54 + 2 is a tie that rounds to even; a little more, and it is none. Twice rounded, it would be."""
    rule = mean()
    state = rule.init(1)
    for value in (2.0**54, 2.0, tail):
        state = rule.add(state, floats(value), 1, None)
    assert len(state.pieces) > 2
    assert state.values.tolist() == [2.0**54 + 4]
    assert rule.add(state, floats(-tail), 1, None).values.tolist() == [2.0**54]


def test_a_usual_sum_of_sparse_updates_is_one_array() -> None:
    rule = mean()
    updates = []
    for seed in range(20):
        difference = some(STRUCTURE.parameters, 1.0, seed)
        _, body = top_k.sparsify(top_k.init(difference.size), difference, STRUCTURE, 0.02)
        updates.append(methods.entries(body, STRUCTURE))
    addends = ((entries(STRUCTURE.parameters, *one), 100 + n, None) for n, one in enumerate(updates))
    assert len(rule.add_all(rule.init(STRUCTURE.parameters), addends).pieces) == 1


def test_adding_a_stream_leaves_the_state_before_alone() -> None:
    rule = mean()
    before = rule.add(rule.init(3), floats(1, 2, 3), 1, None)
    after = rule.add_all(before, [(entries(3, places(1), floats(5)), 1, None)] * 2)
    assert before.values.tolist() == [1, 2, 3]
    assert after.values.tolist() == [1, 12, 3]
    assert rule.finish(after).tolist() == pytest.approx([1 / 3, 4, 1])


def test_only_the_senders_of_a_coordinate_count_there() -> None:
    rule = mean_over_senders()
    state = rule.add(rule.init(3), entries(3, places(0, 1), floats(2, 4)), 1, None)
    state = rule.add(state, entries(3, places(1), floats(8)), 3, None)
    assert rule.finish(state).tolist() == [2, 7, 0]


def test_sparse_updates_of_another_length_or_not_finite_are_refused() -> None:
    rule = mean()
    with pytest.raises(StructureError):
        rule.add(rule.init(2), entries(3, places(0), floats(1)), 1, None)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError):
            rule.add(rule.init(3), entries(3, places(0), floats(bad)), 1, None)
    with pytest.raises(StructureError):
        rule.add(rule.init(2), np.ones(2), 1, None)  # type: ignore[arg-type]


# --- rules -----------------------------------------------------------------------------------------


def counted(dense: Vector, reads: list[int]) -> Any:
    reads[0] += 1
    return sparse(dense)


def refused() -> Any:
    raise AssertionError("a sparse update was made dense")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_merges_sparse_and_dense_updates_to_the_same_bytes(rule: Any) -> None:
    updates = [some(3000, 0.1, seed) * np.float32(1 + seed) for seed in range(9)]
    dense = [Sender(id=str(n), samples=1 + n, read=one.copy) for n, one in enumerate(updates)]
    light = [
        Sender(id=str(n), samples=1 + n, read=refused, sent=partial(sparse, one))
        for n, one in enumerate(updates)
    ]
    settings = Settings(rule=rule, hostile=0.2)
    one, other = merge(settings, 3000, dense), merge(settings, 3000, light)
    assert to_bytes(one.difference) == to_bytes(other.difference)
    assert one.contributions == other.contributions


@pytest.mark.parametrize("rule", sorted(RULES))
def test_updates_that_may_be_kept_are_read_once(rule: Any) -> None:
    reads = [0]
    light = [
        Sender(id=str(n), samples=1, read=refused, sent=partial(counted, some(3000, 0.02, n), reads))
        for n in range(9)
    ]
    merge(Settings(rule=rule), 3000, light)
    assert reads == [9]


def test_the_mean_reads_twice_and_norm_clipping_three_times_what_there_is_no_room_for() -> None:
    """Each of nine updates is a third of the model; a quarter of it is what is kept."""
    for rule, times in (("mean", 2), ("norm_clip", 3), ("median", 1)):
        reads = [0]
        light = [
            Sender(id=str(n), samples=1, read=refused, sent=partial(counted, some(3000, 0.33, n), reads))
            for n in range(9)
        ]
        merge(Settings(rule=rule), 3000, light)  # type: ignore[arg-type]
        assert reads == [9 * times]


@pytest.mark.parametrize("rule", ["mean", "norm_clip"])
def test_the_mean_of_many_sparse_updates_needs_hardly_more_memory_than_that_of_few(rule: Any) -> None:
    parameters = 200_000
    made = [some(parameters, 0.01, seed) for seed in range(4)]

    def peak(devices: int) -> int:
        light = [
            Sender(id=f"{n:04}", samples=1 + n, read=refused, sent=partial(sparse, made[n % 4]))
            for n in range(devices)
        ]
        tracemalloc.start()
        try:
            merge(Settings(rule=rule), parameters, light)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(400) < 1.25 * peak(40)
