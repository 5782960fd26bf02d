"""The clock that all waiting goes by."""

import time


def now_s() -> float:
    """Return seconds of a clock that goes on while the machine sleeps and never back."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
