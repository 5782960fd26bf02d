"""What went wrong: frames that were refused, counted by code and kept over restarts, and the newest error."""

import contextlib
import logging
import time

from liberatai_agent.store.counters import Counters
from liberatai_core.errors import LiberataiError

log = logging.getLogger(__name__)


class Faults:
    """Counts for one device.

    Args:
        counters: keep them.

    Attributes:
        last: the newest error, "E_DISK: full"; "" once it no longer matters.
        last_at: when it was met last, Unix seconds.
        refused: refused frames by code, ever.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._unsaved: dict[str, int] = {}
        self.refused = counters.refusals()
        self.last, self.last_at = "", 0.0

    def refuse(self, code: str, text: str) -> None:
        """Count a frame that was not believed."""
        for counts in (self.refused, self._unsaved):
            counts[code] = counts.get(code, 0) + 1
        if self.refused[code] & (self.refused[code] - 1) == 0:
            # The 1st, 2nd, 4th, 8th … of a kind: a flood must not fill the log.
            log.warning("refused %s: %s (%d so far)", code, text[:300], self.refused[code])

    def note(self, code: str, text: str, *, quiet: bool = False) -> None:
        """Remember an error, and log it once."""
        line = f"{code}: {text}"
        if line != self.last and not quiet:
            log.warning("%s", line)
        self.last, self.last_at = line, time.time()

    def heal(self, code: str) -> None:
        """Forget the newest error if it is of this kind: what it hindered works again."""
        if self.last.startswith(f"{code}:"):
            self.last, self.last_at = "", 0.0

    def save(self) -> None:
        """Store the counters; what the disk refuses is stored later."""
        if self._unsaved:
            with contextlib.suppress(LiberataiError):
                self._counters.add_refusals(self._unsaved)
                self._unsaved = {}
