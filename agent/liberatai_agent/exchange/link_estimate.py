"""How fast the link is, and how much of a day's quota is used. Pure: clocks and counters are arguments.

Only real transfers are measured: nothing is sent to find out, because links are metered.

- What is averaged is the time that a byte takes, not bytes per second: a plan asks how long an update will
  be under way, and the mean of that is the mean of times. A mean of rates forgets the slow transfers.
- A transfer counts by its size and by how long it took, as in the estimators of adaptive video players
  (Shaka Player, hls.js: exponentially weighted, with a half-life, small transfers left out), and by at most
  one half-life: a device that slept in the middle of a transfer loses one vote, not its estimate.
- Tiny messages measure the latency, which is then taken off the larger ones. Of a small transfer, and of one
  that was mostly latency, only one thing is known: the link is at least so fast. It may raise the estimate,
  never lower it.
- An estimate grows old: with time it returns to what the profile says (`drifted`). A low one makes updates
  small, and small ones cannot contradict it for long if the link is better again.

The quota is counted per day of the device's clock (UTC), which is not trusted: see `count`.
"""

import math
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

MIN_BYTES = 4096
"""Transfers below this are one or a few packets: they measure the latency."""
TINY_BYTES = 1024
"""Up to this a message fits one packet of every network, so its acknowledgement takes one round trip."""
HALF_LIFE_BYTES = 65_536
"""Transfers of so many bytes halve the weight of what was before: a dozen updates of 5 KiB."""
HALF_LIFE_S = 4.0
"""Transfers of so many seconds do the same: on a slow link few bytes say much (hls.js: 3 to 9 s)."""
MAX_STEP = 8.0
"""A sample counts as at most so many times slower or faster than the estimate: one freak is no new link."""
RAISE_WEIGHT = 0.25
"""Of a half-life, that a bound counts at least. By its size an update of 600 bytes, all that is left to send
when the estimate is far too low, would move it by a hundredth; so it is a sixth. Not more: shapers let short
bursts pass faster than what lasts."""
DRIFT_HALF_LIFE_S = 43_200.0
"""Half a day: the busy hours of a network are over by then. A device that trains once a day believes its link
at most 4 times too fast, and a plan gives the upload only a tenth of the deadline, so it is still in time."""
FASTEST_S_PER_BYTE = 8e-12
"""The protocol's 1e12 bit/s: where an estimate returns to if nobody says how fast the link should be."""
LATENCY_RISE = 1 / 16
"""The latency falls at once and rises slowly: queues and load only ever add to it."""
ANNOUNCE_RATIO = 1.25
"""Smaller changes of a rate change no plan; a message about them costs more than it saves."""
ANNOUNCE_S = 300.0
"""Between two words about the link: a capability has some 400 bytes, 115 KB a day at this pace."""
DAY_S = 86_400
MAX_COUNT = 2**53
"""Counters stop here: what JSON and the protocol carry exactly."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Span = Annotated[float, Meta(ge=0, le=1e9)]
Slowness = Annotated[float, Meta(ge=FASTEST_S_PER_BYTE, le=1e6)]
"""Seconds per byte; the lower end is the protocol's 1e12 bit/s."""


class LinkEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of the link, kept over restarts.

    Attributes:
        up_s_per_byte, down_s_per_byte: time that a byte takes; None: not measured yet.
        latency_s: round trip to the broker, with its acknowledgement; None: not measured yet.
        day: number of the day that is counted (days since 1970, UTC); 0: none yet.
        day_bytes: bytes of that day, both ways.
        behind_s: seconds that the agent ran while the clock showed an earlier day than `day`.
        sent_bytes, received_bytes: since the state folder is there.
    """

    up_s_per_byte: Slowness | None = None
    down_s_per_byte: Slowness | None = None
    latency_s: Span | None = None
    day: Count = 0
    day_bytes: Count = 0
    behind_s: Span = 0.0
    sent_bytes: Count = 0
    received_bytes: Count = 0

    @property
    def up_bits_s(self) -> float | None:
        """Measured uplink, bit/s."""
        return None if self.up_s_per_byte is None else 8.0 / self.up_s_per_byte

    @property
    def down_bits_s(self) -> float | None:
        """Measured downlink, bit/s."""
        return None if self.down_s_per_byte is None else 8.0 / self.down_s_per_byte


class Announced(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator was told about the link.

    Attributes:
        up_bits_s, down_bits_s: measured, bit/s; None: not measured.
        at_s: when, on the clock of `announce`.
    """

    up_bits_s: float | None = None
    down_bits_s: float | None = None
    at_s: float = -math.inf


NOTHING = Announced()
"""Before anything was measured."""


def sent(link: LinkEstimate, size_bytes: int, seconds: float) -> LinkEstimate:
    """Return what is known after a message was handed to the link and acknowledged by the broker.

    Args:
        link: what was known.
        size_bytes: of the payload.
        seconds: from the handing over to the acknowledgement.
    """
    slowness = _slowness(link.up_s_per_byte, size_bytes, seconds, link.latency_s or 0.0)
    tiny = size_bytes <= TINY_BYTES
    latency_s = _latency(link.latency_s, seconds) if tiny else link.latency_s
    return replace(link, up_s_per_byte=slowness, latency_s=latency_s)


