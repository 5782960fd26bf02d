"""Where members of a family lie in the largest one, and what that makes of their devices' updates."""

from typing import Any

import numpy as np
import pytest

from liberatai_core.aggregator import nested, rules
from liberatai_core.aggregator.packed import pack
from liberatai_core.errors import StructureError
from liberatai_core.structure import DataContract, Structure, Tensor, to_tensors

pytest.importorskip("torch")
import torch

from liberatai_core.learning.families import build, initial_weights, members, structure_of

IMAGES = DataContract(input_shape=(1, 16, 16), classes=5)
SIGNALS = DataContract(input_shape=(3, 64), classes=5)

NARROWER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cnn", {"width": 16}, {"width": 4}),
    ("cnn", {"width": 16, "hidden": 32}, {"width": 8, "hidden": 8}),
    ("cnn1d", {"width": 16}, {"width": 4}),
    ("ds_cnn", {"width": 16, "layers": 2}, {"width": 8, "layers": 2}),
    ("mlp", {"hidden": 16, "layers": 2}, {"hidden": 4, "layers": 2}),
    ("mobilenet", {"width": 50}, {"width": 25}),
    ("resnet", {"depth": 20, "width": 8}, {"depth": 20, "width": 4}),
    ("resnet", {"depth": 50, "width": 8}, {"depth": 50, "width": 4}),
    ("vgg", {"depth": 11, "width": 8}, {"depth": 11, "width": 4}),
    ("vgg", {"depth": 11, "width": 8, "hidden": 16}, {"depth": 11, "width": 4, "hidden": 8}),
]
SHALLOWER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cnn", {"width": 4, "layers": 3}, {"width": 4}),
    ("ds_cnn", {"width": 8, "layers": 2}, {"width": 8}),
    ("mlp", {"hidden": 8, "layers": 3}, {"hidden": 8, "layers": 2}),
    ("resnet", {"depth": 32, "width": 4}, {"depth": 20, "width": 4}),
    ("vgg", {"depth": 16, "width": 4}, {"depth": 11, "width": 4}),
]


def of(family: str, params: dict[str, Any]) -> Structure:
    return structure_of(family, params, SIGNALS if family == "cnn1d" else IMAGES)


def pair(case: tuple[str, dict[str, Any], dict[str, Any]]) -> tuple[Structure, Structure]:
    family, large, small = case
    return of(family, large), of(family, small)


def test_families_that_nest_are_the_built_in_ones_that_can_be_made_smaller() -> None:
    assert set(members.SIZES) == nested.FAMILIES
    assert {size.name for size in members.SIZES.values()} <= nested.SIZES


@pytest.mark.parametrize("case", NARROWER, ids=str)
def test_a_narrower_member_has_the_leading_channels_of_every_tensor(case: Any) -> None:
    large, small = pair(case)
    assert nested.nests(large, small, "width")
    assert not nested.nests(large, small, "depth")
    assert not nested.nests(small, large, "both")
    values = np.arange(large.parameters, dtype=np.float32)
    whole, part = to_tensors(values, large), to_tensors(values[nested.index_map(large, small)], small)
    for name, tensor in part.items():
        assert np.array_equal(tensor, whole[name][tuple(slice(side) for side in tensor.shape)])


@pytest.mark.parametrize("case", SHALLOWER, ids=str)
def test_a_shallower_member_shares_its_blocks_and_keeps_its_head(case: Any) -> None:
    large, small = pair(case)
    assert nested.nests(large, small, "depth")
    assert not nested.nests(large, small, "width")
    found = nested.index_map(large, small)
    for tensor, place in small.slices():
        if tensor.name.startswith("head."):
            assert (found[place] == -1).all()
        else:
            values = np.arange(large.parameters, dtype=np.float32)
            assert np.array_equal(values[found[place]], to_tensors(values, large)[tensor.name].ravel())


