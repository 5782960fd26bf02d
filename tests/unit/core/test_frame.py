"""Bytes that nobody signed, or that mean something else than they say, are refused with the right code."""

import contextlib
import math
import pickle
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tests.golden import make

from liberatai_core.contract import frame as f
from liberatai_core.contract import messages as m
from liberatai_core.contract.frame import HEADER_BYTES, MAGIC, Signer, expect, key_id, open_frame, seal
from liberatai_core.contract.limits import MAX_SPEC_BYTES
from liberatai_core.errors import (
    FrameError,
    LiberataiError,
    ProtocolVersionError,
    RevokedError,
    SchemaError,
    SignatureError,
    TooLargeError,
    UnknownDeviceError,
)
from liberatai_core.structure import Structure, Tensor

FLEET = make.FLEET
ALICE = make.SIGNER
BOB = Signer.from_seed(b"b" * 32, FLEET)
KNOWN = {key_id(s.public_key): s.public_key for s in (ALICE, BOB)}
STATE = m.State(device="dev-1", state="online", session=1)
KINDS = pytest.mark.parametrize("kind", list(m.KIND_OF), ids=lambda kind: kind.__name__)


def read(data: bytes, fleet: str = FLEET) -> Any:
    return open_frame(data, fleet, KNOWN.get)


def forge(kind: Any, body: bytes, signer: Signer = ALICE) -> Any:
    """Return a frame that is signed correctly, whatever its body is: what a hostile device can send."""
    number = m.KIND_OF[kind]
    signature = signer.private.sign(b"liberatai/v1" + signer.fleet.encode() + b"\0" + bytes([number]) + body)
    return MAGIC + bytes([number]) + key_id(signer.public_key) + signature + body


def body_of(message: Any) -> Any:
    return seal(message, ALICE)[HEADER_BYTES:]


def fields_of(message: Any) -> Any:
    return msgpack.unpackb(body_of(message))


# --- what is right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", make.cases().values(), ids=make.cases())
def test_a_sealed_message_opens_as_itself_and_says_who_signed(message: Any) -> None:
    opened = read(seal(message, BOB))
    assert opened.message == message
    assert opened.public_key == BOB.public_key


def test_a_frame_has_the_documented_layout() -> None:
    data = seal(STATE, ALICE)
    body = data[76:]
    assert data[:4] == b"LA1\x01"
    assert data[4:12] == key_id(ALICE.public_key) == f.claimed_key(data)
    Ed25519PublicKey.from_public_bytes(ALICE.public_key).verify(
        data[12:76], b"liberatai/v1golden\0\x01" + body
    )
    assert fields_of(STATE) == {"device": "dev-1", "state": "online", "session": 1}


@pytest.mark.parametrize("message", make.cases().values(), ids=make.cases())
def test_the_msgpack_package_reads_and_writes_the_same_bytes(message: Any) -> None:
    body = body_of(message)
    plain = msgpack.unpackb(body, strict_map_key=True)
    assert plain == msgspec.msgpack.decode(body)
    assert msgpack.packb(plain, use_bin_type=True) == body
    assert read(forge(type(message), msgpack.packb(plain, use_bin_type=True))).message == message


# --- length, magic, kind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"L", b"LA1", b"LA1\x01", bytes(76), seal(STATE, ALICE)[:76]],
    ids=["empty", "1 byte", "magic", "kind", "zeros", "no body"],
)
def test_what_is_too_short_for_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data)


@pytest.mark.parametrize("magic", [b"LA0", b"LA2", b"LA\xff", b"LA\x00"], ids=ascii)
def test_another_protocol_version_is_named_as_such(magic: bytes) -> None:
    with pytest.raises(ProtocolVersionError) as caught:
        read(magic + seal(STATE, ALICE)[3:])
    assert caught.value.code == "E_VERSION"
    with pytest.raises(ProtocolVersionError):
        expect(magic + b"\xee" + seal(STATE, ALICE)[4:], m.State, FLEET, KNOWN.get)


@pytest.mark.parametrize("magic", [b"la1", b"\x00\x00\x00", b"MQT", b"AL1", b"L11"], ids=ascii)
def test_wrong_magic_is_no_frame(magic: bytes) -> None:
    with pytest.raises(FrameError):
        read(magic + seal(STATE, ALICE)[3:])


