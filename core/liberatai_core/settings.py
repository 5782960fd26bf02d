"""YAML text to typed settings, strictly: every fault at once, one line each. The only importer of yaml.

YAML 1.1 surprises (`no` is False, `12:30` is 750, `010` is 8, `1e-3` is text) are switched off: scalars
follow the YAML 1.2 core schema. Aliases, tags, doubled keys and deep nesting are refused.
"""

import math
import re
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar

import msgspec
import yaml

from liberatai_core.errors import ConfigError
from liberatai_core.spelling import meant

Settings = TypeVar("Settings", bound=msgspec.Struct)

MAX_SETTINGS_BYTES = 1 << 20
"""A settings file is read by people; a megabyte is not one."""


MAX_DEPTH = 32
"""Settings nest 4 deep; the parser calls itself for each level."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, without aliases, tags and doubled keys."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases (they turn 1 KB into 1 GB), tags (they choose types) and deep nesting."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags (!name) are not allowed", event.start_mark)
        if self.depth >= MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse doubled keys: the last one would win in silence."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {_short(key)} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, wanted: type[Settings], where: str) -> Settings:
    """Return the settings that a YAML text holds.

    Args:
        text: the YAML document.
        wanted: a msgspec Struct; nested Structs are checked field by field too.
        where: name of the file, for the messages.

    Raises:
        ConfigError: not YAML, unknown or missing keys, wrong types or values; all of them at once.
    """
    return convert(parse_mapping(text, where), wanted, where)


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds, types still unchecked.

    Raises:
        ConfigError: too long, not YAML, or not a mapping.
    """
    if len(text) > MAX_SETTINGS_BYTES:
        raise ConfigError(where, [f"{len(text)} characters, at most {MAX_SETTINGS_BYTES}"])
    try:
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 - the loader derives from SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(where, [f"{line}{_clean(str(error.problem), 200)}"]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(where, [f"not YAML: {_clean(' '.join(str(error).split()), 200)}"]) from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(where, ["must be a mapping of names to values"])
    return raw


def convert(raw: Mapping[str, Any], wanted: type[Settings], where: str) -> Settings:
    """Return `raw` as settings, or raise ConfigError with every fault."""
    found = faults(raw, wanted)
    if found:
        raise ConfigError(where, found)
    try:
        return msgspec.convert(raw, wanted)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(where, [_readable(str(error))]) from None


def faults(raw: Mapping[str, Any], wanted: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """Return one line per fault of `raw`, with the dotted name of the key; none means it converts."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(wanted)}
    known = ", ".join(sorted(fields))
    found = [
        f"{prefix}{_clean(str(name))}: unknown key{meant(str(name), fields)} (known: {known})"
        for name in raw
        if name not in fields
    ]
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                found.append(f"{prefix}{name}: missing")
            continue
        found += _value_faults(raw[name], field.type, f"{prefix}{name}")
    return found


def _value_faults(value: Any, wanted: Any, name: str) -> list[str]:
    nested = _struct_of(wanted)
    if nested is not None and isinstance(value, dict):
        return faults(value, nested, f"{name}.")
    element = _element_of(wanted)
    if element is not None and isinstance(value, list):
        inside = [
            fault
            for place, item in enumerate(value)
            for fault in _value_faults(item, element, f"{name}[{place}]")
        ]
        if inside:
            return inside
    if not _finite(value):
        return [f"{name}: must be finite (got {_short(value)})"]
    try:
        msgspec.convert(value, wanted)
    except (msgspec.ValidationError, ValueError) as error:
        wish = _wish(wanted)
        hint = meant(value, _choices(wanted)) if isinstance(value, str) else ""
        return [f"{name}: {f'must be {wish}' if wish else _readable(str(error))} (got {_short(value)}){hint}"]
    return []


def _choices(wanted: Any) -> list[str]:
    """Return the words that a value may be; none if it may be more than words of a list."""
    if typing.get_origin(wanted) is typing.Annotated:
        return _choices(typing.get_args(wanted)[0])
    if typing.get_origin(wanted) is Literal:
        return [one for one in typing.get_args(wanted) if isinstance(one, str)]
    if _is_union(wanted):
        return [one for arm in typing.get_args(wanted) for one in _choices(arm)]
    return []


def _finite(value: Any) -> bool:
    """Say whether no number in this value is NaN or infinite: neither breaks a bound such as `> 0`."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return not isinstance(value, list) or all(map(_finite, value))


def _struct_of(wanted: Any) -> type[msgspec.Struct] | None:
    """Return the one Struct inside `X`, `Annotated[X, …]` or `X | None`."""
    if isinstance(wanted, type) and issubclass(wanted, msgspec.Struct):
        return wanted
    if typing.get_origin(wanted) is typing.Annotated:
        return _struct_of(typing.get_args(wanted)[0])
    if _is_union(wanted):
        found = [s for s in map(_struct_of, typing.get_args(wanted)) if s is not None]
        return found[0] if len(found) == 1 else None
    return None


def _element_of(wanted: Any) -> Any:
    """Return the type of the elements of `tuple[X, ...]` or `list[X]`, or None."""
    if typing.get_origin(wanted) is typing.Annotated:
        return _element_of(typing.get_args(wanted)[0])
    arguments = typing.get_args(wanted)
    if typing.get_origin(wanted) is list or (typing.get_origin(wanted) is tuple and ... in arguments):
        return arguments[0]
    return None


def _is_union(wanted: Any) -> bool:
    return typing.get_origin(wanted) in (typing.Union, types.UnionType)


_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


def _wish(wanted: Any) -> str:
    """Say what a value must be, as it follows "must be": its bounds where it has some, else its type."""
    if typing.get_origin(wanted) is typing.Annotated:
        inner, *notes = typing.get_args(wanted)
        return _bounded(inner, [note for note in notes if isinstance(note, msgspec.Meta)])
    if typing.get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(wanted)))}"
    if _is_union(wanted):
        wishes = [_wish(arm) for arm in typing.get_args(wanted)]
        return " or ".join(wishes) if all(wishes) else ""
    if _struct_of(wanted) is not None:
        return "a mapping"
    return _PLAIN.get(typing.get_origin(wanted) or wanted, "")


def _bounded(inner: Any, notes: list[msgspec.Meta]) -> str:
    bounds = [
        f"{sign} {_number(limit)}"
        for note in notes
        for sign, limit in ((">", note.gt), (">=", note.ge), ("<", note.lt), ("<=", note.le))
        if limit is not None
    ]
    if bounds:
        return f"{'a whole number ' if inner is int else ''}{' and '.join(bounds)}"
    unit = "characters" if inner in (str, bytes) else "entries"
    rules = [f"like {note.pattern.replace(chr(92) + 'Z', '$')}" for note in notes if note.pattern is not None]
    rules += [f"of at least {note.min_length} {unit}" for note in notes if note.min_length is not None]
    rules += [f"of at most {note.max_length} {unit}" for note in notes if note.max_length is not None]
    return " ".join([_wish(inner), " and ".join(rules)]).strip()


def _number(limit: float) -> str:
    return str(int(limit)) if float(limit).is_integer() else repr(limit)


def _readable(text: str) -> str:
    head, _, path = text.partition(" - at `$")
    return f"{path.rstrip('`').lstrip('.')}: {head}" if path.strip("`.") else head


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _clean(f'"{value}"' if isinstance(value, str) else repr(value))


def _clean(text: str, longest: int = 60) -> str:
    """Return text of a stranger as one short line, control characters escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return line if len(line) <= longest else line[: longest - 3] + "..."
