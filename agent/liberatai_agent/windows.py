"""Times of the day at which a device may train: "22:00-06:00", "mon-fri 19:00-07:00", "sat,sun". Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 24 * 60
_TIME: Final = r"([0-9]{1,2}):([0-9]{2})"
_FORM: Final = re.compile(rf"(?:([a-z,-]+)(?: +|\Z))?(?:{_TIME} *- *{_TIME})?")


@dataclass(frozen=True, slots=True)
class Window:
    """From a minute of the day to another, on days of the week; past midnight where the end is not later.

    Attributes:
        days: 0 is Monday; of a window past midnight the days on which it begins.
        first, last: minutes since midnight; `last` is outside.
    """

    days: frozenset[int]
    first: int
    last: int

    def holds(self, day: int, minute: int) -> bool:
        """Whether a minute of a day lies within it."""
        if self.first < self.last:
            return day in self.days and self.first <= minute < self.last
        late = day in self.days and minute >= self.first
        return late or ((day - 1) % 7 in self.days and minute < self.last)


def parse(text: str) -> Window:
    """Return the window that a text names.

    Raises:
        ValueError: it names none; the text says what one looks like.
    """
    found = _FORM.fullmatch(text.strip().lower())
    if found is None or not any(found.groups()):
        raise ValueError(f'{text!r} is no window: write it like "22:00-06:00" or "mon-fri 19:00-07:00"')
    days, *times = found.groups()
    first, last = (_minute(*times[:2]), _minute(*times[2:])) if times[0] else (0, DAY_MINUTES)
    if first == last:
        raise ValueError(f"{text!r}: begins when it ends; a whole day is 00:00-24:00")
    return Window(_days(days) if days else frozenset(range(7)), first, last)


def open_at(windows: Sequence[str], day: int, minute: int) -> bool:
    """Whether any of the windows holds a minute of a day; without windows every one does."""
    return not windows or any(parse(one).holds(day, minute) for one in windows)


def _minute(hour: str, minute: str) -> int:
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > DAY_MINUTES:
        raise ValueError(f"{hour}:{minute} is no time of the day")
    return found


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{part!r} is no day of the week: {', '.join(DAYS)}, or two with a dash")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(found)
