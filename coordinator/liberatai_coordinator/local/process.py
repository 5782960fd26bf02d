"""One child process with its log."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from liberatai_core import processes
from liberatai_core.errors import LinkError

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
STOP_TIMEOUT_S: Final = 10.0
"""An agent says goodbye and writes its counters; then it is killed."""
TAIL_LINES: Final = 15
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",  # a dozen processes share the processors: more threads are in each other's way
    "OMP_WAIT_POLICY": "PASSIVE",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    # Coordinator, broker and trainings are one fleet: all shall go on.
    "LIBERATAI_TRAIN_PRIORITY": os.environ.get("LIBERATAI_TRAIN_PRIORITY", "low"),
}


class Process:
    """One child process with a log file; it dies with us, and Ctrl-C does not reach it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        prepare: Callable[[], None] | None = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        """Set up; `prepare` sets limits in the child, `also` is in its environment."""
        self.name, self.log, self._command, self._prepare = name, log, list(command), prepare
        self._environment = {**ENVIRONMENT, **(also or {})}
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """What it runs."""
        return list(self._command)

    @property
    def pid(self) -> int | None:
        """The process, None if it is not running."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Start it, unless it runs.

        The kernel's "dies with its parent" means the parent's thread: so a thread that lives as long as the
        child starts it.
        """
        if self.pid is not None:
            return
        ready = threading.Event()
        failed: list[OSError] = []

        def keep() -> None:
            try:
                with self.log.open("ab") as log:
                    child = _popen(self._command, log.fileno(), self._prepare, self._environment)
            except OSError as error:
                failed.append(error)
                ready.set()
                return
            self._child = child
            ready.set()
            child.wait()

        threading.Thread(target=keep, name=f"keeper-{self.name}", daemon=True).start()
        ready.wait()
        if failed:
            raise LinkError(f"{self.name}: cannot be started: {failed[0]}")

    def signal(self, how: signal.Signals) -> None:
        """Send a signal; without effect on a process that has ended."""
        if self._child is not None:
            self._child.send_signal(how)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait for its end; after the time, kill it."""
        if self._child is None:
            return
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """End it as a crash does; from now on it is not missed."""
        self.signal(signal.SIGKILL)
        self.wait()
        self._child = None

    def stop(self) -> None:
        """Ask it to end, and wait for that; from now on it is not missed."""
        self.signal(signal.SIGTERM)
        self.wait()
        self._child = None

    def require_alive(self) -> None:
        """Raise LinkError with the end of its log if the process has ended by itself."""
        if self._child is not None and (code := self._child.poll()) is not None:
            raise LinkError(f"{self.name} ended with code {code}; its log ends:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines of its log, indented."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            lines = []
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"


def _popen(
    command: list[str], log_fd: int, prepare: Callable[[], None] | None, also: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if prepare is not None:
            prepare()

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        env=processes.environment(also=also),
        start_new_session=True,  # Ctrl-C is ours: we stop them in order
        preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - a few system calls
    )
