"""A release is what its key has signed, or it is refused before anything is done with it."""

import io

import msgspec
import pytest

from liberatai_core import release
from liberatai_core.errors import (
    ConfigError,
    DigestError,
    FrameError,
    LiberataiError,
    ProtocolVersionError,
    SchemaError,
    SignatureError,
    TooLargeError,
)
from liberatai_core.release import Manifest, contents, opened, pack, release_key

KEY, OTHER = release_key(b"r" * 32), release_key(b"o" * 32)
FILES = {
    "liberatai_agent/__init__.py": b"",
    "liberatai_core/a/b.py": b"x = 1\n",
    "liberatai_core/py.typed": b"",
}


def manifest(**changes: object) -> Manifest:
    made = Manifest(format=1, version="0.2.0", sequence=7, created_s=1.0, expires_s=2.0)
    return msgspec.structs.replace(made, **changes)


def read(content: bytes, key: bytes = KEY.public) -> tuple[Manifest, dict[str, bytes]]:
    source = io.BytesIO(content)
    found = opened(source, key)
    return found, dict(contents(source, found))


def test_what_was_packed_is_read() -> None:
    found, files = read(pack(manifest(requires={"numpy": "1.26"}), FILES, KEY))
    assert (found.version, found.sequence, found.requires) == ("0.2.0", 7, {"numpy": "1.26"})
    assert files == FILES


def test_another_key_is_refused_and_no_key_too() -> None:
    content = pack(manifest(), FILES, KEY)
    with pytest.raises(SignatureError):
        read(content, OTHER.public)
    with pytest.raises((ConfigError, SignatureError)):
        read(content, b"\xff" * 32)
    with pytest.raises(ConfigError):
        release_key(b"short")


def test_every_changed_or_missing_byte_is_found() -> None:
    content = pack(manifest(), FILES, KEY)
    for place in range(len(content)):
        with pytest.raises(LiberataiError):
            read(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(LiberataiError):
            read(content[:place])
    with pytest.raises(FrameError, match="more in the release"):
        read(content + b"x")


def test_a_changed_file_is_named() -> None:
    content = pack(manifest(), FILES, KEY)
    with pytest.raises(DigestError, match=r"liberatai_core/a/b\.py"):
        read(content[:-1] + b"!")


def signed(text: bytes) -> bytes:
    head = release.MAGIC + KEY.sign(release.CONTEXT + text)
    return head + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    "name",
    ["os.py", "../liberatai_core/x", "liberatai_core", "liberatai_core/../x", "/liberatai_core/x", "liberatai_core//x",
     "liberatai_core/.hidden", "liberatai_core/a\nb", "liberatai_core/" + "a/" * 8 + "x", "liberatai_coordinator/x", ""],
)  # fmt: skip
def test_names_that_are_not_the_agents_are_refused_although_they_are_signed(name: str) -> None:
    with pytest.raises(SchemaError):
        pack(manifest(), {name: b""}, KEY)
    raw = msgspec.to_builtins(manifest()) | {"files": [[name, 0, "0" * 64]]}
    with pytest.raises(SchemaError):
        read(signed(msgspec.json.encode(raw)))


def test_what_is_signed_and_makes_no_sense_is_refused() -> None:
    good = msgspec.to_builtins(manifest())
    entry = ["liberatai_core/x", release.MAX_FILE_BYTES, "0" * 64]
    for changes, error in (
        ({"format": 2}, ProtocolVersionError),
        ({"sequence": 0}, SchemaError),
        ({"version": "1\n2"}, SchemaError),
        ({"python": "x3.11"}, SchemaError),
        ({"files": [entry, entry]}, SchemaError),
        ({"files": [[f"liberatai_core/{n}", *entry[1:]] for n in range(9)]}, TooLargeError),
        ({"expires_s": "soon"}, SchemaError),
        ({"more": 1}, SchemaError),
    ):
        with pytest.raises(error):
            read(signed(msgspec.json.encode(good | changes)))
    with pytest.raises(SchemaError):
        read(signed(b"{"))
    head = release.MAGIC + bytes(64)
    with pytest.raises(TooLargeError):
        read(head + (release.MAX_MANIFEST_BYTES + 1).to_bytes(4, "big"))


@pytest.mark.parametrize(
    ("text", "found"), [("2.13.0+cpu", (2, 13, 0)), ("46", (46,)), ("1.0rc1", (1, 0)), ("none", ()), ("", ())]
)
def test_versions_are_compared_by_their_numbers(text: str, found: tuple[int, ...]) -> None:
    assert release.numbers(text) == found
