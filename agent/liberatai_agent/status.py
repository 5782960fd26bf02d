"""The status file: what `liberatai-agent status` shows. Written when something changed, else once an hour.

A card wears out by writing: counters that move all the time do not count as a change.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liberatai_agent.files import replace_quickly

FILE = "status.json"
PAUSE_S = 1.0
"""Between two writes: several things change at once."""
REFRESH_S = 3600.0
"""For the counters, and so that an old file is a dead agent's."""
MOVING = frozenset({"updated_at", "sent_bytes", "received_bytes", "link", "refusals"})
"""What changes all the time."""
STEADY_LINK = ("metered", "day_quota_bytes", "quota_spent")
"""What of the link does not."""


class StatusFile:
    """Keeps the file.

    Args:
        folder: of the state.
        status: gives what it shows.
    """

    def __init__(self, folder: Path, status: Callable[..., dict[str, Any]]) -> None:
        self._path, self._status = folder / FILE, status
        self._changed = asyncio.Event()
        self._written: dict[str, Any] | None = None

    def changed(self) -> None:
        """Write before long, if there is something new."""
        self._changed.set()

    async def run(self) -> None:
        """Write, for ever."""
        while True:
            self.write()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._changed.wait()
                    self._changed.clear()
                    await self._until_news()
            await asyncio.sleep(PAUSE_S)

    async def _until_news(self) -> None:
        while steady(self._status()) == self._written:
            await self._changed.wait()
            self._changed.clear()

    def write(self, *, stopped: bool = False) -> None:
        """Write the file; a disk that refuses is asked again at the next change."""
        found = self._status(stopped=stopped)
        with contextlib.suppress(OSError):
            replace_quickly(self._path, json.dumps(found, indent=1).encode())
            self._written = steady(found)


def steady(status: dict[str, Any]) -> dict[str, Any]:
    """Return a status without what changes all the time."""
    link = {name: status.get("link", {}).get(name) for name in STEADY_LINK}
    return {name: value for name, value in status.items() if name not in MOVING} | {"link": link}


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the status file of a state folder, None if there is none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
