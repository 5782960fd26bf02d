"""Whose signatures are believed: the repository's own key, and the trust file beside it."""

import os
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from liberatai_coordinator.repository.layout import write_atomically
from liberatai_coordinator.repository.signing import PublicKey, Trusted, public_key
from liberatai_core.errors import ConfigError, DiskError
from liberatai_core.settings import parse

KEY_FILE: Final = "signing.key"
TRUST_FILE: Final = "trust.yaml"
_HEAD: Final = "# Keys whose commits are believed, and for which models (patterns such as lab/*).\n"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[Trusted, ...], Meta(max_length=4096)] = ()


def own_key(folder: Path) -> bytes:
    """Return the 32-byte private key of a repository; made when it is first needed.

    Raises:
        ConfigError: others can read it, or it is no key. DiskError: the disk refuses.
    """
    path = folder / KEY_FILE
    try:
        if not path.exists():
            write_key(path)
        if path.stat().st_mode & 0o077:
            raise ConfigError(str(path), ["others can read this private key: `chmod 600` it"])
        key = path.read_bytes()
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    if len(key) != 32:
        raise ConfigError(str(path), [f"{len(key)} bytes, a private key has 32"])
    return key


def write_key(path: Path) -> None:
    """Make a private key that nobody else can read; another process may win the race."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            return
    finally:
        beside.unlink()


def trusted(folder: Path) -> tuple[Trusted, ...]:
    """Return whose signatures are believed: our own for every model, then the trust file.

    Raises:
        ConfigError: the file is wrong; every fault is named.
    """
    own = Trusted(name="this repository", key=public_key(own_key(folder)), models=("*",))
    return (own, *_listed(folder))


def _listed(folder: Path) -> tuple[Trusted, ...]:
    path = folder / TRUST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read ({error})"]) from None
    return parse(text, _File, str(path)).keys if text.strip().removeprefix(_HEAD.strip()) else ()


def trust(folder: Path, name: str, key: PublicKey, models: tuple[str, ...]) -> Trusted:
    """Add a key to the trust file; the same key again replaces what was said of it.

    Raises:
        ConfigError: not a key, or no name or model.
    """
    try:
        added = msgspec.convert({"name": name, "key": key.lower(), "models": models}, Trusted)
    except msgspec.ValidationError as error:
        raise ConfigError("trust", [f"{error}: a key has 64 hex digits"]) from None
    keys = (*(one for one in _listed(folder) if one.key != added.key), added)
    _write(folder, keys)
    return added


def distrust(folder: Path, key: str) -> bool:
    """Take a key out of the trust file; False if it is not in it."""
    before = _listed(folder)
    keys = tuple(one for one in before if one.key != key.lower())
    if len(keys) == len(before):
        return False
    _write(folder, keys)
    return True


def _write(folder: Path, keys: tuple[Trusted, ...]) -> None:
    text = _HEAD.encode() + msgspec.yaml.encode(_File(keys=keys))
    write_atomically(folder / TRUST_FILE, text)
