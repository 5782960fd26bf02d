"""The agent's side of the training process: start it early, ask it, kill it, let it go when idle.

They talk over a socket of their own; what libraries print goes to the log. The process lives across the
rounds of a job (importing torch costs seconds on a small board) and ends after `idle_s` without work.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from liberatai_agent.children import control_groups, workers
from liberatai_agent.children.messages import (
    LENGTH,
    Failed,
    Prepare,
    Work,
    decode_answer,
    encode,
    require_length,
)
from liberatai_agent.events import TrainingResult
from liberatai_core import processes
from liberatai_core.errors import (
    BY_CODE,
    BusyError,
    LiberataiError,
    MemoryLimitError,
    TaskLimitError,
    TooLargeError,
    TrainingError,
)
from liberatai_core.profile import Trainer as Runtime

log = logging.getLogger(__name__)

ENDING_S = 1.0
"""For a process that closed its channel to end by itself."""


class TrainerDiedError(TrainingError):
    """The training process ended without an answer: killed, or out of memory."""

    code = "E_INTERNAL"


class Trainer:
    """Owns at most one training process.

    Args:
        idle_s: seconds without work after which it ends.
        command: how to start it; for tests.
        state_dir: the agent's state; the process may write in a folder below it. None: nowhere.
    """

    def __init__(
        self, idle_s: float, command: Sequence[str] | None = None, *, state_dir: Path | None = None
    ) -> None:
        self._idle_s, self._state_dir = idle_s, state_dir
        self._command = list(command or processes.command("liberatai_agent.children.trainer_child"))
        self._worker: workers.Worker | None = None
        self._starting = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[int | None] | None = None
        self._busy = self._training = False
        self._runtime: Runtime = "torch"
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._worker is None else self._worker.pid

    async def warm(self, runtime: Runtime = "torch") -> None:
        """Start the process if it is not there, so that its imports are done when work comes.

        Args:
            runtime: what it imports.

        Raises:
            TrainingError: it cannot be started.
        """
        async with self._starting:
            if self.pid is None:
                try:
                    await self._reap()
                    self._worker = await workers.started(self._command, self._state_dir)
                    self._runtime = runtime
                    self._worker.channel[1].write(encode(Prepare(runtime=runtime)))
                except OSError as error:
                    raise TrainingError(f"the training process cannot be started: {error}") from error
        if not self._busy:
            self._rest()

    async def train(self, work: Work) -> TrainingResult:
        """Return the result of one training.

        When this coroutine is cancelled, the process is killed.

        Raises:
            LiberataiError: with the code that the process gave.
            TrainerDiedError: it ended without an answer.
        """
        if self._training and not work.check:
            raise BusyError("a training is under way")
        self._training = self._training or not work.check
        try:
            async with self._turn:  # a check is short: whoever comes meanwhile waits
                return await self._ask_for(work)
        finally:
            self._training = self._training and work.check

    async def _ask_for(self, work: Work) -> TrainingResult:
        self._busy = True
        self._stop_clock()
        kills = control_groups.out_of_memory_kills()
        try:
            if self._runtime == "torch" != work.runtime:
                await self._reap()  # torch would keep its memory
            await self.warm(work.runtime)
            assert self._worker is not None  # noqa: S101 - `warm` started it
            self._worker.limit_memory(work.memory_bytes)
            answer = decode_answer(await _ask(self._worker.channel, encode(work)))
        except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError, TooLargeError) as error:
            raise _ended(await self._wait_or_kill(), kills) from error
        except asyncio.CancelledError:
            await self._reap()
            raise
        finally:
            self._busy = False
        if isinstance(answer, Failed) and answer.code == MemoryLimitError.code:
            # What a failed allocation left behind is given back by the process's end only.
            await self._reap()
        self._rest()
        if isinstance(answer, Failed):
            raise as_error(answer.code, answer.text)
        return answer.result

    async def close(self) -> None:
        """Kill the process; idempotent."""
        self._stop_clock()
        await self._reap()
        if self._ending is not None:
            await self._ending

    def _rest(self) -> None:
        self._stop_clock()
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._end_idle)

    def _stop_clock(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _end_idle(self) -> None:
        self._ending = asyncio.create_task(self._reap())

    async def _wait_or_kill(self) -> int | None:
        """Return how a process ended that closed its channel; kill it if it lives on."""
        if self._worker is not None:
            with contextlib.suppress(TimeoutError):
                # Its end is on the way, and says more than our signal.
                await asyncio.wait_for(self._worker.wait(), ENDING_S)
        return await self._reap()

    async def _reap(self) -> int | None:
        """Kill the process; return its exit code, None if there was none or nobody knows."""
        worker, self._worker = self._worker, None
        return None if worker is None else await worker.end()


async def _ask(channel: workers.Channel, request: bytes) -> bytes:
    source, sink = channel
    sink.write(request)
    await sink.drain()
    size = LENGTH.unpack(await source.readexactly(LENGTH.size))[0]
    require_length(size)
    return await source.readexactly(size)


def _ended(code: int | None, kills_before: int) -> LiberataiError:
    """Return the error that tells how a training process ended without an answer."""
    if code in (None, -signal.SIGKILL) and control_groups.out_of_memory_kills() > kills_before:
        return MemoryLimitError("the training process was killed for want of memory (signal 9)")
    if code == -signal.SIGXCPU:
        return TaskLimitError("the training took more processor time than its deadline allows")
    how = "nobody says how" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    return TrainerDiedError(f"the training process ended without an answer ({how})")


def as_error(code: str, text: str) -> LiberataiError:
    """Return the error that a code stands for."""
    kind = BY_CODE.get(code, TrainingError)
    return kind(text) if kind is not LiberataiError and code != "E_CONFIG" else TrainingError(text)
