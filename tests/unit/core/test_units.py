"""Numbers as people write them: no exponents, no sixty-five thousand KiB, no Unix seconds."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liberatai_core.units import (
    ago_text,
    date_text,
    duration_text,
    field_text,
    number_text,
    rate_text,
    record_lines,
    share_text,
    size_text,
    when_text,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (5.7e-05, "0.000057"),
        (0.0123, "0.0123"),
        (1.5, "1.5"),
        (9.999, "10"),
        (64.04, "64"),
        (99.96, "100"),
        (12_345.6, "12,346"),
        (-3.25, "-3.25"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_numbers_have_three_digits_that_count(number: float, text: str) -> None:
    assert number_text(number) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (820, "820 B"),
        (1023.6, "1 KiB"),
        (1536, "1.5 KiB"),
        (65_536, "64 KiB"),
        (65_536 * 1024, "64 MiB"),
        (1023.6 * 1024, "1 MiB"),
        (3 << 40, "3 TiB"),
        (5 << 50, "5,120 TiB"),
    ],
)
def test_sizes_have_the_unit_that_people_read(size_bytes: float, text: str) -> None:
    assert size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (5.7e-05, "57 µs"),
        (0.012, "12 ms"),
        (0.99999, "1 s"),
        (84.26, "84.3 s"),
        (119.7, "2 min 00 s"),
        (7_199, "119 min 59 s"),
        (12_000, "3 h 20 min"),
        (172_800, "2 d 0 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_rates_shares_and_times() -> None:
    assert [rate_text(speed) for speed in (None, 100, 64_000, 999_999, 2.5e6, 1e9)] == [
        *("-", "100 bit/s", "64 kbit/s", "1 Mbit/s", "2.5 Mbit/s", "1 Gbit/s")
    ]
    assert (share_text(None), share_text(0.5)) == ("-", "50.00%")
    assert (when_text(0), when_text(1e300), date_text(0), date_text(1e300)) == (
        *("never", "-", "1970-01-01", "-"),
    )
    assert ago_text(0) == "never"
    assert ago_text(time.time() - 7200.5) == "2 h ago"
    assert ago_text(time.time() + 3600) == "0 s ago"  # a clock that went back


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("updated_at", 1_796_041_629.76802, when_text(1_796_041_629)),
        ("last_seen_s", 0, "never"),
        ("certificate_end_s", 0.0, "-"),
        ("uptime_s", 32.123, "32.1 s"),
        ("train_seconds", 5.7e-05, "57 µs"),
        ("memory_bytes", 65_536, "64 KiB"),
        ("up_bits_s", 64_000, "64 kbit/s"),
        ("temperature_c", 45.0, "45 °C"),
        ("cpu_percent", 12.5, "12.5 %"),
        ("samples", 12_345, "12,345"),
        ("pid", 18_562, "18562"),
        ("running", True, "yes"),
        ("gflops", None, "-"),
        ("reason", "", "-"),
    ],
)
def test_a_field_is_read_by_its_name(name: str, value: object, text: str) -> None:
    assert field_text(name, value) == text


def test_a_record_is_wrapped_beside_its_names_and_shows_what_is_inside() -> None:
    record = {
        "bytes": {"cnn": 65_536},
        "link": {"up_bits_s": 64_000.0, "metered": False},
        "files": ["blobs/aaaaaaaaaaaaaaaaaaaaaaaa", "blobs/bbbbbbbbbbbbbbbbbbbbbbbb"],
        "classes": [1, 2],
        "none": {},
        "why": "a word " * 20,
    }
    assert record_lines(record)[:5] == [
        "bytes    cnn: 64 KiB",
        "link     up_bits_s: 64 kbit/s\n         metered: no",
        "files    blobs/aaaaaaaaaaaaaaaaaaaaaaaa\n         blobs/bbbbbbbbbbbbbbbbbbbbbbbb",
        "classes  1, 2",
        "none     -",
    ]
    lines = "\n".join(record_lines(record, 60)).split("\n")
    assert max(map(len, lines)) <= 60
    assert record_lines({}) == []


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_number_has_an_exponent(number: float) -> None:
    for text in (number_text(number), size_text(number), duration_text(number), rate_text(number)):
        assert "e+" not in text
        assert "e-" not in text
