"""What the certificate in a file says, without `cryptography`: names, number, dates.

For programs that run all day: Python's own OpenSSL reads the file; where it cannot, `cryptography` does.
"""

import ssl
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from liberatai_core.errors import CertificateError

_decode: Any = getattr(import_module("_ssl"), "_test_decode_cert", None)
"""None: a Python that does not show it."""

MAX_BYTES = 1 << 16
RENEW_SHARE = 2 / 3
"""Of a certificate's lifetime, after which it is renewed."""
WARN_SHARE = 1 / 6
"""Of the lifetime that is left when somebody should look: renewing has failed for half of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dates:
    """A certificate in a file.

    Attributes:
        name: its common name.
        issuer: common name of who signed it.
        serial: its number, in hex.
        start_s, end_s: Unix seconds between which it is valid.
    """

    name: str
    issuer: str
    serial: str
    start_s: float
    end_s: float

    @property
    def renew_s(self) -> float:
        """From when on a new one is asked for."""
        return self.start_s + RENEW_SHARE * (self.end_s - self.start_s)

    def days_left(self, now_s: float | None = None) -> float:
        """Return for how many days it is still valid; below 0: it has ended."""
        return (self.end_s - (time.time() if now_s is None else now_s)) / 86_400.0

    def ends_soon(self, now_s: float | None = None) -> bool:
        """Say whether somebody should look: it should have been renewed long ago."""
        now_s = time.time() if now_s is None else now_s
        return now_s > self.end_s - WARN_SHARE * (self.end_s - self.start_s)

    def is_possible(self, now_s: float | None = None) -> bool:
        """Say whether a clock may be right that shows this time: the certificate is valid then.

        A clock that was never set is before, one that is years ahead is after. What it says of another
        certificate's dates is then worth nothing.
        """
        now_s = time.time() if now_s is None else now_s
        return self.start_s <= now_s <= self.end_s


def read_dates(path: Path) -> Dates:
    """Return what the first certificate in a PEM file says.

    Raises:
        CertificateError: no such file, not readable, or no certificate in it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        raise CertificateError(f"{path}: no such file") from None
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise CertificateError(f"{path}: holds no certificate (PEM)")
    if _decode is None:
        return _by_cryptography(content)
    try:
        found: dict[str, Any] = _decode(str(path))
        return Dates(
            name=_common_name(found["subject"]),
            issuer=_common_name(found["issuer"]),
            serial=f"{int(found['serialNumber'], 16):x}",
            start_s=float(ssl.cert_time_to_seconds(found["notBefore"])),
            end_s=float(ssl.cert_time_to_seconds(found["notAfter"])),
        )
    except (OSError, ValueError, KeyError):
        raise CertificateError(f"{path}: its certificate cannot be read") from None


def require_name(dates: Dates, path: Path, name: str) -> None:
    """Refuse a certificate of somebody else: the broker takes the name in it for user and client id.

    Raises:
        CertificateError: it is.
    """
    if dates.name != name:
        raise CertificateError(
            f"{path}: the certificate of {dates.name!r}, wanted {name!r}: the broker would take this program "
            f"for {dates.name!r} and throw the real one out"
        )


def _common_name(parts: Any) -> str:
    return next((str(value) for part in parts for key, value in part if key == "commonName"), "")


def _by_cryptography(content: bytes) -> Dates:
    from liberatai_core.certificates import facts  # noqa: PLC0415 - 6 MiB, in rare cases

    found = facts(content)
    return Dates(
        name=found.name,
        issuer=found.issuer,
        serial=f"{found.serial:x}",
        start_s=found.start_s,
        end_s=found.end_s,
    )
