r"""A release of the agent in one file, signed offline: what the operator packs, and what a device believes.

    "LAIREL1\n" | Ed25519 signature 64 B | length of manifest u32 | manifest (JSON) | files, one after another

The signature covers `"liberatai/release/v1" | manifest`, and the manifest holds length and SHA-256 of every
file: nothing is parsed before the signature was checked, nothing is written before its digest was. The key
is a *release* key, pinned in the device's settings: neither the coordinator nor the broker has it.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Annotated, Final

import msgspec
from msgspec import Meta

from liberatai_core.contract.ed25519 import LIBRARY, PrivateKey
from liberatai_core.errors import (
    ConfigError,
    DigestError,
    FrameError,
    ProtocolVersionError,
    SchemaError,
    SignatureError,
    TooLargeError,
)

MAGIC: Final = b"LAIREL1\n"
CONTEXT: Final = b"liberatai/release/v1\0"
FORMAT: Final = 1
SIGNATURE_BYTES: Final = 64
PACKAGES: Final = ("liberatai_core", "liberatai_agent")
"""What a release replaces; libraries stay as they are installed."""
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_FILES: Final = 4096
MAX_FILE_BYTES: Final = 8 << 20
MAX_RELEASE_BYTES: Final = 64 << 20
"""A board's card has room for two of them; the agent's own code takes one."""
_LENGTH: Final = struct.Struct(">I")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_VERSION: Final = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,3}")

Seconds = Annotated[float, Meta(ge=0, le=1e11)]


class File(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One file: its path, its length, its SHA-256 (hex)."""

    name: Annotated[str, Meta(max_length=400)]
    size: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a release is.

    Attributes:
        format: of this file.
        version: for people, e.g. "0.2.0".
        sequence: grows with every release of this key: a device never goes back to a lower one.
        created_s, expires_s: Unix seconds; after the second one no device takes it any more.
        python: least version that it runs on, e.g. "3.11".
        requires: libraries that it needs, with their least versions.
        files: in the order in which they follow.
    """

    format: int
    version: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[0-9A-Za-z.+-]*\\Z")]
    sequence: Annotated[int, Meta(ge=1, le=2**53)]
    created_s: Seconds
    expires_s: Seconds
    python: Annotated[str, Meta(pattern="^" + _VERSION.pattern + "\\Z")] = "3.11"
    requires: Annotated[dict[Annotated[str, Meta(max_length=64)], str], Meta(max_length=32)] = {}
    files: Annotated[tuple[File, ...], Meta(max_length=MAX_FILES)] = ()


def release_key(seed: bytes) -> PrivateKey:
    """Return the private key of 32 secret bytes.

    Raises:
        ConfigError: other than 32.
    """
    if len(seed) != 32:
        raise ConfigError("release key", [f"{len(seed)} bytes, a private key has 32"])
    return LIBRARY.private(seed)


def pack(manifest: Manifest, files: Mapping[str, bytes], key: PrivateKey) -> bytes:
    """Return a signed release.

    Args:
        manifest: without its files.
        files: contents by name, e.g. "liberatai_agent/cli.py".
        key: of the operator.

    Raises:
        SchemaError, TooLargeError: a name or a length that no device would take.
    """
    listed = tuple(
        File(name=name, size=len(content), sha256=digest(content)) for name, content in sorted(files.items())
    )
    text = msgspec.json.encode(msgspec.structs.replace(manifest, files=listed))
    _decoded(text)
    head = MAGIC + key.sign(CONTEXT + text) + _LENGTH.pack(len(text)) + text
    return head + b"".join(files[one.name] for one in listed)


def opened(source: IO[bytes], public_key: bytes) -> Manifest:
    """Return what a release is; afterwards `source` stands at its first file.

    Raises:
        FrameError: it is no release, or cut short.
        SignatureError: another key, or changed bytes.
        ProtocolVersionError: of a newer form.
        SchemaError, TooLargeError: signed, but not what a release may be.
    """
    magic = source.read(len(MAGIC))
    if magic != MAGIC:
        raise FrameError("this is no release of the agent")
    signature = source.read(SIGNATURE_BYTES)
    length = source.read(_LENGTH.size)
    if len(signature) != SIGNATURE_BYTES or len(length) != _LENGTH.size:
        raise FrameError("the release ends early")
    (size,) = _LENGTH.unpack(length)
    if size > MAX_MANIFEST_BYTES:
        raise TooLargeError(f"a manifest of {size} bytes, at most {MAX_MANIFEST_BYTES}")
    text = source.read(size)
    if len(text) != size:
        raise FrameError("the release ends early")
    try:
        good = LIBRARY.public(public_key).verify(signature, CONTEXT + text)
    except ValueError:
        raise ConfigError("release_key", ["is no Ed25519 public key"]) from None
    if not good:
        raise SignatureError("the release is not signed with the release key that this device has")
    return _decoded(text)


def contents(source: IO[bytes], manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Return the files of a release that `opened` has opened, each checked.

    Raises:
        FrameError: it ends early, or goes on.
        DigestError: a file is not what was signed.
    """
    for file in manifest.files:
        content = source.read(file.size)
        if len(content) != file.size:
            raise FrameError("the release ends early")
        if digest(content) != file.sha256:
            raise DigestError(f"{file.name} is not what was signed")
        yield file.name, content
    if source.read(1):
        raise FrameError("there is more in the release than it lists")


def digest(content: bytes) -> str:
    """Return the SHA-256 (hex) of a file of a release."""
    return hashlib.sha256(content).hexdigest()


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    found = _VERSION.match(version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _decoded(text: bytes) -> Manifest:
    try:
        found = msgspec.json.decode(text, type=_Format)
        if found.format != FORMAT:
            raise ProtocolVersionError(f"a release of form {found.format}, this agent reads {FORMAT}")
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SchemaError(f"manifest of the release: {error}") from None
    names = [file.name for file in manifest.files]
    wrong = next((name for name in names if not _is_ours(name)), None)
    if wrong is not None or len(set(names)) != len(names):
        raise SchemaError(f"the release holds {wrong!r}, or a file twice")
    if sum(file.size for file in manifest.files) > MAX_RELEASE_BYTES:
        raise TooLargeError(f"a release of more than {MAX_RELEASE_BYTES} bytes")
    return manifest


class _Format(msgspec.Struct):
    format: int


def _is_ours(name: str) -> bool:
    parts = name.split("/")
    return parts[0] in PACKAGES and 2 <= len(parts) <= 8 and all(_PART.fullmatch(part) for part in parts)
