"""The newest lines of the agent's own log, for the fleet to ask for: without what could quote the data."""

import logging
import time
from collections import deque

from liberatai_agent.privacy import LOCAL_ONLY
from liberatai_core.contract.limits import MAX_LINES, MAX_TEXT

OURS = ("liberatai_agent", "liberatai_core")
"""What libraries say may quote anything."""
LEAST = logging.INFO


class Logbook(logging.Handler):
    """Remembers lines; the oldest go first."""

    def __init__(self) -> None:
        super().__init__(LEAST)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one line."""
        if not record.name.startswith(OURS):
            return
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        self._lines.append(f"{when} {record.levelname} {outward_line(record.getMessage())}"[:MAX_TEXT])

    def last(self, count: int) -> tuple[str, ...]:
        """Return the newest lines, the oldest of them first."""
        return tuple(self._lines)[-count:] if count else ()


def outward_line(text: str) -> str:
    """Return a line up to a code whose text may quote the data: a label, a row, a path."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    places = [line.index(code) + len(code) for code in LOCAL_ONLY if code in line]
    return f"{line[: min(places)]} (the rest stays on the device)" if places else line
