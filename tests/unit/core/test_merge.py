"""Several deltas become one that leads to the same bits."""

import numpy as np
import pytest

from liberatai_core.errors import NonFiniteError, StructureError
from liberatai_core.sparsifier.merge import exact_delta
from liberatai_core.sparsifier.top_k import densify, init, sparsify
from liberatai_core.structure import Structure, Tensor

SHAPES = Structure(
    family="mlp", params={}, tensors=(Tensor("a", (100, 40)), Tensor("b", (60,)), Tensor("c", (9,)))
)


def on_grid(random: np.random.Generator) -> np.ndarray:
    """Return weights as a drawn or half-precision keyframe gives them: multiples of a power of two."""
    return (np.rint(random.normal(0, 0.05, SHAPES.parameters) * 2**16) / 2**16).astype(np.float32)


def chain(seed: int, rounds: int, density: float) -> tuple[list[np.ndarray], list[bytes]]:
    """Return the views of some rounds, and the deltas between them, as a coordinator makes them."""
    random = np.random.default_rng(seed)
    view = on_grid(random)
    master = view.copy()
    views, deltas = [view], []
    for number in range(rounds):
        moved = random.laplace(0, 0.01 / (1 + number), SHAPES.parameters)
        master = master + moved.astype(np.float32)
        state = init(SHAPES.parameters)
        _, delta = sparsify(state, master - view, SHAPES, density, power_of_two=True)
        view = view + densify(delta, SHAPES)
        views.append(view)
        deltas.append(delta)
    return views, deltas


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_merged_delta_leads_to_the_same_bits_as_the_chain(seed: int, density: float) -> None:
    views, _ = chain(seed, 8, density)
    for start, stop in [(0, 8), (0, 1), (3, 7), (7, 8)]:
        merged = exact_delta(views[start], views[stop], SHAPES)
        assert merged is not None
        assert np.array_equal(views[start] + densify(merged, SHAPES), views[stop])


def test_a_merged_delta_is_shorter_than_the_chain_that_it_replaces() -> None:
    views, deltas = chain(1, 8, 0.1)
    merged = exact_delta(views[0], views[8], SHAPES)
    assert merged is not None
    assert len(merged) < 0.7 * sum(map(len, deltas))


def test_equal_weights_give_an_empty_delta() -> None:
    view = on_grid(np.random.default_rng(0))
    merged = exact_delta(view, view.copy(), SHAPES)
    assert merged is not None
    assert not densify(merged, SHAPES).any()


def test_differences_that_are_no_small_multiples_of_one_power_have_no_merged_delta() -> None:
    before = on_grid(np.random.default_rng(0))
    after = before.copy()
    after[0] += np.float32(1)
    after[1] += np.float32(2.0**-10)
    assert exact_delta(before, after, SHAPES) is None
    after = before + np.float32(np.pi) * before
    assert exact_delta(before, after, SHAPES) is None


def test_negative_zeros_cannot_be_reached_by_adding() -> None:
    zeros = np.zeros(SHAPES.parameters, np.float32)
    assert exact_delta(-zeros, zeros, SHAPES) is not None
    assert exact_delta(zeros, -zeros, SHAPES) is None


def test_other_lengths_and_values_that_are_not_finite_are_refused() -> None:
    view = on_grid(np.random.default_rng(0))
    with pytest.raises(StructureError):
        exact_delta(view[:-1], view, SHAPES)
    bad = view.copy()
    bad[0] = np.inf
    with pytest.raises(NonFiniteError):
        exact_delta(view, bad, SHAPES)
