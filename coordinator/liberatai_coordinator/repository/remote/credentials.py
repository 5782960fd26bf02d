"""Who we are at a registry: what docker, podman and their helpers have stored."""

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from liberatai_core.errors import ConfigError

MAX_FILE_BYTES: Final = 1024 * 1024
HELPER_S: Final = 20.0
_HELPER: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
DOCKER_HUB: Final = "https://index.docker.io/v1/"

Login = tuple[str, str]
"""User and password; an empty user: the password is an identity token."""


def login_for(host: str, name: str) -> Login | None:
    """Return the login for a repository at a registry; None: be nobody.

    Looked at are `LIBERATAI_REGISTRY_USER` and `…_PASSWORD`, then the files of docker and podman.

    Raises:
        ConfigError: a file is damaged, or a credential helper fails.
    """
    user, password = (os.environ.get(f"LIBERATAI_REGISTRY_{key}", "") for key in ("USER", "PASSWORD"))
    if password:
        return user, password
    for path in _files():
        found = _from_file(path, host, name)
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    """Yield the files that exist, the first one that knows a registry counts."""
    named = os.environ.get("REGISTRY_AUTH_FILE")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    docker = os.environ.get("DOCKER_CONFIG")
    for path in (
        Path(named) if named else None,
        Path(docker) / "config.json" if docker else Path.home() / ".docker" / "config.json",
        Path(runtime) / "containers" / "auth.json" if runtime else None,
        Path.home() / ".config" / "containers" / "auth.json",
    ):
        if path is not None and path.is_file():
            yield path


def _from_file(path: Path, host: str, name: str) -> Login | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(str(path), ["too long for a file of logins"])
        known: Any = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read ({error})"]) from None
    if not isinstance(known, dict):
        raise ConfigError(str(path), ["no file of logins"])
    helpers, logins = known.get("credHelpers"), known.get("auths")
    if isinstance(helpers, dict) and isinstance(helpers.get(host), str):
        return _helped(helpers[host], host, path)
    if isinstance(logins, dict):
        for key in _keys(host, name):
            entry = logins.get(key)
            if isinstance(entry, dict) and (found := _login(entry, path)) is not None:
                return found
    if isinstance(known.get("credsStore"), str) and isinstance(logins, dict) and host in logins:
        return _helped(known["credsStore"], host, path)
    return None


def _keys(host: str, name: str) -> Iterator[str]:
    """Yield the names under which a login may stand, the most specific one first."""
    parts = name.split("/")
    for length in range(len(parts), 0, -1):
        yield f"{host}/{'/'.join(parts[:length])}"
    yield host
    yield f"https://{host}"
    yield f"http://{host}"
    if host in ("docker.io", "registry-1.docker.io"):
        yield DOCKER_HUB


def _login(entry: dict[str, Any], path: Path) -> Login | None:
    token, encoded = entry.get("identitytoken"), entry.get("auth")
    if isinstance(token, str) and token:
        return "", token
    if not isinstance(encoded, str) or not encoded:
        return None
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        raise ConfigError(str(path), ["a login is not base64"]) from None
    return (user, password.rstrip("\0")) if colon else None


def _helped(helper: str, host: str, path: Path) -> Login | None:
    """Ask a credential helper, which is a program of the user's own machine."""
    program = shutil.which(f"docker-credential-{helper}") if _HELPER.fullmatch(helper) else None
    if program is None:
        raise ConfigError(str(path), [f"credential helper docker-credential-{helper[:64]} is not installed"])
    try:
        asked = subprocess.run(
            [program, "get"], input=host.encode(), capture_output=True, timeout=HELPER_S, check=False
        )
        if asked.returncode:
            return None  # it knows no login
        told: Any = msgspec.json.decode(asked.stdout)
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise ConfigError(str(path), [f"{program} failed ({error})"]) from None
    if not isinstance(told, dict):
        return None
    user, secret = told.get("Username"), told.get("Secret")
    if not isinstance(user, str) or not isinstance(secret, str):
        return None
    return ("" if user == "<token>" else user), secret
