"""Files that are whole after any crash, or not there; and what is done with damaged ones."""

import contextlib
import os
from pathlib import Path

from liberatai_core.files import sync_folder, write_durably

__all__ = ["DAMAGED", "replace_quickly", "set_aside", "sync_folder", "write_durably"]

DAMAGED = ".damaged"
"""Ending of what was set aside; a later one of the same name replaces it, so that they do not gather."""


def replace_quickly(path: Path, content: bytes) -> None:
    """Replace a file that may be lost: whole for every reader, and nobody waits for the disk.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    part = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that a fresh one takes its place and somebody can look at it.

    Raises:
        OSError: it cannot be renamed.
    """
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    with contextlib.suppress(OSError):
        sync_folder(path.parent)
    return aside
