"""Only topics that a builder makes are understood; a name can never leave its level."""

import base64
import hashlib
from typing import Any

import pytest

from liberatai_core.contract.limits import MAX_CHUNKS
from liberatai_core.contract.topics import Place, Topics, blob_id, parse, require_id, require_name
from liberatai_core.errors import TopicError

T = Topics(fleet="home")
BLOB = blob_id(b"content")


def place(side: Any, owner: Any, leaf: Any, transfer: Any = None, part: Any = None) -> Any:
    return Place(side=side, owner=owner, leaf=leaf, transfer=transfer, part=part)


@pytest.mark.parametrize(
    ("topic", "text", "meaning"),
    [
        *[
            (T.up("d1", leaf), f"up/d1/{leaf}", place("up", "d1", leaf))
            for leaf in ("state", "caps", "rep", "tele", "ev", "rsp")
        ],
        *[
            (T.down("d1", leaf), f"dn/d1/{leaf}", place("dn", "d1", leaf))
            for leaf in ("want", "task", "req", "xa")
        ],
        (T.upload("d1", BLOB), f"up/d1/x/{BLOB}/m", place("up", "d1", "x", BLOB)),
        (T.upload("d1", BLOB, 0), f"up/d1/x/{BLOB}/0", place("up", "d1", "x", BLOB, 0)),
        (T.upload("d1", BLOB, 4095), f"up/d1/x/{BLOB}/4095", place("up", "d1", "x", BLOB, 4095)),
        (T.blob(BLOB), f"pub/b/{BLOB}/m", place("pub", BLOB, "b")),
        (T.blob(BLOB, 17), f"pub/b/{BLOB}/17", place("pub", BLOB, "b", part=17)),
        (T.head("digits_v2"), "pub/head/digits_v2", place("pub", "digits_v2", "head")),
        (T.coordinator("co1"), "co/co1/state", place("co", "co1", "state")),
    ],
)
def test_a_topic_has_one_text_and_one_meaning(topic: str, text: str, meaning: Any) -> None:
    assert topic == f"lai/v1/home/{text}"
    assert parse(topic, "home") == meaning


BAD_IDS = [
    "",
    "D1",
    "d 1",
    "d1\n",
    "\n",
    "d1\0",
    "..",
    "../x",
    "d/1",
    "a/../b",
    "%2e%2e",
    "+",
    "#",
    "$SYS",
    "dév",
    "🙂",
    "d_1",
    "a" * 33,
    "x" * 10_000,
    "\u0661",
]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda b: ascii(b)[:20])
def test_a_bad_device_or_coordinator_name_is_refused_by_every_builder_and_by_the_parser(bad: str) -> None:
    for build in (
        lambda: T.up(bad, "state"),
        lambda: T.down(bad, "task"),
        lambda: T.upload(bad, BLOB),
        lambda: T.coordinator(bad),
        lambda: T.to_device(bad),
        lambda: Topics(fleet=bad),
        lambda: require_id(bad),
        lambda: parse(f"lai/v1/home/up/{bad}/state", "home"),
        lambda: parse(f"lai/v1/home/dn/{bad}/task", "home"),
        lambda: parse(f"lai/v1/home/co/{bad}/state", "home"),
    ):
        with pytest.raises(TopicError):
            build()


@pytest.mark.parametrize(
    "bad", [b for b in BAD_IDS if b not in {"d_1", "a" * 33}] + ["a" * 65], ids=lambda b: ascii(b)[:20]
)
def test_a_bad_job_name_is_refused_by_builder_and_parser(bad: str) -> None:
    for build in (
        lambda: T.head(bad),
        lambda: require_name(bad),
        lambda: parse(f"lai/v1/home/pub/head/{bad}", "home"),
    ):
        with pytest.raises(TopicError):
            build()


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "m",
        BLOB[:-1],
        BLOB + "a",
        BLOB.upper(),
        BLOB[:-1] + "1",
        BLOB[:-1] + "\n",
        BLOB + "\n",
        "../" + BLOB[3:],
        "+",
        "#",
    ],
    ids=ascii,
)
def test_a_bad_blob_or_transfer_id_is_refused_by_builder_and_parser(bad: str) -> None:
    for build in (
        lambda: T.blob(bad),
        lambda: T.upload("d1", bad),
        lambda: parse(f"lai/v1/home/pub/b/{bad}/m", "home"),
        lambda: parse(f"lai/v1/home/up/d1/x/{bad}/m", "home"),
    ):
        with pytest.raises(TopicError):
            build()


