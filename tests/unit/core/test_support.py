"""Facts about shared support: which coordinates a seed or a block list names, and what is sent on them."""

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import (
    BombError,
    CodecError,
    IndexOrderError,
    IndexRangeError,
    LiberataiError,
    NonFiniteError,
    StructureError,
)
from liberatai_core.sparsifier import support, top_k
from liberatai_core.sparsifier.support import (
    densify_on,
    positions_from_blocks,
    positions_from_seed,
    sparsify_on,
)
from liberatai_core.structure import Structure, Tensor
from liberatai_core.weights import Vector

STRUCTURE = Structure(
    family="mlp", params={}, tensors=(Tensor("a", (30, 100)), Tensor("b", (7,)), Tensor("c", (2000,)))
)
N = STRUCTURE.parameters
MASK = (1 << 64) - 1
GOLDEN = [1691, 3698, 4183, 4201, 4348]
GOLDEN_BLOCKS = [2100, 2101, 2148, 2149, 2150, 2151]
GOLDEN_DIGEST = "2e25be6d6b5773b7"


def flat(size: int) -> Structure:
    return Structure(family="mlp", params={}, tensors=(Tensor("w", (size,)),))


def noise(seed: int = 0, size: int = N) -> Vector:
    return np.random.default_rng(seed).laplace(size=size).astype(np.float32)


