"""What holds for every shared support, every shard of a mean, and every way in which updates get lost."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liberatai_core.aggregator.mean import RULES, Aggregator, Sum, Update, aggregate
from liberatai_core.errors import LiberataiError, StructureError, TooLargeError
from liberatai_core.sparsifier import methods, support, top_k
from liberatai_core.sparsifier.methods import METHODS
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector, to_bytes

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=5)
seeds = st.integers(0, 2**64 - 1)


def build(dimensions: list[list[int]]) -> Structure:
    tensors = tuple(Tensor(f"t{number}", tuple(shape)) for number, shape in enumerate(dimensions))
    return Structure(family="mlp", params={}, tensors=tensors)


def any_finite(generator: np.random.Generator, size: int) -> Vector:
    """Float32 values of all magnitudes, tiny and huge, some of them zero."""
    values = generator.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    keep = np.isfinite(values) & (np.abs(values) < 1e37) & (generator.random(size) < 0.8)
    return np.where(keep, values, np.float32(0)).astype(np.float32)


def usual(generator: np.random.Generator, size: int) -> Vector:
    return (generator.laplace(size=size) * 1e-3).astype(np.float32)


# --- shared support ----------------------------------------------------------------------------------


@quick
@given(shapes, seeds, st.floats(1e-4, 1), st.integers(1, 12), st.integers(1, 255), st.booleans())
def test_all_devices_have_one_support_and_lose_nothing_on_it(
    dimensions: list[list[int]], seed: int, density: float, block: int, levels: int, wild: bool
) -> None:
    structure = build(dimensions)
    size = structure.parameters
    block_size = min(block, size)
    generator = np.random.default_rng(seed)
    draw = any_finite if wild else usual
    wanted = support.positions_from_seed(structure, density, seed, block_size=block_size)
    assert wanted.size == max(1, round(density * size))
    together = np.zeros(size)
    for _ in range(4):
        positions = support.positions_from_seed(structure, density, seed, block_size=block_size)
        np.testing.assert_array_equal(positions, wanted)
        difference = draw(generator, size)
        state, update = support.sparsify_on(top_k.init(size), difference, structure, positions, levels)
        sent = support.densify_on(update, structure, positions)
        elsewhere = np.setdiff1d(np.arange(size), positions)
        assert not sent[elsewhere].any()
        np.testing.assert_array_equal(
            state.residual[elsewhere].view(np.uint32), (difference[elsewhere] + np.float32(0)).view(np.uint32)
        )
        np.testing.assert_array_equal(
            sent[positions].astype(np.float64) + state.residual[positions].astype(np.float64),
            difference[positions].astype(np.float64),
        )
        together += sent
    assert not together[np.setdiff1d(np.arange(size), wanted)].any()


@quick
@given(shapes, seeds, st.data())
def test_blocks_and_positions_name_the_same_coordinates(
    dimensions: list[list[int]], seed: int, data: st.DataObject
) -> None:
    structure = build(dimensions)
    block_size = data.draw(st.integers(1, structure.parameters))
    blocks = -(-structure.parameters // block_size)
    chosen = sorted(data.draw(st.sets(st.integers(0, blocks - 1), min_size=1)))
    positions = support.positions_from_blocks(structure, block_size, chosen)
    mask = np.isin(np.arange(structure.parameters) // block_size, chosen)
    np.testing.assert_array_equal(positions, np.flatnonzero(mask))


@quick
@given(st.binary(max_size=80), st.integers(0, 8), seeds)
def test_any_bytes_are_refused_or_a_finite_difference(body: bytes, kind: int, seed: int) -> None:
    structure = build([[9], [3, 4]])
    for data in (body, bytes([kind]) + body, bytes([kind, structure.parameters]) + body):
        try:
            dense = methods.densify(data, structure, seed)
        except LiberataiError:
            continue
        assert dense.shape == (structure.parameters,)
        assert np.isfinite(dense).all()


@quick
@given(shapes, seeds, st.floats(1e-3, 1), st.sampled_from(sorted(METHODS)), st.booleans())
def test_methods_with_feedback_lose_nothing_bit_for_bit(
    dimensions: list[list[int]], seed: int, density: float, name: str, wild: bool
) -> None:
    structure = build([*dimensions, [23, 13]])
    size, generator = structure.parameters, np.random.default_rng(seed)
    draw, method = any_finite if wild else usual, METHODS[name]
    state = top_k.State(draw(generator, size) if method.feedback else np.zeros(size, np.float32))
    difference = draw(generator, size) / np.float32(size)
    after, update = method.sparsify(state, difference, structure, density, seed=seed)
    sent = methods.densify(update, structure, seed)
    if method.feedback:
        total = state.residual + difference
        np.testing.assert_array_equal(
            sent.astype(np.float64) + after.residual.astype(np.float64), total.astype(np.float64)
        )
    else:
        assert not after.residual.any()


# --- sums in shards ----------------------------------------------------------------------------------


def shard(rule: Aggregator, size: int, updates: list[Update]) -> Sum:
    state = rule.init(size)
    for update in updates:
        state = rule.add(state, update.difference, update.samples, update.cover)
    return state


def some_updates(seed: int, size: int, number: int, wild: bool) -> list[Update]:
    generator = np.random.default_rng(seed)
    draw = any_finite if wild else usual
    return [
        Update(
            id=f"{place:03d}",
            difference=draw(generator, size) * (generator.random(size) < generator.choice([0.01, 0.5, 1])),
            samples=int(generator.integers(1, 20_000)),
            cover=generator.random(size) < 0.5 if generator.random() < 0.3 else None,
        )
        for place in range(number)
    ]


@quick
@given(seeds, st.integers(1, 300), st.integers(0, 25), st.booleans(), st.sampled_from(sorted(RULES)))
def test_one_and_four_shards_in_any_order_give_the_same_bytes(
    seed: int, size: int, number: int, wild: bool, name: str
) -> None:
    rule = RULES[name](10_000)
    updates = some_updates(seed, size, number, wild)
    wanted = to_bytes(aggregate(rule, size, updates))
    generator = np.random.default_rng(seed)
    for _ in range(2):
        mixed = [updates[place] for place in generator.permutation(number)]
        cuts = np.sort(generator.integers(0, number + 1, 3))
        parts = [mixed[a:b] for a, b in zip([0, *cuts], [*cuts, number], strict=True)]
        one, two, three, four = (shard(rule, size, part) for part in parts)
        chained = rule.merge(rule.merge(rule.merge(one, two), three), four)
        paired = rule.merge(rule.merge(four, two), rule.merge(three, one))
        assert to_bytes(rule.finish(chained)) == wanted
        assert to_bytes(rule.finish(paired)) == wanted
        assert chained.updates == paired.updates == number
        np.testing.assert_array_equal(chained.values, paired.values)
        np.testing.assert_array_equal(chained.weights, paired.weights)


@settings(quick, max_examples=25)
@given(seeds, st.integers(1, 20), st.booleans())
def test_the_sum_is_exact(seed: int, size: int, wild: bool) -> None:
    updates = some_updates(seed, size, 12, wild)
    state = shard(RULES["mean"](10_000), size, updates)
    for place in range(size):
        wanted = sum(
            Fraction(float(update.difference[place])) * min(update.samples, 10_000)
            for update in updates
            if update.cover is None or update.cover[place]
        )
        assert sum(Fraction(float(piece[place])) for piece in state.pieces.values()) == wanted


@quick
@given(seeds, st.integers(1, 100), st.integers(0, 9))
def test_mean_over_senders_divides_by_the_samples_of_those_who_sent(
    seed: int, size: int, number: int
) -> None:
    updates = [update for update in some_updates(seed, size, number, wild=False) if update.cover is None]
    result = aggregate(RULES["mean_over_senders"](10_000), size, updates)
    for place in range(size):
        sent = [update for update in updates if update.difference[place] != 0]
        weights = [min(update.samples, 10_000) for update in sent]
        total = sum(w * float(u.difference[place]) for w, u in zip(weights, sent, strict=True))
        assert result[place] == pytest.approx(total / sum(weights) if sent else 0.0, rel=1e-5, abs=1e-12)


def test_sums_of_unlike_lengths_or_too_many_updates_do_not_merge() -> None:
    rule = RULES["mean"](1)
    with pytest.raises(StructureError):
        rule.merge(rule.init(2), rule.init(3))
    full = Sum(2, {}, np.zeros(1), updates=1 << 20)
    with pytest.raises(TooLargeError):
        rule.merge(full, shard(rule, 2, [Update(id="a", difference=np.ones(2, np.float32), samples=1)]))
    with pytest.raises(TooLargeError):
        rule.add(full, np.ones(2, np.float32), 1, None)
    with pytest.raises(StructureError):
        RULES["mean_over_senders"](1).add(rule.init(2), np.ones(2, np.float32), 1, np.array([True]))


def test_merging_leaves_both_sums_alone() -> None:
    rule = RULES["mean"](1)
    one, other = (
        shard(rule, 1, [Update(id="a", difference=np.ones(1, np.float32), samples=1)]) for _ in "ab"
    )
    assert rule.finish(rule.merge(one, other)).tolist() == [1.0]
    assert one.values.tolist() == other.values.tolist() == [1.0]


# --- mass ---------------------------------------------------------------------------------------------

GRID = 2.0**-10
"""Every value is a small multiple: with power-of-two scales all sums are exact."""


@dataclass
class Device:
    """State as on a device: residual, updates without a receipt, updates given back."""

    state: top_k.State
    outbox: dict[str, bytes] = field(default_factory=dict)
    returned: dict[str, bytes] = field(default_factory=dict)


class Channel:
    """Loses, doubles, delays and reorders messages."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.queue: list[tuple[int, str, bytes]] = []

    def send(self, device: int, uid: str, body: bytes) -> None:
        copies = int(self.generator.choice([0, 1, 1, 2, 3]))
        self.queue += [(device, uid, body)] * copies

    def deliver(self) -> list[tuple[int, str, bytes]]:
        """Some of what is under way, in any order; the rest comes later."""
        order = self.generator.permutation(len(self.queue))
        late = self.generator.random(len(self.queue)) < 0.3
        out = [self.queue[place] for place in order if not late[place]]
        self.queue = [self.queue[place] for place in order if late[place]]
        return out


