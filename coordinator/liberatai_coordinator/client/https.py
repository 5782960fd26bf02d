"""One HTTPS request with a token, by the standard library alone."""

import http.client
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from liberatai_core.errors import ConfigError, LinkError


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A coordinator on another machine.

    Attributes:
        url: https://host:port.
        token: that says who asks.
        ca_file: authority of its certificate; None: those of this machine.
    """

    url: str
    token: str = field(repr=False)
    ca_file: Path | None = None

    @classmethod
    def from_files(cls, url: str, token_file: Path | None, ca_file: Path | None) -> "Server":
        """Return a server whose token stands in a file that nobody else can read.

        Raises:
            ConfigError: the URL or a file is wrong.
        """
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
            raise ConfigError("--server", [f"{url}: write https://host:port"])
        if token_file is None:
            raise ConfigError(
                "--token-file", ["missing: `liberatai tokens create` on the coordinator makes one"]
            )
        try:
            if token_file.stat().st_mode & 0o077:
                raise ConfigError("--token-file", [f"others can read {token_file}: `chmod 600` it"])
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("--token-file", [f"{token_file}: {error}"]) from None
        return cls(url=url, token=token, ca_file=ca_file)


def request(
    server: Server, method: str, target: str, content: bytes | None, media_type: str, *, timeout_s: float
) -> tuple[int, bytes]:
    """Send one request over a connection of its own and return (status, content) of the answer.

    Raises:
        LinkError: nobody answers, or the certificate is not believed. ConfigError: the CA file is wrong.
    """
    place = urlsplit(server.url)
    try:
        context = ssl.create_default_context(cafile=None if server.ca_file is None else str(server.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("--ca-file", [f"{server.ca_file}: {error}"]) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    connection = http.client.HTTPSConnection(
        place.hostname or "", place.port or 443, timeout=timeout_s, context=context
    )
    headers = {"connection": "close", "authorization": f"Bearer {server.token}"}
    headers |= {} if content is None else {"content-type": media_type}
    try:
        connection.request(method, target, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except ssl.SSLCertVerificationError as error:
        raise LinkError(
            f"{server.url}: its certificate is not to be believed: {error.verify_message}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise LinkError(f"no coordinator at {server.url}: {error or type(error).__name__}") from None
    finally:
        connection.close()