@pytest.mark.parametrize("number", [n for n in range(256) if n not in m.KINDS])
def test_an_unknown_kind_is_no_frame(number: int) -> None:
    with pytest.raises(FrameError, match="unknown kind"):
        read(MAGIC + bytes([number]) + seal(STATE, ALICE)[4:])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_is_no_frame(protocol: int) -> None:
    data = pickle.dumps({"weights": [0.0] * 100}, protocol)
    assert len(data) > HEADER_BYTES
    with pytest.raises(FrameError):
        read(data)


def test_a_pickle_that_would_run_a_command_is_no_frame_and_no_body() -> None:
    data = b"cos\nsystem\n(S'false'\ntR." + b" " * 100
    with pytest.raises(FrameError):
        read(data)
    with pytest.raises(SchemaError):
        read(forge(m.Update, data))


def _forbidden(_: Any) -> None:
    raise AssertionError("the key was looked up before the length was checked")


@KINDS
def test_an_oversize_body_is_refused_before_any_key_is_looked_up(kind: Any) -> None:
    data = MAGIC + bytes([m.KIND_OF[kind]]) + bytes(72) + bytes(m.MAX_BYTES[kind] + 1)
    with pytest.raises(TooLargeError) as caught:
        open_frame(data, FLEET, _forbidden)
    assert caught.value.code == "E_SIZE"


@KINDS
def test_a_body_of_exactly_the_limit_reaches_the_signature(kind: Any) -> None:
    with pytest.raises(SignatureError):
        read(
            MAGIC + bytes([m.KIND_OF[kind]]) + key_id(ALICE.public_key) + bytes(64) + bytes(m.MAX_BYTES[kind])
        )


# --- every truncation, every flipped bit -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [m.Task, m.Capability, m.Update], ids=lambda kind: kind.__name__)
def test_a_frame_truncated_at_any_byte_is_refused(kind: Any) -> None:
    data = seal(make.MINIMAL[kind], ALICE)
    for length in range(len(data)):
        with pytest.raises((FrameError, SignatureError)):
            read(data[:length])


@pytest.mark.parametrize("kind", [m.Task, m.Capability], ids=lambda kind: kind.__name__)
def test_a_frame_with_any_bit_flipped_is_refused(kind: Any) -> None:
    data = seal(make.MINIMAL[kind], ALICE)
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(
            (FrameError, ProtocolVersionError, UnknownDeviceError, SignatureError, SchemaError, TooLargeError)
        ):
            read(bytes(broken))


@KINDS
def test_a_body_truncated_at_any_byte_is_refused_even_if_it_were_signed_so(kind: Any) -> None:
    body = body_of(make.cases().get(f"{kind.__name__}-full", make.MINIMAL[kind]))
    for length in range(1, len(body)):
        with pytest.raises(SchemaError):
            f._decode(m.KIND_OF[kind], memoryview(body)[:length])


@KINDS
def test_a_body_with_any_bit_flipped_would_be_refused_or_another_valid_message_if_it_were_signed_so(
    kind: Any,
) -> None:
    body = body_of(make.cases().get(f"{kind.__name__}-full", make.MINIMAL[kind]))
    refused = 0
    for bit in range(len(body) * 8):
        broken = bytearray(body)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            assert f._own_body(f._decode(m.KIND_OF[kind], memoryview(broken)), m.KIND_OF[kind]) == broken
        except SchemaError:
            refused += 1
    assert refused > len(body)


# --- signatures --------------------------------------------------------------------------------------------


def test_an_unsigned_frame_is_refused() -> None:
    data = seal(STATE, ALICE)
    with pytest.raises(SignatureError) as caught:
        read(data[:12] + bytes(64) + data[76:])
    assert caught.value.code == "E_SIG"


def test_a_frame_of_an_unknown_key_is_refused_without_being_decoded() -> None:
    stranger = Signer.from_seed(b"s" * 32, FLEET)
    for data in (seal(STATE, stranger), forge(m.Update, b"\xc1 not msgpack", stranger)):
        with pytest.raises(UnknownDeviceError):
            read(data)


def test_a_frame_with_the_key_id_of_somebody_else_is_refused() -> None:
    data = seal(STATE, ALICE)
    with pytest.raises(SignatureError):
        read(data[:4] + key_id(BOB.public_key) + data[12:])


