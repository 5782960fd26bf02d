"""Where the coordinator listens: the API on a Unix socket, what watches it at an address of this machine.

The socket can be opened by its owner, and by a group if the settings name one: nobody logs in.
"""

import asyncio
import logging
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from liberatai_core.errors import ConfigError, LockedError
from liberatai_core.files import closed_to, group_number

log = logging.getLogger(__name__)

MAX_SOCKET_PATH: Final = 107
"""Linux: sizeof(sun_path) - 1."""
SHUTDOWN_S: Final = 2
"""Longest wait for answers that are under way when the coordinator stops."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: stopping is the service's decision."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


async def serve_uds(app: FastAPI, path: Path, group: str | None = None) -> None:
    """Answer on a Unix socket until cancelled; then finish what is under way.

    Args:
        app: what answers.
        path: of the socket.
        group: whose members may connect too (mode 0660); None: the owner alone (0600).

    Raises:
        LockedError: somebody answers on this socket already.
        ConfigError: the path is too long, is no socket, or there is no such group.
    """
    number = None if group is None else group_number(group)
    listener = _bind(path)
    if number is not None:
        _open_to(path, number, group or "")
    try:
        await _serve(app, listener)
    finally:
        _remove(path)


async def serve_https(app: Any, address: str, cert_file: Path, key_file: Path) -> None:
    """Answer other machines over TLS until cancelled; `app` asks who they are (`guard`).

    Raises:
        ConfigError: somebody else listens there, or the certificate cannot be read.
    """
    host, _, port = address.rpartition(":")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file)
        listener = socket.create_server((host, int(port)))
    except ssl.SSLError as error:
        raise ConfigError("remote.cert_file", [f"{cert_file}: {error}"]) from None
    except OSError as error:
        raise ConfigError("remote.address", [f"{address}, {cert_file}: {error.strerror or error}"]) from None
    listener.setblocking(False)
    await _serve(app, listener, ssl_certfile=str(cert_file), ssl_keyfile=str(key_file))


async def serve_tcp(app: FastAPI, address: str) -> None:
    """Answer at an address of this machine alone until cancelled.

    Args:
        app: what answers.
        address: `127.0.0.1:PORT`; the settings allow loopback addresses only.

    Raises:
        ConfigError: somebody else listens there.
    """
    host, _, port = address.rpartition(":")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(128)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError("metrics", [f"{address}: {getattr(error, 'strerror', None) or error}"]) from None
    await _serve(app, listener)


async def _serve(app: Any, listener: socket.socket, **more: Any) -> None:
    config = uvicorn.Config(
        app,
        **more,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        server.should_exit = True
        await task
        raise
    finally:
        listener.close()


def _bind(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError("socket", [f"{path}: longer than {MAX_SOCKET_PATH} bytes; choose a shorter path"])
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the mode of the open descriptor becomes the mode of the file that bind makes: there is
        # no moment in which anybody else could connect, and the process's umask stays alone.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError("socket", [f"{path}: {error.strerror}"]) from None
    return listener


def _open_to(path: Path, number: int, group: str) -> None:
    """Let a group connect; first it is the group's, then its members may, never the other way round."""
    try:
        os.chown(path, -1, number)
        path.chmod(0o660)
    except OSError as error:
        path.unlink(missing_ok=True)
        fault = f"{path} cannot be given to group {group} ({error.strerror}): make this user a member of it"
        raise ConfigError("socket_group", [fault]) from None
    if closed := closed_to(path, number):
        log.warning(
            "socket_group: members of %s cannot enter %s: chmod it, or move the socket", group, closed
        )


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError("socket", [f"{path}: is there already and is no socket; remove it"])
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            _remove(path)  # left behind by a coordinator that was killed
            return
        except OSError as error:
            raise ConfigError("socket", [f"{path}: {error.strerror or error}"]) from None
    raise LockedError(f"{path}: another coordinator answers on this socket; stop it first")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