def test_a_member_may_be_narrower_and_shallower_at_once() -> None:
    large, small = of("cnn", {"width": 16, "layers": 2}), of("cnn", {"width": 8})
    assert [nested.nests(large, small, extent) for extent in ("width", "depth", "both")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "case",
    [
        ("cnn", {"width": 8}, {"width": 4}),
        ("cnn", {"width": 8, "hidden": 32}, {"width": 4, "hidden": 8}),
        ("cnn1d", {"width": 8}, {"width": 4}),
        ("ds_cnn", {"width": 16, "layers": 2}, {"width": 8, "layers": 2}),
        ("mlp", {"hidden": 16, "layers": 2}, {"hidden": 4, "layers": 2}),
        ("resnet", {"depth": 20, "width": 8}, {"depth": 20, "width": 4}),
    ],
    ids=str,
)
def test_leading_channels_see_only_leading_channels(case: Any) -> None:
    """With zeros outside its slice, the largest member answers as the smaller one does.

    Their norms have groups of one size: others would normalise otherwise.
    """
    large, small = pair(case)
    data = SIGNALS if large.family == "cnn1d" else IMAGES
    weights = np.zeros(large.parameters, dtype=np.float32)
    start = initial_weights(small, data, 3)
    weights[nested.index_map(large, small)] = start
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, *data.input_shape)).astype(np.float32))
    answers = [
        _module(one, values, data)(x).detach().numpy() for one, values in ((large, weights), (small, start))
    ]
    assert np.allclose(answers[0], answers[1], atol=1e-4)
    assert np.abs(answers[0]).max() > 0.01


def _module(structure: Structure, weights: Any, data: DataContract) -> torch.nn.Module:
    module = build(structure.family, structure.params, data).eval()
    tensors = to_tensors(weights, structure)
    module.load_state_dict({name: torch.from_numpy(one.copy()) for name, one in tensors.items()})
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("cnn", {"width": 16}), ("ds_cnn", {"width": 4})),
        (("cnn", {"width": 16, "hidden": 8}), ("cnn", {"width": 4})),
        (("cnn", {"width": 16, "norm": "batch"}), ("cnn", {"width": 4})),
        (("resnet", {"depth": 50, "width": 8}), ("resnet", {"depth": 34, "width": 8})),
        (("mlp", {"hidden": 16}), ("mlp", {"hidden": 8, "layers": 2})),
    ],
)
def test_what_does_not_nest_is_refused(one: Any, other: Any) -> None:
    large, small = of(*one), of(*other)
    assert not nested.nests(large, small, "both")
    with pytest.raises(StructureError, match="does not nest"):
        nested.index_map(large, small)


def test_tensors_of_an_installed_family_are_never_taken_for_leading_parts() -> None:
    large, small = (
        Structure(family="mine", params={"width": width}, tensors=(Tensor("head.weight", (2, width)),))
        for width in (8, 4)
    )
    assert not nested.nests(large, small, "both")


def test_a_flattened_map_of_another_size_does_not_nest() -> None:
    """Leading inputs are leading channels only where a channel has as many places in both."""
    large, small = (
        Structure(
            family="cnn",
            params={"width": width},
            tensors=(Tensor("conv1.weight", (width, 1, 3, 3)), Tensor("head.weight", (2, width * places))),
        )
        for width, places in ((8, 16), (4, 9))
    )
    assert not nested.nests(large, small, "width")


def test_the_largest_of_a_family_gathers_what_nests_in_it() -> None:
    widths = [of("cnn", {"width": width}) for width in (4, 16, 8)]
    others = [of("cnn", {"width": 8, "hidden": 8}), of("mlp", {"hidden": 8}), of("mlp", {"hidden": 16})]
    found = nested.groups([*widths, *others], "width")
    assert [list(group.places) for group in found] == [
        ["cnn-width16", "cnn-width8", "cnn-width4"],
        ["mlp-hidden16", "mlp-hidden8"],
    ]
    assert [group.largest for group in found] == ["cnn-width16", "mlp-hidden16"]
    assert (
        nested.groups(list(reversed([*widths, *others])), "width")[0].places.keys() == found[0].places.keys()
    )


def test_own_heads_follow_the_flat_vector_of_the_largest() -> None:
    deep, middle, flat = (of("mlp", {"hidden": 8, "layers": layers}) for layers in (3, 2, 1))
    (group,) = nested.groups([deep, middle, flat], "depth")
    head = 8 * 5 + 5
    assert group.size == deep.parameters + 2 * head
    places = np.concatenate([group.places[one.id][-head:] for one in (middle, flat)])
    assert np.array_equal(places, np.arange(deep.parameters, group.size))


