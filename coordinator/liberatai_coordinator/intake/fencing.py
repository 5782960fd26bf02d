"""A coordinator that was put back from a copy learns that it was further once, and jumps above that.

Devices ignore a word of a lower epoch than one that they have believed of the same key. So a copy would talk
to nobody until it has been started often enough. What its own key has signed tells it: its retained presence
at the broker, or the frame that a device shows it (EpochSeen). No word of anybody else is believed.
"""

import logging
from dataclasses import dataclass

from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract.frame import expect, key_id
from liberatai_core.contract.messages import CoordinatorState
from liberatai_core.errors import ReplayError, UnknownDeviceError

log = logging.getLogger(__name__)

MAX_JUMPS = 3
"""Jumps of one process: a copy needs one. Who needs more has a twin that jumps as well."""

LAST_EPOCH = 2**53 - 2**20
"""Above it there is no room to go on: only a new key helps."""


@dataclass(slots=True, kw_only=True)
class Fencing:
    """Compares the epoch with what the coordinator's own key has signed before.

    Attributes:
        fleet, coordinator: names.
        public_key: the coordinator's own.
        jumps: that this process has made already.
        behind: the ledger is above a higher epoch now: the coordinator must start again to speak under it.
        fault: why devices may ignore this coordinator, in words; "" if nothing is known.
    """

    ledger: Ledger
    fleet: str
    coordinator: str
    public_key: bytes
    jumps: int = 0
    behind: bool = False
    fault: str = ""
    _foreign: bool = False

    def own_presence(self, frame: bytes) -> None:
        """Look at what stands at, or comes to, the topic of the coordinator's own presence.

        Raises:
            LiberataiError: it is no presence, or not about this coordinator.
        """
        try:
            epoch = self._epoch(frame)
        except UnknownDeviceError:
            if not self._foreign:
                log.warning(
                    "a coordinator with another key spoke here: devices that pin that key ignore this one"
                )
            self._foreign = True
            return
        if epoch > self.ledger.epoch:
            self._jump(epoch, "its own presence at the broker")

    def shown(self, device: str, frame: bytes) -> None:
        """Look at a frame that a device shows: it has believed it.

        Raises:
            LiberataiError: it is not signed by this coordinator: a device may show what it likes.
        """
        epoch = self._epoch(frame)
        if epoch > self.ledger.epoch:
            self._jump(epoch, f"what {device} has heard of it")

    def _epoch(self, frame: bytes) -> int:
        own = key_id(self.public_key)
        word = expect(frame, CoordinatorState, self.fleet, {own: self.public_key}.get)
        if word.coordinator != self.coordinator:
            raise ReplayError(f"presence of {word.coordinator}, this is {self.coordinator}")
        return word.epoch

    def _jump(self, epoch: int, source: str) -> None:
        if self.behind:
            return
        if epoch > LAST_EPOCH:
            self.fault = f"its key has signed epoch {epoch}, above which there is no room: it needs a new key"
            log.error("%s", self.fault)
            return
        if self.jumps >= MAX_JUMPS:
            self._twin(epoch)
            return
        self.ledger.raise_epoch(epoch)
        self.behind = True
        log.warning(
            "this coordinator is a copy: it is at epoch %d, by %s it was at %d; it goes on above that",
            self.ledger.epoch,
            source,
            epoch,
        )

    def _twin(self, epoch: int) -> None:
        fault = f"another coordinator with the same key speaks at epoch {epoch}: devices ignore this one"
        if fault != self.fault:
            log.error("%s", fault)
        self.fault = fault
