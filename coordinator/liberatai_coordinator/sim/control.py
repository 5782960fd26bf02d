"""How other commands speak to a simulation that runs: one JSON request and one answer over a Unix socket."""

import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from liberatai_core.errors import BY_CODE, ConfigError, LiberataiError, NotFoundError

SOCKET: Final = "sim.sock"
MAX_BYTES: Final = 65_536
TIMEOUT_S: Final = 60.0
Handler = Callable[[Mapping[str, Any]], Any]


def address(folder: Path) -> str:
    """Return the path of a simulation's socket, relative where it would be too long."""
    path = folder.absolute() / SOCKET
    return str(path) if len(os.fsencode(path)) < 100 else os.path.relpath(path)


class Control:
    """Answers requests while it is open; use it in a `with` statement.

    Args:
        folder: of the simulation.
        handlers: by the name of what is asked; each may raise LiberataiErrors.
    """

    def __init__(self, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = folder / SOCKET
        self._path.unlink(missing_ok=True)

        class Answer(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(_answered(self.rfile.readline(MAX_BYTES), handlers) + b"\n")

        self._server = socketserver.ThreadingUnixStreamServer(address(folder), Answer)
        self._server.daemon_threads = True
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


def _answered(line: bytes, handlers: Mapping[str, Handler]) -> bytes:
    try:
        request = json.loads(line)
        answer = {"ok": handlers[request["do"]](request)}
    except ConfigError as error:
        answer = {"code": error.code, "where": error.where, "faults": list(error.faults)}
    except LiberataiError as error:
        answer = {"code": error.code, "text": str(error)}
    except (KeyError, TypeError, ValueError) as error:
        answer = {"code": "E_SCHEMA", "text": f"no request of this release: {error}"}
    return json.dumps(answer).encode()


def ask(folder: Path, do: str, **request: Any) -> Any:
    """Ask the simulation that runs in a folder.

    Raises:
        NotFoundError: none runs there. LiberataiError: what it answered.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(address(folder))
            connection.sendall(json.dumps({"do": do, **request}).encode() + b"\n")
            answer = json.loads(connection.makefile("rb").readline(MAX_BYTES))
    except (OSError, ValueError):
        raise NotFoundError(f"{folder}: no simulation runs here; start one with `liberatai sim up`") from None
    if "ok" in answer:
        return answer["ok"]
    if answer["code"] == ConfigError.code:
        raise ConfigError(answer["where"], answer["faults"])
    raise BY_CODE.get(answer["code"], LiberataiError)(answer["text"])
