"""What a device's socket carried over all its starts, from samples that may be lost or late. Pure."""

from dataclasses import dataclass

MAX_TOTAL = 2**53
"""Totals stop here: counters come from devices, and a database's integers end at 2^63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTraffic:
    """Bytes of a device over all its starts.

    Attributes:
        sent_bytes, received_bytes: in total.
        session, session_sent, session_received: the last counters heard, which begin at zero at every start.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    session: int = 0
    session_sent: int = 0
    session_received: int = 0

    def heard(self, session: int, sent: int, received: int) -> "DeviceTraffic":
        """Return the totals after the device told its counters.

        Samples may be lost, doubled or late: within a session only what exceeds the last word is added.
        """
        if session < self.session:
            return self
        last_sent, last_received = (
            (self.session_sent, self.session_received) if session == self.session else (0, 0)
        )
        return DeviceTraffic(
            sent_bytes=min(MAX_TOTAL, self.sent_bytes + max(0, sent - last_sent)),
            received_bytes=min(MAX_TOTAL, self.received_bytes + max(0, received - last_received)),
            session=session,
            session_sent=max(sent, last_sent),
            session_received=max(received, last_received),
        )


NO_TRAFFIC = DeviceTraffic()
