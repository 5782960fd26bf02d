"""Files that are whole after any crash, or not there; and whose they are."""

import os
from pathlib import Path


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
