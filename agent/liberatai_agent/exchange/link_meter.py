"""Looks at the link for `link_estimate`: takes times and counters, and keeps what it says in a small file.

The file is replaced as a whole and rarely: cards wear out. A crash forgets at most UNSAVED_BYTES of the
day's traffic, or a hundredth of the quota if that is less.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from liberatai_agent.exchange import link_estimate
from liberatai_agent.exchange.link_estimate import DAY_S, NOTHING, Announced, LinkEstimate
from liberatai_agent.store.files import write_durably
from liberatai_core.link.link import Traffic

log = logging.getLogger(__name__)

FILE = "traffic.json"
MAX_FILE_BYTES = 4096
"""The file has some 200 bytes."""
SAVE_S = 3600.0
"""Between two writes while little moves: 24 a day, where keep-alive pings alone would make 1440."""
UNSAVED_BYTES = 65_536


def read_link(folder: Path) -> LinkEstimate:
    """Return what the state folder knows of the link; nothing if there is no file, or a damaged one."""
    try:
        with (folder / FILE).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=LinkEstimate)
    except OSError:
        return LinkEstimate()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("%s: %s: the link is measured anew", folder / FILE, error)
        return LinkEstimate()


class LinkMeter:
    """Measures one agent's link.

    Args:
        folder: the state folder.
        quota_bytes: that a day may move, both ways together; None: any number.
        traffic: gives the socket's counters; they start at zero with this object.
        now: gives seconds of a clock that cannot be set and goes on while the machine sleeps.
        wall: gives Unix seconds.
        up_bits_s, down_bits_s: what the profile or the settings promise of the link, bit/s; None: nothing.
            What was measured long ago returns there.
    """

    def __init__(
        self,
        folder: Path,
        quota_bytes: int | None,
        traffic: Callable[[], Traffic],
        now: Callable[[], float],
        wall: Callable[[], float] = time.time,
        *,
        up_bits_s: float | None = None,
        down_bits_s: float | None = None,
    ) -> None:
        self.link = read_link(folder)
        self.announced = link_estimate.announce(self.link, NOTHING, now())
        self._folder, self._quota_bytes = folder, quota_bytes
        self._promised_up, self._promised_down = up_bits_s, down_bits_s
        self._traffic, self._now, self._wall = traffic, now, wall
        self._counted, self._counted_s = Traffic(), now()
        self._saved, self._saved_s = self.link, now()
        self._fetching = 0
        self._fetch_failed = False
        self._fetch_from = (0.0, 0)
        self.count()

    @property
    def day_bytes(self) -> int:
        """Bytes of the day that is counted."""
        return self.link.day_bytes

    @property
    def quota_bytes(self) -> int | None:
        """What a day may move."""
        return self._quota_bytes

    @quota_bytes.setter
    def quota_bytes(self, size_bytes: int | None) -> None:
        self._quota_bytes = size_bytes

    @property
    def spent(self) -> bool:
        """Whether the day's quota is used up."""
        return self._quota_bytes is not None and self.link.day_bytes >= self._quota_bytes

    @contextmanager
    def sending(self, size_bytes: int) -> Iterator[None]:
        """Measure a publication; what fails is not counted."""
        began = self._now()
        yield
        self.link = link_estimate.sent(self.link, size_bytes, self._now() - began)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Measure downloads: from the first that begins to the end of the last one under way.

        Downloads that overlap share the link, so they are measured together, by what the socket received.
        """
        if self._fetching == 0:
            self._fetch_failed = False
            self._fetch_from = (self._now(), self._traffic().received_bytes)
        self._fetching += 1
        try:
            yield
        except BaseException:
            # Somebody was waited for in vain: that time says nothing about the link.
            self._fetch_failed = True
            raise
        finally:
            self._fetching -= 1
            if self._fetching == 0 and not self._fetch_failed:
                began, before = self._fetch_from
                size = self._traffic().received_bytes - before
                self.link = link_estimate.received(self.link, size, self._now() - began)

    def count(self) -> None:
        """Add what moved since the last call, let the estimates age, and save both when it is worth it."""
        traffic, now_s = self._traffic(), self._now()
        ran_s = max(0.0, now_s - self._counted_s)
        aged = link_estimate.drifted(
            self.link, ran_s, up_bits_s=self._promised_up, down_bits_s=self._promised_down
        )
        self.link = link_estimate.count(
            aged,
            max(0, traffic.sent_bytes - self._counted.sent_bytes),
            max(0, traffic.received_bytes - self._counted.received_bytes),
            day=max(0, int(self._wall() // DAY_S)),
            ran_s=ran_s,
        )
        self._counted, self._counted_s = traffic, now_s
        unsaved = self.link.sent_bytes + self.link.received_bytes
        unsaved -= self._saved.sent_bytes + self._saved.received_bytes
        limit = min(UNSAVED_BYTES, (self._quota_bytes or UNSAVED_BYTES * 100) // 100)
        if unsaved > limit or self.link.day != self._saved.day or now_s - self._saved_s >= SAVE_S:
            self.save()

    def look(self) -> Announced:
        """Return what the coordinator should know now."""
        self.announced = link_estimate.announce(self.link, self.announced, self._now())
        return self.announced

    def save(self) -> None:
        """Write the file, if there is something new; a disk that refuses is asked again later."""
        self._saved_s = self._now()
        if self.link == self._saved:
            return
        try:
            write_durably(self._folder / FILE, msgspec.json.encode(self.link), mode=0o600)
        except OSError as error:
            log.warning("%s: %s: tried again later", self._folder / FILE, error.strerror)
        else:
            self._saved = self.link
