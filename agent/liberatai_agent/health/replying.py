"""Answers what the fleet asks a device: is it there, measure again, the newest lines of the log."""

from collections.abc import Awaitable, Callable

from liberatai_agent.health.logbook import Logbook
from liberatai_core.contract.limits import MAX_CONTROL_BYTES
from liberatai_core.contract.messages import Answer, Request
from liberatai_core.errors import BusyError, LiberataiError, ReplayError, StateError

AT_ONCE, EVERY_S = 20.0, 0.5
"""Answers that may follow each other, and what one of them costs: nobody makes a device talk for ever."""
MAX_LOG_BYTES = MAX_CONTROL_BYTES - 4096


class Replying:
    """Answers for one device.

    Args:
        device: its name.
        logbook: None: the device's owner shares no log.
        measure: looks at the machine and tells what is new.
        say: publishes an answer.
    """

    def __init__(
        self,
        device: str,
        logbook: Logbook | None,
        measure: Callable[[], Awaitable[None]],
        say: Callable[[Answer], None],
    ) -> None:
        self._device, self._logbook, self._measure, self._say = device, logbook, measure, say
        self._last = (0, 0)
        self._left, self._left_s = AT_ONCE, 0.0

    def require_new(self, request: Request, epoch: int, now_s: float) -> None:
        """Refuse what was answered before, or comes too fast.

        Raises:
            ReplayError: it is no new request. BusyError: there were too many.
        """
        if request.epoch < epoch or (request.epoch, request.number) <= self._last:
            raise ReplayError(f"request {request.number} of epoch {request.epoch} was answered before")
        self._left = min(AT_ONCE, self._left + (now_s - self._left_s) / EVERY_S)
        self._left_s = now_s
        if self._left < 1.0:
            raise BusyError(f"request {request.number}: more than one in {EVERY_S:g} s")
        self._left -= 1.0
        self._last = request.epoch, request.number

    async def answer(self, request: Request) -> None:
        """Do what is asked and say so."""
        code, text = "", ""
        lines: tuple[str, ...] = ()
        try:
            match request.what:
                case "probe":
                    await self._measure()
                case "logs":
                    lines = self._lines(request.lines)
                case "ping":
                    pass
        except LiberataiError as error:
            code, text = error.code, str(error)[:512]
        self._say(
            Answer(
                device=self._device,
                session=0,
                epoch=request.epoch,
                number=request.number,
                code=code,
                text=text,
                lines=lines,
            )
        )

    def _lines(self, count: int) -> tuple[str, ...]:
        if self._logbook is None:
            raise StateError("the owner of this device shares no log (share_logs in agent.yaml)")
        found: list[str] = []
        size = 0
        for line in reversed(self._logbook.last(count)):
            size += len(line.encode()) + 5
            if size > MAX_LOG_BYTES:
                break
            found.append(line)
        return tuple(reversed(found))
