"""What must hold for every message, topic, object and heap of bytes, not only for those somebody thought of."""

import hashlib
import os
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect as i
from tests.golden import make

from liberatai_core.contract import messages as m
from liberatai_core.contract.chunks import Assembly, count, cut, missing
from liberatai_core.contract.frame import (
    HEADER_BYTES,
    MAGIC,
    Signer,
    _decode,
    expect,
    key_id,
    open_frame,
    seal,
)
from liberatai_core.contract.limits import MAX_CHUNKS
from liberatai_core.contract.topics import BLOB, FLEET_OR_DEVICE, NAME, Topics, parse
from liberatai_core.errors import ConfigError, LiberataiError, SchemaError
from liberatai_core.settings import parse_mapping
from liberatai_core.structure import DataContract, Structure, Tensor

settings.register_profile("quick", max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("usual", max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))

FLEET = "fleet"
SIGNER = Signer.from_seed(b"p" * 32, FLEET)
KEYS = {key_id(SIGNER.public_key): SIGNER.public_key}
KINDS = pytest.mark.parametrize("kind", list(m.KIND_OF), ids=lambda kind: kind.__name__)

tensors = st.lists(
    st.builds(
        Tensor,
        name=st.text(min_size=1, max_size=20),
        shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda tensor: tensor.name,
).map(tuple)
structures = st.builds(
    Structure,
    family=st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True),
    params=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True),
        st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        max_size=3,
    ),
    tensors=tensors,
)

contracts = st.builds(
    DataContract,
    input_shape=st.lists(st.integers(1, 64), min_size=1, max_size=4).map(tuple),
    classes=st.integers(2, 65_536),
)
WHOLE = {Structure: structures, DataContract: contracts}
"""Types whose fields bound each other."""


def _most(kind: Any, usual: int) -> int:
    return min(int(kind.max_length), usual)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for everything that an annotation allows (containers kept short)."""
    match kind:
        case i.IntType():
            return st.integers(kind.ge, kind.le)
        case i.FloatType():
            lowest = kind.ge if kind.gt is None else kind.gt
            return st.floats(
                lowest, kind.le, exclude_min=kind.gt is not None, allow_nan=False, allow_infinity=False
            )
        case i.StrType():
            if kind.pattern:
                return st.from_regex(
                    kind.pattern.removeprefix("^").removesuffix(r"\Z"),
                    fullmatch=True,
                    alphabet=st.characters(codec="ascii"),
                )
            return st.text(min_size=kind.min_length or 0, max_size=_most(kind, 20))
        case i.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=_most(kind, 40))
        case i.VarTupleType():
            return st.lists(
                values(kind.item_type), min_size=kind.min_length or 0, max_size=_most(kind, 3)
            ).map(tuple)
        case i.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case i.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
        case i.UnionType():
            return st.one_of(*map(values, kind.types))
        case i.LiteralType():
            return st.sampled_from(kind.values)
        case i.BoolType():
            return st.booleans()
        case i.NoneType():
            return st.none()
        case i.StructType() if kind.cls in WHOLE:
            return WHOLE[kind.cls]
        case i.StructType() if kind.cls in (m.Task, m.Cancel):
            return _paths(kind)
        case i.StructType():
            required = {f.name: values(f.type) for f in kind.fields if f.required}
            optional = {f.name: values(f.type) for f in kind.fields if not f.required}
            return st.fixed_dictionaries(required, optional=optional).map(lambda fields: kind.cls(**fields))
    raise AssertionError(f"no strategy for {kind}")


def _paths(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for messages that lead a device to weights: from a name, or from a keyframe."""
    fields = {f.name: values(f.type) for f in kind.fields}
    fields["held"] = st.just(b"") | st.binary(min_size=16, max_size=16)
    leads = fields["held"].flatmap(
        lambda held: st.fixed_dictionaries(fields | {"held": st.just(held)}).filter(
            lambda found: held or found.get("steps", True)
        )
    )
    return leads.map(lambda found: kind.cls(**found))


