"""The folder with everything that the agent keeps: one agent at a time uses it."""

import errno
import fcntl
import os
from pathlib import Path

from liberatai_core.errors import DiskError, LockedError


class StateLock:
    """Holds a state folder against a second agent; released by `close` or when the process ends.

    Raises:
        LockedError: another agent uses the folder.
        DiskError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise DiskError(f"{folder}: cannot be locked: {error.strerror}") from error
            raise LockedError(f"{folder}: another agent uses this state folder") from None

        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Release the folder; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def holder(folder: Path) -> int | None:
    """Return the process id of the agent that uses a state folder, None if none does.

    The lock itself is not tried: that would keep an agent out which starts just now.
    """
    try:
        with (folder / "lock").open("rb") as file:
            text = file.read(32).strip()
        if not text.isdigit() or int(text) <= 1:
            return None
        command = Path(f"/proc/{int(text)}/cmdline").read_bytes()
    except OSError:
        return None
    return int(text) if b"liberatai" in command else None
