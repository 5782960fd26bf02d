"""Take a backup of a coordinator, whether it runs or not: one moment of its ledger, and what belongs to it.

The ledger is copied as one snapshot. Files of versions are named by their content and never change, but old
ones are removed: hard links hold those that the snapshot needs until they are in the archive.
"""

import grp
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import msgspec

from liberatai_coordinator.backup import archive
from liberatai_coordinator.backup.archive import Contents, Entry, Owner, Progress
from liberatai_coordinator.config import FILES, FOLDERS, CoordinatorConfig, JobSpec
from liberatai_coordinator.jobs.queue import LIVE
from liberatai_coordinator.store.database import Database
from liberatai_coordinator.store.jobs import JobStore
from liberatai_coordinator.store.versions import VersionStore
from liberatai_core.errors import BusyError, ConfigError, DiskError, NotFoundError

TRIES: Final = 20
"""A snapshot whose files are removed before they are held is taken again; two in a row are rare."""
HELD: Final = ".backup-"
OWN_FILES: Final = {"teach.unlabeled", "aggregate.validation", "evaluate.test"}
"""Keys of a job that name files of the coordinator's own samples."""
_CONTENT: Final = re.compile("[0-9a-f]{64}")
_NOT_TAKEN: Final = ("ledger.db", "ledger-schema-", HELD)


def take(
    config: CoordinatorConfig, settings: Path, target: Path, *, now_s: float, progress: Progress
) -> Contents:
    """Write a backup and read it again.

    Args:
        config: of the coordinator, with absolute paths.
        settings: its settings file.
        target: of the backup.
        now_s: by the clock.
        progress: is told, once while writing and once while reading.

    Returns:
        What is in it.

    Raises:
        NotFoundError: no ledger there.
        ConfigError: the ledger is of another release than this program.
        DiskError, BusyError, DamagedError: it cannot be taken.
    """
    state = Path(config.state_dir)
    if not (state / "ledger.db").is_file():
        raise NotFoundError(f"{state}: no ledger: is {settings} the file of this coordinator?")
    try:
        with (
            tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work,
            _held(state) as held,
        ):
            sources, snapshot = _snapshot(state, Path(work), held)
            found: dict[str, Any] = {"outside": {}, "owners": {}, "data": {}, "jobs": (), "lacks": []}
            try:
                keep = _Keep(Path(work))
                found["links"] = _add_state(state, held, sources, keep)
                _add_settings(config, settings, state, sources, found, keep)
                _add_data(snapshot, sources, found)
                epoch = snapshot.number("epoch")
            finally:
                snapshot.close()
            entries = tuple(_entry(name, path) for name, path in sorted(sources.items()))
            found["lacks"] += _damaged(entries)
            contents = Contents(
                format=archive.FORMAT,
                release=_release(),
                created_s=now_s,
                fleet=config.fleet,
                coordinator=config.coordinator,
                epoch=epoch,
                settings=os.path.normpath(settings.absolute()),
                state_dir=os.path.normpath(state.absolute()),
                files=entries,
                **found,
            )
            archive.write(target, contents, sources, progress)
    except OSError as error:
        raise DiskError(f"{error.filename or target}: {error.strerror or error}") from None
    archive.extract(target, None, progress)
    return contents


def _snapshot(state: Path, work: Path, held: Path) -> tuple[dict[str, Path], Database]:
    """Copy the ledger and hold its files: by their names in the archive."""
    blobs = state / "blobs" / "sha256"
    for _ in range(TRIES):
        copy = work / "ledger.db"
        Database.copy(state / "ledger.db", copy)
        snapshot = Database.look(work)
        try:
            needed = VersionStore(snapshot).needed_blobs()
            sources = {f"state/blobs/sha256/{sha}": _hold(blobs / sha, held / sha) for sha in needed}
        except FileNotFoundError:
            snapshot.close()
            continue
        except BaseException:
            snapshot.close()
            raise
        return sources | {"state/ledger.db": copy}, snapshot
    raise BusyError(f"{state}: files are removed faster than they are held; try again later")


def _hold(blob: Path, link: Path) -> Path:
    if link.exists():
        return link
    try:
        link.hardlink_to(blob)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links, or a user who may not: most likely it stays long enough
        if not blob.exists():
            raise FileNotFoundError(blob) from None
        return blob
    return link


