"""The two clocks of a coordinator, in one place: a simulation gives it others, whose time is virtual.

Whoever waits or compares times asks here. Work that is measured as such (a commit, a request) asks `time`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_monotonic: Callable[[], float] = time.monotonic
_wall: Callable[[], float] = time.time


def monotonic() -> float:
    """Return seconds of a clock that never goes back; its zero means nothing."""
    return _monotonic()


def wall() -> float:
    """Return seconds since 1970, as people count them."""
    return _wall()


@contextmanager
def replaced(monotonic: Callable[[], float], wall: Callable[[], float]) -> Iterator[None]:
    """Go by other clocks for a while: of the whole process, so that there is one simulation at a time."""
    global _monotonic, _wall
    before = _monotonic, _wall
    _monotonic, _wall = monotonic, wall
    try:
        yield
    finally:
        _monotonic, _wall = before
