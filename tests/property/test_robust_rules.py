"""Whatever devices send: no order changes a bit, and no minority moves a coordinate beyond honest values."""

from functools import partial
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from liberatai_core.aggregator import packed
from liberatai_core.aggregator.rules import RULES, Sender, Settings, feared, merge
from liberatai_core.aggregator.trimmed_mean import trimmed_mean
from liberatai_core.weights import to_bytes


def drawn(seed: int, devices: int, parameters: int, density: float) -> Any:
    random = np.random.default_rng(seed)
    scale = 2.0 ** random.integers(-30, 10, (devices, 1))
    values = (random.normal(size=(devices, parameters)) * scale).astype(np.float32)
    values[random.random(values.shape) > density] = 0
    return values


def senders(values: Any, counts: Any) -> list[Sender]:
    return [
        Sender(id=f"{place:03d}", samples=int(count), read=partial(np.array, one))
        for place, (one, count) in enumerate(zip(values, counts, strict=True))
    ]


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 2**32),
    devices=st.integers(1, 12),
    parameters=st.integers(1, 3000),
    density=st.floats(0, 1),
    hostile=st.floats(0, 0.49),
    clip=st.floats(0.1, 10),
    data=st.data(),
)
def test_no_order_of_arrival_changes_a_bit(
    rule: Any,
    seed: int,
    devices: int,
    parameters: int,
    density: float,
    hostile: float,
    clip: float,
    data: st.DataObject,
) -> None:
    values = drawn(seed, devices, parameters, density)
    some = senders(values, np.random.default_rng(seed).integers(1, 10**7, devices))
    asked = Settings(rule=rule, hostile=hostile, clip=clip, seed=seed)
    one = merge(asked, parameters, some)
    other = merge(asked, parameters, data.draw(st.permutations(some)))
    assert to_bytes(one.difference) == to_bytes(other.difference)
    assert one.contributions == other.contributions
    assert one.frozen == other.frozen
    assert np.isfinite(one.difference).all()
    assert all(-1.001 <= given.cosine <= 1.001 for given in one.contributions)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 30), share=st.floats(0, 0.49))
def test_a_minority_cannot_move_the_trimmed_mean_beyond_honest_values(
    seed: int, devices: int, share: float
) -> None:
    f = feared(share, devices)
    if 2 * f >= devices:
        return
    random = np.random.default_rng(seed)
    values = random.normal(size=(devices, 20))
    values[:f] = 10.0 ** random.integers(0, 30, (f, 20)) * random.choice([-1, 1], (f, 20))
    found, honest = trimmed_mean(values, f), values[f:]
    assert (found <= honest.max(axis=0) + 1e-12).all()
    assert (found >= honest.min(axis=0) - 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(sorted(set(RULES) - {"mean"})),
    seed=st.integers(0, 2**32),
    density=st.floats(0.05, 1),
    loud=st.floats(1, 1e6),
)
def test_no_minority_makes_the_result_longer_than_honest_updates(
    rule: Any, seed: int, density: float, loud: float
) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(10, 300)).astype(np.float32)
    values[random.random(values.shape) > density] = 0
    honest = max(packed.norm(one) for one in values[2:])
    values[:2] *= np.float32(loud)
    found = merge(Settings(rule=rule, hostile=0.2), 300, senders(values, [1] * 10))
    # Trimming ranks whole coordinates: its result may combine the loudest honest value of each.
    assert packed.norm(found.difference) <= 1.5 * honest


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 8), parameters=st.integers(1, 6000))
def test_scalar_products_do_not_depend_on_who_else_is_there(seed: int, devices: int, parameters: int) -> None:
    """A matrix product of a library may sum in another order for another shape; here that changes no bit."""
    values = drawn(seed, devices, parameters, 0.3)
    together = packed.gram([packed.pack(one) for one in values])
    for first in range(devices):
        for second in range(devices):
            pair = packed.gram([packed.pack(values[first]), packed.pack(values[second])])
            assert pair[0, 1] == together[first, second]
