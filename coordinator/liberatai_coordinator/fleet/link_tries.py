"""When devices are invited whose links were too slow when last measured. Pure: time is an argument.

Only transfers show whether a link has recovered.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from liberatai_coordinator.config import JobSpec
from liberatai_coordinator.fleet import plan
from liberatai_core.contract.messages import Capability

LINK_ROUNDS, LINK_S = 20, 3600.0
"""A device whose measured link is too slow is invited all the same after so many rounds or seconds."""


@dataclass(slots=True)
class LinkTries:
    """When the links of a job's devices were tried last.

    Attributes:
        open: invited to the open round although their links were too slow.
    """

    open: set[str] = field(default_factory=set)
    _tried: dict[str, tuple[int, float]] = field(default_factory=dict)

    def clear(self, device: str) -> None:
        """Note that a device's link is fast enough."""
        self._tried.pop(device, None)

    def is_due(self, device: str, number: int, now_s: float) -> bool:
        """Whether it is time to try a link again; it was too slow since the first call at the latest.

        Args:
            device: whose link is too slow.
            number: of the round.
            now_s: the coordinator's own clock.
        """
        since, since_s = self._tried.setdefault(device, (number, now_s))
        return number - since >= LINK_ROUNDS or now_s - since_s >= LINK_S

    def note_invited(self, devices: Iterable[str], number: int, now_s: float) -> None:
        """Note which of the invited devices are only tried again."""
        self.open = {name for name in devices if name in self._tried}
        self._tried |= dict.fromkeys(self.open, (number, now_s))


def only_link(job: JobSpec, candidate: plan.Candidate | None, capability: Capability | None) -> bool:
    """Whether only a link that may recover keeps a device from its structure: not its quota."""
    if capability is None or candidate is None or not plan.may_recover(capability):
        return False
    unmetered = msgspec.structs.replace(capability, day_quota_bytes=0)
    return plan.density(job, candidate, unmetered)[0] <= 0