def received(link: LinkEstimate, size_bytes: int, seconds: float) -> LinkEstimate:
    """Return what is known after something was asked for and is complete.

    Args:
        link: what was known.
        size_bytes: that came.
        seconds: from the question to the last byte.
    """
    slowness = _slowness(link.down_s_per_byte, size_bytes, seconds, link.latency_s or 0.0)
    return replace(link, down_s_per_byte=slowness)


def _latency(known: float | None, seconds: float) -> float | None:
    if not 0 <= seconds <= DAY_S:
        return known
    if known is None or seconds < known:
        return seconds
    return known + (seconds - known) * LATENCY_RISE


def _slowness(known: float | None, size_bytes: int, seconds: float, latency_s: float) -> float | None:
    """Return the mean time of a byte after one more transfer."""
    if size_bytes <= 0 or not 0 <= seconds <= DAY_S:
        return known
    moving = seconds - latency_s
    is_bound = size_bytes < MIN_BYTES or moving < latency_s
    # What is only a bound is counted without taking anything off: the link is at least so fast.
    sample = min(max((seconds if is_bound else moving) / size_bytes, FASTEST_S_PER_BYTE), 1e6)
    if known is None:
        return None if is_bound else sample
    if is_bound and sample >= known:
        return known
    weight = min(1.0, size_bytes / HALF_LIFE_BYTES + seconds / HALF_LIFE_S)
    kept = math.exp2(-max(weight, RAISE_WEIGHT) if is_bound else -weight)
    return kept * known + (1.0 - kept) * min(max(sample, known / MAX_STEP), known * MAX_STEP)


def drifted(
    link: LinkEstimate, ran_s: float, *, up_bits_s: float | None = None, down_bits_s: float | None = None
) -> LinkEstimate:
    """Return what is still believed of the link some time later: slow estimates move towards the profile.

    The distance halves per DRIFT_HALF_LIFE_S, in time per byte: a rate far below the profile doubles. An
    estimate that is faster than the profile stays: what was measured once was possible. Many short times give
    what one long time gives.

    Args:
        link: what was known.
        ran_s: seconds since then, on a clock that cannot be set; nothing happens if it is not positive.
        up_bits_s: uplink that the profile or the settings promise, bit/s; None: nothing.
        down_bits_s: the same for the downlink.
    """
    if not ran_s > 0:
        return link
    kept = math.exp2(-ran_s / DRIFT_HALF_LIFE_S)
    return replace(
        link,
        up_s_per_byte=_aged(link.up_s_per_byte, up_bits_s, kept),
        down_s_per_byte=_aged(link.down_s_per_byte, down_bits_s, kept),
    )


def _aged(known: float | None, promised_bits_s: float | None, kept: float) -> float | None:
    """Return the time of a byte of which a share `kept` of the distance to the promised one is left."""
    goal = max(8.0 / promised_bits_s, FASTEST_S_PER_BYTE) if promised_bits_s else FASTEST_S_PER_BYTE
    if known is None or known <= goal:
        return known
    return goal + kept * (known - goal)


def announce(link: LinkEstimate, last: Announced, now_s: float) -> Announced:
    """Return what the coordinator should know: `last` itself unless a rate moved and it is time.

    Args:
        link: what is known.
        last: what it was told.
        now_s: of a clock that never goes back.
    """
    moved = _moved(link.up_bits_s, last.up_bits_s) or _moved(link.down_bits_s, last.down_bits_s)
    if not moved or now_s - last.at_s < ANNOUNCE_S:
        return last
    return Announced(up_bits_s=link.up_bits_s, down_bits_s=link.down_bits_s, at_s=now_s)


def _moved(now: float | None, before: float | None) -> bool:
    if now is None or before is None:
        return now is not before
    return not before / ANNOUNCE_RATIO <= now <= before * ANNOUNCE_RATIO


def count(
    link: LinkEstimate, sent_bytes: int, received_bytes: int, *, day: int, ran_s: float
) -> LinkEstimate:
    """Return the counters after some traffic.

    A new day gives a new quota only if its number is larger than every day seen before: a clock that jumps
    back, or has not been set yet, gives none. A clock that was far ahead must not lock the device out until
    that day comes, so after 24 h of running behind it, the clock is believed again.

    Args:
        link: the counters.
        sent_bytes: since the last call.
        received_bytes: since the last call.
        day: number of the day that the clock shows now.
        ran_s: since the last call, on a clock that cannot be set.
    """
    behind_s = link.behind_s + ran_s if day < link.day else 0.0
    new_day = day > link.day or behind_s >= DAY_S
    moved = sent_bytes + received_bytes
    return replace(
        link,
        day=min(day, MAX_COUNT) if new_day else link.day,
        day_bytes=min(MAX_COUNT, moved if new_day else link.day_bytes + moved),
        behind_s=0.0 if new_day else behind_s,
        sent_bytes=min(MAX_COUNT, link.sent_bytes + sent_bytes),
        received_bytes=min(MAX_COUNT, link.received_bytes + received_bytes),
    )
