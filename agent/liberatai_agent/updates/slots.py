"""The two folders of releases, on disk: unpacked, checked before every start, and what is known of them."""

import shutil
import sqlite3
import sys
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from liberatai_agent.store.files import write_durably
from liberatai_agent.updates.plan import Release, Slot, State, free_slot, require_wanted, unpacked
from liberatai_core import release
from liberatai_core.errors import (
    ConfigError,
    DamagedError,
    DiskError,
    LiberataiError,
    MissingExtraError,
    NotFoundError,
)
from liberatai_core.files import make_folder

FOLDER: Final = "releases"
STATE: Final = "state.json"
SIGNED: Final = "signed"
"""In a slot: the head of the release, up to its manifest: every start checks the slot against it."""
LINK: Final = "current"
OUTBOX: Final = "outbox.db"
"""Of the agent, in its state folder."""
HEALTHY: Final = "healthy"
"""Written by a release on trial when it is well: its number."""


def folder_of(state_dir: Path) -> Path:
    """Return where releases lie."""
    return state_dir / FOLDER


def read_state(state_dir: Path) -> State:
    """Return what is known; nothing is, if there never was a release or the file is damaged."""
    try:
        return msgspec.json.decode((folder_of(state_dir) / STATE).read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError):
        return State()


def write_state(state_dir: Path, state: State) -> None:
    """Remember it, and let the link for people follow.

    Raises:
        DiskError: the disk refuses.
    """
    folder = folder_of(state_dir)
    try:
        write_durably(folder / STATE, msgspec.json.encode(state), mode=0o644)
        link, beside = folder / LINK, folder / f"{LINK}.tmp"
        beside.unlink(missing_ok=True)
        if state.current is None:
            link.unlink(missing_ok=True)
        else:
            beside.symlink_to(state.current.slot)
            beside.replace(link)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}") from None


def install(state_dir: Path, bundle: Path, public_key: bytes, *, now_s: float, again: bool = False) -> State:
    """Unpack a signed release beside the one that runs; it is tried at the next start.

    Raises:
        NotFoundError, ConfigError: no such file, or the release does not run on this device.
        SignatureError, FrameError, DigestError, SchemaError, ProtocolVersionError, TooLargeError: the file is
            not what the release key has signed.
        StateError: an older one, an expired one, one that failed here.
        DiskError: the disk refuses.
    """
    state = read_state(state_dir)
    try:
        with bundle.open("rb") as source:
            manifest = release.opened(source, public_key)
            require_wanted(state, manifest, now_s=now_s, again=again)
            require_runs_here(manifest)
            head_bytes = source.tell()
            slot = free_slot(state)
            write_state_without(state_dir, state, slot)
            place = folder_of(state_dir) / slot
            shutil.rmtree(place, ignore_errors=True)
            for name, content in release.contents(source, manifest):
                path = place / name
                make_folder(path.parent, mode=0o755)  # root may have asked: it is the agent's all the same
                write_durably(path, content, mode=0o644)
            source.seek(0)
            write_durably(place / SIGNED, source.read(head_bytes), mode=0o644)
    except FileNotFoundError:
        raise NotFoundError(f"{bundle}: no such file") from None
    except OSError as error:
        raise DiskError(
            f"{error.filename or bundle}: {error.strerror}; free space or check the disk"
        ) from None
    (folder_of(state_dir) / HEALTHY).unlink(missing_ok=True)
    tried = Release(slot=slot, version=manifest.version, sequence=manifest.sequence)
    state = unpacked(read_state(state_dir), tried, manifest.created_s)
    write_state(state_dir, state)
    return state


def write_state_without(state_dir: Path, state: State, slot: Slot) -> None:
    """Forget a release on trial whose folder is about to be written anew."""
    make_folder(folder_of(state_dir), mode=0o755)
    if state.trial is not None and state.trial.slot == slot:
        write_state(state_dir, msgspec.structs.replace(state, trial=None, starts=0))


def require_whole(state_dir: Path, wanted: Release, public_key: bytes) -> Path:
    """Check a slot against what was signed, and return where Python finds it.

    Raises:
        DamagedError: a file is missing, changed or too much; the text says which.
    """
    place = folder_of(state_dir) / wanted.slot
    try:
        fault = _fault(place, wanted, public_key)
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    except LiberataiError as error:
        fault = f"{place}: {error.code} {error}"
    if fault:
        raise DamagedError(fault)
    return place


def _fault(place: Path, wanted: Release, public_key: bytes) -> str:
    with (place / SIGNED).open("rb") as source:
        manifest = release.opened(source, public_key)
    if manifest.sequence != wanted.sequence:
        return f"{place} holds release {manifest.version}"
    for file in manifest.files:
        if release.digest((place / file.name).read_bytes()) != file.sha256:
            return f"{place / file.name} is not what was signed"
    listed = {SIGNED, *(file.name for file in manifest.files)}
    found = (path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    foreign = next((path for path in found if path.relative_to(place).as_posix() not in listed), None)
    return f"{foreign} is in no release" if foreign is not None else ""


def keep_outbox(state_dir: Path) -> None:
    """Copy the outbox before a trial: what a newer release makes of it, the older one may not understand."""
    path, copy = state_dir / OUTBOX, folder_of(state_dir) / OUTBOX
    with suppress(OSError, sqlite3.Error):
        copy.unlink(missing_ok=True)
        if path.exists():
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            copy.chmod(0o600)


def put_outbox_back(state_dir: Path) -> None:
    """Take the copy after a failed trial, if the outbox has another form now: nothing was unsent before."""
    path, copy = state_dir / OUTBOX, folder_of(state_dir) / OUTBOX
    with suppress(OSError, sqlite3.Error):
        if copy.exists() and _form(path) != _form(copy):
            for ending in ("-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            copy.replace(path)


def _form(path: Path) -> object:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA user_version").fetchone()


def waits(state_dir: Path) -> bool:
    """Whether a release is to be tried."""
    return read_state(state_dir).trial is not None


def require_runs_here(manifest: release.Manifest) -> None:
    """Refuse a release that this device's Python or libraries are too old for.

    Raises:
        ConfigError: the interpreter is. MissingExtraError: a library is, or is missing.
    """
    if sys.version_info[:2] < release.numbers(manifest.python)[:2]:
        have = ".".join(map(str, sys.version_info[:2]))
        raise ConfigError("release", [f"needs Python {manifest.python}, this device has {have}"])
    for name, least in manifest.requires.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            raise MissingExtraError(
                f"release {manifest.version} needs {name} {least}: install it first"
            ) from None
        if release.numbers(have) < release.numbers(least):
            raise MissingExtraError(f"release {manifest.version} needs {name} {least}, {have} is installed")
