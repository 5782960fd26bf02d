"""The flat vector and its digest are the same on every machine."""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest

from liberatai_core.errors import NonFiniteError, StructureError
from liberatai_core.weights import digest, from_bytes, require_finite, to_bytes


def test_the_digest_is_the_sha256_of_little_endian_float32() -> None:
    values = [0.0, -0.0, 1.5, -3.25e-30, 3.4e38]
    expected = hashlib.sha256(struct.pack("<5f", *values)).digest()
    assert digest(np.array(values, dtype=np.float32)) == expected


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.astype(">f4"),
        lambda w: np.repeat(w, 2)[::2],
        lambda w: w[::-1].copy()[::-1],
        lambda w: w.astype(np.float64),
    ],
    ids=["big endian", "strided", "reversed", "float64"],
)
def test_memory_layout_does_not_change_digest_or_bytes(view: Any) -> None:
    weights = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert digest(view(weights)) == digest(weights)
    assert to_bytes(view(weights)) == to_bytes(weights)


def test_one_changed_bit_changes_the_digest() -> None:
    weights = np.zeros(10, dtype=np.float32)
    other = weights.copy()
    other[3] = -0.0
    assert digest(weights) != digest(other)


def test_an_empty_vector_has_a_digest() -> None:
    assert digest(np.zeros(0, dtype=np.float32)) == hashlib.sha256(b"").digest()


def test_bytes_come_back_as_the_same_bits_and_writable() -> None:
    weights = np.frombuffer(np.random.default_rng(1).bytes(400), dtype="<f4")
    back = from_bytes(to_bytes(weights))
    assert back.view(np.uint32).tolist() == weights.view("<u4").tolist()
    assert back.dtype == np.float32
    back[0] = 1.0


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_bytes_that_are_no_whole_number_of_floats_are_refused(length: int) -> None:
    with pytest.raises(StructureError, match="no float32 vector"):
        from_bytes(bytes(length))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_place(bad: str) -> None:
    weights = np.zeros(5, dtype=np.float32)
    require_finite(weights, "update")
    weights[3] = bad
    with pytest.raises(NonFiniteError, match="update: value 3"):
        require_finite(weights, "update")
