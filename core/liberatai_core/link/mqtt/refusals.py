"""What a broker does not take, whether it says so or not. Pure.

A broker that says no (MQTT 5) is believed at once. Others only break the connection, and a message that is
repeated after every reconnect breaks it for ever. So what was under way at such losses is remembered:

- A message longer than any that was ever acknowledged, under way at several losses in a row, is too long.
  Packets are limited to half of it from then on; the sender cuts smaller pieces. It may have been a poor
  line: after a number of messages that went well the limit is doubled again, each time after twice as many.
- A short message that was under way at many losses in a row is set aside for a while.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from liberatai_core.link.link import Refused

LONG_BYTES = 4096  # shorter messages are not suspected for their length
SMALLEST_LIMIT = 2048  # a state, a capability or a task must fit; below that there is nothing to cut
SIZE_LOSSES = 3  # in a row until a length is blamed; one more each time, once a limit was found
TOPIC_LOSSES = 5  # ... until a topic is
GOOD_MESSAGES = 32  # of at least half the limit, until a suspicion is tried again
ASIDE_S = 600.0  # how long such a message is not sent
TOO_LARGE = 0x95  # MQTT 5 reason code
REASONS = {TOO_LARGE: "Packet too large"}  # codes that brokers send where MQTT 5 does not provide for them


@dataclass(slots=True)
class Evidence:
    """What is known of one broker.

    Attributes:
        limit: the largest packet that is still sent.
        taken: the largest packet that was acknowledged.
    """

    limit: int
    taken: int = 0
    _is_found: bool = False
    _is_word: bool = False  # the broker itself said so
    _all: int = field(init=False)
    _good: int = 0
    _needed: int = GOOD_MESSAGES
    _long_losses: int = 0
    _losses: dict[str, int] = field(default_factory=dict)
    _aside: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Remember the limit that holds without any evidence."""
        self._all = self.limit

    def acknowledged(self, topic: str, size: int) -> None:
        """Note that the broker took a message."""
        self.taken = max(self.taken, size)
        self._losses.pop(topic, None)
        if self._is_word or 2 * size < self.limit or self.limit >= self._all:
            return
        self._good += 1
        if self._good >= self._needed:
            self._good, self._needed = 0, 2 * self._needed
            self.limit = min(self._all, 2 * self.limit)

    def refused(self, topic: str, size: int, code: int, reason: str) -> Refused | None:
        """Note that the broker said no to a message; None: that is known already."""
        if code == TOO_LARGE and size > SMALLEST_LIMIT:
            self._is_word = True
            return self._lower(topic, size, reason)
        return Refused(what="publish", topic=topic, reason=reason, size_bytes=size)

    def lost(self, under_way: Iterable[tuple[str, int]], now_s: float, *, code: int = 0) -> Refused | None:
        """Note a connection that broke without a reason (or for this one) while these were under way."""
        sizes: dict[str, int] = {}
        for topic, size in under_way:
            sizes[topic] = max(size, sizes.get(topic, 0))
        self._losses = {topic: self._losses.get(topic, 0) + 1 for topic in sizes}
        if not sizes:
            return None
        longest = max(sizes, key=lambda topic: sizes[topic])
        size = sizes[longest]
        if code == TOO_LARGE and size > SMALLEST_LIMIT:
            self._is_word = True
            return self._lower(longest, size, REASONS[code])
        if size >= LONG_BYTES and self.taken < size <= self.limit:
            self._long_losses += 1
            if not self._is_found and self._long_losses < SIZE_LOSSES:
                return None
            text = f"the connection broke {self._long_losses} times right after it was sent"
            return self._lower(longest, size, text)
        worst = max(self._losses, key=lambda topic: self._losses[topic])
        if self._losses[worst] < TOPIC_LOSSES:
            return None
        self._aside[worst] = now_s + ASIDE_S
        text = f"the connection broke {self._losses[worst]} times right after it was sent"
        self._losses[worst] -= 1  # once more is enough when it is tried again
        return Refused(what="publish", topic=worst, reason=text, size_bytes=sizes[worst])

    def is_aside(self, topic: str, now_s: float) -> bool:
        """Say whether this message is not sent for now."""
        until_s = self._aside.get(topic)
        if until_s is not None and now_s >= until_s:
            del self._aside[topic]
            return False
        return until_s is not None

    def _lower(self, topic: str, size: int, reason: str) -> Refused | None:
        self._long_losses, self._good, self._is_found = 0, 0, True
        if size > self.limit:
            return None  # one of several that were sent together
        taken = self.taken if self.taken < size else 0
        self.limit = max(taken, size // 2, SMALLEST_LIMIT)
        return Refused(what="size", topic=topic, reason=reason, size_bytes=size, max_packet_bytes=self.limit)
