"""Questions about devices: every one has one text that means the same, and nonsense is refused with words."""

import contextlib
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("liberatai_coordinator")  # devices do not have it

from liberatai_coordinator.fleet.query import (
    FIELDS,
    LABEL,
    MAX_DEPTH,
    Both,
    Either,
    Facts,
    Is,
    Not,
    Query,
    Value,
    matches,
    parse,
    select,
    text_of,
)
from liberatai_core.errors import ConfigError

NUMBERS = st.integers(-(10**9), 10**9).map(lambda n: n / 1000)
TEXTS = st.one_of(
    st.text(st.characters(exclude_characters='"\\\n', exclude_categories=["Cs"]), max_size=8),
    st.text(st.characters(exclude_characters="'\\\n", exclude_categories=["Cs"]), max_size=8),
)
OF_TYPE: dict[type, st.SearchStrategy[Value]] = {str: TEXTS, float: NUMBERS, bool: st.booleans()}
NAMES = st.sampled_from([*FIELDS, "label.site", "label.floor-2"])


def type_of(field: str) -> type:
    return str if field.startswith(LABEL) else FIELDS[field]


@st.composite
def comparisons(draw: st.DrawFn) -> Query:
    field = draw(NAMES)
    kind = type_of(field)
    signs = {
        str: ["==", "!=", "like", "in"],
        float: ["==", "!=", "<", "<=", ">", ">=", "in"],
        bool: ["==", "!="],
    }
    sign = draw(st.sampled_from(signs[kind] + (["is"] if kind is bool or field.startswith(LABEL) else [])))
    if sign == "is":
        return Is(field, "is")
    count = draw(st.integers(1, 3)) if sign == "in" else 1
    return Is(field, sign, tuple(draw(OF_TYPE[kind]) for _ in range(count)))


def _both(parts: list[Query]) -> Query:
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Both) else (part,))]
    return Both(tuple(flat))


def _either(parts: list[Query]) -> Query:
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Either) else (part,))]
    return Either(tuple(flat))


QUERIES = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(_both),
        st.lists(inner, min_size=2, max_size=3).map(_either),
    ),
    max_leaves=8,
)


@st.composite
def devices(draw: st.DrawFn) -> Facts:
    names = draw(st.lists(NAMES, unique=True))
    return {name: draw(st.one_of(st.none(), OF_TYPE[type_of(name)])) for name in names}


def quotable(query: Query) -> bool:
    """A text with both quotes has no literal."""
    match query:
        case Is(_, _, values):
            return not any(isinstance(one, str) and '"' in one and "'" in one for one in values)
        case Not(part):
            return quotable(part)
        case Both(parts) | Either(parts):
            return all(map(quotable, parts))


@given(QUERIES.filter(quotable), devices())
def test_the_text_of_a_question_means_the_same(query: Query, device: Facts) -> None:
    again = parse(text_of(query))
    assert text_of(again) == text_of(query)
    assert matches(again, device) == matches(query, device)


@given(QUERIES, QUERIES, devices())
def test_and_or_and_not_are_those_of_logic(a: Query, b: Query, device: Facts) -> None:
    holds = matches(a, device), matches(b, device)
    assert matches(Both((a, b)), device) == all(holds)
    assert matches(Either((a, b)), device) == any(holds)
    assert matches(Not(a), device) is not holds[0]


@given(NUMBERS, st.one_of(st.none(), NUMBERS), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
def test_numbers_are_compared_and_what_is_not_known_fits_nothing(
    limit: float, known: float | None, sign: str
) -> None:
    signs = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
    signs |= {"==": operator.eq, "!=": operator.ne}
    expected = sign == "!=" if known is None else signs[sign](known, limit)
    assert matches(Is("ram_mb", sign, (limit,)), {"ram_mb": known}) == expected


@given(st.text(max_size=60))
def test_whatever_is_written_is_a_question_or_has_a_fault(text: str) -> None:
    for read in (parse, select):
        with contextlib.suppress(ConfigError):
            assert text_of(read(text)) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a field is missing at the end"),
        ("ram_mb >= ", "a value of ram_mb is missing"),
        ("ram_mb >= 'much'", "compared with a number"),
        ("tier == full", "a text in quotes"),
        ("tier < 'full'", "no < with it"),
        ("rammb > 3", "did you mean ram_mb"),
        ("online and", "a field is missing at the end"),
        ("online metered", "too much"),
        ("(online", "')' is missing"),
        ("ram_mb", "compared with nothing"),
        ("online; drop", "';' is nothing"),
        ("__import__('os')", "no field __import__"),
        ("(" * (MAX_DEPTH + 2) + "online", "brackets"),
        ("online or " * 300 + "online", "characters"),
        ("name == 'a\\'b'", "is nothing"),
    ],
)
def test_a_fault_is_told_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="query") as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "device", "fits"),
    [
        ("site=hall", {"label.site": "hall"}, True),
        ("site=hall", {}, False),
        ("site!=hall", {}, True),
        ("site", {"label.site": ""}, True),
        ("!site", {"label.site": "x"}, False),
        ("tier=full,ram_mb=2000", {"tier": "full", "ram_mb": 2000.0}, True),
        ("online=true", {"online": True}, True),
        ("online", {"online": False}, False),
    ],
)
def test_a_selector_asks_for_labels_and_fields(text: str, device: dict[str, Value], fits: bool) -> None:
    assert matches(select(text), device) is fits
