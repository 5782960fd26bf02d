"""Settings are read strictly, and all their faults are told at once, one line each."""

import tracemalloc
import types
import typing
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from msgspec import Meta

from liberatai_core.errors import ConfigError
from liberatai_core.settings import MAX_SETTINGS_BYTES, parse, parse_mapping


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: Annotated[float, Meta(gt=0, le=2_592_000)] = 1.0
    mode: Literal["fast", "slow"] = "fast"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-z]{1,8}\Z")]
    share: float = 0.5


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str = ""
    number: int = 0
    real: float = 0.0
    flag: bool = False
    maybe: str | None = None
    small: Annotated[int, Meta(ge=1, le=9)] | None = None
    inner: Inner = Inner()
    optional: Inner | None = None
    entries: Annotated[tuple[Entry, ...], Meta(max_length=3)] = ()
    numbers: list[int] = []
    table: dict[str, float] = {}


def faults_of(text: str, wanted: Any = Wanted) -> Any:
    with pytest.raises(ConfigError) as caught:
        parse(text, wanted, "s.yaml")
    assert all(fault and "\n" not in fault and fault.isprintable() for fault in caught.value.faults)
    return caught.value.faults


# --- one line per fault -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("text: 5", "text: must be text (got 5)"),
        ("text: true", "text: must be text (got true)"),
        ("text: ~", "text: must be text (got null)"),
        ("number: soon", 'number: must be a whole number (got "soon")'),
        ("number: 1.5", "number: must be a whole number (got 1.5)"),
        ("number: true", "number: must be a whole number (got true)"),
        ('number: "1"', 'number: must be a whole number (got "1")'),
        ("real: soon", 'real: must be a number (got "soon")'),
        ("flag: 1", "flag: must be true or false (got 1)"),
        ("maybe: 5", "maybe: must be text or null (got 5)"),
        ("small: 10", "small: must be a whole number >= 1 and <= 9 or null (got 10)"),
        ("inner: {rate: soon}", 'inner.rate: must be > 0 and <= 2592000 (got "soon")'),
        ("inner: {rate: 0}", "inner.rate: must be > 0 and <= 2592000 (got 0)"),
        ("inner: {mode: quick}", 'inner.mode: must be one of fast, slow (got "quick")'),
        ("inner: 5", "inner: must be a mapping (got 5)"),
        ("inner: [1]", "inner: must be a mapping (got [1])"),
        ("optional: {rate: x}", 'optional.rate: must be > 0 and <= 2592000 (got "x")'),
        ("optional: 5", "optional: must be a mapping or null (got 5)"),
        ("entries: 5", "entries: must be a list of at most 3 entries (got 5)"),
        ("entries: [5]", "entries[0]: must be a mapping (got 5)"),
        ("entries: [{name: a}, {name: B}]", 'entries[1].name: must be text like ^[a-z]{1,8}$ (got "B")'),
        ("entries: [{name: a}, {share: 1}]", "entries[1].name: missing"),
        ("numbers: [1, x]", 'numbers[1]: must be a whole number (got "x")'),
        ("numbers: 5", "numbers: must be a list (got 5)"),
        ("table: [1]", "table: must be a mapping (got [1])"),
        ("inner: {speed: 1}", "inner.speed: unknown key (known: mode, rate)"),
        ("inner: {rat: 1}", "inner.rat: unknown key; did you mean rate? (known: mode, rate)"),
    ],
)
def test_a_fault_is_one_line_that_says_where_what_and_what_was_there(text: str, fault: str) -> None:
    assert faults_of(text) == [fault]


def test_all_faults_are_told_at_once_and_the_file_stands_in_every_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("text: 5\nextra: 1\ninner: {rate: -1, mode: x}\nentries: [{share: x}, 3]", Wanted, "dir/s.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["dir/s.yaml", key]
        for key in (
            "extra",
            "text",
            "inner.rate",
            "inner.mode",
            "entries[0].name",
            "entries[0].share",
            "entries[1]",
        )
    ]


def test_a_long_or_dirty_value_is_shown_short_and_clean() -> None:
    (fault,) = faults_of('number: "' + "x" * 500 + '"')
    assert len(fault) < 110
    assert faults_of('number: "\\e[31m\\nroot"') == [
        'number: must be a whole number (got "\\x1b[31m\\nroot")'
    ]
    assert faults_of('"\\e[31m\\n": 1')[0].startswith("\\x1b[31m\\n: unknown key")
    assert len(faults_of("x" * 900 + ": 1")[0]) < 250


@pytest.mark.parametrize(
    "text",
    [
        "real: .nan",
        "real: .inf",
        "real: -.inf",
        "real: 1e999",
        "inner: {rate: .nan}",
        "table: {a: .nan}",
        "entries: [{name: a, share: .nan}]",
    ],
)
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    """NaN passes every `>` and `<=`."""
    (fault,) = faults_of(text)
    assert "must be finite" in fault


# --- a job whose every key has a wrong type -----------------------------------------------------------------


def _wrong(kind: Any) -> Any:
    """Return a YAML value that this type cannot take: null for what must not be null, else a list or a date."""
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    arms = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    takes_list = any(typing.get_origin(arm) in (list, tuple) for arm in arms)
    return {"wrong": 1} if takes_list else [["wrong"]]


def _all_wrong(struct: Any, prefix: str = "") -> Any:
    """Return (mapping with every key wrong, names of the keys); structs inside are entered."""
    mapping, names = {}, []
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            mapping[field.encode_name], inside = _all_wrong(field.type, f"{prefix}{field.encode_name}.")
            names += inside
        else:
            mapping[field.encode_name] = _wrong(field.type)
            names.append(f"{prefix}{field.encode_name}")
    return mapping, names


