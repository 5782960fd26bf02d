"""Ed25519 (RFC 8032) with the OpenSSL that Python itself has loaded; elsewhere with `cryptography`.

Python's hashlib and ssl bring libcrypto into every process. `cryptography` brings a second one: 6 MiB of
resident memory, a sixth of an idle agent's. Where the first cannot be called (statically linked Pythons,
other libraries than OpenSSL, a provider that refuses Ed25519), the second is used; the first must pass the
test vector of the RFC to be taken. Keys and signatures are the same bytes either way.
"""

import ctypes
from importlib import import_module
from typing import Any, Protocol

from liberatai_core.errors import SignatureError

SEED_BYTES = KEY_BYTES = 32
SIGNATURE_BYTES = 64

_ED25519 = 1087  # NID_ED25519
_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
_SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
    "d25bf5f0595bbe24655141438e7a100b"
)
"""RFC 8032, 7.1, test 1: the empty message."""


class PrivateKey(Protocol):
    """A key that signs."""

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte signature."""


class PublicKey(Protocol):
    """A key that verifies."""

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Say whether this key's owner signed the data."""


class Library(Protocol):
    """Where keys are made."""

    name: str

    def private(self, seed: bytes) -> PrivateKey:
        """Read a 32-byte private key; raises SignatureError for another length."""

    def public(self, key: bytes) -> PublicKey:
        """Read a 32-byte public key; raises SignatureError for another length or no point."""


class OpenSsl:
    """The libcrypto that Python's own modules are linked to.

    Raises:
        OSError, AttributeError, ImportError: it cannot be called.
    """

    name = "openssl"

    def __init__(self) -> None:
        # The symbols of libcrypto are found through the module that is linked to it.
        library = ctypes.CDLL(import_module("_hashlib").__file__)
        pointer, number, data = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        for name, result, arguments in (
            ("EVP_PKEY_new_raw_private_key", pointer, (ctypes.c_int, pointer, data, number)),
            ("EVP_PKEY_new_raw_public_key", pointer, (ctypes.c_int, pointer, data, number)),
            ("EVP_PKEY_get_raw_public_key", ctypes.c_int, (pointer, data, ctypes.POINTER(number))),
            ("EVP_PKEY_free", None, (pointer,)),
            ("EVP_MD_CTX_new", pointer, ()),
            ("EVP_MD_CTX_free", None, (pointer,)),
            ("EVP_DigestSignInit", ctypes.c_int, (pointer,) * 5),
            ("EVP_DigestSign", ctypes.c_int, (pointer, data, ctypes.POINTER(number), data, number)),
            ("EVP_DigestVerifyInit", ctypes.c_int, (pointer,) * 5),
            ("EVP_DigestVerify", ctypes.c_int, (pointer, data, number, data, number)),
            ("ERR_clear_error", None, ()),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.call: Any = library

    def private(self, seed: bytes) -> "_Key":
        """Read a private key."""
        return _Key(self, self._read(self.call.EVP_PKEY_new_raw_private_key, seed))

    def public(self, key: bytes) -> "_Key":
        """Read a public key."""
        return _Key(self, self._read(self.call.EVP_PKEY_new_raw_public_key, key))

    def _read(self, read: Any, raw: bytes) -> int:
        if len(raw) != KEY_BYTES:
            raise SignatureError(f"a key of {len(raw)} bytes, wanted {KEY_BYTES}")
        handle: int | None = read(_ED25519, None, raw, len(raw))
        if not handle:
            self.call.ERR_clear_error()  # the queue is shared with the ssl module
            raise SignatureError("no Ed25519 key")
        return handle


class _Key:
    """An EVP_PKEY; only read after it was made, so threads may share it."""

    def __init__(self, library: OpenSsl, handle: int) -> None:
        self._library, self._handle = library, handle

    def __del__(self) -> None:
        self._library.call.EVP_PKEY_free(self._handle)

    @property
    def public(self) -> bytes:
        raw, length = ctypes.create_string_buffer(KEY_BYTES), ctypes.c_size_t(KEY_BYTES)
        found = self._library.call.EVP_PKEY_get_raw_public_key(self._handle, raw, ctypes.byref(length))
        self._require(found == 1 and length.value == KEY_BYTES)
        return raw.raw

    def sign(self, data: bytes) -> bytes:
        call = self._library.call
        context = call.EVP_MD_CTX_new()
        try:
            raw, length = ctypes.create_string_buffer(SIGNATURE_BYTES), ctypes.c_size_t(SIGNATURE_BYTES)
            self._require(call.EVP_DigestSignInit(context, None, None, None, self._handle) == 1)
            self._require(call.EVP_DigestSign(context, raw, ctypes.byref(length), data, len(data)) == 1)
            self._require(length.value == SIGNATURE_BYTES)
            return raw.raw
        finally:
            call.EVP_MD_CTX_free(context)

    def verify(self, signature: bytes, data: bytes) -> bool:
        if len(signature) != SIGNATURE_BYTES:
            return False
        call = self._library.call
        context = call.EVP_MD_CTX_new()
        try:
            self._require(call.EVP_DigestVerifyInit(context, None, None, None, self._handle) == 1)
            if call.EVP_DigestVerify(context, signature, len(signature), data, len(data)) == 1:
                return True
            call.ERR_clear_error()
            return False
        finally:
            call.EVP_MD_CTX_free(context)

    def _require(self, done: bool) -> None:
        if not done:
            self._library.call.ERR_clear_error()
            raise SignatureError("OpenSSL refuses to work with this key")


class Cryptography:
    """The package of that name, loaded when it is needed."""

    name = "cryptography"

    def private(self, seed: bytes) -> PrivateKey:
        """Read a private key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

        try:
            return _WrappedPrivateKey(Ed25519PrivateKey.from_private_bytes(seed))
        except ValueError as error:
            raise SignatureError(str(error)) from None

    def public(self, key: bytes) -> PublicKey:
        """Read a public key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

        try:
            return _WrappedPublicKey(Ed25519PublicKey.from_public_bytes(key))
        except ValueError as error:
            raise SignatureError(str(error)) from None


class _WrappedPrivateKey:
    def __init__(self, key: Any) -> None:
        self._key = key

    @property
    def public(self) -> bytes:
        return bytes(self._key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        return bytes(self._key.sign(data))


class _WrappedPublicKey:
    def __init__(self, key: Any) -> None:
        self._key = key

    def verify(self, signature: bytes, data: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

        try:
            self._key.verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True


def works(library: Library) -> bool:
    """Say whether a library gives what the RFC says, and refuses what it must."""
    try:
        key, public = library.private(_SEED), library.public(_PUBLIC)
        wrong = bytes([_SIGNATURE[0] ^ 1]) + _SIGNATURE[1:]
        right = key.public == _PUBLIC and key.sign(b"") == _SIGNATURE and public.verify(_SIGNATURE, b"")
        return right and not public.verify(wrong, b"") and not public.verify(_SIGNATURE, b"x")
    except SignatureError:
        return False


def _chosen() -> Library:
    try:
        library = OpenSsl()
    except (OSError, AttributeError, ImportError):
        return Cryptography()
    return library if works(library) else Cryptography()


LIBRARY: Library = _chosen()