@pytest.mark.parametrize(
    "part",
    [
        "",
        "-1",
        "+1",
        "01",
        "1.0",
        "1e3",
        " 1",
        "1\n",
        "4096",
        "9999",
        "99999",
        "M",
        "\u0663",
        "0x1",
        "1_0",
        "m\n",
    ],
    ids=ascii,
)
def test_a_chunk_number_has_one_spelling_and_a_bound(part: Any) -> None:
    for topic in (f"lai/v1/home/pub/b/{BLOB}/{part}", f"lai/v1/home/up/d1/x/{BLOB}/{part}"):
        with pytest.raises(TopicError):
            parse(topic, "home")


@pytest.mark.parametrize("part", [-1, MAX_CHUNKS, 10**9])
def test_no_builder_makes_a_chunk_number_that_the_parser_refuses(part: Any) -> None:
    with pytest.raises(TopicError, match="chunk number"):
        T.blob(BLOB, part)
    with pytest.raises(TopicError, match="chunk number"):
        T.upload("d1", BLOB, part)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/",
        "lai/v1/home",
        "lai/v1/home/",
        "lai/v1/other/up/d1/state",
        "lai/v2/home/up/d1/state",
        "lai/v1//up/d1/state",
        "/lai/v1/home/up/d1/state",
        "x/lai/v1/home/up/d1/state",
        "lai/v1/home/lai/v1/home/up/d1/state",
        "lai/v1/home/up/d1",
        "lai/v1/home/up/d1/",
        "lai/v1/home/up/d1/state/",
        "lai/v1/home/up/d1/state/x",
        "lai/v1/home/up/d1/task",
        "lai/v1/home/dn/d1/state",
        "lai/v1/home/up/d1/x",
        f"lai/v1/home/up/d1/x/{BLOB}",
        f"lai/v1/home/up/d1/x/{BLOB}/m/m",
        "lai/v1/home/pub/head",
        "lai/v1/home/pub/head/a/b",
        f"lai/v1/home/pub/b/{BLOB}",
        "lai/v1/home/co/c1",
        "lai/v1/home/co/c1/task",
        "lai/v1/home/UP/d1/state",
        "lai/v1/home/nn/d1/state",
        "lai/v1/home/up/+/state",
        "lai/v1/home/#",
        "$SYS/broker/uptime",
        "lai/v1/home/up/d1/state\0",
        "lai/v1/home/up/d1/" + "x" * 300,
        "a" * 65_535,
    ],
    ids=lambda t: ascii(t)[:40],
)
def test_what_no_builder_makes_is_refused(topic: str) -> None:
    with pytest.raises(TopicError):
        parse(topic, "home")


def test_an_unknown_leaf_is_refused_by_the_builders() -> None:
    for leaf in ("task", "x/../state", "", "+"):
        with pytest.raises(TopicError, match="no such topic"):
            T.up("d1", leaf)
    with pytest.raises(TopicError, match="no such topic"):
        T.down("d1", "state")


def test_a_refusal_says_what_without_repeating_everything_or_control_characters() -> None:
    with pytest.raises(TopicError) as caught:
        parse("lai/v1/home/up/\x1b[31m\n" + "x" * 200 + "/state", "home")
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_a_fleet_that_is_a_prefix_of_another_one_does_not_hear_it() -> None:
    with pytest.raises(TopicError):
        parse(Topics(fleet="home-2").up("d1", "state"), "home")


def test_a_blob_id_is_130_bits_of_its_sha256() -> None:
    expected = base64.b32encode(hashlib.sha256(b"content").digest()).decode().lower()[:26]
    assert blob_id(b"content") == expected
    assert blob_id(b"content") != blob_id(b"Content")


def _matches(pattern: Any, topic: str) -> Any:
    levels, parts = pattern.split("/"), topic.split("/")
    return len(levels) == len(parts) and all(a in ("+", b) for a, b in zip(levels, parts, strict=True))


def test_the_coordinators_filters_hear_every_device_topic_and_nothing_else() -> None:
    heard = [T.up("d1", leaf) for leaf in ("state", "caps", "rep", "tele", "ev", "rsp")] + [
        T.upload("d1", BLOB),
        T.upload("d1", BLOB, 3),
    ]
    silent = [
        T.down("d1", "task"),
        T.head("j"),
        T.blob(BLOB),
        T.coordinator("c"),
        Topics(fleet="b").up("d1", "state"),
    ]
    assert all(any(_matches(f, t) for f in T.from_devices) for t in heard)
    assert not any(_matches(f, t) for f in T.from_devices for t in silent)


def test_a_devices_filters_hear_its_own_topics_and_coordinators_only() -> None:
    heard = [T.down("d1", leaf) for leaf in ("want", "task", "req", "xa")] + [T.coordinator("c1")]
    silent = [T.down("d2", "task"), T.up("d1", "state"), T.up("d2", "caps"), T.blob(BLOB)]
    assert all(any(_matches(f, t) for f in T.to_device("d1")) for t in heard)
    assert not any(_matches(f, t) for f in T.to_device("d1") for t in silent)
