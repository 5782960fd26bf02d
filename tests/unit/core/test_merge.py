"""Several deltas become one that leads to the same bits."""

import numpy as np
import pytest

from liberatai_core.errors import NonFiniteError, StructureError
from liberatai_core.sparsifier.merge import MAX_STREAMS, exact_deltas
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


def added(view: np.ndarray, streams: tuple[bytes, ...]) -> np.ndarray:
    """Return what a device holds after it applied some streams, one after the other."""
    for stream in streams:
        view = view + densify(stream, SHAPES)
    return view


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_merged_delta_leads_to_the_same_bits_as_the_chain(seed: int, density: float) -> None:
    views, _ = chain(seed, 8, density)
    for start, stop in [(0, 8), (0, 1), (3, 7), (7, 8)]:
        merged = exact_deltas(views[start], views[stop], SHAPES)
        assert merged is not None
        assert np.array_equal(added(views[start], merged), views[stop])


def test_a_merged_delta_is_shorter_than_the_chain_that_it_replaces() -> None:
    views, deltas = chain(1, 8, 0.1)
    merged = exact_deltas(views[0], views[8], SHAPES)
    assert merged is not None
    assert sum(map(len, merged)) < 0.7 * sum(map(len, deltas))


def test_equal_weights_give_an_empty_delta() -> None:
    view = on_grid(np.random.default_rng(0))
    merged = exact_deltas(view, view.copy(), SHAPES)
    assert merged is not None
    assert len(merged) == 1
    assert not densify(merged[0], SHAPES).any()


@pytest.mark.parametrize(("levels", "files"), [(255, 1), (256, 2), (65_000, 2), (70_000, 3), (2**22, 3)])
def test_coordinates_that_moved_far_pay_a_second_time_in_a_coarser_stream(levels: int, files: int) -> None:
    before = on_grid(np.random.default_rng(0))
    after = before.copy()
    after[:50] += np.float32(2.0**-19)
    after[7] = before[7] + np.float32(levels * 2.0**-19)
    merged = exact_deltas(before, after, SHAPES)
    assert merged is not None
    assert len(merged) == files <= MAX_STREAMS
    assert np.array_equal(added(before, merged), after)
    if files > 1:
        assert np.count_nonzero(densify(merged[0], SHAPES)) == 1


def test_steps_that_shrink_a_thousandfold_still_merge() -> None:
    """A converging job: its first deltas are coarse, its last ones fine."""
    random = np.random.default_rng(3)
    first = view = on_grid(random)
    for number in range(16):
        moved = random.laplace(0, 0.02 / 2**number, SHAPES.parameters).astype(np.float32)
        _, delta = sparsify(init(SHAPES.parameters), moved, SHAPES, 0.2, power_of_two=True)
        view = view + densify(delta, SHAPES)
    merged = exact_deltas(first, view, SHAPES)
    assert merged is not None
    assert len(merged) > 1, "one stream was enough: the test shows nothing"
    assert np.array_equal(added(first, merged), view)


def test_differences_that_are_no_multiples_of_one_power_have_no_merged_delta() -> None:
    before = np.zeros(SHAPES.parameters, np.float32)
    after = before.copy()
    after[:2] = 1.0, 2.0**-30
    assert exact_deltas(before, after, SHAPES) is None
    tiny = before.copy()
    tiny[0] = 2.0**-140
    assert exact_deltas(before, tiny, SHAPES) is None, "no scale is so small"
    huge = before.copy()
    huge[0] = 2.0**127
    merged = exact_deltas(before, huge, SHAPES)
    assert merged is None or np.array_equal(added(before, merged), huge)


def test_negative_zeros_cannot_be_reached_by_adding() -> None:
    zeros = np.zeros(SHAPES.parameters, np.float32)
    assert exact_deltas(-zeros, zeros, SHAPES) is not None
    assert exact_deltas(zeros, -zeros, SHAPES) is None


def test_other_lengths_and_values_that_are_not_finite_are_refused() -> None:
    view = on_grid(np.random.default_rng(0))
    with pytest.raises(StructureError):
        exact_deltas(view[:-1], view, SHAPES)
    bad = view.copy()
    bad[0] = np.inf
    with pytest.raises(NonFiniteError):
        exact_deltas(view, bad, SHAPES)
