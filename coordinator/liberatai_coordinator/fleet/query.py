"""Questions about devices, as operators write them: `ram_mb >= 2000 and tier == "full"`. Pure, and no code.

    question   = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" question ")" | field [ operator value | "in" "(" value { "," value } ")" ]
    operator   = "==" | "!=" | "<" | "<=" | ">" | ">=" | "like"
    value      = number | "text" | 'text' | true | false

Fields are those of `FIELDS`, and `label.NAME`. A field alone asks whether it is true, or a label is there.
What a device has not told is less, equal or like nothing, and unequal to everything; `like` knows * and ?.
A selector of the command line (`-l site=hall,tier!=full`) is another way to write the same.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from liberatai_core.errors import ConfigError

Value = str | float | bool
Facts = Mapping[str, Value | None]
"""What is known of a device, by field; absent or None: not known."""

FIELDS: Final[dict[str, type]] = {
    "name": str,
    "status": str,
    "state": str,
    "phase": str,
    "tier": str,
    "profile": str,
    "arch": str,
    "agent_version": str,
    "online": bool,
    "ready": bool,
    "drained": bool,
    "metered": bool,
    "cores": float,
    "cpu_share": float,
    "ram_mb": float,
    "storage_kb": float,
    "disk_free_mb": float,
    "gflops": float,
    "up_mbit": float,
    "down_mbit": float,
    "samples": float,
    "updates": float,
    "silent_s": float,
}
"""Every field and its type. Sizes are MiB and KiB, links Mbit/s, `silent_s` is without a sign of life."""
LABEL: Final = "label."
MAX_CHARACTERS, MAX_TOKENS, MAX_DEPTH = 1024, 256, 32
"""Of a question: whoever writes more wants a program."""
LABEL_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?\Z")
MAX_LABEL: Final = 64
"""Characters of a label's value."""

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>-?\d{1,15}(?:\.\d{1,9})?(?![\w.]))
    | (?P<text>"[^"\\\n]*"|'[^'\\\n]*')
    | (?P<sign>==|!=|<=|>=|<|>|\(|\)|,)
    | (?P<word>[A-Za-z_][A-Za-z0-9_.-]*)
    )""",
    re.VERBOSE,
)
_SELECTED = re.compile(r"(?P<absent>!?)(?P<name>[A-Za-z0-9_.-]+)(?:(?P<sign>==|!=|=)(?P<value>[^,=!]*))?\Z")


@dataclass(frozen=True, slots=True)
class Is:
    """A comparison of one field; `sign` "is": whether it is true, or there."""

    field: str
    sign: str
    values: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite."""

    part: "Query"


