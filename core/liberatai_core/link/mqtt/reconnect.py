"""When to try again after a connection is lost, and what the losses of the past say about the reason. Pure.

Full jitter (a uniform draw from the whole window) over windows that double: a fleet that loses its broker in
one moment comes back spread over the first window, not in its first second. The cap is lower while something
is at stake: an update that waits for the end of a round is worth a handshake every few seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass

FIRST_RETRY_S = 0.1  # the shortest pause: a restarting broker needs some
STABLE_S = 60.0  # a connection that lasted so long resets the backoff
CUT_IN_A_ROW = 3  # short connections without a reason: Mosquitto 2.0 says nothing to a client it throws out
REFUSED_IN_A_ROW = 5  # TLS 1.3 shows a refused certificate only as a closed connection
REFUSED_RETRY_S = 900.0  # ... and nothing but an operator changes that
TAKEN_OVER = 0x8E  # MQTT 5 reason code

Draw = Callable[[float, float], float]
"""Gives a number between two others, uniformly."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a connection ended.

    Attributes:
        reason: in words.
        code: the MQTT 5 reason code, if the broker gave one.
        unanswered: TCP and TLS stood, and no CONNACK came.
        unexplained: it broke after that without a word.
        certificate: TLS said what is wrong with our certificate.
        under_way: topic and packet size of what was sent and not acknowledged.
    """

    reason: str
    code: int = 0
    unanswered: bool = False
    unexplained: bool = False
    certificate: bool = False
    under_way: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """What follows from a loss: the reason in words, seconds to wait, and whether haste is of no use."""

    reason: str
    seconds: float
    in_vain: bool = False


@dataclass(slots=True, kw_only=True)
class Reconnect:
    """Counts losses and decides pauses.

    Attributes:
        client_id: for the text about two clients of one name.
        secure: whether TLS is spoken.
        cap_s, urgent_cap_s: longest pause, and the longest while something is at stake.
        spread_s: window of the first pause.
        urgent: whether something is at stake.
    """

    client_id: str
    secure: bool
    cap_s: float
    urgent_cap_s: float
    spread_s: float
    urgent: bool = False
    failures: int = 0
    takeovers: int = 0
    cuts: int = 0
    unanswered: int = 0

    def welcomed(self) -> None:
        """Note that the broker has answered."""
        self.unanswered = 0

    def lost(self, loss: Loss, lasted_s: float, draw: Draw) -> Pause:
        """Return the pause after the end of a connection, or of an attempt, that lasted so long."""
        if lasted_s >= STABLE_S:
            self.failures = self.takeovers = self.cuts = 0
        seconds = self._draw(draw)
        self.failures += 1
        self.takeovers += loss.code == TAKEN_OVER
        self.cuts = self.cuts + 1 if loss.unexplained else 0
        if loss.code == TAKEN_OVER:
            again = f", {self.takeovers} times: do two devices use it?" if self.takeovers > 1 else ""
            return Pause(
                f"session taken over: another client has connected as {self.client_id!r}{again}", seconds
            )
        if self.cuts >= CUT_IN_A_ROW and not loss.under_way:
            text = f"{loss.reason}, {self.cuts} times: do two devices use the id {self.client_id!r}?"
            return Pause(text, seconds)
        if self.secure and loss.unanswered:
            self.unanswered += 1
            if self.unanswered >= REFUSED_IN_A_ROW:
                text = loss.reason
                if not loss.certificate:
                    text = f"{text}, {self.unanswered} times: certificate refused or revoked?"
                return Pause(text, max(seconds, REFUSED_RETRY_S * draw(0.5, 1)), in_vain=True)
        return Pause(loss.reason, seconds)

    def hurried(self, pause: Pause, left_s: float, draw: Draw) -> float:
        """Return what is left of a pause when something comes to be at stake in the middle of it."""
        if pause.in_vain or not self.urgent:
            return left_s
        return min(left_s, max(FIRST_RETRY_S, draw(0, self.urgent_cap_s)))

    def _draw(self, draw: Draw) -> float:
        cap_s = min(self.cap_s, self.urgent_cap_s) if self.urgent else self.cap_s
        window_s = min(cap_s, self.spread_s * 2.0 ** min(self.failures, 30))
        return min(cap_s, max(FIRST_RETRY_S, draw(0, window_s)))
