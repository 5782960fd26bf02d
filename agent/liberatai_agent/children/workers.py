"""How the agent gets a training process, and gets rid of it: a child of its own, or one of a service manager.

A child is in the agent's own sandbox. Where a service manager starts the training for each connection of a
socket (LIBERATAI_TRAINER, see deploy/systemd), it is a service beside the agent, with limits and rights of
its own; then it is nobody's child, and its exit code is not known.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from liberatai_agent.children import control_groups, start
from liberatai_agent.children.messages import HELLO

SOCKET = "LIBERATAI_TRAINER"
"""Environment variable: path of the socket at which a service manager starts training processes."""
HELLO_S = 60.0
"""From the connection to the first word of the process: a small board reads Python from a slow card."""
GROUP_SLACK = 1.2
"""A control group counts what the process's own limit does not: files that are mapped and read."""

Channel = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Worker(Protocol):
    """A training process that was started."""

    @property
    def channel(self) -> Channel:
        """What is said to it and heard from it."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""

    def limit_memory(self, size_bytes: int) -> None:
        """Bound its memory from outside, where that is ours to do."""

    async def wait(self) -> None:
        """Wait until it has ended."""

    async def end(self) -> int | None:
        """Kill it if it runs; return how it ended, None if nobody tells."""


async def started(command: Sequence[str], state_dir: Path | None) -> Worker:
    """Return a new training process.

    Args:
        command: for a child.
        state_dir: the agent's state; a child may write in a folder below it. None: nowhere.

    Raises:
        OSError: it cannot be started.
    """
    if address := os.environ.get(SOCKET, ""):
        return await _serviced(address)
    return await _child(command, state_dir)


# --- a child ---------------------------------------------------------------------------------------


async def _child(command: Sequence[str], state_dir: Path | None) -> Worker:
    ours, theirs = socket.socketpair()
    folder = start.fresh_folder(state_dir, "trainer")
    child = None
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            str(os.getpid()),
            str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=start.LOG,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            cwd=folder,
            env=start.environment(folder),
        )
        child = _Child(process)
        group = control_groups.group_for_child("trainer")
        if group is not None:
            control_groups.put_into(group, process.pid)
            child.group = group
        child.opened = await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        if child is not None:
            await child.end()
        raise
    finally:
        theirs.close()
    return child


class _Child:
    """A child: in a process group of its own, so that nothing that it starts survives it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.group: Path | None = None
        self.opened: Channel | None = None

    @property
    def channel(self) -> Channel:
        assert self.opened is not None  # noqa: S101 - `_child` opened it
        return self.opened

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.returncode is None else None

    def limit_memory(self, size_bytes: int) -> None:
        if self.group is not None:
            control_groups.limit_memory(self.group, int(GROUP_SLACK * size_bytes))

    async def wait(self) -> None:
        await self._process.wait()

    async def end(self) -> int | None:
        if self.opened is not None:
            self.opened[1].transport.abort()
        if self._process.returncode is None:
            # The group is the process's own (start_new_session), and it was not reaped yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        code = await self._process.wait()
        _close(self._process)
        return code


def _close(process: Any) -> None:
    # The transport warns at interpreter exit unless its pipes are closed while the loop runs.
    process._transport.close()  # noqa: SLF001


# --- a service beside the agent ---------------------------------------------------------------------


async def _serviced(address: str) -> Worker:
    reader, writer = await asyncio.open_unix_connection(address)
    try:
        async with asyncio.timeout(HELLO_S):
            (pid,) = HELLO.unpack(await reader.readexactly(HELLO.size))
        # While the connection is open the process lives: the number is nobody else's.
        return _Serviced(os.pidfd_open(pid), pid, (reader, writer))
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        writer.transport.abort()
        raise OSError(
            f"{address}: nothing heard of a process; see `journalctl -u 'liberatai-trainer@*'`"
        ) from error
    except BaseException:
        writer.transport.abort()
        raise


class _Serviced:
    """A process of the service manager: it ends with the connection, or by a signal of ours."""

    def __init__(self, handle: int, pid: int, channel: Channel) -> None:
        self._handle, self._pid, self._opened = handle, pid, channel
        self._ended = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(handle, self._has_ended)

    def _has_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        os.close(self._handle)
        self._ended.set_result(None)

    @property
    def channel(self) -> Channel:
        return self._opened

    @property
    def pid(self) -> int | None:
        return None if self._ended.done() or _is_readable(self._handle) else self._pid

    def limit_memory(self, size_bytes: int) -> None:
        """Leave it to the unit's slice, and to the limit that the process sets itself."""

    async def wait(self) -> None:
        await asyncio.shield(self._ended)

    async def end(self) -> int | None:
        self._opened[1].transport.abort()
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            await self.wait()
        return None


def _is_readable(handle: int) -> bool:
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    return bool(watch.poll(0))
