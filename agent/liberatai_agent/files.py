"""Files that are whole after any crash, or not there; and what is done with damaged ones."""

import contextlib
import os
from pathlib import Path

DAMAGED = ".damaged"
"""Ending of what was set aside; a later one of the same name replaces it, so that they do not gather."""


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that after any crash it is whole, or not there: fsync, rename, fsync of the folder."""
    part = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


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


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