@dataclass(frozen=True, slots=True)
class Both:
    """All parts hold."""

    parts: tuple["Query", ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of the parts holds."""

    parts: tuple["Query", ...]


Query = Is | Not | Both | Either


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def parse(text: str) -> Query:
    """Return what a question means.

    Raises:
        ConfigError: it has a fault; the text points at it.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError("query", [f"{len(text)} characters, at most {MAX_CHARACTERS}"])
    reader = _Reader(text, list(_tokens(text)))
    found = reader.question(0)
    reader.end()
    return found


def select(text: str) -> Query:
    """Return what a selector means: `name=value`, `name!=value`, `name`, `!name`, joined by commas.

    Names that are no field are labels.

    Raises:
        ConfigError: it has a fault.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError("selector", [f"{len(text)} characters, at most {MAX_CHARACTERS}"])
    return Both(tuple(_selected(part.strip()) for part in text.split(",")))


def matches(query: Query, facts: Facts) -> bool:
    """Whether a question is true of a device."""
    match query:
        case Both(parts):
            return all(matches(part, facts) for part in parts)
        case Either(parts):
            return any(matches(part, facts) for part in parts)
        case Not(part):
            return not matches(part, facts)
        case Is():
            return _holds(query, facts.get(query.field))


def text_of(query: Query) -> str:
    """Return a question in the one form in which it is kept: `parse` gives the same again."""
    match query:
        case Both(parts):
            return " and ".join(_within(part, Either, Both) for part in parts)
        case Either(parts):
            return " or ".join(_within(part, Either) for part in parts)
        case Not(part):
            return f"not {_within(part, Either, Both)}"
        case Is(field, "is"):
            return field
        case Is(field, "in", values):
            return f"{field} in ({', '.join(map(_literal, values))})"
        case Is(field, sign, values):
            return f"{field} {sign} {_literal(values[0])}"


def _within(query: Query, *bracketed: type) -> str:
    return f"({text_of(query)})" if isinstance(query, bracketed) else text_of(query)


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{value}'" if '"' in value else f'"{value}"'
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _holds(asked: Is, known: Value | None) -> bool:
    if asked.sign == "is":
        return known is True or (asked.field.startswith(LABEL) and known is not None)
    if known is None:
        return asked.sign == "!="
    first = asked.values[0]
    match asked.sign:
        case "==" | "in":
            return known in asked.values
        case "!=":
            return known != first
        case "like":
            return isinstance(known, str) and isinstance(first, str) and fnmatchcase(known, first)
    if isinstance(known, str) or isinstance(first, str):
        return False
    return _COMPARE[asked.sign](known, first)


# --- reading --------------------------------------------------------------------------------------


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    for _ in range(MAX_TOKENS):
        if not text[at:].strip():
            return
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            raise _fault(text, start, f"{text[start]!r} is nothing that a question has")
        yield _Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup))
        at = found.end()
    raise ConfigError("query", [f"more than {MAX_TOKENS} words"])


def _fault(text: str, at: int, words: str) -> ConfigError:
    return ConfigError("query", [f"{words} (at character {at + 1}: {text[at : at + 24]!r})"])


@dataclass(slots=True)
class _Reader:
    """Reads a question by descent; the depth is bounded."""

    text: str
    tokens: list[_Token]
    place: int = 0

    def question(self, depth: int) -> Query:
        parts = [self.all(depth)]
        while self.take("or"):
            parts.append(self.all(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def all(self, depth: int) -> Query:
        parts = [self.one(depth)]
        while self.take("and"):
            parts.append(self.one(depth))
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def one(self, depth: int) -> Query:
        if depth > MAX_DEPTH:
            raise ConfigError("query", [f"more than {MAX_DEPTH} brackets inside of each other"])
        if self.take("not"):
            return Not(self.one(depth + 1))
        if self.take("("):
            found = self.question(depth + 1)
            self.need(")")
            return found
        return self.comparison()

    def comparison(self) -> Query:
        token = self.next("a field")
        if token.kind != "word" or token.text in ("and", "or", "in", "like", "true", "false"):
            raise _fault(self.text, token.at, "a field is missing")
        wanted = self.type_of(token)
        if self.take("in"):
            self.need("(")
            values = [self.value(token.text, wanted)]
            while self.take(","):
                values.append(self.value(token.text, wanted))
            self.need(")")
            return Is(token.text, "in", tuple(values))
        sign = self.sign(token, wanted)
        if sign == "is":
            return Is(token.text, "is")
        return Is(token.text, sign, (self.value(token.text, wanted),))

    def sign(self, token: _Token, wanted: type) -> str:
        found = next((sign for sign in ("==", "!=", "<=", ">=", "<", ">", "like") if self.take(sign)), None)
        if found is None:
            if wanted is bool or token.text.startswith(LABEL):
                return "is"
            raise _fault(self.text, token.at, f"{token.text} is compared with nothing")
        if (found in _COMPARE and wanted is not float) or (found == "like" and wanted is not str):
            kind = {str: "a text", bool: "true or false", float: "a number"}[wanted]
            raise _fault(self.text, token.at, f"{token.text} is {kind}: no {found} with it")
        return found

    def type_of(self, token: _Token) -> type:
        if token.text.startswith(LABEL) and LABEL_NAME.match(token.text[len(LABEL) :]):
            return str
        if token.text not in FIELDS:
            near = difflib.get_close_matches(token.text, FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}, and label.NAME"
            raise _fault(self.text, token.at, f"no field {token.text}: {hint}")
        return FIELDS[token.text]

    def value(self, field: str, wanted: type) -> Value:
        token = self.next(f"a value of {field}")
        found: Value | None = None
        if token.kind == "number":
            found = float(token.text)
        elif token.kind == "text":
            found = token.text[1:-1]
        elif token.text in ("true", "false"):
            found = token.text == "true"
        if found is None or not isinstance(found, wanted):
            kind = {str: 'a text in quotes ("…")', bool: "true or false", float: "a number"}[wanted]
            raise _fault(self.text, token.at, f"{field} is compared with {kind}")
        return found

    def take(self, text: str) -> bool:
        here = self.tokens[self.place] if self.place < len(self.tokens) else None
        found = here is not None and here.kind in ("word", "sign") and here.text == text
        self.place += found
        return found

    def need(self, text: str) -> None:
        if not self.take(text):
            at = self.tokens[self.place].at if self.place < len(self.tokens) else len(self.text)
            raise _fault(self.text, at, f"{text!r} is missing")

    def next(self, what: str) -> _Token:
        if self.place >= len(self.tokens):
            raise _fault(self.text, len(self.text), f"{what} is missing at the end")
        self.place += 1
        return self.tokens[self.place - 1]

    def end(self) -> None:
        if self.place < len(self.tokens):
            raise _fault(self.text, self.tokens[self.place].at, 'too much: "and" or "or" is missing')


def _selected(part: str) -> Query:
    found = _SELECTED.match(part)
    if found is None or (found["absent"] and found["sign"]):
        raise ConfigError("selector", [f"{part!r}: write name=value, name!=value, name or !name"])
    name = found["name"]
    field = name if name in FIELDS or name.startswith(LABEL) else LABEL + name
    if field.startswith(LABEL) and not LABEL_NAME.match(field[len(LABEL) :]):
        raise ConfigError("selector", [f"{name}: no name of a label"])
    if found["sign"] is None:
        return Not(Is(field, "is")) if found["absent"] else Is(field, "is")
    sign = "!=" if found["sign"] == "!=" else "=="
    return Is(field, sign, (_typed(field, found["value"].strip()),))


def _typed(field: str, text: str) -> Value:
    wanted = FIELDS.get(field, str)
    if wanted is str:
        return text
    if wanted is bool and text in ("true", "false"):
        return text == "true"
    try:
        return float(text) if wanted is float else bool(int(text))
    except ValueError:
        kind = "a number" if wanted is float else "true or false"
        raise ConfigError("selector", [f"{field}={text}: {field} is {kind}"]) from None
