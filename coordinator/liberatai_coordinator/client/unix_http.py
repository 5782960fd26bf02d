"""One HTTP request over a Unix socket, by the standard library alone: a command must start at once."""

import http.client
import socket as sockets
from pathlib import Path

from liberatai_core.errors import LinkError


class _Connection(http.client.HTTPConnection):
    """HTTP whose other end is a file."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("liberatai", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(
    path: Path, method: str, target: str, content: bytes | None, media_type: str, *, timeout_s: float
) -> tuple[int, bytes]:
    """Send one request over a connection of its own and return (status, content) of the answer.

    A kept connection that the other side has closed meanwhile would fail; a new one costs nothing here.

    Args:
        path: of the socket.
        method: of HTTP.
        target: path of the request, quoted.
        content: of the request; None for none.
        media_type: of the content.
        timeout_s: longest wait for a part of the answer.

    Raises:
        LinkError: nobody answers, or the answer breaks off.
    """
    connection = _Connection(path, timeout_s)
    try:
        try:
            connection.connect()
        except TimeoutError:
            raise
        except PermissionError:
            text = f"{path}: permission denied; be a member of its group (setting socket_group), or its user"
            raise LinkError(text) from None
        except OSError:
            text = f"no coordinator at {path}: start one with `liberatai serve` (or give --socket)"
            raise LinkError(text) from None
        headers = {"connection": "close"} | ({} if content is None else {"content-type": media_type})
        connection.request(method, target, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except TimeoutError:
        raise LinkError(f"the coordinator at {path} does not answer: look at its log") from None
    except (OSError, http.client.HTTPException) as error:
        raise LinkError(
            f"the coordinator at {path} broke off ({error or type(error).__name__}): look at its log"
        ) from None
    finally:
        connection.close()
