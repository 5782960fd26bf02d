"""Both libraries for Ed25519 are the same function; what is no signature is refused by both."""

import os
import random
import ssl
import subprocess
import sys
import threading

import pytest

from liberatai_core.contract import ed25519
from liberatai_core.contract.ed25519 import Cryptography, Library, OpenSsl, works
from liberatai_core.errors import SignatureError

VECTORS = [  # RFC 8032, 7.1: seed, public key, message, signature
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
]


def openssl() -> OpenSsl:
    try:
        return OpenSsl()
    except (OSError, AttributeError, ImportError):
        pytest.skip("this Python does not show its libcrypto")


@pytest.fixture(params=["openssl", "cryptography"])
def library(request: pytest.FixtureRequest) -> Library:
    return openssl() if request.param == "openssl" else Cryptography()


@pytest.mark.parametrize(("seed", "public", "message", "signature"), VECTORS)
def test_the_vectors_of_the_rfc_hold(
    library: Library, seed: str, public: str, message: str, signature: str
) -> None:
    key = library.private(bytes.fromhex(seed))
    assert key.public.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert library.public(key.public).verify(bytes.fromhex(signature), bytes.fromhex(message))


def test_both_agree_on_random_keys_and_on_everything_that_is_damaged() -> None:
    draw, one, other = random.Random(0), openssl(), Cryptography()
    for _ in range(60):
        seed, data = draw.randbytes(32), draw.randbytes(draw.randrange(5000))
        key = one.private(seed)
        signature = key.sign(data)
        assert other.private(seed).sign(data) == signature
        assert other.private(seed).public == key.public
        flipped = bytearray(signature)
        flipped[draw.randrange(64)] ^= 1 << draw.randrange(8)
        wrong_key = bytearray(key.public)
        wrong_key[draw.randrange(32)] ^= 1 << draw.randrange(8)
        for library in (one, other):
            assert library.public(key.public).verify(signature, data)
            assert not library.public(key.public).verify(bytes(flipped), data)
            assert not library.public(key.public).verify(signature, data + b"x")
            assert not library.public(key.public).verify(signature[:-1], data)
            assert not library.public(key.public).verify(b"", data)
        got = []
        for library in (one, other):
            try:
                got.append(library.public(bytes(wrong_key)).verify(signature, data))
            except SignatureError:
                got.append(False)
        assert got == [False, False]


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(library: Library, size: int) -> None:
    with pytest.raises(SignatureError):
        library.private(bytes(size))
    with pytest.raises(SignatureError):
        library.public(bytes(size))


def test_a_refused_signature_leaves_no_error_for_the_ssl_module() -> None:
    key = openssl().public(bytes.fromhex(VECTORS[0][1]))
    for _ in range(3):
        assert not key.verify(bytes(64), b"x")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="x").do_handshake()


def test_threads_may_share_a_key(library: Library) -> None:
    key, faults = library.private(bytes(32)), []
    public = library.public(key.public)

    def work(number: int) -> None:
        for n in range(50):
            data = f"{number} {n}".encode()
            if not public.verify(key.sign(data), data):
                faults.append(data)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []


def test_a_library_that_takes_every_signature_is_not_used(library: Library) -> None:
    assert works(library)

    class Yes:
        name = "yes"

        def private(self, seed: bytes) -> ed25519.PrivateKey:
            return library.private(seed)

        def public(self, _key: bytes) -> ed25519.PublicKey:
            class Key:
                def verify(self, _signature: bytes, _data: bytes) -> bool:
                    return True

            return Key()

    assert not works(Yes())


def test_the_second_library_is_loaded_only_where_the_first_cannot_be_called() -> None:
    openssl()
    code = "import sys, liberatai_core.contract.frame; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
