"""Devices that could not do their task: when they are asked again. Pure: time is an argument.

A device that said that it failed fails again with the same data on the same machine: it is asked again when
something about it has changed, or after a pause that doubles. One that was lost in the middle of its task
comes back changed in nothing but its number: once is bad luck, again and again is a pattern.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from liberatai_core.contract.messages import Capability

How = Literal["failed", "lost"]

FIRST_S, MOST_S = 60.0, 6 * 3600.0
"""Pauses double from a minute to six hours: a repaired device that says nothing new is found the same day."""

FREE_LOSSES = 1
"""Losses in a row without a pause: connections break."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is known of a device that could not do its task.

    Attributes:
        times: in a row.
        until_s: it is not asked before, unless its mark has changed.
        mark: what it was like.
    """

    how: How
    times: int
    until_s: float
    mark: Capability | None


@dataclass(slots=True)
class Failures:
    """Failures of the devices of one job."""

    _of: dict[str, Failure] = field(default_factory=dict)

    def note(self, device: str, how: How, capability: Capability | None, now_s: float) -> None:
        """Note that a device failed, or was lost, in a round."""
        before = self._of.get(device)
        times = before.times + 1 if before is not None and before.how == how else 1
        paused = times if how == "failed" else times - FREE_LOSSES
        pause_s = min(MOST_S, FIRST_S * 2.0 ** min(paused - 1, 20)) if paused > 0 else 0.0
        mark = _mark(capability, how)
        self._of[device] = Failure(how=how, times=times, until_s=now_s + pause_s, mark=mark)

    def __contains__(self, device: str) -> bool:
        return device in self._of

    def clear(self, device: str) -> None:
        """Forget the failures of a device whose update is stored."""
        self._of.pop(device, None)

    def may_try(self, device: str, capability: Capability | None, now_s: float) -> bool:
        """Whether a device may be asked."""
        known = self._of.get(device)
        return known is None or now_s >= known.until_s or _mark(capability, known.how) != known.mark

    def words(self, device: str, now_s: float) -> str:
        """Return why a device is not asked."""
        known = self._of.get(device)
        if known is None:
            return ""
        what = "failed" if known.how == "failed" else "was lost"
        often = "" if known.times == 1 else f" {known.times} times in a row"
        return f"it {what}{often}: asked again when it changes, or in {max(0.0, known.until_s - now_s):.0f} s"


def _mark(capability: Capability | None, how: How) -> Capability | None:
    """Return what of a device has something to do with whether it fails; what varies by itself has not."""
    if capability is None:
        return None
    steady = msgspec.structs.replace(
        capability,
        disk_free_bytes=0,
        gflops=None,
        up_bits_s=None,
        down_bits_s=None,
        link_measured=False,
        quota_spent=False,
    )
    # A new start may have read repaired data; but who is lost in its task starts anew every time.
    return steady if how == "failed" else msgspec.structs.replace(steady, session=0)
