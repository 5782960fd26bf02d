"""The link of one simulated device: what a message takes from one end to the other. Pure but for its random.

A direction carries one message after the other: a long one makes the next wait. TCP turns a lost packet into
delay: a share of messages takes a retransmission longer. Nothing overtakes.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Final

from liberatai_core.profile import Network

RETRANSMISSION_S: Final = 0.2
"""Linux, least retransmission timeout of TCP (RFC 6298 would wait a second)."""
PACKET_BYTES: Final = 1400
APART_S: Final = 1e-6
"""Between two messages that arrive together: a loop calls back in any order what is due at one time."""
MAX_RETRANSMISSIONS: Final = 8


@dataclass(slots=True)
class _Way:
    bits_s: float
    free_s: float = 0.0
    last_s: float = 0.0
    moved_bytes: int = 0


@dataclass(slots=True)
class Line:
    """Both directions of a link.

    Attributes:
        rtt_s, jitter_s: of a round trip.
        loss: share of packets that are sent again.
    """

    rtt_s: float
    jitter_s: float
    loss: float
    random: Random
    up: _Way = field(default_factory=lambda: _Way(1e9))
    down: _Way = field(default_factory=lambda: _Way(1e9))

    @classmethod
    def of(cls, net: Network, random: Random) -> "Line":
        """Return the link that a profile describes."""
        return cls(
            rtt_s=net.rtt_ms / 1e3,
            jitter_s=net.jitter_ms / 1e3,
            loss=net.loss_percent / 100,
            random=random,
            up=_Way(net.up_mbit * 1e6),
            down=_Way(net.down_mbit * 1e6),
        )

    def send(self, now_s: float, size_bytes: int) -> float:
        """Return when a message that leaves the device now is at the broker."""
        return self._pass(self.up, now_s, size_bytes)

    def receive(self, now_s: float, size_bytes: int) -> float:
        """Return when a message that leaves the broker now is at the device."""
        return self._pass(self.down, now_s, size_bytes)

    def cut(self) -> None:
        """Forget what was under way: the connection is gone."""
        for way in (self.up, self.down):
            way.free_s = way.last_s = 0.0

    def _pass(self, way: _Way, now_s: float, size_bytes: int) -> float:
        way.moved_bytes += size_bytes
        way.free_s = max(now_s, way.free_s) + 8 * size_bytes / way.bits_s
        delay_s = self.rtt_s / 2
        if self.jitter_s:
            delay_s += abs(self.random.gauss(0.0, self.jitter_s)) / 2
        if self.loss:
            packets = 1 + size_bytes // PACKET_BYTES
            again = 1.0 - (1.0 - self.loss) ** packets
            tries = 0
            while tries < MAX_RETRANSMISSIONS and self.random.random() < again:
                delay_s += max(RETRANSMISSION_S, self.rtt_s) * 2**tries
                tries += 1
        way.last_s = max(way.last_s + APART_S, way.free_s + delay_s)
        return way.last_s
