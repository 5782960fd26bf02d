"""The frame around every message: sign outside, decode inside, refuse in a fixed order.

    "LA1" | kind u8 | key id 8 B | Ed25519 signature 64 B | body (one msgpack map or array)

The signature covers `"liberatai/v1" | fleet | 0x00 | kind | body`, so a frame of another fleet or kind
never verifies. Order of checks: length, frame, signature, typed decode; semantics follow elsewhere. An
unauthenticated byte never reaches the decoder. Ed25519: RFC 8032.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import msgspec

from liberatai_core.contract.ed25519 import LIBRARY, PrivateKey, PublicKey
from liberatai_core.contract.limits import MAX_SPEC_BYTES
from liberatai_core.contract.messages import (
    KIND_OF,
    KINDS,
    MAX_BYTES,
    Capability,
    CertificateRequest,
    Message,
    TaskSpec,
)
from liberatai_core.errors import (
    FrameError,
    ProtocolVersionError,
    SchemaError,
    SignatureError,
    TooLargeError,
    UnknownDeviceError,
)

MAGIC = b"LA1"
KEY_ID_BYTES = 8
HEADER_BYTES = len(MAGIC) + 1 + KEY_ID_BYTES + 64

_FIELD_PRIME = 2**255 - 19
_SMALL_ORDER = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    }
)
"""y coordinates of the eight points whose order divides 8 (RFC 8032 curve): a signature "of" such a key can
be made without any private key, and OpenSSL takes it."""

_PARSED = 4096
"""Public keys that are kept parsed: 100 bytes each or so."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {kind: msgspec.msgpack.Decoder(struct) for kind, struct in KINDS.items()}
_SPEC_DECODER = msgspec.msgpack.Decoder(TaskSpec)
_ARRAYS = {
    struct: [field.default for field in msgspec.structs.fields(struct)]
    for struct in KINDS.values()
    if struct.__struct_config__.array_like
}
"""Defaults of the fields of kinds that are arrays on the wire, in order."""

AnyMessage = TypeVar("AnyMessage", bound=Message)


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key and the fleet it speaks in."""

    private: PrivateKey
    fleet: str
    public_key: bytes = field(init=False)
    """The 32-byte public key."""

    def __post_init__(self) -> None:
        """Derive the public key once: every frame names it."""
        object.__setattr__(self, "public_key", self.private.public)

    @classmethod
    def from_seed(cls, seed: bytes, fleet: str) -> "Signer":
        """Return the signer of a 32-byte private key."""
        return cls(LIBRARY.private(seed), fleet)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A verified message, and who signed it."""

    message: Message
    public_key: bytes


Keys = Callable[[bytes], bytes | None]
"""From a key id (8 bytes) to the public key (32 bytes), or None if nobody has it."""


