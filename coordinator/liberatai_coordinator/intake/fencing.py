"""A coordinator that was put back from a copy learns that it was further once, and jumps above that.

Devices ignore a word of a lower epoch than one that they have believed of the same key. So a copy would talk
to nobody until it has been started often enough. What its own key has signed tells it: its retained presence
at the broker, or the frame that a device shows it (EpochSeen). No word of anybody else is believed.

Whoever is put in its place on purpose (a backup is restored, `serve --take-over`) begins a new *generation*:
the upper bits of an epoch, the minutes since 2026. A coordinator that hears of a later generation than its
own is not a copy that is behind but the one that was replaced: it stops, and does not start again.
"""

import logging
from dataclasses import dataclass

from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.contract.frame import Signer, expect, key_id, seal
from liberatai_core.contract.messages import CoordinatorState, Presence
from liberatai_core.errors import ReplayError, UnknownDeviceError

log = logging.getLogger(__name__)

MAX_JUMPS = 3
"""Jumps of one process: a copy needs one. Who needs more has a twin that jumps as well."""

LAST_EPOCH = 2**53 - 2**20
"""Above it there is no room to go on: only a new key helps."""

STARTS_BITS = 24
"""Lower bits of an epoch: starts of one generation. Once a second, they last for half a year."""
FIRST_GENERATION = 480_000
LAST_GENERATION = 40_000_000
"""Minutes since 2026: November 2026, when there were generations for the first time, and 2102. What is
outside comes from a clock that is wrong, or is the plain number of a coordinator that was never replaced."""
BEGIN_2026_S = 1_767_225_600.0


def generation(epoch: int) -> int:
    """Return when a coordinator was put in its place; 0: it is the first one."""
    number = epoch >> STARTS_BITS
    return number if FIRST_GENERATION <= number <= LAST_GENERATION else 0


def first_epoch(before: int, now_s: float) -> int:
    """Return the epoch of a coordinator that takes the place of another one.

    Args:
        before: highest epoch of the other one that is known.
        now_s: by the clock. A clock that stands in the past still gives a later generation than `before`.
    """
    minutes = int((now_s - BEGIN_2026_S) / 60)
    clock = minutes if FIRST_GENERATION <= minutes <= LAST_GENERATION else FIRST_GENERATION
    return max(clock, generation(before) + 1) << STARTS_BITS


def presence_frame(signer: Signer, coordinator: str, epoch: int, state: Presence) -> bytes:
    """Return a signed CoordinatorState."""
    return seal(CoordinatorState(coordinator=coordinator, epoch=epoch, state=state), signer)


@dataclass(slots=True, kw_only=True)
class Fencing:
    """Compares the epoch with what the coordinator's own key has signed before.

    Attributes:
        fleet, coordinator: names.
        public_key: the coordinator's own.
        jumps: that this process has made already.
        behind: the ledger is above a higher epoch now: the coordinator must start again to speak under it.
        replaced: another one was put in its place: it must stop.
        fault: why devices may ignore this coordinator, in words; "" if nothing is known.
    """

    ledger: Ledger
    fleet: str
    coordinator: str
    public_key: bytes
    jumps: int = 0
    behind: bool = False
    replaced: bool = False
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

    def presence(self, signer: Signer, state: Presence) -> bytes:
        """Return the signed presence of this coordinator under its epoch."""
        return presence_frame(signer, self.coordinator, self.ledger.epoch, state)

    @property
    def ends(self) -> bool:
        """Nothing more may be said under this epoch."""
        return self.behind or self.replaced

    def _jump(self, epoch: int, source: str) -> None:
        if self.ends:
            return
        if generation(epoch) > generation(self.ledger.epoch):
            self.ledger.note_replaced(epoch)
            self.replaced = True
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
