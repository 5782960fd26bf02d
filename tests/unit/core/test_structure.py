"""A structure that arrives in a message can be trusted once it is built."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from liberatai_core.errors import StructureError
from liberatai_core.structure import (
    MAX_PARAMETERS,
    MAX_PARAMS,
    MAX_RANK,
    MAX_TENSORS,
    DataContract,
    Structure,
    Tensor,
    from_tensors,
    require_length,
    structure_id,
    to_tensors,
)


def make(*shapes: Any, **params: Any) -> Structure:
    tensors = tuple(Tensor(name=f"t{i}", shape=shape) for i, shape in enumerate(shapes))
    return Structure(family="mlp", params=params, tensors=tensors)


def test_slices_lie_side_by_side_and_cover_the_vector() -> None:
    structure = make((3, 2), (), (4,))
    assert [(t.name, s.start, s.stop) for t, s in structure.slices()] == [
        ("t0", 0, 6),
        ("t1", 6, 7),
        ("t2", 7, 11),
    ]
    assert structure.parameters == 11


def test_named_tensors_and_flat_vector_are_inverse() -> None:
    structure = make((3, 2), (), (4,))
    flat = np.arange(11, dtype=np.float32)
    tensors = to_tensors(flat, structure)
    assert tensors["t0"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert from_tensors(tensors, structure).tolist() == flat.tolist()


def test_named_tensors_are_views_so_that_nothing_is_copied() -> None:
    flat = np.zeros(6, dtype=np.float32)
    to_tensors(flat, make((3, 2)))["t0"][2, 1] = 5
    assert flat[5] == 5


@pytest.mark.parametrize(
    "wrong", [np.zeros(5), np.zeros(7), np.zeros((3, 2)), np.zeros(0)], ids=lambda w: str(w.shape)
)
def test_a_vector_of_another_length_is_refused(wrong: Any) -> None:
    for use in (to_tensors, require_length):
        with pytest.raises(StructureError, match="wanted"):
            use(wrong.astype(np.float32), make((3, 2)))


@pytest.mark.parametrize(
    "tensors", [{}, {"t0": np.zeros((2, 3))}, {"t1": np.zeros((3, 2))}], ids=["missing", "turned", "misnamed"]
)
def test_a_missing_or_wrongly_shaped_tensor_is_refused(tensors: Any) -> None:
    with pytest.raises(StructureError, match="t0"):
        from_tensors(tensors, make((3, 2)))


@pytest.mark.parametrize(
    "shape", [(0,), (-1,), (3, 0), (-3, -2), (MAX_PARAMETERS + 1,), (1,) * (MAX_RANK + 1)], ids=str
)
def test_an_impossible_shape_is_refused(shape: Any) -> None:
    with pytest.raises(StructureError, match="impossible shape"):
        make(shape)


@pytest.mark.parametrize(
    "shapes",
    [[(1 << 28,), (1,)], [(1 << 28, 1 << 28)], [(1 << 28,) * MAX_RANK]],
    ids=["sum", "product", "astronomic"],
)
def test_more_parameters_than_the_limit_are_refused_without_allocating(shapes: Any) -> None:
    with pytest.raises(StructureError, match="at most"):
        make(*shapes)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(StructureError, match="one name"):
        Structure(
            family="mlp", params={}, tensors=(Tensor(name="a", shape=(1,)), Tensor(name="a", shape=(2,)))
        )


@pytest.mark.parametrize("name", ["", "Width", "../x", "a-b", "wïdth", "a\n", "a" * 33, "0"])
def test_a_parameter_that_could_not_stand_in_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(StructureError, match="impossible parameter"):
        Structure(family="mlp", params={name: 1}, tensors=(Tensor(name="a", shape=(1,)),))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(StructureError, match="finite"):
        make((1,), width=value)


def test_too_many_parameters_and_too_long_names_are_refused() -> None:
    with pytest.raises(StructureError, match=f"at most {MAX_PARAMS}"):
        make((1,), **{f"p{i}": True for i in range(MAX_PARAMS + 1)})
    with pytest.raises(StructureError, match="characters"):
        make((1,), name="x" * 200)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, "mlp"),
        ({"width": 16, "depth": 2}, "mlp-depth2-width16"),
        ({"bias": True}, "mlp-bias1"),
        ({"dropout": 0.5}, "mlp-dropout0_5"),
        ({"act": "../ReLU ü²"}, "mlp-act___relu___"),
    ],
)
def test_the_id_is_sorted_readable_and_safe_in_a_path(params: Any, expected: Any) -> None:
    assert structure_id("mlp", params) == expected
    assert make((1,), **params).id == expected


@pytest.mark.parametrize("family", ["", "CNN", "cnn\n", "cnn ", "../cnn", "os.system", "c" * 33])
def test_a_family_that_could_not_be_registered_does_not_decode(family: str) -> None:
    body = {"family": family, "params": {}, "tensors": [{"name": "a", "shape": [1]}]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(body, Structure)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": []},
        {"tensors": [{"name": f"t{i}", "shape": [1]} for i in range(MAX_TENSORS + 1)]},
        {"tensors": [{"name": "", "shape": [1]}]},
        {"tensors": [{"name": "x" * 129, "shape": [1]}]},
        {"tensors": [{"name": "x", "shape": [1.5]}]},
        {"tensors": [{"name": "x", "shape": [True]}]},
        {"tensors": [{"name": "x", "shape": [2**64]}]},
        {"tensors": [{"name": "x", "shape": [1], "data": b""}]},
        {"params": {"width": None}},
        {"params": {"width": [1]}},
        {"code": "import os"},
    ],
    ids=[
        "no tensors",
        "too many",
        "no name",
        "long name",
        "float side",
        "bool side",
        "huge side",
        "extra",
        "null",
        "list",
        "code",
    ],
)
def test_what_is_no_structure_does_not_decode(change: Any) -> None:
    good = {"family": "mlp", "params": {"width": 1}, "tensors": [{"name": "a", "shape": [1]}]}
    msgspec.convert(good, Structure)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(good | change, Structure)


@pytest.mark.parametrize(
    "contract",
    [
        {"input_shape": [], "classes": 2},
        {"input_shape": [1] * 5, "classes": 2},
        {"input_shape": [8], "classes": 1},
        {"input_shape": [8], "classes": 65537},
        {"input_shape": [0], "classes": 2},
        {"input_shape": [-8], "classes": 2},
        {"input_shape": [2**28, 2**28], "classes": 2},
    ],
    ids=["no axis", "five axes", "one class", "too many classes", "empty", "negative", "huge"],
)
def test_an_impossible_data_contract_does_not_decode(contract: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(contract, DataContract)
