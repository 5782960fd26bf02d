"""The file of a backup: a tar whose first member says what all others are, with length and SHA-256.

Reading believes nothing: members come in the order of the list, each once, plain files only, below the folder
that they are written to, as long as the list says, and with that digest.
"""

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
from msgspec import Meta

from liberatai_core.errors import ConfigError, DamagedError, DiskError

FORMAT: Final = 1
CONTENTS: Final = "backup.json"
MAX_CONTENTS_BYTES: Final = 256 * 1024 * 1024
"""Of the list: 100 bytes for each of two million files."""
PIECE_BYTES: Final = 1 << 20
_PART: Final = re.compile(r"[A-Za-z0-9_@+=,~. -]{1,255}")

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those that there are."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One file: its name in the archive, its length, its SHA-256 (hex)."""

    name: str
    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]


class Owner(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Whose a file is, by names: another machine has other numbers."""

    mode: Annotated[int, Meta(ge=0, le=0o777)]
    user: str
    group: str


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in a backup.

    Attributes:
        format: of the archive.
        release: of the program that wrote it.
        created_s: when, by that machine's clock.
        fleet, coordinator: names.
        epoch: of the ledger.
        settings: path of the settings file on that machine.
        state_dir: the same of the state folder.
        outside: files that the settings name outside of the state folder: name in the archive to path.
        owners: of those files: mode (octal), user and group, by name in the archive.
        data: of jobs that had not ended: job to key of its file ("teach.unlabeled") to name in the archive.
        jobs: names of jobs that had not ended.
        lacks: what could not be read, in words.
        links: files of which one copy is enough: name to the name of the same file, which is listed.
        files: all members, in their order.
    """

    format: int
    release: str
    created_s: float
    fleet: str
    coordinator: str
    epoch: int
    settings: str
    state_dir: str
    outside: dict[str, str] = {}
    owners: dict[str, Owner] = {}
    data: dict[str, dict[str, str]] = {}
    jobs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    links: dict[str, str] = {}
    files: tuple[Entry, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(entry.size for entry in self.files)


def write(path: Path, contents: Contents, sources: Mapping[str, Path], progress: Progress) -> None:
    """Write a backup, beside its place first; nobody else may read it.

    Args:
        path: of the file.
        contents: its list.
        sources: where each file of the list lies.
        progress: is told.

    Raises:
        DamagedError: a file is not what the list says.
        DiskError: the disk refuses.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        beside.unlink(missing_ok=True)
        beside.touch(mode=0o600)
        with beside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                text = msgspec.json.encode(contents)
                archive.addfile(_member(CONTENTS, len(text)), io.BytesIO(text))
                done = 0
                for entry in contents.files:
                    with sources[entry.name].open("rb") as source:
                        digest = _Digest(source, entry)
                        archive.addfile(_member(entry.name, entry.size), digest)
                        digest.require_whole()
                    done += entry.size
                    progress(done, contents.size_bytes)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}; free space or check the disk") from None
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Contents:
    """Return what a backup says that is in it.

    Raises:
        ConfigError: it is no backup, or one of a newer release.
        DamagedError: its list makes no sense.
    """
    with _opened(path) as archive:
        return _contents(path, archive)


def extract(path: Path, folder: Path | None, progress: Progress) -> Contents:
    """Check every byte of a backup, and write its files below a folder.

    Args:
        path: of the backup.
        folder: where to, empty; None: check only.
        progress: is told.

    Raises:
        ConfigError: it is no backup, or one of a newer release.
        DamagedError: something is missing, too much, or not what was written.
        DiskError: the disk refuses.
    """
    with _opened(path) as archive:
        contents = _contents(path, archive)
        done = 0
        for entry, member in _members(path, archive, contents):
            source = archive.extractfile(member)
            if source is None:
                raise DamagedError(f"{path}: {entry.name} is no plain file")
            digest = _Digest(source, entry, f"{path}: ")
            target = None if folder is None else folder / entry.name
            try:
                _copy(digest, target)
            except OSError as error:
                raise DiskError(f"{target or path}: {error.strerror or error}; free space") from None
            digest.require_whole()
            done += entry.size
            progress(done, contents.size_bytes)
    if folder is not None:
        for name, other in contents.links.items():
            _link(folder / name, folder / other)
    return contents


def digest_of(path: Path) -> tuple[int, str]:
    """Return length and SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


class _Digest:
    """A file that is read once, and must be what its entry says."""

    def __init__(self, source: IO[bytes], entry: Entry, where: str = "") -> None:
        self._source, self._entry, self._where = source, entry, where
        self._sha = hashlib.sha256()
        self._read = 0

    def read(self, size: int = -1) -> bytes:
        piece = self._source.read(size)
        self._sha.update(piece)
        self._read += len(piece)
        return piece

    def require_whole(self) -> None:
        """Raise DamagedError unless all of it was read, and is right."""
        if (self._read, self._sha.hexdigest()) != (self._entry.size, self._entry.sha256):
            raise DamagedError(f"{self._where}{self._entry.name} is not what was written")


def _link(name: Path, other: Path) -> None:
    try:
        name.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            name.hardlink_to(other)
        except OSError:  # a file system without links
            shutil.copyfile(other, name)
    except OSError as error:
        raise DiskError(f"{name}: {error.strerror or error}; free space") from None


def _copy(source: _Digest, target: Path | None) -> None:
    if target is None:
        while source.read(PIECE_BYTES):
            pass
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.touch(mode=0o600, exist_ok=False)
    with target.open("wb") as file:
        while piece := source.read(PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, mode="r:") as archive:
            yield archive
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except tarfile.ReadError as error:
        if "empty" in str(error) or "invalid header" in str(error):
            raise ConfigError(str(path), ["is no backup of a coordinator"]) from None
        raise DamagedError(f"{path}: {error}") from None
    except (tarfile.TarError, EOFError) as error:
        raise DamagedError(f"{path}: {error}") from None


def _contents(path: Path, archive: tarfile.TarFile) -> Contents:
    member = archive.next()
    if member is None or member.name != CONTENTS or not member.isreg():
        raise ConfigError(str(path), ["is no backup of a coordinator"])
    source = archive.extractfile(member) if member.size <= MAX_CONTENTS_BYTES else None
    if source is None:
        raise DamagedError(f"{path}: {CONTENTS} is too long")
    text = source.read()
    try:
        number = msgspec.json.decode(text, type=_Format).format
        if number == FORMAT:
            contents = msgspec.json.decode(text, type=Contents)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: {CONTENTS}: {error}") from None
    if number != FORMAT:
        raise ConfigError(str(path), [f"a backup of format {number}, this release reads {FORMAT}"])
    names = [entry.name for entry in contents.files]
    all_names = [*names, *contents.links]
    wrong = next((name for name in all_names if not _is_plain(name)), None)
    if wrong is not None or len(set(all_names)) != len(all_names):
        raise DamagedError(f"{path}: {CONTENTS} names {wrong!r}, or a file twice")
    used = {*contents.outside, *contents.links.values()}
    used.update(name for data in contents.data.values() for name in data.values())
    if not used <= {*names}:
        raise DamagedError(f"{path}: {CONTENTS} names files that it does not list")
    return contents


class _Format(msgspec.Struct):
    format: int


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 32 and all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)


def _members(
    path: Path, archive: tarfile.TarFile, contents: Contents
) -> Iterator[tuple[Entry, tarfile.TarInfo]]:
    for entry in contents.files:
        member = archive.next()
        if member is None or member.name != entry.name:
            raise DamagedError(f"{path}: {entry.name} is missing")
        if not member.isreg() or member.size != entry.size:
            raise DamagedError(f"{path}: {entry.name} is not what was written")
        yield entry, member
    if archive.next() is not None:
        raise DamagedError(f"{path}: there is more in it than it lists")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