MESSAGES = {kind: values(i.type_info(kind)) for kind in m.KIND_OF}


@KINDS
@given(data=st.data())
def test_every_message_that_its_type_allows_survives_the_wire_and_has_one_encoding_in_any_library(
    kind: Any, data: st.DataObject
) -> None:
    message = data.draw(MESSAGES[kind])
    frame = seal(message, SIGNER)
    opened = open_frame(frame, FLEET, KEYS.get)
    assert opened.message == message
    assert type(opened.message) is kind
    assert opened.public_key == SIGNER.public_key
    assert seal(opened.message, SIGNER) == frame
    assert expect(frame, kind, FLEET, KEYS.get) == message
    plain = msgpack.unpackb(frame[HEADER_BYTES:])
    assert plain == msgspec.msgpack.decode(frame[HEADER_BYTES:])
    assert msgpack.packb(plain, use_bin_type=True) == frame[HEADER_BYTES:]


def _only_known_errors(use: Any) -> None:
    refused = None
    try:
        use()
    except LiberataiError as error:
        refused = error
    assert refused is None or (refused.code != "E_INTERNAL" and str(refused).isprintable())


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_known_errors(noise: bytes) -> None:
    for data in (noise, MAGIC + noise, MAGIC + b"\x02" + noise):
        _only_known_errors(lambda data=data: open_frame(data, FLEET, KEYS.get))
        _only_known_errors(lambda data=data: expect(data, m.Update, FLEET, KEYS.get))


@KINDS
@given(noise=st.binary(max_size=200))
def test_random_bodies_raise_nothing_but_known_errors(kind: Any, noise: bytes) -> None:
    with pytest.raises(SchemaError):
        _decode(m.KIND_OF[kind], memoryview(noise))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@KINDS
@given(data=st.data())
def test_any_value_in_any_field_is_refused_or_gives_that_very_message(kind: Any, data: st.DataObject) -> None:
    message = make.cases().get(f"{kind.__name__}-full", make.MINIMAL[kind])
    field = data.draw(st.sampled_from(type(message).__struct_fields__))
    body = msgpack.packb(make.changed(message, field, data.draw(anything)))
    try:
        message = _decode(m.KIND_OF[kind], memoryview(body))
    except SchemaError:
        return
    assert seal(message, SIGNER)[HEADER_BYTES:] == body


