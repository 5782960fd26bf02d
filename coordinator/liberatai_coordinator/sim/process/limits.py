"""Limits of a device's process without privileges: what setrlimit and the scheduler give."""

import contextlib
import os
import resource
from collections.abc import Callable

from liberatai_core.profile import Profile


def limits_of(profile: Profile, number: int) -> Callable[[], None]:
    """Return what bounds a child to its profile; it runs in the child, between fork and exec.

    Memory: what the agent and each of its children allocate (RLIMIT_DATA), at most the board's. Processors:
    as many of this machine's as the board has, another choice for every device. How fast one computes stays
    this machine's: only control groups can change that.

    Args:
        profile: class of the device.
        number: of the device, which chooses its processors.
    """
    here = sorted(os.sched_getaffinity(0))
    count = min(profile.cores, len(here))
    own = {here[(number + place) % len(here)] for place in range(count)}
    data_bytes = int((profile.ram_mb or profile.memory_mb) * (1 << 20))

    def limit() -> None:
        with contextlib.suppress(OSError, ValueError):
            os.sched_setaffinity(0, own)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))

    return limit
