"""Questions to devices that are there: is it alive, what has it measured, what stands in its log.

A question is lost where the device is not: nobody is asked who cannot answer, and nobody waits for long.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Final, Literal

from liberatai_coordinator import clock
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_core.contract.messages import Answer, Request
from liberatai_core.errors import BY_CODE, BusyError, LiberataiError, LinkError, StateError

ANSWER_S: Final = 10.0
"""Longest wait: a round trip over a slow link, and a look at the machine."""
MAX_WAITING: Final = 256
"""Questions under way."""

What = Literal["ping", "probe", "logs"]


@dataclass(slots=True, kw_only=True)
class Asking:
    """Asks devices.

    Attributes:
        epoch: of this coordinator.
    """

    fleet: Fleet
    publisher: Publisher
    epoch: int
    answer_s: float = ANSWER_S
    _number: int = 0
    _waiting: dict[tuple[str, int], asyncio.Future[Answer]] = field(default_factory=dict)

    async def ask(self, device: str, what: What, lines: int = 0) -> tuple[Answer, float]:
        """Return a device's answer, and the seconds that it took.

        Raises:
            StateError: the device is not there. LinkError: it did not answer in time.
            BusyError: too many questions are under way. LiberataiError: what the device says went wrong.
        """
        known = self.fleet.admit(device)
        if not known.online or not self.fleet.connected:
            raise StateError(f"{device} is {self.fleet.shown(known)[0]}: it cannot answer")
        if len(self._waiting) >= MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} questions to devices are under way: try again")
        self._number += 1
        key = device, self._number
        asked: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[key] = asked
        began_s = clock.monotonic()
        try:
            request = Request(device=device, epoch=self.epoch, number=self._number, what=what, lines=lines)
            await self.publisher.send(self.publisher.topics.down(device, "req"), request)
            async with asyncio.timeout(self.answer_s):
                answer = await asked
        except TimeoutError:
            raise LinkError(f"{device} did not answer within {self.answer_s:g} s") from None
        finally:
            del self._waiting[key]
        if answer.code:
            kind = BY_CODE.get(answer.code, StateError)
            raise (StateError if kind is LiberataiError or answer.code == "E_CONFIG" else kind)(
                f"{device}: {answer.text}"
            )
        return answer, clock.monotonic() - began_s

    async def remind(self, device: str) -> None:
        """Let a device say everything again, if it is there: also one of which nothing is known just now.

        Raises:
            LinkError: the broker is away.
        """
        self._number += 1
        request = Request(device=device, epoch=self.epoch, number=self._number, what="probe")
        await self.publisher.send(self.publisher.topics.down(device, "req"), request)

    def heard(self, answer: Answer) -> None:
        """Take a device's verified answer; one that nobody waits for is dropped."""
        asked = self._waiting.get((answer.device, answer.number))
        if asked is not None and answer.epoch == self.epoch and not asked.done():
            asked.set_result(answer)