@given(st.data())
def test_bytes_changed_in_a_good_frame_are_never_accepted(data: st.DataObject) -> None:
    frame = bytearray(seal(make.MINIMAL[m.Update], SIGNER))
    for place in data.draw(st.sets(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
        frame[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(LiberataiError):
        open_frame(bytes(frame), FLEET, KEYS.get)


# --- topics ---------------------------------------------------------------------------------------------------


def _matching(pattern: Any) -> Any:
    return st.from_regex(pattern.removeprefix("^").removesuffix(r"\Z"), fullmatch=True)


parts = st.none() | st.integers(0, MAX_CHUNKS - 1)


@given(
    fleet=_matching(FLEET_OR_DEVICE),
    device=_matching(FLEET_OR_DEVICE),
    job=_matching(NAME),
    blob=_matching(BLOB),
    part=parts,
)
def test_the_parser_is_the_inverse_of_every_builder(
    fleet: str, device: str, job: str, blob: str, part: Any
) -> None:
    t = Topics(fleet=fleet)
    found = parse(t.upload(device, blob, part), fleet)
    assert (found.side, found.owner, found.leaf, found.transfer, found.part) == (
        "up",
        device,
        "x",
        blob,
        part,
    )
    found = parse(t.blob(blob, part), fleet)
    assert (found.side, found.owner, found.leaf, found.transfer, found.part) == ("pub", blob, "b", None, part)
    for leaf in ("state", "caps", "rep", "tele", "ev", "rsp"):
        found = parse(t.up(device, leaf), fleet)
        assert (found.side, found.owner, found.leaf) == ("up", device, leaf)
    for leaf in ("want", "task", "req", "xa"):
        found = parse(t.down(device, leaf), fleet)
        assert (found.side, found.owner, found.leaf) == ("dn", device, leaf)
    assert parse(t.head(job), fleet).owner == job
    assert parse(t.coordinator(device), fleet).owner == device


def _rebuilt(place: Any, fleet: str) -> Any:
    t = Topics(fleet=fleet)
    match place.side, place.leaf:
        case "up", "x":
            return t.upload(place.owner, place.transfer, place.part)
        case "up", leaf:
            return t.up(place.owner, leaf)
        case "dn", leaf:
            return t.down(place.owner, leaf)
        case "pub", "b":
            return t.blob(place.owner, place.part)
        case "pub", "head":
            return t.head(place.owner)
        case "co", "state":
            return t.coordinator(place.owner)
    raise AssertionError(f"no builder makes {place}")


levels = st.sampled_from(
    [
        "up",
        "dn",
        "pub",
        "co",
        "x",
        "b",
        "head",
        "state",
        "task",
        "m",
        "0",
        "00",
        "4096",
        "d1",
        "a" * 26,
        "",
        "+",
        "#",
        "d\n",
    ]
) | st.text(max_size=5)


@given(st.lists(levels, min_size=1, max_size=6).map("/".join))
def test_a_topic_that_the_parser_takes_is_exactly_what_a_builder_makes(rest: str) -> None:
    topic = f"lai/v1/home/{rest}"
    try:
        place = parse(topic, "home")
    except LiberataiError:
        return
    assert _rebuilt(place, "home") == topic


@given(st.text(max_size=300))
def test_random_topics_raise_nothing_but_known_errors(topic: str) -> None:
    _only_known_errors(lambda: parse(topic, "home"))


# --- chunks ---------------------------------------------------------------------------------------------------


@given(content=st.binary(min_size=1, max_size=3000), chunk_bytes=st.integers(1, 700), data=st.data())
def test_chunks_in_any_order_and_doubled_join_to_the_content(
    content: bytes, chunk_bytes: int, data: st.DataObject
) -> None:
    total = count(len(content), chunk_bytes)
    order = data.draw(st.permutations(range(total)))
    order = order + data.draw(st.lists(st.integers(0, total - 1), max_size=5))
    data.draw(st.randoms()).shuffle(order)
    assembly = Assembly(len(content), chunk_bytes, hashlib.sha256(content).digest())
    seen = set()
    for number in order:
        assert assembly.add(number, cut(content, number, chunk_bytes)) == (number not in seen)
        seen.add(number)
        assert missing(assembly.bitmap(), total) == sorted(set(range(total)) - seen)
    assert assembly.complete
    assert assembly.join() == content


@given(
    size=st.integers(-5, 5000),
    chunk_bytes=st.integers(-5, 700),
    pieces=st.lists(st.tuples(st.integers(-3, 20), st.binary(max_size=700)), max_size=8),
)
def test_any_pieces_raise_nothing_but_known_errors_and_are_never_joined_wrongly(
    size: int, chunk_bytes: int, pieces: Any
) -> None:
    def feed() -> None:
        assembly = Assembly(size, chunk_bytes, bytes(32))
        for number, piece in pieces:
            _only_known_errors(lambda number=number, piece=piece: assembly.add(number, piece))
        assert sum(map(len, assembly.parts.values())) <= size
        assembly.join()
        raise AssertionError("content without its digest was joined")

    _only_known_errors(feed)


# --- settings -------------------------------------------------------------------------------------------------


@given(st.text(max_size=200) | st.text(alphabet="ab:-[]{}!&*?|>'\"\n #,%~<=0.1e", max_size=60))
def test_any_text_is_a_mapping_or_a_config_error_of_single_lines(text: str) -> None:
    faults, found = [], {}
    try:
        found = parse_mapping(text, "s.yaml")
    except ConfigError as error:
        faults = error.faults
    assert all(fault.isprintable() for fault in faults)
    assert all(isinstance(key, str) for key in found)
