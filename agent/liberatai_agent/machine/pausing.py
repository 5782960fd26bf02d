"""A pause that somebody at the device asked for: a file that outlives restarts."""

import math
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from liberatai_agent.store.files import replace_quickly
from liberatai_core.errors import DiskError

FILE: Final = "paused.json"
MAX_REASON: Final = 120
MAX_BYTES: Final = 4096


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A pause.

    Attributes:
        reason: why, in words of whoever asked for it.
        since_s: when, Unix seconds.
        until_s: when it ends by itself; None: when somebody ends it.
    """

    reason: str = ""
    since_s: float = 0.0
    until_s: float | None = None

    @property
    def words(self) -> str:
        """What is said of it outside."""
        parts = ["paused at the device"]
        if self.until_s is not None and math.isfinite(self.until_s):
            parts.append(f"until {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.until_s))}")
        text = " ".join("".join(c if c.isprintable() else " " for c in self.reason).split())[:MAX_REASON]
        return " ".join(parts) + (f": {text}" if text else "")


def pause(folder: Path, wanted: Pause) -> None:
    """Let the agent of this state folder pause.

    Raises:
        DiskError: it cannot be written.
    """
    path = folder / FILE
    try:
        replace_quickly(path, msgspec.json.encode(wanted))
        owner = folder.stat()
        if os.geteuid() == 0:
            os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None


def resume(folder: Path) -> bool:
    """End a pause; False: there was none.

    Raises:
        DiskError: it cannot be removed.
    """
    try:
        (folder / FILE).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DiskError(f"{folder / FILE}: {error.strerror}") from None
    return True


def paused(folder: Path, wall_s: float) -> Pause | None:
    """Return the pause that holds; a file that cannot be understood is one, for somebody wanted it."""
    try:
        with (folder / FILE).open("rb") as file:
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError:
        return Pause()
    try:
        found = msgspec.json.decode(content, type=Pause)
    except msgspec.MsgspecError:
        return Pause()
    over = found.until_s is not None and wall_s >= found.until_s
    return None if over else found
