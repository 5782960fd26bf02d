"""A new model travels as a recipe: the same random weights everywhere, for some hundred bytes."""

import hashlib

import numpy as np
import pytest

from liberatai_core.compressor.artifact import MAX_REACH, levels_of, restore
from liberatai_core.compressor.codebook import compress
from liberatai_core.compressor.drawn import cut, draw
from liberatai_core.errors import CodecError, LiberataiError, NonFiniteError, StructureError
from liberatai_core.structure import Structure, Tensor

SHAPES = Structure(
    family="mlp",
    params={},
    tensors=(Tensor("w", (200, 50)), Tensor("gain", (200,)), Tensor("few", (20,)), Tensor("off", (100,))),
)


def reference(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    parts = [
        random.normal(0, 0.05, 10_000),
        np.ones(200),
        random.normal(0, 0.1, 20),
        random.normal(3, 1, 100),
    ]
    return np.concatenate(parts).astype(np.float32)


def test_the_file_is_tiny_and_gives_weights_that_are_spread_like_the_reference() -> None:
    file = draw(reference(), SHAPES, 7)
    weights = restore(file, SHAPES)
    assert len(file) < 400
    assert weights[:10_000].std() == pytest.approx(0.05, rel=0.03)
    assert abs(weights[:10_000].mean()) < 0.003
    assert (weights[10_000:10_200] == 1).all()


def test_few_values_and_values_around_another_mean_travel_as_they_are() -> None:
    weights = restore(draw(reference(), SHAPES, 7), SHAPES)
    assert np.allclose(weights[10_200:], reference()[10_200:], rtol=1e-3)


def test_weights_are_multiples_of_a_power_of_two_so_that_sums_are_exact() -> None:
    weights = restore(draw(reference(), SHAPES, 7), SHAPES)
    scaled = weights[:10_000] * 2.0**20
    assert np.array_equal(scaled, np.rint(scaled))


def test_the_same_seed_gives_the_same_bits_on_every_machine() -> None:
    levels = levels_of(12345, 700, 1000)
    assert levels.min() >= -700
    assert levels.max() <= 700
    assert hashlib.sha256(levels.astype("<i8").tobytes()).hexdigest()[:16] == "f16b1b07b3086f96"
    assert draw(reference(), SHAPES, 7) == draw(reference(), SHAPES, 7)
    assert not np.array_equal(restore(draw(reference(), SHAPES, 8), SHAPES), reference())


def test_tensors_of_one_model_are_drawn_apart() -> None:
    twins = Structure(family="mlp", params={}, tensors=(Tensor("a", (500,)), Tensor("b", (500,))))
    weights = restore(draw(np.random.default_rng(0).normal(size=1000).astype(np.float32), twins, 3), twins)
    assert abs(np.corrcoef(weights[:500], weights[500:])[0, 1]) < 0.2


def test_every_truncation_and_every_flipped_byte_is_refused() -> None:
    file = draw(reference(), SHAPES, 7)
    for end in range(len(file)):
        with pytest.raises(LiberataiError):
            restore(file[:end], SHAPES)
    for at in range(len(file)):
        with pytest.raises(LiberataiError):
            restore(file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :], SHAPES)


def test_a_reach_beyond_the_limit_is_refused() -> None:
    file = draw(reference(), SHAPES, 7)
    at = file.index(bytes([5])) + 5
    wide = file[:at] + bytes([0x81, 0x80, 0x02]) + file[at + 2 :]
    with pytest.raises(CodecError, match=str(MAX_REACH)):
        restore(wide, SHAPES)


def test_bad_references_and_seeds_are_refused() -> None:
    with pytest.raises(StructureError):
        draw(reference()[:-1], SHAPES, 0)
    bad = reference()
    bad[3] = np.nan
    with pytest.raises(NonFiniteError):
        draw(bad, SHAPES, 0)
    with pytest.raises(ValueError, match="seed"):
        draw(reference(), SHAPES, 2**32)


def sliced_member() -> tuple[Structure, np.ndarray]:
    """Return a smaller structure with an own last tensor, and where its values lie in `SHAPES`."""
    small = Structure(
        family="mlp",
        params={},
        tensors=(Tensor("w", (100, 40)), Tensor("gain", (100,)), Tensor("few", (20,)), Tensor("own", (9, 9))),
    )
    whole = np.arange(SHAPES.parameters)
    places = [
        whole[:10_000].reshape(200, 50)[:100, :40].ravel(),
        whole[10_000:10_100],
        whole[10_200:10_220],
        SHAPES.parameters + np.arange(81),
    ]
    return small, np.concatenate(places)


def test_a_slice_of_a_drawn_model_travels_bit_for_bit() -> None:
    small, places = sliced_member()
    large, own = draw(reference(), SHAPES, 7), draw(reference(1)[: small.parameters], small, 8)
    file = cut(large, SHAPES, own, small, places)
    space = np.concatenate([restore(large, SHAPES), restore(own, small)[-81:]])
    assert np.array_equal(restore(file, small), space[places])


def test_a_slice_of_a_compressed_model_is_no_recipe() -> None:
    small, places = sliced_member()
    large, own = draw(reference(), SHAPES, 7), draw(reference(1)[: small.parameters], small, 8)
    squeezed = compress(restore(large, SHAPES), SHAPES, 4000)
    with pytest.raises(CodecError, match="no recipe"):
        cut(squeezed, SHAPES, own, small, places)


@pytest.mark.parametrize("bits", [1, 2, 3, 10])
def test_fewer_levels_are_spread_alike_and_make_slices_shorter(bits: int) -> None:
    small, places = sliced_member()
    large, own = (
        draw(reference(), SHAPES, 7, reach_bits=bits),
        draw(reference(1)[: small.parameters], small, 8),
    )
    assert restore(large, SHAPES)[:10_000].std() == pytest.approx(0.05, rel=0.15)
    assert len(cut(large, SHAPES, own, small, places)) < 4000 * (bits + 2) / 8 + 300
