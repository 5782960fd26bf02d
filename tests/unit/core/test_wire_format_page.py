"""docs/wire-format.md says what the code does: kinds, fields, defaults, error codes, limits, topics."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from liberatai_core.contract import limits, topics
from liberatai_core.contract import messages as m
from liberatai_core.errors import BY_CODE
from liberatai_core.structure import DataContract, Structure, Tensor

PAGE = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text(encoding="utf-8")
PARTS: list[Any] = [
    Structure,
    Tensor,
    DataContract,
    m.Step,
    m.BlobRef,
    m.Training,
    m.TaskSpec,
    m.Wishes,
    m.ModelWish,
    m.AgentWish,
]


def _section(title: str) -> str:
    found = re.search(rf"^(#+) {title}\n(.*?)(?=^#{{1,3}} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found.group(2)


def _rows(text: str) -> dict[str, list[str]]:
    """Return the cells of every table row whose first cell is `code`, by that cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


def _number(value: float) -> str:
    return f"{int(value):,}".replace(",", " ") if value >= 10_000 else str(int(value))


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = msgspec.json.decode(msgspec.json.encode(field.default))
    if value is None or isinstance(value, bool):
        return {None: "nil", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'`"{value}"`'
    return {"[]": "empty", "{}": "all defaults"}.get(str(value), str(value))


@pytest.mark.parametrize(("number", "kind"), m.KINDS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_every_kind_stands_on_the_page_with_its_byte_and_its_size(number: int, kind: type[m.Message]) -> None:
    section = _section(kind.__name__)
    form = "array · " if kind.__struct_config__.array_like else ""
    assert f"Kind {number} · {form}`" in section
    assert f"body ≤ {_number(m.MAX_BYTES[kind])} bytes" in section


@pytest.mark.parametrize("struct", [*m.KIND_OF, *PARTS], ids=lambda struct: struct.__name__)
def test_every_field_stands_on_the_page_in_wire_order_with_its_default(struct: Any) -> None:
    expected = {field.encode_name: _default(field) for field in msgspec.structs.fields(struct)}
    assert {name: cells[1] for name, cells in _rows(_section(struct.__name__)).items()} == expected
    assert list(_rows(_section(struct.__name__))) == list(expected)


def test_every_error_code_stands_on_the_page_and_no_other() -> None:
    # Only the codes of this module: other tests may derive errors of their own.
    own = {code for code, error in BY_CODE.items() if error.__module__ == "liberatai_core.errors"}
    assert set(_rows(_section("Error codes"))) == own


def test_every_limit_stands_on_the_page_with_its_value_and_no_other() -> None:
    expected = {name: _number(value) for name, value in vars(limits).items() if name.isupper()}
    assert {name: cells[0] for name, cells in _rows(_section("Limits")).items()} == expected


def test_every_topic_leaf_and_name_pattern_stands_on_the_page() -> None:
    tree = _section("Topics")
    up, down = sorted(topics.UP_LEAVES), sorted(topics.DOWN_LEAVES)
    assert all(f"/up/<dev>/{leaf} " in tree for leaf in up)
    assert all(f"/dn/<dev>/{leaf} " in tree for leaf in down)
    for pattern in (topics.FLEET_OR_DEVICE, topics.NAME, topics.BLOB):
        assert f"`{pattern.replace(chr(92) + 'Z', '$')}`" in tree
