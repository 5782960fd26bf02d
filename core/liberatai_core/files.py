"""Files that are whole after any crash, or not there; whose they are, and who may enter."""

import grp
import os
from pathlib import Path

from liberatai_core.errors import ConfigError
from liberatai_core.spelling import meant


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that after any crash it is whole, or not there: fsync, rename, fsync of the folder.

    What root writes belongs to the owner of the folder: a service that runs as somebody else must be able to
    read what an administrator's command leaves in its state.
    """
    part = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            file.write(content)
            _give(file.fileno(), path.parent)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def make_folder(path: Path, *, mode: int = 0o700) -> None:
    """Make a folder and those above it; each belongs to the owner of the one it lies in."""
    if path.is_dir():
        return
    make_folder(path.parent, mode=0o755)
    path.mkdir(mode=mode, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _give(descriptor, path.parent)
    finally:
        os.close(descriptor)


def _give(descriptor: int, folder: Path) -> None:
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def group_number(group: str) -> int:
    """Return the number of a group of this machine.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        hint = meant(group, (one.gr_name for one in grp.getgrall()))
        fault = f"no group {group!r} on this machine{hint}: `groupadd {group}`, or name another one"
        raise ConfigError("socket_group", [fault]) from None


def closed_to(path: Path, number: int) -> Path | None:
    """Return the outermost folder above a path that a group cannot enter; None if it can."""
    for folder in reversed(path.absolute().parents):
        found = folder.stat()
        may = found.st_mode & (0o010 if found.st_gid == number else 0o001)
        if not may:
            return folder
    return None