def test_a_signature_of_another_message_is_refused() -> None:
    other = seal(m.State(device="dev-1", state="offline", session=1), ALICE)
    data = seal(STATE, ALICE)
    with pytest.raises(SignatureError):
        read(data[:12] + other[12:76] + data[76:])


@KINDS
def test_a_signature_holds_for_one_kind_only(kind: Any) -> None:
    data = seal(make.MINIMAL[kind], ALICE)
    for other in set(m.KINDS) - {m.KIND_OF[kind]}:
        with pytest.raises(SignatureError):
            read(data[:3] + bytes([other]) + data[4:])


@pytest.mark.parametrize("fleet", ["other", "golde", "goldenn", "", "GOLDEN"])
def test_a_signature_holds_for_one_fleet_only(fleet: str) -> None:
    with pytest.raises(SignatureError):
        read(seal(STATE, ALICE), fleet)
    with pytest.raises(SignatureError):
        read(seal(STATE, Signer.from_seed(bytes(range(32)), fleet)))


def test_bytes_after_the_body_are_refused_with_and_without_a_new_signature() -> None:
    with pytest.raises(SignatureError):
        read(seal(STATE, ALICE) + b"\x00")
    for tail in (b"\x00", b"\xc0", body_of(STATE)):
        with pytest.raises(SchemaError):
            read(forge(m.State, body_of(STATE) + tail))


def test_the_second_form_of_a_signature_is_refused() -> None:
    """S + L verifies the same equation; RFC 8032 demands that it is refused."""
    order = 2**252 + 27742317777372353535851937790883648493
    data = seal(STATE, ALICE)
    s = int.from_bytes(data[44:76], "little") + order
    assert s < 2**256
    with pytest.raises(SignatureError):
        read(data[:44] + s.to_bytes(32, "little") + data[76:])


def test_a_revoked_key_is_refused_by_its_owner_and_nothing_is_decoded() -> None:
    def revoked(_: Any) -> None:
        raise RevokedError("dev-1 is shut out")

    with pytest.raises(RevokedError):
        open_frame(forge(m.State, b"\xc1"), FLEET, revoked)