@settings(quick, max_examples=15)
@given(seeds, st.sampled_from([0.01, 0.05, 0.3]), st.integers(1, 15))
def test_no_mass_is_lost_or_doubled_over_100_rounds_of_loss_duplication_and_reordering(
    seed: int, density: float, levels: int
) -> None:
    structure = build([[20, 9], [9], [40]])
    size, generator = structure.parameters, np.random.default_rng(seed)
    devices = [Device(top_k.init(size)) for _ in range(3)]
    up, down = Channel(generator), Channel(generator)
    verdicts: dict[str, bytes] = {}
    trained, model = np.zeros(size, np.float32), np.zeros(size, np.float32)
    made: dict[str, bytes] = {}
    for number in range(100):
        for place, device in enumerate(devices):
            if generator.random() < 0.4:
                difference = (generator.integers(-8, 9, size) * GRID).astype(np.float32)
                trained += difference
                for body in device.returned.values():
                    difference += top_k.densify(body, structure)
                device.returned.clear()
                uid = f"{place}/{number}"
                device.state, made[uid] = top_k.sparsify(
                    device.state, difference, structure, density, levels=levels, power_of_two=True
                )
                device.outbox[uid] = made[uid]
            for uid, body in device.outbox.items():
                up.send(place, uid, body)
        for place, uid, body in up.deliver():
            if uid not in verdicts:
                # Late, or not among the first of an over-selected round: refused for good.
                late = number - int(uid.split("/")[1]) > 3
                accepted = not late and generator.random() < 0.7
                verdicts[uid] = b"accepted" if accepted else b"refused"
                if accepted:
                    model += top_k.densify(body, structure)
            down.send(place, uid, verdicts[uid])
        for place, uid, verdict in down.deliver():
            body = devices[place].outbox.pop(uid, b"")
            if body and verdict == b"refused":
                devices[place].returned[uid] = body
    kept = np.zeros(size, np.float32)
    for device in devices:
        kept += device.state.residual
        for uid, body in (device.outbox | device.returned).items():
            if verdicts.get(uid) != b"accepted":
                kept += top_k.densify(body, structure)
    assert b"refused" in verdicts.values()
    assert b"accepted" in verdicts.values()
    np.testing.assert_array_equal(model + kept, trained)


def test_sampled_updates_of_a_seed_are_the_same_for_every_device() -> None:
    """Two devices with one seed: the sum of their updates has k coordinates, not 2 k."""
    structure = build([[50, 40]])
    generator = np.random.default_rng(0)
    sums = np.zeros(2000, np.float32)
    for _ in range(2):
        _, update = METHODS["random_k"].sparsify(
            top_k.init(2000), usual(generator, 2000), structure, 0.05, seed=9
        )
        sums += methods.densify(update, structure, 9)
    assert np.count_nonzero(sums) == 100
