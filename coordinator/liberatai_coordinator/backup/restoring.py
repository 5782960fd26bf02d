"""Put a backup back, here or on another machine: what it holds becomes the one coordinator of its key.

Everything is written beside its place and checked before anything takes its place. Nothing is deleted: what
stood there before is renamed.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from liberatai_coordinator.backup import archive
from liberatai_coordinator.backup.archive import Contents, Owner, Progress
from liberatai_coordinator.config import FILES, FOLDERS, CoordinatorConfig, JobSpec
from liberatai_coordinator.jobs.renewal import renew
from liberatai_coordinator.store.database import require_unused
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.wiring import taking_over
from liberatai_core.contract.messages import RUN_BYTES
from liberatai_core.errors import ConfigError, DamagedError, DiskError
from liberatai_core.settings import parse, parse_mapping

BEFORE: Final = ".before-restore"
"""Appended to the name of what stood in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was done.

    Attributes:
        contents: of the backup.
        settings: settings file to start the coordinator with.
        state_dir: state folder.
        epoch: that the coordinator has taken; the one that was backed up is replaced.
        renamed: what stood in the way, under its new name.
    """

    contents: Contents
    settings: Path
    state_dir: Path
    epoch: int
    renamed: tuple[Path, ...]


def restore(
    path: Path, *, into: Path | None, broker: str | None, force: bool, progress: Progress
) -> Restored:
    """Put a backup back.

    Args:
        path: of the backup.
        into: folder for everything; None: where it was on the machine that was backed up.
        broker: URL of the broker instead of the one in the settings.
        force: rename what stands in the way.
        progress: is told.

    Raises:
        ConfigError: no backup, something stands in the way, or the settings cannot be changed.
        DamagedError: the backup is damaged.
        LockedError: a coordinator runs on the state folder.
        DiskError: the disk refuses.
    """
    places = _Places(archive.read(path), None if into is None else into.absolute())
    in_the_way = _in_the_way(places)
    if in_the_way and not force:
        raise ConfigError(str(path), [f"{old} is there already: --force renames it" for old in in_the_way])
    try:
        places.state_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=places.state_dir.parent, prefix=".liberatai-restore-") as work:
            contents = archive.extract(path, Path(work), progress)
            text = _settings_text(Path(work) / "settings.yaml", places, broker)
            epoch = _take_place(Path(work) / "state", places)
            renamed = [_out_of_the_way(old) for old in in_the_way]
            for name, target in places.outside.items():
                _put(Path(work) / name, target, contents.owners.get(name))
            (Path(work) / "settings.yaml").write_text(text, encoding="utf-8")
            _put(Path(work) / "settings.yaml", places.settings, Owner(mode=0o644, user="", group=""))
            _put_folder(Path(work) / "state", places.state_dir)
    except OSError as error:
        raise DiskError(f"{error.filename or places.state_dir}: {error.strerror or error}") from None
    return Restored(
        contents=contents,
        settings=places.settings,
        state_dir=places.state_dir,
        epoch=epoch,
        renamed=tuple(renamed),
    )


class _Places:
    """Where everything goes."""

    def __init__(self, contents: Contents, into: Path | None) -> None:
        self._into, self._old_state = into, Path(contents.state_dir)
        old = Path(contents.settings)
        self.contents = contents
        self.settings = old if into is None else into / old.name
        self.state_dir = self._old_state if into is None else into / "state"
        self.outside = {name: self.moved(Path(old)) for name, old in contents.outside.items()}
        for where in (self.settings, self.state_dir, *self.outside.values()):
            if not where.is_absolute() or ".." in where.parts:
                raise DamagedError(f"the backup names {str(where)!r}, which is no place for a file")
        self.state_dir = self.state_dir.resolve()  # systemd keeps it elsewhere, behind a link

    def moved(self, old: Path) -> Path:
        """Return where a path of the machine that was backed up lies here."""
        if self._into is None:
            return old
        if old.is_relative_to(self._old_state):
            return self.state_dir / old.relative_to(self._old_state)
        return self._into / "files" / old.relative_to(old.anchor)

    def settings_here(self, config: CoordinatorConfig, broker: str | None) -> dict[str, str]:
        """Return the settings that have another value here, from those of the other machine."""
        changed = {} if broker is None else {"broker": broker}
        if self._into is None:
            return changed
        for name in (*FILES, *FOLDERS):
            if (old := getattr(config, name)) is not None:
                changed[name] = str(self.moved(Path(old)))
        if Path(config.socket).is_absolute():
            changed["socket"] = Path(config.socket).name
        return changed | {"state_dir": str(self.state_dir)}


def _in_the_way(places: _Places) -> list[Path]:
    found = [path for path in (places.settings, *places.outside.values()) if path.exists()]
    if places.state_dir.exists() and any(places.state_dir.iterdir()):
        require_unused(places.state_dir)
        found.append(places.state_dir)
    return found


def _out_of_the_way(old: Path) -> Path:
    number = 1
    while (new := old.with_name(f"{old.name}{BEFORE}-{number}")).exists():
        number += 1
    old.rename(new)
    return new


def _settings_text(path: Path, places: _Places, broker: str | None) -> str:
    """Return the settings with the paths of here.

    What people wrote beside them stays, if every setting has a line of its own.
    """
    text = path.read_text(encoding="utf-8")
    where = "settings of the backup"
    there = parse(text, CoordinatorConfig, where).relative_to(Path(places.contents.settings).parent)
    changed = places.settings_here(there, broker)
    if not changed:
        return text
    wanted = msgspec.structs.replace(there, **changed)
    lines = _with_lines(text, changed)
    with suppress(ConfigError):
        if parse(lines, CoordinatorConfig, where).relative_to(places.settings.parent) == wanted:
            return lines
    return json.dumps(parse_mapping(text, where) | changed, indent=1) + "\n"  # JSON is YAML


def _with_lines(text: str, changed: Mapping[str, str]) -> str:
    lines = text.splitlines()
    for name, value in changed.items():
        line = f"{name}: {json.dumps(value)}"
        places = [number for number, old in enumerate(lines) if re.match(rf"{name}[ ]*:", old)]
        if places:
            lines[places[0]] = line
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _take_place(state: Path, places: _Places) -> int:
    """Let the ledger begin a new generation, and jobs find their samples; returns its epoch."""
    ledger = Ledger.open(state, reserve_bytes=0, epoch_after=taking_over)
    try:
        for name, data in places.contents.data.items():
            row = ledger.jobs.get(name)
            spec: dict[str, Any] = msgspec.json.decode(row.spec)
            for key, member in data.items():
                section, _, field = key.partition(".")
                spec[section][field] = str(places.state_dir / Path(member).relative_to("state"))
            text = msgspec.json.encode(spec)
            msgspec.json.decode(text, type=JobSpec)
            ledger.jobs.set_spec(name, text)
        renew(ledger, os.urandom(RUN_BYTES))
        return ledger.epoch
    finally:
        ledger.close()


def _put(source: Path, target: Path, owner: Owner | None) -> None:
    """Move a file to its place; whose it was, it is again, where those names are known."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)
    if owner is None:
        return
    if os.geteuid() == 0:
        if owner.user:
            with suppress(LookupError):
                shutil.chown(target, user=owner.user)
        if owner.group:
            with suppress(LookupError):
                shutil.chown(target, group=owner.group)
    target.chmod(owner.mode)


def _put_folder(source: Path, target: Path) -> None:
    """Move a folder to its place; who owned an empty one there owns it."""
    owner: Mapping[str, int] = {}
    if target.exists():
        status = target.stat()
        owner = {"uid": status.st_uid, "gid": status.st_gid}
    source.chmod(0o700)
    if owner and os.geteuid() == 0:
        for path in (source, *source.rglob("*")):
            os.chown(path, owner["uid"], owner["gid"], follow_symlinks=False)
    source.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
