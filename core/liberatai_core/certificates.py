"""Certificates of a fleet: keys, requests for one, and what a certificate says. Pure: bytes in, values out.

EC keys (P-256, P-384), X.509 (RFC 5280), requests in PKCS #10 (RFC 2986). This loads `cryptography`, 6 MiB of
memory: a running agent asks it in a process of its own, see `liberatai_agent.children.request_child`.
"""

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from liberatai_core.contract.limits import MAX_CERTIFICATE_BYTES, MAX_REQUEST_BYTES
from liberatai_core.errors import CertificateError, TooLargeError

CURVES = ("secp256r1", "secp384r1")
"""What brokers and TLS libraries all take; RSA keys cost a small device seconds."""
ROLES = ("device", "coordinator", "server", "claim")
URN = "urn:liberatai"
PEM_START = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a certificate says.

    Attributes:
        name: its common name: user name, client id and topic level at the broker.
        fleet, role: from its URI, "" where another authority made it.
        serial: number of the certificate.
        start_s, end_s: Unix seconds between which it is valid.
        issuer: common name of who signed it.
        hosts: names and addresses of a server.
    """

    name: str
    fleet: str
    role: str
    serial: int
    start_s: float
    end_s: float
    issuer: str
    hosts: tuple[str, ...] = ()


def common_name(text: str) -> x509.Name:
    """Return the name of a subject that has a common name and nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as it is written to a file."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(der: bytes) -> bytes:
    """Return a certificate as it is written to a file.

    Raises:
        CertificateError: it is none.
    """
    return load(der).public_bytes(serialization.Encoding.PEM)


def key_of(pem: bytes, where: str = "key") -> ec.EllipticCurvePrivateKey:
    """Return the private key in a PEM file.

    Raises:
        CertificateError: there is none, or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(_key_part(pem), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(f"{where}: holds no private key that can be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{where}: its private key is no EC key")
    return key


def _key_part(pem: bytes) -> bytes:
    start = pem.find(b"-----BEGIN", max(0, pem.find(b"PRIVATE KEY-----") - 40))
    return pem[start:] if start >= 0 else pem


def key_of_number(number: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 private key that a token carries as a number.

    Raises:
        CertificateError: no key has this number.
    """
    try:
        return ec.derive_private_key(int.from_bytes(number, "big"), ec.SECP256R1())
    except ValueError:
        raise CertificateError("the key in the token is none") from None


def request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a signed request for a certificate with this common name (DER)."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(der: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request, which must be for this name and no other.

    Raises:
        TooLargeError: longer than any honest request.
        CertificateError: no request, another name, a key of another kind, a signature that is not its own.
    """
    if len(der) > MAX_REQUEST_BYTES:
        raise TooLargeError(f"request of {len(der)} bytes, at most {MAX_REQUEST_BYTES}")
    try:
        found = x509.load_der_x509_csr(der)
        names = [(attribute.oid, attribute.value) for attribute in found.subject]
        is_signed, asks, key = found.is_signature_valid, len(found.extensions), found.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.DuplicateExtension):
        raise CertificateError("no request for a certificate can be read from these bytes") from None
    if names != [(NameOID.COMMON_NAME, name)]:
        raise CertificateError(f"a request of {name} must be for the common name {name!r} and nothing else")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise CertificateError(f"{name}: its key must be an EC key, {' or '.join(CURVES)}")
    if not is_signed:
        raise CertificateError(f"{name}: the request is not signed with its own key")
    if asks:
        raise CertificateError(f"{name}: a request may ask for no extensions")
    return key


def load(data: bytes) -> x509.Certificate:
    """Return the first certificate in DER or PEM.

    Raises:
        CertificateError: there is none, or it is longer than any of ours.
    """
    if len(data) > 4 * MAX_CERTIFICATE_BYTES:
        raise CertificateError(f"{len(data)} bytes: no certificate is that long")
    try:
        if PEM_START in data:
            return x509.load_pem_x509_certificate(data[data.index(PEM_START) :])
        return x509.load_der_x509_certificate(data)
    except (ValueError, TypeError):
        raise CertificateError("no certificate can be read from these bytes") from None


def facts(data: bytes) -> Facts:
    """Return what a certificate says (DER or PEM).

    Raises:
        CertificateError: it is none, or nobody of a fleet can have it.
    """
    certificate = load(data)
    try:
        names = _names(certificate.subject)
        issuer = _names(certificate.issuer)
        alternative = _alternative(certificate)
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise CertificateError("a certificate whose fields cannot be read") from None
    uris = alternative.get_values_for_type(x509.UniformResourceIdentifier) if alternative else []
    parts = next((uri.split(":") for uri in uris if uri.startswith(f"{URN}:")), [])
    fleet, role = (parts[2], parts[3]) if len(parts) >= 4 else ("", "")
    hosts: list[str] = []
    if alternative:
        hosts = [str(value) for value in alternative.get_values_for_type(x509.DNSName)]
        hosts += [str(value) for value in alternative.get_values_for_type(x509.IPAddress)]
    return Facts(
        name=names[0] if names else "",
        fleet=fleet,
        role=role,
        serial=certificate.serial_number,
        start_s=start.timestamp(),
        end_s=end.timestamp(),
        issuer=issuer[0] if issuer else "",
        hosts=tuple(hosts),
    )


def require_pair(certificate: bytes, key: bytes, authority: bytes, name: str) -> None:
    """Refuse a certificate that a device cannot use.

    Args:
        certificate: what was issued (DER or PEM).
        key: the private key that it was asked for with (PEM).
        authority: the authority's certificate (DER or PEM).
        name: that it must carry.

    Raises:
        CertificateError: another key, another name, or not signed by this authority.
    """
    issued, root = load(certificate), load(authority)
    if issued.public_key() != key_of(key).public_key():
        raise CertificateError(f"{name}: the certificate belongs to another key")
    if _names(issued.subject) != [name]:
        raise CertificateError(f"the certificate is for {_names(issued.subject)}, not for {name}")
    try:
        issued.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError(f"{name}: the certificate is not of the fleet's authority") from None


def prove(key: ec.EllipticCurvePrivateKey, said: bytes) -> bytes:
    """Return the signature of a claim's key under what its holder says (ECDSA, SHA-256, DER)."""
    return key.sign(said, ec.ECDSA(hashes.SHA256()))


def proves(certificate: bytes, signature: bytes, said: bytes) -> bool:
    """Say whether the holder of a certificate's key said this."""
    key = load(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, said, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _names(name: x509.Name) -> list[str]:
    return [str(found.value) for found in name.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _alternative(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