@contextmanager
def _held(state: Path) -> Iterator[Path]:
    for left in state.glob(f"{HELD}*"):  # of one that was killed
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    folder = state / f"{HELD}{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Keep:
    """Copies small files that somebody may write while the backup is taken."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __call__(self, path: Path) -> Path:
        self._count += 1
        return Path(shutil.copyfile(path, self._folder / f"kept-{self._count}"))


def _add_state(state: Path, held: Path, sources: dict[str, Path], keep: _Keep) -> dict[str, str]:
    """Add what else lies in the state folder: keys, certificates, whatever later releases put there.

    Returns:
        Files that are links to others which are in the archive already: name to name.
    """
    known = {_inode(path): name for name, path in sources.items()}
    links = {}
    for path in sorted(state.rglob("*")):
        name = path.relative_to(state)
        first = name.parts[0]
        if first in ("blobs", "lock") or first.startswith(_NOT_TAKEN) or path.name.endswith(".tmp"):
            continue
        if path.is_file() and not path.is_symlink():
            member = f"state/{name.as_posix()}"
            with suppress(FileNotFoundError):
                if (same := known.get(_inode(path))) is not None:
                    links[member] = same
                elif _CONTENT.fullmatch(path.name):  # named by what is in it: it never changes
                    sources[member] = _hold(path, held / f"{len(sources)}-{path.name}")
                    known[_inode(path)] = member
                else:
                    sources[member] = keep(path)
    return links


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _add_settings(
    config: CoordinatorConfig,
    settings: Path,
    state: Path,
    sources: dict[str, Path],
    found: dict[str, Any],
    keep: _Keep,
) -> None:
    """Add the settings file and what it names outside of the state folder."""
    sources["settings.yaml"] = keep(settings)
    named = [Path(path) for name in FILES if (path := getattr(config, name)) is not None]
    for name in FOLDERS:
        folder = getattr(config, name)
        named += sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder else []
    for number, path in enumerate(dict.fromkeys(named)):
        if Path(os.path.normpath(path.absolute())).is_relative_to(os.path.normpath(state.absolute())):
            continue
        if not os.access(path, os.R_OK):
            found["lacks"].append(f"{path}: cannot be read")
            continue
        sources[f"outside/{number}"] = keep(path)
        found["owners"][f"outside/{number}"] = _owner(path)
        found["outside"][f"outside/{number}"] = os.path.normpath(path.absolute())


def _owner(path: Path) -> Owner:
    status = path.stat()
    user = group = ""
    with suppress(KeyError):
        user = pwd.getpwuid(status.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    return Owner(mode=status.st_mode & 0o777, user=user, group=group)


def _add_data(snapshot: Database, sources: dict[str, Path], found: dict[str, Any]) -> None:
    """Add the coordinator's own samples that jobs under way need."""
    jobs = [row for row in JobStore(snapshot).all() if row.state in LIVE]
    found["jobs"] = tuple(row.name for row in jobs)
    for row in jobs:
        try:
            job = msgspec.json.decode(row.spec, type=JobSpec)
        except msgspec.MsgspecError:
            continue  # a job of another release: the coordinator says so itself
        for key in sorted(OWN_FILES):
            section, _, name = key.partition(".")
            given = getattr(getattr(job, section), name)
            if given is None:
                continue
            path = Path(row.base_dir) / given
            if not path.is_file() or not os.access(path, os.R_OK):
                found["lacks"].append(f"job {row.name}: {key}: {path} cannot be read")
                continue
            _, sha = archive.digest_of(path)
            member = f"state/job-data/{sha[:32]}{path.suffix}"
            sources[member] = path
            found["data"].setdefault(row.name, {})[key] = member


def _entry(name: str, path: Path) -> Entry:
    size, sha = archive.digest_of(path)
    return Entry(name=name, size=size, sha256=sha)


def _damaged(entries: Iterable[Entry]) -> list[str]:
    """Return in words which files of versions are not what their names say; they are taken as they are."""
    blobs = [entry for entry in entries if entry.name.startswith("state/blobs/")]
    wrong = [entry.name for entry in blobs if entry.name.rpartition("/")[2] != entry.sha256]
    return [f"a whole {name.removeprefix('state/')}: it is damaged" for name in wrong]


def _release() -> str:
    try:
        return version("liberatai")
    except PackageNotFoundError:
        return "unknown"


def default_name(config: CoordinatorConfig, stamp: str) -> str:
    """Return the name of a backup's file in a folder that was given."""
    return f"liberatai-{config.fleet}-{config.coordinator}-{stamp}.tar"


def older(folder: Path, config: CoordinatorConfig, keep: int) -> list[Path]:
    """Return the backups of this coordinator in a folder but for the newest `keep`."""
    names = default_name(config, "[0-9]" * 8 + "T" + "[0-9]" * 6 + "Z")
    return sorted(folder.glob(names))[:-keep]


def require_target(target: Path) -> None:
    """Refuse what would overwrite something, before anything is done.

    Raises:
        ConfigError: the file is there, or its folder is not.
    """
    if target.exists():
        raise ConfigError(str(target), ["is there already: give another name"])
    if not target.parent.is_dir():
        raise ConfigError(str(target), [f"no folder {target.parent}"])
