"""What an authority signs: certificates, lists of revoked ones. Pure: times and keys are arguments.

A certificate's common name is its holder's user name, client id and topic level at the broker. Its role
stands in a URI, `urn:liberatai:<fleet>:<role>:<name>`, for people and for the coordinator.
"""

import datetime as dt
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from liberatai_core.certificates import URN, common_name
from liberatai_core.errors import CertificateError

Role = Literal["device", "coordinator", "server", "claim"]

DAY_S: Final = 86_400.0
AUTHORITY_DAYS: Final = 3650.0
SERVER_DAYS: Final = 365.0
CRL_DAYS: Final = 3650.0
"""A broker refuses everybody with an expired list; freshness comes from loading it anew."""
BACKDATE_S: Final = 300.0
"""The clock of a broker may be behind the authority's; of a short life a tenth will do."""


@dataclass(frozen=True, slots=True)
class Signer:
    """An authority's key and certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_authority(
    key: ec.EllipticCurvePrivateKey, fleet: str, what: Literal["authority", "claims"], now_s: float
) -> x509.Certificate:
    """Return the self-signed certificate of a fleet's authority, or of the one for claims."""
    name = common_name(f"{fleet} {what}")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key.public_key(), now_s, AUTHORITY_DAYS * DAY_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(_uri(fleet, what, ""), critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(
    signer: Signer,
    public_key: ec.EllipticCurvePublicKey,
    fleet: str,
    role: Role,
    name: str,
    now_s: float,
    lifetime_s: float,
    hosts: Sequence[str] = (),
) -> bytes:
    """Return a certificate (DER).

    Args:
        signer: the authority; its certificate must outlive what it signs.
        public_key: of the holder.
        fleet: of the holder.
        role: of the holder.
        name: of the holder.
        now_s: Unix seconds.
        lifetime_s: from now on.
        hosts: names and addresses by which a server is reached.

    Raises:
        CertificateError: the authority itself ends before.
    """
    if now_s + lifetime_s > signer.certificate.not_valid_after_utc.timestamp():
        raise CertificateError(f"{name}: the authority ends before this certificate would: make a new one")
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    certificate = (
        _builder(common_name(name), signer.certificate.subject, public_key, now_s, lifetime_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(authority, critical=False)
        .add_extension(_uri(fleet, role, name, hosts), critical=False)
        .sign(signer.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def revocation_list(signer: Signer, revoked: Iterable[tuple[int, float]], number: int, now_s: float) -> bytes:
    """Return the list of revoked certificates (PEM).

    Args:
        signer: the authority.
        revoked: serial number and Unix seconds of each.
        number: grows from list to list.
        now_s: Unix seconds.
    """
    start = _time(now_s - BACKDATE_S)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(start)
        .next_update(start + dt.timedelta(days=CRL_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for serial, at_s in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(at_s)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now_s: float, lifetime_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_s - min(BACKDATE_S, lifetime_s / 10)))
        .not_valid_after(_time(now_s + lifetime_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _uri(fleet: str, role: str, name: str, hosts: Sequence[str] = ()) -> x509.SubjectAlternativeName:
    urn = ":".join(part for part in (URN, fleet, role, name) if part)
    return x509.SubjectAlternativeName(
        [*(_general_name(host) for host in hosts), x509.UniformResourceIdentifier(urn)]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise CertificateError(f"{host!r} is no name or address of a host") from None


def _time(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).replace(microsecond=0)
