"""Keeps the agent honest about being alive: parts that end or stand still end the agent, and systemd is told.

A program that hangs looks alive from outside. So the watchdog of the service manager is fed only while every
part proves itself: the link by what it says and moves, the publisher and the trainer by ending what they
began.
If something stands still for too long, the agent ends, and whoever started it starts it again.
"""

import asyncio
import contextlib
import ctypes
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from liberatai_core.sd_notify import notify, pause_s

log = logging.getLogger(__name__)

PUBLISH_S = 180.0
"""A message of 256 KiB takes 84 s at 25 kbit/s, and a dead connection is noticed in 90 s."""
STOP_S = 60.0
"""A process is killed at once; what is still there then waits for a disk that does not answer."""
SILENCE_PINGS = 4.0
"""In so many times the keepalive a link moves something, or says that it has lost the connection."""
RETRY_S = 120.0
"""Without a connection a link says something for every try, and how long it waits then; a try takes 30 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What the parts show of themselves. Times are `time.monotonic`: a machine that sleeps does not count.

    Attributes:
        connected: whether the link says so.
        moved_s: when bytes moved, or the link said something, last.
        keepalive_s: how often a connection that is idle moves something.
        retry_s: what the link waits before it tries again.
        publishing_s: since when one message is being published; None: none is.
        stopping_s: since when a training that was stopped has not ended; None: all have.
    """

    connected: bool
    moved_s: float
    keepalive_s: float
    retry_s: float = 0.0
    publishing_s: float | None = None
    stopping_s: float | None = None


def stands_still(signs: Signs, now: float) -> str:
    """Return which part does nothing any more, "" if all do."""
    silent_s = now - signs.moved_s
    patience_s = max(30.0, SILENCE_PINGS * signs.keepalive_s) if signs.connected else signs.retry_s + RETRY_S
    if silent_s > patience_s:
        return f"the link has shown no sign of life for {silent_s:.0f} s"
    if signs.publishing_s is not None and now - signs.publishing_s > PUBLISH_S:
        return f"a message has been on its way for {now - signs.publishing_s:.0f} s"
    if signs.stopping_s is not None and now - signs.stopping_s > STOP_S:
        return f"a training was stopped {now - signs.stopping_s:.0f} s ago and has not ended"
    return ""


class StandstillError(RuntimeError):
    """A part of the agent does nothing any more: a bug, or a system that is stuck."""


class Supervisor:
    """Runs the agent's parts until one ends or stands still, or somebody asks to stop.

    Args:
        signs: gives what the parts show of themselves.
    """

    def __init__(self, signs: Callable[[], Signs]) -> None:
        self._signs = signs
        self._stop = asyncio.Event()
        self._parts: set[asyncio.Task[None]] = set()
        self._crash: BaseException | None = None

    def stop(self) -> None:
        """Ask everything to end; from the event loop's thread."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether everything shall end."""
        return self._stop.is_set()

    def run_part(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something; if it raises, the agent ends, so that a clean one is started."""
        task = asyncio.create_task(work)
        self._parts.add(task)
        task.add_done_callback(self._ended)
        return task

    def crashed(self, error: BaseException) -> None:
        """End the agent with this error."""
        self._crash = self._crash or error
        self._stop.set()

    async def wait(self) -> None:
        """Wait until the agent shall end."""
        await self._stop.wait()

    async def close(self) -> None:
        """Stop all parts."""
        parts = list(self._parts)
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)

    def require_no_crash(self) -> None:
        """Raise what ended the agent, if something did."""
        if self._crash is not None:
            raise self._crash

    async def watch(self) -> None:
        """Tell the service manager that all is well, as long as it is."""
        rest_s, suspected = pause_s(), 0
        while True:
            what = stands_still(self._signs(), time.monotonic())
            # Twice, with time for everybody in between: the whole process may have been stopped for a while.
            suspected = suspected + 1 if what else 0
            if suspected > 1:
                log.error("E_INTERNAL: %s: the agent ends, to be started again", what)
                raise StandstillError(what)
            if not what:
                notify("WATCHDOG=1")
            await asyncio.sleep(rest_s)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._parts.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.crashed(error)


def give_memory_back() -> None:
    """Return freed memory to the system: an agent is idle most of the time (glibc; elsewhere nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