def test_a_job_with_every_key_of_a_wrong_type_gets_one_line_per_key() -> None:
    from liberatai_coordinator import config

    mapping, names = _all_wrong(config.JobSpec)
    with pytest.raises(ConfigError) as caught:
        config.parse_job(yaml.safe_dump(mapping), "job.yaml")
    assert [fault.partition(": ")[0] for fault in caught.value.faults] == names
    assert all("must be" in fault and "(got " in fault for fault in caught.value.faults)
    assert len(names) > 30
    assert {"name", "data.classes", "rounds.deadline_s", "training.epochs"} <= set(names)


def test_a_coordinator_with_every_key_of_a_wrong_type_gets_one_line_per_key() -> None:
    from liberatai_coordinator import config

    mapping, names = _all_wrong(config.CoordinatorConfig)
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_dump(mapping), config.CoordinatorConfig, "coordinator.yaml")
    assert [fault.partition(": ")[0] for fault in caught.value.faults] == names


def test_the_example_of_the_documentation_reads_as_documented() -> None:
    from liberatai_coordinator import config

    text = "name: j\ndata: {input_shape: [8], classes: 2}\nstructures: [{family: mlp}]\nrounds: {deadline_s: soon}"
    with pytest.raises(ConfigError) as caught:
        config.parse_job(text, "job.yaml")
    assert str(caught.value) == 'job.yaml: rounds.deadline_s: must be > 0 and <= 2592000 (got "soon")'


def test_a_job_with_nothing_wrong_is_read() -> None:
    from liberatai_coordinator import config

    job = config.parse_job(
        "name: j\ndata: {input_shape: [8], classes: 2}\nstructures: [{family: mlp, params: {hidden: 4}}]",
        "job.yaml",
    )
    assert (job.name, job.structures[0].params) == ("j", {"hidden": 4})


# --- YAML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("NO", "NO"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("+5", 5),
        ("-0", 0),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("null", None),
        ("", None),
        ("nULL", "nULL"),
        ("0.1.0", "0.1.0"),
        ("=", "="),
        ("<<", "<<"),
        ('"5"', "5"),
        ("'true'", "true"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_mapping(f"a: {text}", "s.yaml")["a"]
    assert found == value
    assert type(found) is type(value)


def test_norway_is_a_country() -> None:
    assert parse("text: no", Wanted, "s.yaml").text == "no"
    assert faults_of("flag: no") == ['flag: must be true or false (got "no")']


def test_settings_need_no_key_at_all() -> None:
    for text in ("", "# nothing\n", "---\n", "{}"):
        assert parse(text, Wanted, "s.yaml") == Wanted()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)

NOT_SETTINGS = {
    "aliases bomb": (BOMB, "aliases"),
    "one alias": ("a: &x 1\nb: *x", "line 2: aliases"),
    "merge key with alias": ("a: &x {b: 1}\nc: {<<: *x}", "aliases"),
    "recursive alias": ("a: &x [*x]", "aliases"),
    "doubled key": ("text: a\nnumber: 1\ntext: b", 'line 3: key "text" stands twice'),
    "doubled key inside": ("inner: {rate: 1, rate: 2}", 'key "rate" stands twice'),
    "doubled key, other spelling": ('a: 1\n"a": 2', "stands twice"),
    "list": ("- 1\n- 2", "must be a mapping"),
    "text": ("just text", "must be a mapping"),
    "number": ("5", "must be a mapping"),
    "number as key": ("1: 2", "must be a mapping"),
    "null as key": ("~: 2", "must be a mapping"),
    "list as key": ("? [a, b]\n: 1", "a key must be plain text"),
    "mapping as key": ("? {a: b}\n: 1", "a key must be plain text"),
    "empty list as key inside": ("inner: {[]: 1}", "a key must be plain text"),
    "python object": ("a: !!python/object/apply:os.system ['false']", "tags"),
    "python name": ("a: !!python/name:os.system", "tags"),
    "local tag": ("a: !secret x", "tags"),
    "bool tag": ("a: !!bool perhaps", "tags"),
    "float tag": ('a: !!float ""', "tags"),
    "timestamp tag": ("a: !!timestamp nonsense", "tags"),
    "binary tag": ("a: !!binary x", "tags"),
    "set tag": ("a: !!set {b, c}", "tags"),
    "tag on the document": ("!!map {a: 1}", "tags"),
    "deep lists": ("a: " + "[" * 200_000, "nested deeper"),
    "deep mappings": ("a: " + "{a: " * 50_000, "nested deeper"),
    "deep block": ("".join(" " * i + "a:\n" for i in range(200)), "nested deeper"),
    "deep dashes": ("a:\n" + "- " * 5000, "nested deeper"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
    "tab": ("a:\n\t- 1", "line 2"),
    "unclosed": ("a: [1, 2", "line 1"),
    "colon": ("a: b: c", "line 1"),
    "percent": ("%YAML 9.9\n---\na: 1", "line 1"),
    "NUL": ("a: \0", "not YAML"),
    "control character": ("a: \x1b[31m", "not YAML"),
    "too many digits": ("a: " + "9" * 5000, "not YAML"),
    "too long": ("#" * (MAX_SETTINGS_BYTES + 1), "at most"),
}


@pytest.mark.parametrize("name", NOT_SETTINGS)
def test_what_is_no_settings_file_is_refused_in_one_line(name: str) -> None:
    text, reason = NOT_SETTINGS[name]
    (fault,) = faults_of(text)
    assert reason in fault
    assert len(fault) < 250


def test_a_bomb_of_aliases_costs_no_memory() -> None:
    tracemalloc.start()
    faults_of(BOMB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
