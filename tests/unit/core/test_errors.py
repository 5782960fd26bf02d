"""Error codes are part of the contract."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from liberatai_core import errors
from liberatai_core.errors import BY_CODE, ConfigError, LiberataiError


def _classes(base: Any = LiberataiError) -> Iterator[Any]:
    yield base
    for child in base.__subclasses__():
        yield from _classes(child)


ALL = [c for c in _classes() if c.__module__ == errors.__name__]


def test_no_two_errors_share_a_code() -> None:
    codes = [c.code for c in ALL]
    assert len(set(codes)) == len(codes)
    assert {code: BY_CODE[code] for code in codes} == {c.code: c for c in ALL}


PROMISED = {
    "E_SIZE",
    "E_FRAME",
    "E_SIG",
    "E_UNKNOWN_DEVICE",
    "E_REVOKED",
    "E_TOPIC",
    "E_SCHEMA",
    "E_VERSION",
    "E_REPLAY",
    "E_DUP",
    "E_DUP_CONFLICT",
    "E_ROUND_UNKNOWN",
    "E_ROUND_CLOSED",
    "E_BASE_MODEL",
    "E_TIER",
    "E_INDEX_RANGE",
    "E_INDEX_ORDER",
    "E_NONFINITE",
    "E_NORM",
    "E_CODEC",
    "E_BOMB",
    "E_QUOTA",
    "E_BUSY",
    "E_DIGEST",
    "E_DISK",
    "E_INTERNAL",
}


def test_codes_that_travel_never_disappear() -> None:
    assert set(BY_CODE) >= PROMISED


@pytest.mark.parametrize("error", ALL, ids=lambda c: c.__name__)
def test_a_code_is_short_upper_case_and_the_class_says_what_it_means(error: Any) -> None:
    assert re.fullmatch(r"E_[A-Z_]{2,28}", error.code)
    assert error.__doc__


def test_the_base_is_never_raised_itself() -> None:
    with pytest.raises(TypeError, match="subclasses"):
        LiberataiError("something")


@pytest.mark.parametrize(
    "error", [c for c in ALL if c not in (LiberataiError, ConfigError)], ids=lambda c: c.__name__
)
def test_every_error_is_caught_by_the_base_and_keeps_its_text(error: Any) -> None:
    with pytest.raises(LiberataiError, match="what went wrong"):
        raise error("what went wrong")


def test_a_config_error_has_one_line_per_fault() -> None:
    error = ConfigError("job.yaml", ["a: missing", "b: unknown key"])
    assert error.faults == ["a: missing", "b: unknown key"]
    assert str(error) == "job.yaml: a: missing\njob.yaml: b: unknown key"
