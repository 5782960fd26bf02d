"""What `doctor` says of certificates and keys before it knocks at the broker."""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from liberatai_core.certificates import Facts, facts
from liberatai_core.doctor.finding import Finding, fail, ok, warn
from liberatai_core.doctor.machine import expires
from liberatai_core.errors import CertificateError
from liberatai_core.units import date_text, duration_text

EARLY_S: Final = 14 * 86_400
"""A certificate that ends sooner is worth a warning; a third of its lifetime, if that is less."""
RENEW: Final = "`liberatai ca renew`, or let the device join anew (`liberatai devices invite`)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What a program's settings name, and who it is.

    Attributes:
        ca_file, cert_file, key_file: as the settings name them; None: not given.
        name: of the device or coordinator: the certificate's common name.
        fleet: that the certificate must be for.
    """

    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    name: str
    fleet: str


def check_files(files: TlsFiles, now_s: float) -> list[Finding]:
    """Look at the files of mutual TLS."""
    found: list[Finding] = []
    if files.ca_file is not None:
        found += _check_authority(files.ca_file, now_s)
    if files.cert_file is not None:
        found += _check_certificate(files, files.cert_file, now_s)
    if files.key_file is not None:
        found += _check_key(files, files.key_file)
    return found


def _read(path: Path, setting: str) -> bytes | Finding:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return fail("certificate", f"{setting}: no such file: {path}", f"put it there, or correct {setting}")
    except IsADirectoryError:
        return fail("certificate", f"{setting}: {path} is a folder", f"name the file inside it in {setting}")
    except OSError as error:
        text = f"{setting}: {path}: {error.strerror}"
        return fail("certificate", text, "let this user read it, or run this as its owner")


def _facts(path: Path, setting: str) -> tuple[Facts, bytes] | Finding:
    content = _read(path, setting)
    if isinstance(content, Finding):
        return content
    try:
        return facts(content), content
    except CertificateError as error:
        what = "it holds a key, not a certificate" if b"PRIVATE KEY" in content else str(error)
        remedy = f"{setting} must name a certificate in PEM (-----BEGIN CERTIFICATE-----)"
        return fail("certificate", f"{setting}: {path}: {what}", remedy)


def _check_authority(path: Path, now_s: float) -> list[Finding]:
    told = _facts(path, "ca_file")
    if isinstance(told, Finding):
        return [told]
    authority, _ = told
    return [_in_time(authority, f"ca_file: {path}", now_s) or ok("authority", f"{path}: {authority.name}")]


def _check_certificate(files: TlsFiles, path: Path, now_s: float) -> list[Finding]:
    told = _facts(path, "cert_file")
    if isinstance(told, Finding):
        return [told]
    one, content = told
    where = f"cert_file: {path}"
    found = [late] if (late := _in_time(one, where, now_s)) is not None else []
    if one.name != files.name:
        text = f"{where}: it is for {one.name!r}, the settings say {files.name!r}"
        remedy = (
            f"use the certificate of {files.name}, or correct the name: the broker goes by the certificate"
        )
        found.append(fail("certificate", text, remedy))
    if one.fleet and one.fleet != files.fleet:
        text = f"{where}: it is for fleet {one.fleet!r}, the settings say fleet {files.fleet!r}"
        found.append(fail("fleet", text, f"correct fleet: in the settings, or join {files.fleet!r}"))
    if one.role in ("server", "claim"):
        text = f"{where}: it is a certificate of a {one.role}"
        found.append(fail("certificate", text, "use the one that was issued for this device or coordinator"))
    if foreign := _foreign(content, files.ca_file):
        found.append(warn("certificate", f"{where}: {foreign}", "the broker must know who signed it"))
    if not any(finding.state == "fail" for finding in found):
        found.append(ok("certificate", f"{path}: {one.name}, {expires(one.end_s, now_s)}"))
    return found


def _in_time(one: Facts, where: str, now_s: float) -> Finding | None:
    if now_s > one.end_s:
        text = f"{where}: expired on {date_text(one.end_s)}, {duration_text(now_s - one.end_s)} ago"
        return fail("certificate", text, f"{RENEW}; if that date lies ahead, the clock is wrong")
    if now_s < one.start_s:
        text = f"{where}: valid only from {date_text(one.start_s)} on, this clock says {date_text(now_s)}"
        return fail("certificate", text, "set the clock (NTP)")
    if one.end_s - now_s < min(EARLY_S, (one.end_s - one.start_s) / 3):
        return warn("certificate", f"{where}: {expires(one.end_s, now_s)}", RENEW)
    return None


def _foreign(content: bytes, ca_file: Path | None) -> str:
    """Return that a certificate is not signed by what the settings trust; "" if it is, or nobody can say."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    from liberatai_core.certificates import load  # noqa: PLC0415

    if ca_file is None:
        return ""
    try:
        one, roots = load(content), load_pem_x509_certificates(ca_file.read_bytes())
    except (OSError, ValueError, CertificateError):
        return ""
    for root in roots:
        try:
            one.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return ""
    return f"it is not signed by {ca_file}"


def _check_key(files: TlsFiles, path: Path) -> list[Finding]:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    from liberatai_core.certificates import load  # noqa: PLC0415

    content = _read(path, "key_file")
    if isinstance(content, Finding):
        return [content]
    where = f"key_file: {path}"
    start = content.find(b"-----BEGIN", max(0, content.find(b"PRIVATE KEY-----") - 40))
    try:
        key = load_pem_private_key(content[max(0, start) :], password=None)
    except TypeError:
        text = f"{where}: the key is protected by a password"
        return [fail("key", text, f"write it without one: `openssl pkey -in {path} -out NEW`")]
    except (ValueError, UnsupportedAlgorithm):
        text = f"{where}: holds no private key that can be read"
        return [fail("key", text, "key_file must name a private key in PEM (-----BEGIN PRIVATE KEY-----)")]
    found: list[Finding] = []
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        found.append(warn("key", f"{where}: others may read it", f"`chmod 600 {path}`"))
    if files.cert_file is None:
        return found
    try:
        wanted = load(files.cert_file.read_bytes()).public_key()
    except (OSError, CertificateError):
        return found  # that is said of the certificate
    own, theirs = (
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (key.public_key(), wanted)
    )
    if own != theirs:
        text = f"{where}: it does not belong to cert_file {files.cert_file}"
        found.append(fail("key", text, "name the key that the certificate was asked for with, or renew both"))
    return found