def test_what_exceeds_a_group_begins_the_next_one() -> None:
    """Every set of members may cover a slice of its own, so their number must be bounded."""
    many = [of("mlp", {"hidden": hidden}) for hidden in range(2, 4 + nested.MAX_MEMBERS)]
    found = nested.groups(many, "width")
    assert [len(group.places) for group in found] == [nested.MAX_MEMBERS, 2]
    assert [group.largest for group in found] == ["mlp-hidden11", "mlp-hidden3"]


def sender(name: str, values: list[float], samples: int = 1) -> rules.Sender:
    return rules.Sender(id=name, samples=samples, read=lambda: np.array(values, dtype=np.float32))


def covered(places: list[int], *senders: rules.Sender) -> nested.Covered:
    return nested.Covered(places=np.array(places), senders=senders)


def test_every_coordinate_is_divided_by_the_weight_of_those_that_cover_it() -> None:
    merged = nested.merge(
        rules.Settings(),
        5,
        {
            "large": covered([0, 1, 2, 3], sender("a", [1, 2, 3, 4], samples=3)),
            "small": covered([2, 0], sender("b", [7, 5], samples=1)),
        },
    )
    assert np.array_equal(merged.difference, np.array([2, 2, 4, 4, 0], np.float32))
    assert merged.moved.tolist() == [True, True, True, True, False]
    assert merged.frozen == ()


def test_a_slice_with_too_few_devices_is_frozen_and_the_others_move() -> None:
    """One device in five may be hostile: one or two devices alone are too few, three are enough."""
    settings = rules.Settings(rule="median", hostile=0.2)
    merged = nested.merge(
        settings,
        3,
        {
            "large": covered([0, 1, 2], sender("a", [1, 1, 1]), sender("b", [1, 1, 1])),
            "small": covered([0], sender("c", [1]), sender("d", [1])),
        },
    )
    assert merged.difference.tolist() == [1, 0, 0]
    assert merged.moved.tolist() == [True, False, False]
    assert merged.why(np.array([0, 1, 2])) == "67% of it: 2 updates, 3 are needed against 1 hostile ones"
    assert merged.why(np.array([0])) == ""


def test_one_hostile_device_of_the_smallest_tier_moves_no_slice() -> None:
    """It could steer its own tier, where it is alone; in the slice that all share it is one of five."""
    honest = [sender(name, [1, 1]) for name in "abcd"]
    hostile = sender("e", [-1000])
    merged = nested.merge(
        rules.Settings(rule="trimmed_mean", hostile=0.2),
        2,
        {"large": covered([0, 1], *honest), "small": covered([0], hostile)},
    )
    assert np.allclose(merged.difference, 1)


def test_an_update_that_counts_in_several_slices_is_told_once() -> None:
    merged = nested.merge(
        rules.Settings(rule="norm_clip", hostile=0),
        3,
        {
            "large": covered([0, 1, 2], sender("b", [3, 0, 4])),
            "small": covered([0], sender("a", [3])),
        },
    )
    assert [one.id for one in merged.contributions] == ["a", "b"]
    assert [one.norm for one in merged.contributions] == [3, 5]
    assert [one.cosine for one in merged.contributions] == pytest.approx([1, 1])
    assert {one.verdict for one in merged.contributions} == {"accepted"}


def test_a_difference_of_another_length_or_place_is_refused() -> None:
    with pytest.raises(StructureError, match="wanted"):
        nested.merge(rules.Settings(), 3, {"one": covered([0, 1], sender("a", [1, 2, 3]))})
    sparse = rules.Sender(
        id="a", samples=1, read=lambda: np.ones(3, np.float32), sent=lambda: pack(np.ones(3, np.float32))
    )
    with pytest.raises(StructureError, match="wanted"):
        nested.merge(rules.Settings(), 3, {"one": covered([0, 1], sparse)})
    with pytest.raises(StructureError, match="outside"):
        nested.merge(rules.Settings(), 1, {"one": covered([0, 1], sender("a", [1, 2]))})
