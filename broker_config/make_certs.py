#!/usr/bin/env python3
"""Make the certificates of a fleet's broker: an authority, the broker, the coordinator, the devices.

    python make_certs.py certs init                        the authority and an empty revocation list
    python make_certs.py certs server broker.example.org 192.0.2.7
    python make_certs.py certs client coordinator pi-kitchen pi-garage
    python make_certs.py certs revoke pi-garage            then: kill -HUP the broker

EC P-256 keys, TLS client and server use kept apart.
"""

import argparse
import datetime as dt
import ipaddress
import os
import re
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
SERVER_DAYS = 365
CLIENT_DAYS = 90  # a stolen device is useless after that even if nobody notices
CRL_DAYS = 3650  # the broker refuses everybody with an expired list; freshness comes from SIGHUP
BACKDATE = dt.timedelta(minutes=5)  # devices without a battery-backed clock run late
CLIENT_NAME = re.compile(r"[a-z0-9-]{1,32}")  # a level of a topic: no slash, no wildcard


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file in one step; a key is never readable by others, not even for a moment."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    new.replace(path)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, pem, secret=True)


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


class Authority:
    """The fleet's certificate authority in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self) -> None:
        """Make the key, the root certificate and an empty revocation list; never overwrites."""
        if (self.folder / "ca.key").exists():
            raise SystemExit(f"{self.folder / 'ca.key'} exists: a new authority would shut out every device")
        self.folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("LiberatAI fleet authority")
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
        certificate = (
            self._builder(name, name, key.public_key(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        _write_key(self.folder / "ca.key", key)
        _write(self.folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
        self._write_crl([])

    def server(self, hosts: list[str]) -> None:
        """Issue the broker's certificate for these names and addresses."""
        self._issue("server", hosts[0], SERVER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH, hosts)

    def client(self, name: str) -> None:
        """Issue the certificate of a device or the coordinator."""
        if not CLIENT_NAME.fullmatch(name):
            raise SystemExit(f"{name!r}: a client's name must match {CLIENT_NAME.pattern}")
        if name in ("ca", "server"):
            raise SystemExit(f"{name!r} is taken by the authority's own files")
        self._issue(name, name, CLIENT_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def revoke(self, name: str) -> None:
        """Put the current certificate of a client on the revocation list."""
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(_certificate(self.folder / f"{name}.crt").serial_number)
            .revocation_date(_now())
            .build()
        )
        old = list(x509.load_pem_x509_crl((self.folder / "ca.crl").read_bytes()))
        self._write_crl([*(kept for kept in old if kept.serial_number != entry.serial_number), entry])

    def _key(self) -> ec.EllipticCurvePrivateKey:
        path = self.folder / "ca.key"
        if not path.exists():
            raise SystemExit(f"{path} is missing: run `init` first")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SystemExit(f"{path} is not an EC key")
        return key

    @staticmethod
    def _builder(
        subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        start = _now() - BACKDATE
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + dt.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    def _issue(
        self, file: str, common_name: str, days: int, usage: x509.ObjectIdentifier, hosts: list[str]
    ) -> None:
        ca_key, ca = self._key(), _certificate(self.folder / "ca.crt")
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        builder = (
            self._builder(_name(common_name), ca.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(ca_key, hashes.SHA256())
        _write_key(self.folder / f"{file}.key", key)
        _write(self.folder / f"{file}.crt", certificate.public_bytes(serialization.Encoding.PEM))

    def _write_crl(self, revoked: list[x509.RevokedCertificate]) -> None:
        start = _now() - BACKDATE
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_certificate(self.folder / "ca.crt").subject)
            .last_update(start)
            .next_update(start + dt.timedelta(days=CRL_DAYS))
        )
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(self._key(), hashes.SHA256())
        _write(self.folder / "ca.crl", crl.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def main(arguments: list[str]) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description="Certificates of a LiberatAI fleet's broker.")
    parser.add_argument("folder", type=Path, help="where the certificates are")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="make the authority")
    commands.add_parser("server", help="issue the broker's certificate").add_argument("host", nargs="+")
    commands.add_parser("client", help="issue clients' certificates").add_argument("name", nargs="+")
    commands.add_parser("revoke", help="revoke clients' certificates").add_argument("name", nargs="+")
    chosen = parser.parse_args(arguments)
    authority = Authority(chosen.folder)
    if chosen.command == "init":
        authority.create()
    elif chosen.command == "server":
        authority.server(chosen.host)
    elif chosen.command == "client":
        for name in chosen.name:
            authority.client(name)
    else:
        for name in chosen.name:
            authority.revoke(name)


if __name__ == "__main__":
    main(sys.argv[1:])
