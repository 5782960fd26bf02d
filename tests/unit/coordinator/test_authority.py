"""The authority: what it signs, what it refuses, what it remembers."""

import os
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from liberatai_coordinator.authority.authority import LIST, Authority
from liberatai_core import certificates
from liberatai_core.contract.limits import MAX_REQUEST_BYTES
from liberatai_core.contract.topics import claim_name
from liberatai_core.errors import CertificateError, NotFoundError, StateError, TooLargeError, TopicError

DAY_S = 86_400.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "default")


def device(authority: Authority, name: str, now_s: float | None = None) -> bytes:
    return authority.issue(certificates.new_key().public_key(), "device", name, 90 * DAY_S, now_s=now_s)


def listed(authority: Authority, kind: str = "ca") -> set[int]:
    crl = x509.load_pem_x509_crl((authority.folder / f"{kind}.crl").read_bytes())
    return {entry.serial_number for entry in crl}


def test_a_certificate_says_who_its_holder_is(authority: Authority) -> None:
    found = certificates.facts(device(authority, "dev-a", now_s=1e9 + 1))
    assert (found.name, found.fleet, found.role, found.issuer) == (
        "dev-a",
        "default",
        "device",
        "default authority",
    )
    assert (found.start_s, found.end_s) == (1e9 + 1 - 300, 1e9 + 1 + 90 * DAY_S)


def test_keys_are_readable_by_the_owner_only(authority: Authority) -> None:
    for kind in ("ca", "claims"):
        assert (authority.folder / f"{kind}.key").stat().st_mode & 0o077 == 0


