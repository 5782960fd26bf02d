"""What is seen of a fleet of virtual time on its way: moments of devices, receipts, faults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from liberatai_coordinator.sim import scenario as scenarios
from liberatai_coordinator.sim.record import FaultRecord, Moment
from liberatai_coordinator.sim.scenario import Happening
from liberatai_coordinator.sim.virtual.disk import Stored

HOLDERS: Final = 3
"""Devices that are named as those who held a round."""


@dataclass(slots=True)
class Seen:
    """Notes for the record.

    Attributes:
        now_s: returns the virtual time.
        moments: of the devices whose moments are kept.
        receipts: bytes of every update that the coordinator has, by its id.
        last: by round, the devices whose updates came last.
        faults: in the order in which they began.
    """

    now_s: Callable[[], float]
    moments: dict[str, list[Moment]] = field(default_factory=dict)
    receipts: dict[bytes, int] = field(default_factory=dict)
    last: dict[int, list[str]] = field(default_factory=dict)
    faults: list[FaultRecord] = field(default_factory=list)
    _open_faults: dict[tuple[str, str], int] = field(default_factory=dict)

    def note(self, device: str, what: str, text: str = "") -> None:
        """Note what a device does now."""
        moments = self.moments.get(device)
        if moments is not None:
            moments.append(Moment(at_s=round(self.now_s(), 3), what=f"{what}: {text}" if text else what))

    def receipted(self, device: str, update_id: bytes, stored: Stored) -> None:
        """Note that the coordinator has an update."""
        self.receipts[update_id] = len(stored.frame)
        self.last[stored.round] = [device, *self.last.get(stored.round, [])][:HOLDERS]
        self.note(device, "receipt")

    def happened(self, one: Happening) -> None:
        """Note a fault that begins, and what that which ends has led to."""
        key = next((begin for begin, end in scenarios.ENDS.items() if end == one.what), None)
        if key is None:
            self._open_faults[one.what, one.device] = len(self.faults)
            self.faults.append(FaultRecord(at_s=round(one.at_s, 3), what=one.what, device=one.device))
            return
        number = self._open_faults.pop((key, one.device), None)
        if number is not None:
            self.faults[number] = replace(self.faults[number], ended_s=round(one.at_s, 3))
