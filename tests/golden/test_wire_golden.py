"""What earlier releases sent must stay readable, and what this one sends must be what they expect."""

import json
from typing import Any

import msgspec
import pytest
from tests.golden import make

from liberatai_core.contract.frame import decode_spec, open_frame, seal
from liberatai_core.contract.messages import KINDS

CASES = make.cases()


def _on_disk(name: str) -> Any:
    return bytes.fromhex((make.FOLDER / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_sealed_to_exactly_the_golden_bytes(name: str) -> None:
    assert make.hex_lines(seal(CASES[name], make.SIGNER)) == (make.FOLDER / f"{name}.hex").read_text()


@pytest.mark.parametrize("name", CASES)
def test_golden_bytes_open_as_exactly_the_golden_message(name: str) -> None:
    opened = open_frame(_on_disk(name), make.FLEET, lambda _: make.SIGNER.public_key)
    assert opened.message == CASES[name]
    assert type(opened.message) is type(CASES[name])
    assert opened.public_key == make.SIGNER.public_key


def test_every_kind_has_a_golden_message_and_no_file_is_left_over() -> None:
    assert set(make.MINIMAL) == set(KINDS.values())
    assert {path.stem for path in make.FOLDER.glob("*.hex")} == set(CASES) | set(make.SPECS)


@pytest.mark.parametrize("name", make.SPECS)
def test_what_tasks_have_in_common_is_written_to_exactly_the_golden_bytes(name: str) -> None:
    assert make.spec_lines(make.SPECS[name]) == (make.FOLDER / f"{name}.hex").read_text()
    assert decode_spec(_on_disk(name)) == make.SPECS[name]


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_optional_field_stands_in_a_full_golden_message(kind: Any) -> None:
    fields = msgspec.structs.fields(kind)
    optional = {f.encode_name for f in fields if not f.required}
    if not optional:
        return
    body = msgspec.msgpack.decode(_on_disk(f"{kind.__name__}-full")[76:])
    if isinstance(body, list):
        assert len(body) == len(fields)
        assert all(v != f.default for v, f in zip(body, fields, strict=True) if not f.required)
    else:
        assert optional <= set(body)


def test_kind_bytes_field_names_and_defaults_are_those_of_the_protocol() -> None:
    """A default is never written, so changing one silently changes what an older reader understands."""
    assert make.schema() == json.loads((make.FOLDER / "schema.json").read_text())