def test_openssl_agrees_with_what_was_signed(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "dev.pem").write_bytes(certificates.certificate_pem(device(authority, "dev-a")))
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        "sslclient",
        "-CAfile",
        str(authority.folder / "ca.crt"),
    ]
    done = subprocess.run([*command, str(tmp_path / "dev.pem")], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_second_authority_is_never_made_over_the_first(authority: Authority) -> None:
    key = (authority.folder / "ca.key").read_bytes()
    with pytest.raises(StateError):
        Authority.create(authority.folder, "default")
    assert (authority.folder / "ca.key").read_bytes() == key


@pytest.mark.parametrize("name", ["a/b", "+", "Dev", "", "x" * 33, "dev-a\n"])
def test_a_name_that_is_no_topic_level_gets_no_certificate(authority: Authority, name: str) -> None:
    with pytest.raises(TopicError):
        device(authority, name)
    assert authority.issued() == []


def test_names_of_claims_and_coordinators_are_no_devices(authority: Authority) -> None:
    key = certificates.new_key().public_key()
    authority.issue(key, "coordinator", "co1", DAY_S)
    for name in ("claim-a", "co1"):
        with pytest.raises(CertificateError):
            device(authority, name)
    with pytest.raises(CertificateError):
        authority.issue(key, "claim", "dev-a", DAY_S)
    device(authority, "dev-a")
    with pytest.raises(CertificateError):
        authority.issue(key, "coordinator", "dev-a", DAY_S)


def test_everything_that_was_issued_is_listed_before_anybody_has_it(authority: Authority) -> None:
    serial = certificates.facts(device(authority, "dev-a")).serial
    (one,) = Authority(authority.folder).issued()
    assert (one.name, int(one.serial, 16), one.state(one.start_s + 1)) == ("dev-a", serial, "valid")


def test_a_line_that_a_crash_cut_short_harms_no_other(authority: Authority) -> None:
    device(authority, "dev-a")
    with (authority.folder / LIST).open("ab") as file:
        file.write(b'{"serial":"12","name":"dev-')
    device(authority, "dev-b")
    assert [one.name for one in authority.issued()] == ["dev-a", "dev-b"]


def test_all_certificates_of_a_name_are_revoked_for_good(authority: Authority) -> None:
    serials = {certificates.facts(device(authority, "dev-a")).serial for _ in range(2)}
    claim = authority.issue(certificates.new_key().public_key(), "claim", claim_name("dev-a"), DAY_S)
    other = certificates.facts(device(authority, "dev-b")).serial
    assert len(authority.revoke("dev-a", "stolen")) == 3
    assert listed(authority) == serials
    assert listed(authority, "claims") == {certificates.facts(claim).serial}
    authority.revoke("dev-b")
    assert listed(authority) == serials | {other}
    assert [one.reason for one in authority.revoke("dev-a", "again")] == ["stolen"] * 3
    later = certificates.facts(device(authority, "dev-a")).serial
    assert later not in listed(authority)


def test_one_certificate_is_revoked_by_its_number(authority: Authority) -> None:
    first, second = (certificates.facts(device(authority, "dev-a")).serial for _ in range(2))
    authority.revoke_serial(f"{first:x}")
    assert listed(authority) == {first}
    assert second not in listed(authority)
    with pytest.raises(NotFoundError):
        authority.revoke_serial("12")
    with pytest.raises(NotFoundError):
        authority.revoke("nobody")


def test_lists_leave_out_what_would_have_ended_anyway(authority: Authority) -> None:
    old = certificates.facts(device(authority, "dev-a", now_s=1e9)).serial
    authority.revoke("dev-a", now_s=1e9 + DAY_S)
    assert listed(authority) == {old}
    device(authority, "dev-b")
    authority.revoke("dev-b")
    assert old not in listed(authority)


def test_nothing_outlives_the_authority(authority: Authority) -> None:
    with pytest.raises(CertificateError, match="authority ends"):
        authority.issue(certificates.new_key().public_key(), "device", "dev-a", 3651 * DAY_S)


def test_another_process_sees_what_was_issued(authority: Authority) -> None:
    if os.fork() == 0:
        device(Authority(authority.folder), "dev-b")
        os._exit(0)
    device(authority, "dev-a")
    os.wait()
    assert {one.name for one in authority.issued()} == {"dev-a", "dev-b"}


# --- requests ------------------------------------------------------------------------------------


def csr(name: x509.Name, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *, asks: bool = False) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if asks:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_an_honest_request_is_taken() -> None:
    key = certificates.new_key()
    assert certificates.requested_key(certificates.request(key, "dev-a"), "dev-a") == key.public_key()


def test_dishonest_requests_are_refused() -> None:
    key, own = certificates.new_key(), certificates.common_name("dev-a")
    two = x509.Name([*own, x509.NameAttribute(NameOID.COMMON_NAME, "dev-b")])
    more = x509.Name([*own, x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x")])
    honest = certificates.request(key, "dev-a")
    wrong = {
        "another name": certificates.request(key, "dev-b"),
        "two names": csr(two, key),
        "more than a name": csr(more, key),
        "no name": csr(x509.Name([]), key),
        "a weak curve": csr(own, ec.generate_private_key(ec.SECP192R1())),
        "an RSA key": csr(own, rsa.generate_private_key(65537, 2048)),
        "wants to be an authority": csr(own, key, asks=True),
        "damaged signature": honest[:-1] + bytes([honest[-1] ^ 1]),
        "cut short": honest[:-10],
        "nothing": b"",
        "noise": bytes(range(256)),
    }
    for what, der in wrong.items():
        assert refusal(der) == "E_CERT", what
    with pytest.raises(TooLargeError):
        certificates.requested_key(bytes(MAX_REQUEST_BYTES + 1), "dev-a")


def refusal(der: bytes) -> str:
    try:
        certificates.requested_key(der, "dev-a")
    except CertificateError as error:
        return error.code
    return ""


def test_a_certificate_that_a_device_cannot_use_is_refused(authority: Authority, tmp_path: Path) -> None:
    key = certificates.new_key()
    pem, root = certificates.key_pem(key), authority.certificates["ca"]
    der = authority.issue(key.public_key(), "device", "dev-a", DAY_S)
    certificates.require_pair(der, pem, root, "dev-a")
    other = Authority.create(tmp_path / "other", "default")
    foreign = other.issue(key.public_key(), "device", "dev-a", DAY_S)
    for wrong in (
        (device(authority, "dev-a"), pem, root, "dev-a"),
        (der, pem, root, "dev-b"),
        (foreign, pem, root, "dev-a"),
        (b"x", pem, root, "dev-a"),
        (der, b"x", root, "dev-a"),
    ):
        with pytest.raises(CertificateError):
            certificates.require_pair(*wrong)


def test_key_and_certificate_lie_in_one_file(authority: Authority) -> None:
    key = certificates.new_key()
    der = authority.issue(key.public_key(), "device", "dev-a", DAY_S)
    both = certificates.certificate_pem(der) + certificates.key_pem(key)
    for content in (both, certificates.key_pem(key) + certificates.certificate_pem(der)):
        assert certificates.key_of(content).public_key() == key.public_key()
        assert certificates.facts(content).name == "dev-a"
