"""When to look whether a device has become silent: a queue of names by time. Pure."""

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Watch:
    """Every name once, with the time at which to look at it."""

    _due: list[tuple[float, str]] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def add(self, name: str, due_s: float) -> None:
        """Look at a device then; one that is watched keeps its time."""
        if name not in self._names:
            self._names.add(name)
            heapq.heappush(self._due, (due_s, name))

    def take(self, now_s: float) -> str | None:
        """Return a device whose time has come, which is watched no more; None: there is none."""
        if not self._due or self._due[0][0] > now_s:
            return None
        name = heapq.heappop(self._due)[1]
        self._names.discard(name)
        return name
