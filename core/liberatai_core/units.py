"""Sizes, rates, times and shares as people write them: for every line that a person reads.

Three digits are enough to compare, and nobody reads an exponent. Programs take the numbers themselves
(`-o json`).
"""

import math
import textwrap
import time
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "ago_text",
    "count_text",
    "date_text",
    "duration_text",
    "field_text",
    "number_text",
    "rate_text",
    "record_lines",
    "share_text",
    "size_text",
    "when_text",
    "wrapped",
]

NONE: Final = "-"
"""What stands where nobody knows a number."""

_SECONDS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_LONG: Final = (("d", 86_400), ("h", 3600), ("min", 60))


def number_text(number: float) -> str:
    """Return a number with three digits that count, never with an exponent: 0.000057, 1.5, 64, 12,345."""
    if not math.isfinite(number):
        return NONE
    if abs(number) >= 99.95:
        return f"{number:,.0f}"
    if number == 0:
        return "0"
    places = 2
    while abs(number) < 10 ** -(places - 2) and places < 12:
        places += 1
    if abs(number) >= 9.995:
        places = 1
    text = f"{number:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size_text(size_bytes: float) -> str:
    """Return bytes in the unit that people read: 820 B, 1.5 KiB, 64 MiB."""
    if not math.isfinite(size_bytes):
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    place = 0
    while abs(size_bytes) >= 1023.5 and place < len(units) - 1:
        size_bytes /= 1024
        place += 1
    return f"{size_bytes:.0f} B" if place == 0 else f"{number_text(size_bytes)} {units[place]}"


def rate_text(bits_s: float | None) -> str:
    """Return the speed of a link: 64 kbit/s, 2.5 Mbit/s, 1 Gbit/s; "-" if nobody knows it."""
    if bits_s is None or not math.isfinite(bits_s):
        return NONE
    for unit, least in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_s >= 0.9995 * least:
            return f"{number_text(bits_s / least)} {unit}"
    return f"{number_text(bits_s)} bit/s"


def count_text(number: int) -> str:
    """Return a number in groups of three digits."""
    return f"{number:,}"


def share_text(share: float | None) -> str:
    """Return a share in per cent with two places, so that columns of them can be compared; "-" for None."""
    return NONE if share is None else f"{share:.2%}"


def duration_text(seconds: float) -> str:
    """Return how long something takes: 57 µs, 12 ms, 1.5 s, 84 s, 2 min 05 s, 3 h 20 min, 4 d 3 h."""
    if not math.isfinite(seconds):
        return NONE
    if seconds <= 0:
        return "0 s"
    if seconds < 119.5:
        least, unit = next((one for one in _SECONDS if seconds >= 0.9995 * one[0]), _SECONDS[-1])
        return f"{number_text(seconds / least)} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days:,} d {hours} h"


def ago_text(seen_s: float) -> str:
    """Return how long ago a Unix time was; "never" for 0."""
    if not seen_s:
        return "never"
    seconds = max(0.0, time.time() - seen_s)
    for unit, length in _LONG:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def when_text(seconds: float) -> str:
    """Return a Unix time as local date and time; "never" for 0, "-" for what no calendar has."""
    if not seconds:
        return "never"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return NONE


def date_text(seconds: float) -> str:
    """Return a Unix time as a date (UTC), as certificates have it; "-" for what no calendar has."""
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return NONE


def field_text(name: str, value: object) -> str:
    """Return a field of a record, read by its name: `_bits_s`, `_bytes`, `_s` (a time, or how long), `_c`.

    Args:
        name: of the field; its end tells the unit.
        value: number, text, yes or no, or None.
    """
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return _number(name, value)


def _number(name: str, value: float) -> str:
    if name.endswith("_bits_s"):
        return rate_text(value)
    if name == "bytes" or name.endswith("_bytes"):
        return size_text(value)
    if name.endswith("end_s") and not value:
        return NONE
    if name.endswith(("_s", "_at", "seconds")):
        # A second of this century, or a number of seconds.
        return when_text(value) if value >= _CENTURY_S or name.endswith(_TIMES) else duration_text(value)
    if name.endswith("_percent"):
        return f"{number_text(value)} %"
    if name.endswith("_c"):
        return f"{number_text(value)} °C"
    if name in _NUMBERS:
        return str(value)
    return count_text(value) if isinstance(value, int) else number_text(value)


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Return a sentence in lines of so many characters; long words, such as names, are never cut.

    Args:
        text: the sentence.
        width: of the screen; None: one line.
        indent: before every line.
    """
    if width is None:
        return indent + text
    return textwrap.fill(
        text,
        max(20, width),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def record_lines(fields: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Return a record as lines of name and value, numbers as people write them.

    Args:
        fields: by name; mappings and lists inside are written over several lines.
        width: of the screen; None: every value in one line.
    """
    longest = max(map(len, fields), default=0)
    left = " " * (longest + 2)
    lines = []
    for name, value in fields.items():
        text = _value_text(name, value, "\n" + left)
        if width is not None:
            parts = (wrapped(part, width, left) for part in text.split("\n" + left))
            text = "\n".join(parts).lstrip()
        lines.append(f"{name:<{longest}}  {text}")
    return lines


def _value_text(name: str, value: Any, newline: str) -> str:
    if isinstance(value, Mapping):
        unit = name if name == "bytes" or name.endswith("_bytes") else ""
        return newline.join(f"{key}: {_value_text(unit or key, v, ', ')}" for key, v in value.items()) or NONE
    if isinstance(value, list | tuple):
        between = newline if any(isinstance(one, str) and len(one) > 24 for one in value) else ", "
        return between.join(field_text(name, one) for one in value) or NONE
    return field_text(name, value)


_CENTURY_S: Final = 946_684_800
"""2000-01-01: nothing that is measured here takes so long."""
_NUMBERS: Final = frozenset({"pid", "port", "session", "epoch", "round", "version", "seed", "schema"})
"""Names that are numbers: nobody counts with them."""
_TIMES: Final = ("created_s", "seen_s", "_at", "since_s", "until_s", "end_s")
