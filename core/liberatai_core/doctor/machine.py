"""What `doctor` looks at on this machine: folders, private files, the clock, the disk."""

import os
import pwd
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

from liberatai_core.doctor.finding import Finding, fail, ok
from liberatai_core.units import date_text, size_text

CLOCK_FLOOR: Final = 1_735_689_600
"""2025-01-01: a clock before that was never set, and certificates look invalid to it."""
CLOCK_CEILING: Final = 4_102_444_800
"""2100-01-01: no certificate of ours is valid then."""
MAX_LOOKED_AT: Final = 1000
"""Files of a folder whose owner is looked at."""


def check_clock(now_s: float) -> Finding:
    """Say whether the clock can be right."""
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if CLOCK_FLOOR <= now_s < CLOCK_CEILING:
        return ok("clock", told)
    remedy = "set it (NTP: `timedatectl set-ntp true`): no certificate is valid at that time"
    return fail("clock", f"it says {told}, which cannot be", remedy)


def check_folder(folder: Path, setting: str) -> Finding:
    """Say whether files can be written in a folder, by writing one.

    Args:
        folder: that must be writable; it may not be there yet.
        setting: that names it, for the remedy.
    """
    try:
        if folder.is_dir():
            with tempfile.TemporaryFile(dir=folder, prefix=".doctor-"):
                pass
            return ok(setting, f"{folder}: can be written")
        if folder.exists():
            remedy = f"move the file away, or name another folder in {setting}"
            return fail(setting, f"{folder}: is a file, not a folder", remedy)
        made = [folder, *folder.parents]
        missing = [one for one in made if not one.exists()]
        folder.mkdir(parents=True, mode=0o700)
        for one in missing:
            one.rmdir()
    except OSError as error:
        who = _user(os.geteuid())
        remedy = f"give it to {who} (`chown {who} {folder}`), or name another folder in {setting}"
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            remedy = "free some space"
        elif error.errno == 30:  # EROFS
            remedy = f"the file system is read-only: mount it anew, or name another folder in {setting}"
        return fail(setting, f"{folder}: cannot be written ({error.strerror})", remedy)
    return ok(setting, f"{folder}: can be made")


def check_owners(folder: Path) -> list[Finding]:
    """Say which files of a folder belong to somebody else than the folder: the service cannot write them."""
    try:
        owner = folder.stat().st_uid
        others = []
        for number, path in enumerate(folder.rglob("*")):
            if number >= MAX_LOOKED_AT:
                break
            if path.lstat().st_uid != owner:
                others.append(path)
    except OSError:
        return []
    if not others:
        return []
    who, more = _user(owner), f" and {len(others) - 1} more" if len(others) > 1 else ""
    text = f"{others[0]}{more} belong to {_user(others[0].lstat().st_uid)}, the folder to {who}"
    return [fail("state folder", text, f"`chown -R {who} {folder}`: somebody ran a command as another user")]


def check_private(path: Path, what: str, length: int) -> Finding | None:
    """Say what is wrong with a private key's file; None: there is none yet.

    Args:
        path: of the file.
        what: it is, for the line.
        length: bytes that it must have.
    """
    try:
        found = path.stat()
        content = path.read_bytes()[: length + 1]
    except FileNotFoundError:
        return None
    except OSError as error:
        who = _user(os.geteuid())
        return fail(what, f"{path}: {error.strerror}", f"run this as its owner, or `chown {who} {path}`")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return fail(what, f"{path}: others may read this private key (mode {mode})", f"`chmod 600 {path}`")
    if len(content) != length:
        text = f"{path}: {found.st_size} bytes, a private key has {length}: it is damaged"
        return fail(what, text, "put it back from a copy; without one it must join anew")
    return ok(what, str(path))


def check_disk(folder: Path, least_bytes: int) -> Finding:
    """Say whether there is room where a folder lies."""
    there = next((one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return fail("disk", f"{there}: {error.strerror}", "look at the disk: `dmesg`, `df`")
    text = f"{size_text(free)} free at {there}"
    if free < least_bytes:
        return fail("disk", text, f"free at least {size_text(least_bytes)}")
    return ok("disk", text)


def expires(end_s: float, now_s: float) -> str:
    """Return until when something is valid, with the days that are left."""
    days = (end_s - now_s) / 86_400
    return (
        f"valid until {date_text(end_s)} ({days:.0f} days left)" if days >= 1 else f"ends {date_text(end_s)}"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