# Edwards25519 in plain integers, to find the weak keys without trusting the table under test.
P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def _add(a: Any, b: Any) -> Any:
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def _on_curve(y: int) -> Any:
    """Return the point with this y, or None."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (x, y) if (x * x - square) % P == 0 else None


def _weak_points() -> Any:
    """Return the points whose order divides 8: 8 * group order / 8 of any point."""
    order = 2**252 + 27742317777372353535851937790883648493
    found = set()
    for y in range(2, 40):
        point, result, factor = _on_curve(y), (0, 1), order
        while point and factor:
            if factor & 1:
                result = _add(result, point)
            point, factor = _add(point, point), factor >> 1
        found.add(result)
    return found


def _weak_keys() -> Any:
    """Return every encoding of a weak point: both signs, and y + p where that fits."""
    ys = {y + extra for _, y in _weak_points() for extra in (0, P) if y + extra < 2**255}
    return sorted((y | sign << 255).to_bytes(32, "little") for y in ys for sign in (0, 1))


def test_there_are_eight_weak_points() -> None:
    assert len(_weak_points()) == 8


@pytest.mark.parametrize("key", _weak_keys(), ids=lambda key: key.hex()[:8])
def test_a_weak_public_key_verifies_nothing_although_openssl_would_take_it(key: bytes) -> None:
    """R = identity and S = 0 is a valid signature under such a key for one message in 8, or more."""
    signature = b"\x01" + bytes(63)
    for session in range(40):
        body = body_of(
            m.Capability(device="d", public_key=key, session=session, agent_version="", tier="full")
        )
        data = MAGIC + b"\x02" + key_id(key) + signature + body
        for keys in ({key_id(key): key}, {}):
            with pytest.raises(SignatureError):
                open_frame(data, FLEET, keys.get)


def test_openssl_does_take_a_weak_key() -> None:
    """Positive control of the test above: the check is ours to make."""
    Ed25519PublicKey.from_public_bytes(b"\x01" + bytes(31)).verify(b"\x01" + bytes(63), b"anything")


@pytest.mark.parametrize(
    "key",
    [b"", bytes(31), bytes(33), b"\xff" * 32, (P + 5).to_bytes(32, "little"), (2).to_bytes(32, "little")],
    ids=["empty", "short", "long", "ones", "not canonical", "off the curve"],
)
def test_what_is_no_public_key_verifies_nothing(key: bytes) -> None:
    with pytest.raises(SignatureError):
        open_frame(seal(STATE, ALICE), FLEET, lambda _: key)


# --- introduction -----------------------------------------------------------------------------------------

NEW = Signer.from_seed(b"n" * 32, FLEET)


def introduction(public_key: bytes) -> m.Capability:
    return m.Capability(device="new", public_key=public_key, session=1, agent_version="1", tier="full")


def test_a_new_device_introduces_itself_with_its_own_key() -> None:
    opened = read(seal(introduction(NEW.public_key), NEW))
    assert opened.public_key == NEW.public_key
    assert opened.message == introduction(NEW.public_key)


def test_an_introduction_that_names_another_key_than_it_is_signed_with_is_refused() -> None:
    with pytest.raises(SignatureError):
        read(seal(introduction(ALICE.public_key), NEW))


def test_an_introduction_signed_by_somebody_else_is_refused() -> None:
    body = body_of(introduction(NEW.public_key))
    stranger = Signer.from_seed(b"s" * 32, FLEET)
    signature = forge(m.Capability, body, stranger)[12:76]
    with pytest.raises(SignatureError):
        read(MAGIC + b"\x02" + key_id(NEW.public_key) + signature + body)


def test_an_introduction_into_another_fleet_is_refused() -> None:
    with pytest.raises(SignatureError):
        read(seal(introduction(NEW.public_key), NEW), "other")


@pytest.mark.parametrize(
    "body",
    [b"\x80", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 60_000, body_of(STATE)],
    ids=["empty map", "reserved", "array32", "nested", "another kind"],
)
def test_an_unreadable_introduction_is_refused_within_its_bounds(body: bytes) -> None:
    with pytest.raises(SchemaError):
        read(forge(m.Capability, body, NEW))


@pytest.mark.parametrize(
    "kind",
    [k for k in m.KIND_OF if k not in (m.Capability, m.CertificateRequest)],
    ids=lambda kind: kind.__name__,
)
def test_nothing_else_introduces(kind: Any) -> None:
    with pytest.raises(UnknownDeviceError):
        read(seal(make.MINIMAL[kind], NEW))


def test_a_known_device_signs_its_capability_with_the_key_that_is_known() -> None:
    with pytest.raises(SignatureError):
        read(
            seal(introduction(NEW.public_key), NEW)[:4]
            + key_id(ALICE.public_key)
            + seal(introduction(NEW.public_key), NEW)[12:]
        )


# --- bodies of a device that signs correctly -----------------------------------------------------------------

CLAIMS = {"array32": b"\xdd", "map32": b"\xdf", "bin32": b"\xc6", "str32": b"\xdb", "ext32": b"\xc9"}


@pytest.mark.parametrize("head", CLAIMS)
@KINDS
def test_a_header_that_promises_four_billion_entries_allocates_nothing(kind: Any, head: str) -> None:
    claim = CLAIMS[head] + b"\xff\xff\xff\xff"
    known = make.cases().get(f"{kind.__name__}-full", make.MINIMAL[kind])
    claimed = [make.changed(known, name, msgspec.Raw(claim)) for name in kind.__struct_fields__]
    bodies = [claim, claim + b"\x01" * 500, body_of(known)[:-1] + claim]
    bodies += map(msgspec.msgpack.encode, claimed)
    frames = [forge(kind, body) for body in bodies]
    tracemalloc.start()
    for data in frames:
        with pytest.raises(SchemaError):
            read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64_000


BOMBS = {
    "nested arrays": b"\x91" * 1_000_000,
    "nested maps": b"\x81\xa1a" * 500 + b"\x80",
    "nested maps of ints": b"\x81\x01" * 500_000,
    "a million empty maps": b"\xdd" + struct.pack(">I", 1_000_000) + b"\x80" * 1_000_000,
    "a million empty arrays": b"\xdd" + struct.pack(">I", 1_000_000) + b"\x90" * 1_000_000,
    "a million nils": b"\xdd" + struct.pack(">I", 1_000_000) + b"\xc0" * 1_000_000,
    "a map of a million zeros": b"\xdf" + struct.pack(">I", 500_000) + b"\x00" * 1_000_000,
    "zeros": bytes(1_000_000),
}


@pytest.mark.parametrize("field", [None, "body", "class_counts", "evaluation", "device", "unknown"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_at_most_twice_its_length(bomb: str, field: str) -> None:
    body = BOMBS[bomb]
    if field:
        body = msgspec.msgpack.encode(make.changed(make.MINIMAL[m.Update], field, msgspec.Raw(body)))
    data = forge(m.Update, body)
    tracemalloc.start()
    with pytest.raises(SchemaError):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * len(data) + 64_000


@pytest.mark.parametrize("bomb", [b for b in BOMBS if len(BOMBS[b]) > 600_000])
@pytest.mark.parametrize("kind", [k for k in m.KIND_OF if k is not m.Update], ids=lambda kind: kind.__name__)
def test_a_bomb_in_any_other_kind_is_too_large_before_any_key_is_looked_up(kind: Any, bomb: str) -> None:
    with pytest.raises(TooLargeError):
        open_frame(forge(kind, BOMBS[bomb]), FLEET, _forbidden)


def _map(*pairs: Any) -> Any:
    return bytes([0x80 + len(pairs)]) + b"".join(a + b for a, b in pairs)


DEVICE, ONLINE, SESSION = (b"\xa6device", b"\xa2d1"), (b"\xa5state", b"\xa6online"), (b"\xa7session", b"\x01")
GOOD = _map(DEVICE, ONLINE, SESSION)

NOT_CANONICAL = {
    "doubled key, same value": _map(DEVICE, ONLINE, SESSION, SESSION),
    "doubled key, other value": _map(DEVICE, ONLINE, SESSION, (b"\xa7session", b"\x02")),
    "other order": _map(ONLINE, DEVICE, SESSION),
    "map16": b"\xde\x00\x03" + GOOD[1:],
    "map32": b"\xdf\x00\x00\x00\x03" + GOOD[1:],
    "str8 key": _map((b"\xd9\x06device", b"\xa2d1"), ONLINE, SESSION),
    "str32 value": _map((b"\xa6device", b"\xdb\x00\x00\x00\x02d1"), ONLINE, SESSION),
    "uint8": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcc\x01")),
    "uint64": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcf" + bytes(7) + b"\x01")),
    "int8": _map(DEVICE, ONLINE, (b"\xa7session", b"\xd0\x01")),
    "float for a whole number": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcb" + struct.pack(">d", 1.0))),
    "default written": _map(DEVICE, ONLINE, SESSION, (b"\xa7version", b"\xa0")),
    "bin for a string": _map((b"\xa6device", b"\xc4\x02d1"), ONLINE, SESSION),
    "bin for a key": _map((b"\xc4\x06device", b"\xa2d1"), ONLINE, SESSION),
}

MALFORMED = {
    "unknown field": _map(DEVICE, ONLINE, SESSION, (b"\xa5extra", b"\x01")),
    "unknown field, nested": _map(DEVICE, ONLINE, SESSION, (b"\xa5extra", b"\x91" * 60)),
    "missing field": _map(DEVICE, ONLINE),
    "int key": _map(DEVICE, ONLINE, SESSION, (b"\x01", b"\x01")),
    "nil key": _map(DEVICE, ONLINE, (b"\xc0", b"\x01")),
    "array key": _map(DEVICE, ONLINE, (b"\x90", b"\x01")),
    "ext value": _map((b"\xa6device", b"\xc7\x02\x05d1"), ONLINE, SESSION),
    "fixext value": _map(DEVICE, ONLINE, (b"\xa7session", b"\xd4\x05\x01")),
    "timestamp": _map(DEVICE, ONLINE, (b"\xa7session", b"\xd6\xff\x00\x00\x00\x01")),
    "ext as body": b"\xc7\x04\xff" + bytes(4),
    "invalid UTF-8 value": _map((b"\xa6device", b"\xa2\xff\xfe"), ONLINE, SESSION),
    "invalid UTF-8 key": _map((b"\xa6devic\xff", b"\xa2d1"), ONLINE, SESSION),
    "surrogate": _map((b"\xa6device", b"\xa3\xed\xa0\x80"), ONLINE, SESSION),
    "overlong UTF-8": _map((b"\xa6device", b"\xa2\xc0\xaf"), ONLINE, SESSION),
    "nil": _map(DEVICE, ONLINE, (b"\xa7session", b"\xc0")),
    "bool": _map(DEVICE, ONLINE, (b"\xa7session", b"\xc3")),
    "string": _map(DEVICE, ONLINE, (b"\xa7session", b"\xa11")),
    "negative": _map(DEVICE, ONLINE, (b"\xa7session", b"\xff")),
    "int64 minimum": _map(DEVICE, ONLINE, (b"\xa7session", b"\xd3\x80" + bytes(7))),
    "uint64 maximum": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcf" + b"\xff" * 8)),
    "above 2^53": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcf\x00\x20" + bytes(5) + b"\x01")),
    "NaN": _map(DEVICE, ONLINE, (b"\xa7session", b"\xcb" + struct.pack(">d", math.nan))),
    "reserved byte": b"\xc1" + GOOD,
    "array instead of map": b"\x93\xa2d1\xa6online\x01",
    "nil body": b"\xc0",
    "empty map": b"\x80",
    "a name with a newline": _map((b"\xa6device", b"\xa3d1\n"), ONLINE, SESSION),
}


def test_the_hand_written_body_is_good_where_nothing_is_wrong_with_it() -> None:
    assert read(forge(m.State, GOOD)).message == m.State(device="d1", state="online", session=1)


@pytest.mark.parametrize("name", NOT_CANONICAL)
def test_a_second_encoding_of_a_message_is_refused(name: str) -> None:
    with pytest.raises(SchemaError):
        read(forge(m.State, NOT_CANONICAL[name]))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_body_that_is_not_its_kind_is_refused(name: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read(forge(m.State, MALFORMED[name]))
    assert caught.value.code == "E_SCHEMA"


def test_a_float32_is_no_second_form_of_a_float() -> None:
    fields = fields_of(m.Telemetry(device="d", session=1, cpu_percent=0.5))
    for value in (b"\xca" + struct.pack(">f", 0.5), b"\x01"):
        with pytest.raises(SchemaError):
            read(forge(m.Telemetry, msgspec.msgpack.encode(fields | {"cpu_percent": msgspec.Raw(value)})))


def _float_paths(kind: Any) -> Iterator[Any]:
    for name, value in msgspec.structs.asdict(make.FULL.get(kind, make.MINIMAL[kind])).items():
        if isinstance(value, float):
            yield name


FLOATS = [(kind, name) for kind in m.KIND_OF for name in _float_paths(kind)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda x: getattr(x, "__name__", x))
def test_a_float_that_is_not_finite_is_refused_on_the_wire(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(SchemaError):
        read(forge(kind, msgpack.packb(make.changed(make.FULL[kind], name, value))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_float_that_is_not_finite_is_refused_in_a_spec(value: Any) -> None:
    training = make.changed(make.FULL_SPEC.training, "learning_rate", value)
    for body in (
        make.changed(make.FULL_SPEC, "training", training),
        make.changed(make.FULL_SPEC, "deadline_s", value),
    ):
        with pytest.raises(SchemaError):
            f.decode_spec(msgpack.packb(body))


def test_floats_of_every_message_are_tried() -> None:
    assert {name for _, name in FLOATS} >= {"gflops", "cpu_percent", "loss", "density"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", -1),
        ("round", 0),
        ("round", 2**32 - 1),
        ("samples", 0),
        ("samples", 2**32 - 1),
        ("samples", -1),
        ("epoch", -1),
        ("samples", 60.0),
        ("samples", None),
    ],
)
def test_counts_that_cannot_be_are_refused_on_the_wire(field: str, value: Any) -> None:
    with pytest.raises(SchemaError, match=make.where(m.Update, field)):
        read(forge(m.Update, msgpack.packb(make.changed(make.MINIMAL[m.Update], field, value))))


def test_a_structure_with_impossible_tensors_is_refused_on_the_wire() -> None:
    for tensors in (
        [{"name": "a", "shape": [-1]}],
        [{"name": "a", "shape": [2**28, 2**28]}],
        [{"name": "a", "shape": [1] * 100}],
    ):
        fields = make.changed(make.SPEC, "structure", make.changed(make.STRUCTURE, "tensors", tensors))
        with pytest.raises(SchemaError):
            f.decode_spec(msgpack.packb(fields))


def test_a_refusal_is_one_short_line_whatever_the_sender_wrote() -> None:
    body = _map(DEVICE, ONLINE, SESSION, (b"\xd9\xff" + b"\x1b[31m\r\nroot: " + b"x" * 243, b"\x01"))
    with pytest.raises(SchemaError) as caught:
        read(forge(m.State, body))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_refused_frame_leaves_no_trace_in_the_decoder() -> None:
    for body in MALFORMED.values():
        with pytest.raises(LiberataiError):
            read(forge(m.State, body))
        assert read(forge(m.State, GOOD)).message.session == 1


# --- sealing and expecting -------------------------------------------------------------------------------------


def test_a_message_that_no_receiver_would_take_is_not_sealed() -> None:
    for message in (
        m.State(device="Dev 1", state="online", session=1),
        m.State(device="d", state="online", session=-1),
        m.Event(device="d", session=1, number=1, name="n", text="x" * 513),
        m.State(device="d", state="online", session=1, version="\ud800"),
        m.State(device="d", state="online", session=2**70),
        m.State(device="d", state=object(), session=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(SchemaError):
            seal(message, ALICE)


def test_a_whole_number_in_a_float_field_travels_as_a_float() -> None:
    message = m.Telemetry(device="d", session=1, cpu_percent=50)
    assert read(seal(message, ALICE)).message == message
    assert seal(message, ALICE) == seal(m.Telemetry(device="d", session=1, cpu_percent=50.0), ALICE)


def test_a_part_of_a_message_is_not_sealed() -> None:
    with pytest.raises(FrameError, match="Step"):
        seal(make.KEYFRAME, ALICE)


def test_a_message_beyond_its_size_is_not_sealed() -> None:
    chains = {f"{n:0128}": (make.KEYFRAME,) * 50 for n in range(64)}
    with pytest.raises(TooLargeError):
        seal(msgspec.structs.replace(make.MINIMAL[m.Head], chains=chains), ALICE)


def test_a_spec_beyond_its_size_is_neither_written_nor_read() -> None:
    tensors = tuple(Tensor(name=f"{i:04}" * 32, shape=(1,)) for i in range(1000))
    big = Structure(family="mlp", params={}, tensors=tensors)
    with pytest.raises(TooLargeError):
        f.encode_spec(msgspec.structs.replace(make.SPEC, structure=big))
    with pytest.raises(TooLargeError):
        f.decode_spec(bytes(MAX_SPEC_BYTES + 1))


def test_a_spec_has_one_encoding_and_no_truncated_or_changed_one_is_another_spec() -> None:
    data = f.encode_spec(make.FULL_SPEC)
    assert f.decode_spec(data) == make.FULL_SPEC
    assert msgpack.packb(msgpack.unpackb(data), use_bin_type=True) == data
    for length in range(len(data)):
        with pytest.raises(SchemaError):
            f.decode_spec(data[:length])
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(SchemaError):
            assert f.encode_spec(f.decode_spec(bytes(broken))) == broken


@pytest.mark.parametrize("kind", [k for k in m.KIND_OF if k in f._ARRAYS], ids=lambda kind: kind.__name__)
def test_an_array_leaves_out_defaults_at_its_end_and_nothing_else(kind: Any) -> None:
    message = make.MINIMAL[kind]
    whole = msgspec.to_builtins(message, builtin_types=(bytes,))
    told = [value != field.default for value, field in zip(whole, msgspec.structs.fields(kind), strict=True)]
    least = max(place for place, is_told in enumerate(told) if is_told) + 1
    assert len(fields_of(message)) == least
    for length in range(len(whole) + 1):
        if length != least:
            with pytest.raises(SchemaError):
                read(forge(kind, msgpack.packb(whole[:length])))
    with pytest.raises(SchemaError):
        read(forge(kind, msgpack.packb([*whole, None])))


def test_expect_returns_the_wanted_kind_and_refuses_others_before_any_crypto() -> None:
    assert expect(seal(STATE, ALICE), m.State, FLEET, KNOWN.get) == STATE
    with pytest.raises(FrameError, match="State, wanted Update"):
        expect(seal(STATE, ALICE), m.Update, FLEET, _forbidden)


@pytest.mark.parametrize(
    "data", [b"", b"LA1", b"\x00" * 4, bytes(100)], ids=["empty", "magic", "zeros", "more zeros"]
)
def test_expect_refuses_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        expect(data, m.State, FLEET, KNOWN.get)
