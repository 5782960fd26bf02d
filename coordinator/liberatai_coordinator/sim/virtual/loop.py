"""An event loop whose time jumps to whatever comes next: a simulated hour takes as long as its work."""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

EPOCH_S = 1_760_000_000.0
"""Wall time at the start, seconds since 1970: the same in every run."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their virtual times; work for threads is done at once, in this one.

    So the order of everything follows from the program and its seeds, never from the machine.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._jumping = _Jumping(self._advance)
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return virtual seconds since the start."""
        return self.now_s

    def wall(self) -> float:
        """Return virtual seconds since 1970."""
        return EPOCH_S + self.now_s

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Arguments], Result], *args: *Arguments
    ) -> "asyncio.Future[Result]":
        """Do it now."""
        del executor
        done: asyncio.Future[Result] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - as an executor does: whoever awaits it gets it
            done.set_exception(error)
        return done

    def _advance(self, seconds: float) -> None:
        self.now_s += seconds


class _Jumping(selectors.SelectSelector):
    """Waits for nothing but what is ready; what would be waited, the clock jumps."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return what is ready now; if nothing is, let the time pass that the loop would wait."""
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise RuntimeError("the simulation stands still: nothing will ever happen")
        self._advance(timeout)
        return []
