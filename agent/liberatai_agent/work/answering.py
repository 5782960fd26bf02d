"""A local Unix socket at which other programs ask the newest model; a process of its own answers.

The agent only listens: with the first question it starts the process, which takes the questions from then on
and ends when there are none. So nobody pays for numpy who does not ask, and a question cannot harm the agent.
"""

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

from liberatai_agent.children import start
from liberatai_agent.config import AgentConfig
from liberatai_core import processes

log = logging.getLogger(__name__)

NAME = "predict.sock"
LONGEST = 107
"""Bytes of a Unix socket's path."""
WAITING = 16
"""Programs that may wait to be answered."""
PAUSE_S = 1.0
"""After a process ended: one that cannot start must not be started without pause."""


def socket_path(config: AgentConfig) -> Path:
    """Return where programs ask."""
    return config.state_path / NAME


class Answering:
    """Listens, and starts what answers.

    Args:
        config: settings; `predict_idle_s: 0` turns it off.
        command: what answers; for tests.
    """

    def __init__(self, config: AgentConfig, command: list[str] | None = None) -> None:
        self._config = config
        self._command = command or processes.command("liberatai_agent.children.predictor_child")
        data = [] if config.data is None else [str(Path(config.data).absolute())]
        self._about = [str(config.state_path.absolute()), str(config.predict_idle_s), *data]

    async def run(self) -> None:
        """Serve until cancelled; without a socket it does nothing."""
        listener = self._listener() if self._config.predict_idle_s else None
        if listener is None:
            return
        try:
            while True:
                await _asked(listener)
                await self._answer(listener)
                await asyncio.sleep(PAUSE_S)
        finally:
            listener.close()
            socket_path(self._config).unlink(missing_ok=True)

    def _listener(self) -> socket.socket | None:
        path = socket_path(self._config)
        if len(os.fsencode(path)) > LONGEST:
            log.warning("%s: too long for a socket (%d bytes): nobody can ask for predictions", path, LONGEST)
            return None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(WAITING)
        except OSError as error:
            log.warning("%s: %s: nobody can ask for predictions", path, error.strerror)
            listener.close()
            return None
        listener.setblocking(False)
        return listener

    async def _answer(self, listener: socket.socket) -> None:
        """Let a process answer until it ends; its socket is a copy of the listener."""
        folder = start.fresh_folder(self._config.state_path, "predictor")
        process = None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(os.getpid()),
                str(listener.fileno()),
                *self._about,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=start.LOG,
                pass_fds=(listener.fileno(),),
                cwd=folder,
                env=start.environment(folder),
            )
            await process.wait()
        except OSError as error:
            log.warning("predictions: the process cannot be started: %s", error)
        finally:
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


async def _asked(listener: socket.socket) -> None:
    """Wait until somebody connects; the connection stays for who answers."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(listener.fileno(), event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(listener.fileno())
