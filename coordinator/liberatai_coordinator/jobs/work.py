"""Long work of a job beside the event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(slots=True)
class Work:
    """Runs one piece of long work after the other in a thread."""

    _working: "asyncio.Future[Any] | None" = None

    async def do(self, work: Callable[..., Result], *args: Any) -> Result:
        """Run work in a thread; `settled` waits for it even if the task that asked is cancelled."""
        working = asyncio.ensure_future(asyncio.to_thread(work, *args))
        self._working = working
        return await asyncio.shield(working)

    async def settled(self) -> None:
        """Wait for work that a cancelled task has left behind: a thread cannot be stopped."""
        if self._working is not None:
            await asyncio.wait([self._working])

    @property
    def busy(self) -> bool:
        """Whether a thread works now."""
        return self._working is not None and not self._working.done()
