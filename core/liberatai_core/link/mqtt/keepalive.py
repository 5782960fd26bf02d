"""When an idle connection is asked for a sign of life, and when its peer counts as dead. Pure.

MQTT wants a packet from the client within every keepalive (MQTT 5.0, 3.1.2.10); nothing promises that the
broker ever speaks by itself. So silence alone says nothing: the peer is dead only if it was *asked* and gave
no byte in a whole keepalive since. Any byte is a sign of life, not only the answer to the question.
"""

from dataclasses import dataclass

PING_AFTER = 0.6  # of the keepalive without a word of our own; amqtt waits no longer than all of it


@dataclass(slots=True)
class Keepalive:
    """One connection's times, all in seconds of one monotonic clock.

    Attributes:
        keepalive_s: what was agreed with the broker; 0: no pings, and nobody is dead.
        sent_s, heard_s: when the last byte went out and came in.
        asked_s: when the question went out that has no answer yet; None: none is open.
    """

    keepalive_s: float
    sent_s: float
    heard_s: float
    asked_s: float | None = None

    def sent(self, now_s: float) -> None:
        """Note that bytes went out."""
        self.sent_s = now_s

    def heard(self, now_s: float) -> None:
        """Note that bytes came in: whoever sends them is alive."""
        self.heard_s = now_s
        self.asked_s = None

    def asked(self, now_s: float) -> None:
        """Note that a ping went out."""
        self.sent_s = self.asked_s = now_s

    def is_ping_due(self, now_s: float) -> bool:
        """Say whether the peer must hear from us, or was silent for so long that it is asked."""
        return self.asked_s is None and now_s >= self._ping_s

    def is_dead(self, looked_s: float) -> bool:
        """Say whether the peer was asked and stayed silent for a whole keepalive.

        `looked_s` is when the socket was last known to be empty, not the present: a machine that slept
        between the two has not listened, and the answer may lie in the socket.
        """
        return self.asked_s is not None and looked_s >= self.asked_s + self.keepalive_s

    @property
    def due_s(self) -> float | None:
        """When one of the two may become true; None: never."""
        if not self.keepalive_s:
            return None
        return self._ping_s if self.asked_s is None else self.asked_s + self.keepalive_s

    @property
    def _ping_s(self) -> float:
        if not self.keepalive_s:
            return float("inf")
        return min(self.sent_s + PING_AFTER * self.keepalive_s, self.heard_s + self.keepalive_s)