def mixed(word: int) -> int:
    """SplitMix64's output function as published, in Python's integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def oracle(parameters: int, count: int, seed: int, block_size: int) -> list[int]:
    """The definition in plain loops: blocks in the order of their hashes until there are enough."""
    key = mixed(seed)
    blocks = -(-parameters // block_size)
    order = sorted(range(blocks), key=lambda block: mixed((block + 1) * 0x9E3779B97F4A7C15 + key & MASK))
    found: list[int] = []
    for block in order:
        end = min((block + 1) * block_size, parameters)
        found += list(range(block * block_size, end))[: count - len(found)]
    return sorted(found)


@pytest.mark.parametrize("block_size", [1, 2, 7, 64, 1000, N])
@pytest.mark.parametrize("density", [1e-6, 0.001, 0.05, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("seed", [0, 1, MASK])
def test_a_seed_names_what_the_definition_says(density: float, seed: int, block_size: int) -> None:
    positions = positions_from_seed(STRUCTURE, density, seed, block_size=block_size)
    assert positions.dtype == np.int64
    assert positions.tolist() == oracle(N, max(1, round(density * N)), seed, block_size)


def test_the_coordinates_of_a_seed_never_change() -> None:
    """Golden: made by `oracle` above, from (5007, 5, 42, 1), (5007, 6, 42, 4) and (300_000, 3000, 7, 1)."""
    assert positions_from_seed(STRUCTURE, 0.001, 42).tolist() == GOLDEN
    assert positions_from_seed(STRUCTURE, 6 / N, 42, block_size=4).tolist() == GOLDEN_BLOCKS
    many = positions_from_seed(flat(300_000), 0.01, 7).astype("<i8").tobytes()
    assert hashlib.sha256(many).hexdigest()[:16] == GOLDEN_DIGEST


def test_chunks_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = positions_from_seed(STRUCTURE, 0.1, 5).tolist()
    monkeypatch.setattr(support, "_CHUNK", 17)
    assert positions_from_seed(STRUCTURE, 0.1, 5).tolist() == wanted


def test_every_coordinate_is_named_equally_often() -> None:
    """2000 draws of 10 %: a count has mean 200 and deviation 13.4; five of them bound 100 coordinates."""
    counts = np.zeros(100)
    for seed in range(2000):
        counts[support.draw(100, 10, seed)] += 1
    assert np.abs(counts - 200).max() < 5 * 13.4
    assert counts.std() == pytest.approx(13.4, rel=0.35)


def test_seeds_beside_each_other_name_other_coordinates() -> None:
    """Two independent halves of 10 % share 1 % of 100 000: 1000, deviation 28."""
    one, other = (support.draw(100_000, 10_000, seed) for seed in (11, 12))
    assert abs(np.intersect1d(one, other).size - 1000) < 150


def test_drawing_from_a_large_structure_needs_little_memory() -> None:
    structure = flat(4_000_000)
    positions_from_seed(structure, 0.001, 1)
    tracemalloc.start()
    positions_from_seed(structure, 0.001, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    "bad",
    [{"density": 0.0}, {"density": 1.5}, {"density": float("nan")}, {"seed": -1}, {"seed": 1 << 64},
     {"block_size": 0}, {"block_size": N + 1}],
)  # fmt: skip
def test_a_draw_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"density": 0.1, "seed": 0, "block_size": 1} | bad
    with pytest.raises(ValueError):
        positions_from_seed(
            STRUCTURE, settings["density"], settings["seed"], block_size=settings["block_size"]
        )


def test_blocks_name_their_coordinates_and_the_last_one_is_short() -> None:
    assert positions_from_blocks(flat(10), 4, [0, 2]).tolist() == [0, 1, 2, 3, 8, 9]
    assert positions_from_blocks(flat(10), 1, (3, 9)).tolist() == [3, 9]
    assert positions_from_blocks(flat(10), 10, [0]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("block_size", "blocks", "error"),
    [
        (4, [0, 3], IndexRangeError),
        (4, [-1, 2], IndexRangeError),
        (4, [], IndexRangeError),
        (4, [1 << 62], IndexRangeError),
        (4, [1 << 80], IndexRangeError),
        (4, [-1, 1 << 63], IndexRangeError),
        (4, [0.5], IndexRangeError),
        (4, [[0]], IndexRangeError),
        (4, [2, 1], IndexOrderError),
        (4, [1, 1], IndexOrderError),
        (4, [0, 1, 2, 2], BombError),
        (0, [0], IndexRangeError),
        (11, [0], IndexRangeError),
    ],
)
def test_a_wrong_block_list_is_refused_with_a_code(
    block_size: int, blocks: Any, error: type[LiberataiError]
) -> None:
    with pytest.raises(error):
        positions_from_blocks(flat(10), block_size, blocks)


def test_an_endless_block_list_is_refused_before_it_is_read() -> None:
    with pytest.raises(BombError):
        positions_from_blocks(flat(10), 1, range(1 << 40))


def test_an_update_on_a_support_has_no_positions() -> None:
    """4 bits and a sign at most per value, and one scale per tensor."""
    positions = positions_from_seed(STRUCTURE, 0.2, 1)
    _, update = sparsify_on(top_k.init(N), noise(), STRUCTURE, positions)
    assert len(update) < positions.size * 5 / 8 + 60


def test_what_is_not_named_stays_untouched_and_old_residuals_are_sent() -> None:
    positions = positions_from_seed(STRUCTURE, 0.2, 1, block_size=8)
    state, update = sparsify_on(top_k.State(noise(1)), noise(), STRUCTURE, positions, levels=3, decay=0.5)
    sent = densify_on(update, STRUCTURE, positions)
    total = np.float32(0.5) * noise(1) + noise()
    elsewhere = np.setdiff1d(np.arange(N), positions)
    assert not sent[elsewhere].any()
    np.testing.assert_array_equal(state.residual[elsewhere], total[elsewhere])
    np.testing.assert_array_equal(sent + state.residual, total)
    assert state.rounds == 1


def test_a_float16_residual_on_a_support_is_the_one_on_the_disk() -> None:
    state = top_k.init(N, storage="float16")
    for seed in range(3):
        positions = positions_from_seed(STRUCTURE, 0.1, seed)
        state, _ = sparsify_on(state, noise(seed), STRUCTURE, positions)
        again = top_k.state_from_bytes(top_k.state_to_bytes(state), N)
        np.testing.assert_array_equal(again.residual, state.residual)


@pytest.mark.parametrize(
    ("positions", "error"),
    [
        (np.array([3, 2]), IndexOrderError),
        (np.array([2, 2]), IndexOrderError),
        (np.array([-1, 2]), IndexRangeError),
        (np.array([2, N]), IndexRangeError),
        (np.empty(0, np.int64), IndexRangeError),
        (np.array([1.0]), IndexRangeError),
        (np.array([[1]]), IndexRangeError),
    ],
)
def test_impossible_positions_are_refused_at_both_ends(positions: Any, error: type[LiberataiError]) -> None:
    _, update = sparsify_on(top_k.init(N), noise(), STRUCTURE, np.array([1]))
    with pytest.raises(error):
        sparsify_on(top_k.init(N), noise(), STRUCTURE, positions)
    with pytest.raises(error):
        densify_on(update, STRUCTURE, positions)


def test_updates_of_another_support_or_structure_are_refused() -> None:
    positions = positions_from_seed(STRUCTURE, 0.2, 1)
    _, update = sparsify_on(top_k.init(N), noise(), STRUCTURE, positions)
    with pytest.raises(CodecError):
        densify_on(update, STRUCTURE, positions[1:])
    with pytest.raises(StructureError):
        sparsify_on(top_k.init(N), noise(size=N - 1), STRUCTURE, positions)
    with pytest.raises(StructureError):
        sparsify_on(top_k.init(N - 1), noise(), STRUCTURE, positions)
    with pytest.raises(NonFiniteError):
        sparsify_on(top_k.init(N), noise() * np.float32(np.nan), STRUCTURE, positions)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            sparsify_on(top_k.init(N), noise(), STRUCTURE, positions, decay=decay)
