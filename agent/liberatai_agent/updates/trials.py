"""The running agent's part in a trial: ends for a release that waits, says that one on trial works."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from liberatai_agent.config import AgentConfig
from liberatai_agent.updates import keeper

log = logging.getLogger(__name__)


class Trials:
    """Watches for releases that wait, and proves the one that runs.

    Args:
        config: whether releases are wanted at all, and how long one must work well.
        looked: returns after the next look at the machine.
        at_rest: no work is in hand.
        well: connected, and all parts are alive.
        anew: ends the agent, to be started anew.
    """

    def __init__(
        self,
        config: AgentConfig,
        looked: Callable[[], Awaitable[None]],
        at_rest: Callable[[], bool],
        well: Callable[[], bool],
        anew: Callable[[], None],
    ) -> None:
        self._update = config.update
        self._folder: Path = config.state_path
        self._looked, self._at_rest, self._well, self._anew = looked, at_rest, well, anew

    async def watch(self) -> None:
        """End, to be started anew, when a release waits for its trial and no work is in hand."""
        while self._update.key_bytes is not None:
            await self._looked()
            if keeper.may_try(self._folder) and self._at_rest():
                log.info("a release waits for its trial: starting anew")
                self._anew()

    async def prove(self) -> None:
        """Say that a release on trial works, once it was connected and all parts were alive for a while."""
        beats = 0
        while keeper.on_trial():
            await asyncio.sleep(1.0)
            beats = beats + 1 if self._well() else 0
            if beats >= self._update.beats:
                keeper.tell_healthy(self._folder)
