"""Gives this fleet's coordinator a while to be heard: its presence stands at the broker."""

import asyncio
from collections.abc import Callable

SILENCE_S = 20.0
"""After which a connection without a coordinator's presence is odd: it stands at the broker."""


class Silence:
    """A timer that begins with a connection.

    Args:
        listening: this device knows what it can do; before that, nothing was listened to.
        silent: told when nobody spoke.
    """

    def __init__(self, listening: Callable[[], bool], silent: Callable[[], None]) -> None:
        self._listening, self._silent = listening, silent
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Wait from now on, in the running event loop."""
        self.cancel()
        self._timer = asyncio.get_running_loop().call_later(SILENCE_S, self._over)

    def cancel(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        if self._listening():
            self._silent()
        else:
            self.begin()