def key_id(public_key: bytes) -> bytes:
    """Return the 8 bytes that stand for a public key in a frame."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def fingerprint(public_key: bytes) -> str:
    """Return what people compare of a key: 32 digits (hex) of its SHA-256, which begins with the key id."""
    digits = hashlib.sha256(public_key).hexdigest()[:32]
    return "-".join(digits[start : start + 4] for start in range(0, 32, 4))


def seal(message: Message, signer: Signer) -> bytes:
    """Return the signed frame of a message.

    Raises:
        TooLargeError: the body is larger than its kind allows; nothing of the kind may be sent.
        SchemaError: a field breaks its bounds: no receiver would take it.
        FrameError: a part of a message (a Step, say), which has no kind of its own.
    """
    kind = KIND_OF.get(type(message))
    if kind is None:
        raise FrameError(f"{type(message).__name__} is no kind of message")
    body = _own_body(message, kind)
    signature = signer.private.sign(_signed(signer.fleet, kind, body))
    return b"".join((MAGIC, bytes((kind,)), key_id(signer.public_key), signature, body))


def open_frame(data: bytes, fleet: str, keys: Keys) -> Opened:
    """Verify and decode one frame.

    A Capability or CertificateRequest of an unknown key is verified with the key that it carries itself:
    that is how a new device introduces itself. Whether it is let in is decided elsewhere.

    Raises:
        FrameError, ProtocolVersionError, TooLargeError, UnknownDeviceError, SignatureError, SchemaError:
            in this order of checks.
    """
    kind = _kind(data)
    body = data[HEADER_BYTES:]
    claimed = claimed_key(data)
    public = keys(claimed)
    if public is None and KINDS[kind] in (Capability, CertificateRequest):
        return _open_introduction(data, fleet, claimed)
    if public is None:
        raise UnknownDeviceError(f"no enrolled device has key {claimed.hex()}")
    _verify(public, data[4 + KEY_ID_BYTES : HEADER_BYTES], _signed(fleet, kind, body))
    return Opened(message=_decode(kind, body), public_key=public)


def expect(data: bytes, kind: type[AnyMessage], fleet: str, keys: Keys) -> AnyMessage:
    """Open a frame that must be of this kind.

    Raises:
        FrameError: another kind; and whatever `open_frame` raises.
    """
    found = KINDS[_kind(data)]
    if found is not kind:
        raise FrameError(f"{found.__name__}, wanted {kind.__name__}")
    message = open_frame(data, fleet, keys).message
    if not isinstance(message, kind):
        raise FrameError(f"{type(message).__name__}, wanted {kind.__name__}")
    return message


def claimed_key(data: bytes) -> bytes:
    """Return the key id that a frame claims, unverified (for counters and logs only)."""
    return data[4 : 4 + KEY_ID_BYTES]


def _open_introduction(data: bytes, fleet: str, claimed: bytes) -> Opened:
    # The body must be decoded to find the key. It is small, typed and bounded, and it is thrown away
    # unless the signature then verifies.
    kind, body = data[3], data[HEADER_BYTES:]
    message = _decode(kind, body)
    if not isinstance(message, Capability | CertificateRequest) or key_id(message.public_key) != claimed:
        raise SignatureError("the introduction names another key than it is signed with")
    _verify(message.public_key, data[4 + KEY_ID_BYTES : HEADER_BYTES], _signed(fleet, kind, body))
    return Opened(message=message, public_key=message.public_key)


def _kind(data: bytes) -> int:
    if len(data) <= HEADER_BYTES:
        raise FrameError(f"{len(data)} bytes, a frame has more than {HEADER_BYTES}")
    if data[:2] == MAGIC[:2] and data[2] != MAGIC[2]:
        raise ProtocolVersionError(f"frame version {data[2:3]!r}, this side speaks {MAGIC[2:3]!r}")
    if data[:3] != MAGIC:
        raise FrameError("wrong magic")
    kind = data[3]
    if kind not in KINDS:
        raise FrameError(f"unknown kind {kind}")
    _require_size(len(data) - HEADER_BYTES, kind)
    return kind


def _require_size(body_bytes: int, kind: int) -> None:
    limit = MAX_BYTES[KINDS[kind]]
    if body_bytes > limit:
        raise TooLargeError(f"{KINDS[kind].__name__}: body of {body_bytes} bytes, at most {limit}")


def _own_body(message: Message, kind: int) -> bytes:
    # A body is decoded before it is signed: what breaks a bound fails here, with its author, and a
    # whole number in a float field (60 for 60.0) gets the one encoding that the receiver takes.
    try:
        body = _canonical(_DECODERS[kind].decode(_ENCODER.encode(message)))
    except (msgspec.DecodeError, msgspec.EncodeError, TypeError, OverflowError, UnicodeError) as error:
        raise SchemaError(f"{KINDS[kind].__name__}: {_line(error)}") from None
    _require_size(len(body), kind)
    return body


def _canonical(message: Message) -> bytes:
    # By way of a dict, so that every header is the shortest, as any msgpack library writes it: for a struct
    # with left out defaults msgspec writes map16 where fixmap would do. Of an array it leaves out nothing.
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    if type(message) in _ARRAYS:
        names, defaults = message.__struct_fields__, _ARRAYS[type(message)]
        # A value that equals its default is the default itself (Message.__post_init__).
        while plain and getattr(message, names[len(plain) - 1]) is defaults[len(plain) - 1]:
            plain.pop()
    return _ENCODER.encode(plain)


def encode_spec(spec: TaskSpec) -> bytes:
    """Return the one byte string of a TaskSpec, the content of a blob.

    Raises:
        SchemaError: a field breaks its bounds: no device would take it.
        TooLargeError: longer than MAX_SPEC_BYTES.
    """
    try:
        data = _canonical(_SPEC_DECODER.decode(_ENCODER.encode(spec)))
    except (msgspec.DecodeError, msgspec.EncodeError, TypeError, OverflowError, UnicodeError) as error:
        raise SchemaError(f"TaskSpec: {_line(error)}") from None
    if len(data) > MAX_SPEC_BYTES:
        raise TooLargeError(f"TaskSpec: {len(data)} bytes, at most {MAX_SPEC_BYTES}")
    return data


def decode_spec(data: bytes) -> TaskSpec:
    """Return the TaskSpec in a blob whose content was checked against the name in a signed task.

    Raises:
        TooLargeError: longer than MAX_SPEC_BYTES; nothing is decoded.
        SchemaError: no TaskSpec, or not in its one form.
    """
    if len(data) > MAX_SPEC_BYTES:
        raise TooLargeError(f"TaskSpec: {len(data)} bytes, at most {MAX_SPEC_BYTES}")
    try:
        spec: TaskSpec = _SPEC_DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError) as error:
        raise SchemaError(f"TaskSpec: {_line(error)}") from None
    if _canonical(spec) != data:
        raise SchemaError("TaskSpec: not in canonical form")
    return spec


def _line(error: Exception) -> str:
    """Return an error's text as one short line: parts of it were written by the sender."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:200])


def _signed(fleet: str, kind: int, body: bytes) -> bytes:
    return b"".join((b"liberatai/v1", fleet.encode(), b"\0", bytes((kind,)), body))


@lru_cache(_PARSED)
def _parsed(public: bytes) -> PublicKey:
    """Return a public key that was parsed and checked once.

    Raises:
        SignatureError: it is weak, or no key.
    """
    y = int.from_bytes(public, "little") & (1 << 255) - 1
    if y >= _FIELD_PRIME or y in _SMALL_ORDER:
        raise SignatureError("a weak public key: it verifies what nobody signed")
    return LIBRARY.public(public)


def _verify(public: bytes, signature: bytes, signed: bytes) -> None:
    if not _parsed(public).verify(signature, signed):
        raise SignatureError("the signature does not belong to these bytes")


def _decode(kind: int, body: bytes | memoryview) -> Message:
    try:
        message: Message = _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError) as error:
        raise SchemaError(f"{KINDS[kind].__name__}: {_line(error)}") from None
    # The decoder keeps the last of doubled keys and accepts several encodings of one value; exactly one
    # byte string per message leaves no room for two readers that understand it differently.
    if _canonical(message) != body:
        raise SchemaError(f"{KINDS[kind].__name__}: not in canonical form")
    return message
