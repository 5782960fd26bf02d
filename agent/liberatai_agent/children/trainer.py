"""The agent's side of the training process: start it early, ask it, kill it, let it go when idle.

They talk over a socket of their own; what libraries print goes to the log. The process has its own group, so
nothing that it starts survives it. It lives across the rounds of a job (importing torch costs seconds on a
small board) and ends after `idle_s` without work.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from liberatai_agent import control_groups
from liberatai_agent.children import start
from liberatai_agent.children.messages import (
    LENGTH,
    Failed,
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

log = logging.getLogger(__name__)

GROUP_SLACK = 1.2
"""A control group counts what the process's own limit does not: files that are mapped and read."""
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
        self._process: asyncio.subprocess.Process | None = None
        self._group: Path | None = None
        self._channel: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._starting = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[int | None] | None = None
        self._busy = False

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def warm(self) -> None:
        """Start the process if it is not there, so that its imports are done when work comes.

        Raises:
            TrainingError: it cannot be started.
        """
        async with self._starting:
            if self.pid is None:
                try:
                    await self._start()
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
        if self._busy:
            raise BusyError("a training is under way")
        self._busy = True
        self._stop_clock()
        kills = control_groups.out_of_memory_kills()
        try:
            await self.warm()
            if self._group is not None:
                control_groups.limit_memory(self._group, int(GROUP_SLACK * work.memory_bytes))
            answer = decode_answer(await self._ask(encode(work)))
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

    async def _start(self) -> None:
        await self._reap()
        ours, theirs = socket.socketpair()
        folder = start.fresh_folder(self._state_dir, "trainer")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                str(os.getpid()),
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=start.LOG,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd=folder,
                env=start.environment(folder),
            )
            self._group = control_groups.group_for_child("trainer")
            if self._group is not None:
                control_groups.put_into(self._group, self._process.pid)
            self._channel = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            await self._reap()
            raise
        finally:
            theirs.close()

    async def _ask(self, request: bytes) -> bytes:
        assert self._channel is not None  # noqa: S101 - `warm` set it
        source, sink = self._channel
        sink.write(request)
        await sink.drain()
        size = LENGTH.unpack(await source.readexactly(LENGTH.size))[0]
        require_length(size)
        return await source.readexactly(size)

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
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                # Its end is on the way, and says more than our signal.
                await asyncio.wait_for(self._process.wait(), ENDING_S)
        return await self._reap()

    async def _reap(self) -> int | None:
        """Kill the process; return its exit code, None if there was none."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel[1].transport.abort()
        if process is None:
            return None
        if process.returncode is None:
            # The group is the process's own (start_new_session), and it was not reaped yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = await process.wait()
        _close(process)
        return code


def _close(process: Any) -> None:
    # The transport warns at interpreter exit unless its pipes are closed while the loop runs.
    process._transport.close()  # noqa: SLF001


def _ended(code: int | None, kills_before: int) -> LiberataiError:
    """Return the error that tells how a training process ended without an answer."""
    if code == -signal.SIGKILL and control_groups.out_of_memory_kills() > kills_before:
        return MemoryLimitError("the training process was killed for want of memory (signal 9)")
    if code == -signal.SIGXCPU:
        return TaskLimitError("the training took more processor time than its deadline allows")
    how = "it was not running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    return TrainerDiedError(f"the training process ended without an answer ({how})")


def as_error(code: str, text: str) -> LiberataiError:
    """Return the error that a code stands for."""
    kind = BY_CODE.get(code, TrainingError)
    return kind(text) if kind is not LiberataiError and code != "E_CONFIG" else TrainingError(text)
