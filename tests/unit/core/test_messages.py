"""Every message is closed, frozen and bounded, and has one encoding."""

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.golden import make

from liberatai_core.contract import messages as m
from liberatai_core.errors import NonFiniteError, SchemaError

KINDS = pytest.mark.parametrize("kind", list(m.KIND_OF), ids=lambda kind: kind.__name__)
ENCODE = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "module",
    [
        "contract.messages",
        "contract.frame",
        "contract.topics",
        "contract.chunks",
        "contract.limits",
        "structure",
        "errors",
    ],
)
def test_the_contract_loads_neither_numpy_nor_torch_nor_yaml_nor_pickle(module: str) -> None:
    """The agent's supervisor waits for months in 28 MB; and bytes from outside never meet pickle."""
    code = f"import sys, liberatai_core.{module}; print([n for n in ('numpy', 'torch', 'yaml', 'pickle', '_pickle') if n in sys.modules])"
    command = [*shlex.split(os.environ.get("LIBERATAI_EMULATOR", "")), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_profile_and_its_settings_load_no_numpy() -> None:
    code = "import sys, liberatai_core.profile; print([n for n in ('numpy', 'torch', 'pickle') if n in sys.modules])"
    command = [*shlex.split(os.environ.get("LIBERATAI_EMULATOR", "")), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_kind_numbers_are_unique_and_fit_a_byte() -> None:
    assert len(m.KIND_OF) == len(m.KINDS) == len(m.MAX_BYTES)
    assert all(0 < number < 256 for number in m.KINDS)
    assert set(m.MAX_BYTES) == set(m.KIND_OF)


PARTS: list[Any] = [m.Training, m.TaskSpec]
PART_OF = {m.Training: m.Training(), m.TaskSpec: make.SPEC}

CHECKED_BY_STRUCTURE = ("structure.params", "structure.tensors[].shape[]")
"""Bounds that no annotation can say; tests/unit/core/test_structure.py holds them."""
UNBOUNDED_ON_PURPOSE = ("Update.loss",)
"""One float, finite: a loss may be anything."""


def _unbounded(kind: Any, where: Any) -> Iterator[Any]:
    i = msgspec.inspect
    match kind:
        case i.IntType() | i.FloatType():
            if (kind.ge is None and kind.gt is None) or (kind.le is None and kind.lt is None):
                yield where
        case i.StrType() | i.BytesType():
            if kind.max_length is None and getattr(kind, "pattern", None) is None:
                yield where
        case i.VarTupleType() | i.ListType():
            if kind.max_length is None:
                yield where
            yield from _unbounded(kind.item_type, f"{where}[]")
        case i.DictType():
            if kind.max_length is None:
                yield where
            yield from _unbounded(kind.key_type, f"{where}.key")
            yield from _unbounded(kind.value_type, f"{where}.value")
        case i.TupleType():
            for item in kind.item_types:
                yield from _unbounded(item, f"{where}[]")
        case i.UnionType():
            for arm in kind.types:
                yield from _unbounded(arm, where)
        case i.StructType():
            if not (kind.forbid_unknown_fields and kind.cls.__struct_config__.frozen):
                yield f"{where} is open"
            for field in kind.fields:
                yield from _unbounded(field.type, f"{where}.{field.encode_name}")
        case i.BoolType() | i.NoneType() | i.LiteralType():
            pass
        case _:
            yield f"{where}: {type(kind).__name__}"


@pytest.mark.parametrize("kind", [*m.KIND_OF, m.TaskSpec], ids=lambda kind: kind.__name__)
def test_every_field_of_a_message_has_a_type_and_bounds(kind: Any) -> None:
    found = [
        w for w in _unbounded(msgspec.inspect.type_info(kind), kind.__name__) if w not in UNBOUNDED_ON_PURPOSE
    ]
    assert [w for w in found if not any(known in w for known in CHECKED_BY_STRUCTURE)] == []


@KINDS
def test_a_message_is_frozen_and_takes_no_other_field(kind: Any) -> None:
    message = make.MINIMAL[kind]
    with pytest.raises(AttributeError):
        setattr(message, message.__struct_fields__[0], "other")
    with pytest.raises(AttributeError):
        message.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        kind(**msgspec.structs.asdict(message), extra=1)


def _fields(kind: Any) -> tuple[msgspec.inspect.Field, ...]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return info.fields


def _float_fields(kind: Any) -> Iterator[Any]:
    for field in _fields(kind):
        arms = getattr(field.type, "types", (field.type,))
        if any(isinstance(arm, msgspec.inspect.FloatType) for arm in arms):
            yield field.encode_name


FLOATS = [(kind, name) for kind in [*m.KIND_OF, *PARTS] for name in _float_fields(kind)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda x: getattr(x, "__name__", x))
def test_no_message_can_even_be_built_with_a_float_that_is_not_finite(
    kind: Any, name: str, value: Any
) -> None:
    base = make.MINIMAL[kind] if kind in make.MINIMAL else PART_OF[kind]
    with pytest.raises(NonFiniteError, match=name):
        msgspec.structs.replace(base, **{name: value})


@pytest.mark.parametrize("kind", [*m.KIND_OF, *PARTS], ids=lambda kind: kind.__name__)
def test_a_field_set_to_its_default_is_written_like_one_that_is_left_out(kind: Any) -> None:
    """Otherwise one message would have several encodings, and several signatures."""
    base = make.MINIMAL[kind] if kind in make.MINIMAL else PART_OF[kind]
    optional = {}
    for field in msgspec.structs.fields(kind):
        if not field.required:
            # decoding makes new objects that equal their defaults and are not them
            optional[field.name] = msgspec.convert(msgspec.msgpack.decode(ENCODE(field.default)), field.type)
    if kind is m.Task:
        del optional["steps"]  # a task leads somewhere: without them something must be held
    explicit = msgspec.structs.replace(base, **optional)
    assert explicit == base
    assert ENCODE(explicit) == ENCODE(base)


def test_false_is_not_the_default_zero() -> None:
    """Equal values of another type stay as they are: the receiver refuses them."""
    assert ENCODE(msgspec.structs.replace(make.SPEC, seed=False)) != ENCODE(make.SPEC)


def test_the_base_of_a_task_is_where_its_steps_lead_or_what_is_held() -> None:
    short, long = make.MINIMAL[m.Task], make.FULL[m.Task]
    assert isinstance(short, m.Task)
    assert isinstance(long, m.Task)
    assert short.base == make.KEYFRAME.digest
    assert long.base == make.DELTA.digest
    assert msgspec.structs.replace(long, steps=()).base == long.held


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (m.Task, {"steps": ()}),
        (m.Task, {"held": b"x" * 15}),
        (m.Task, {"held": b"x"}),
        (m.Cancel, {"held": b"x" * 15}),
    ],
)
def test_a_path_that_starts_or_leads_nowhere_is_refused(kind: Any, change: Any) -> None:
    with pytest.raises(SchemaError):
        msgspec.structs.replace(make.MINIMAL[kind], **change)
    body = make.changed(make.MINIMAL[kind], *next(iter(change.items())))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(ENCODE(body), type=kind)


def test_a_seed_of_work_depends_on_all_of_it_and_fits_torch() -> None:
    work: dict[str, Any] = {"seed": 1, "device": "d", "job": "j", "number": 2}
    changes: list[dict[str, Any]] = [{}, {"seed": 2}, {"device": "e"}, {"job": "k"}, {"number": 3}]
    seeds = {m.work_seed(**(work | change)) for change in changes}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "change",
    [{"device": "d2"}, {"job": "k"}, {"number": 2}, {"base": bytes(16)}],
    ids=lambda c: next(iter(c)),
)
def test_another_device_job_round_or_base_gives_another_update_id(change: Any) -> None:
    work: dict[str, Any] = {"device": "d1", "job": "j", "number": 1, "base": make.BASE}
    assert m.update_id(**work) == m.update_id(**work)
    assert len(m.update_id(**work)) == 16
    assert m.update_id(**(work | change)) != m.update_id(**work)


def test_parts_of_an_update_id_cannot_be_shifted_into_each_other() -> None:
    assert m.update_id("ab", "c", 1, make.ID32) != m.update_id("a", "bc", 1, make.ID32)
    assert m.update_id("a", "b1", 1, make.ID32) != m.update_id("a", "b", 11, make.ID32)


BAD_VALUES: list[tuple[Any, str, list[Any]]] = [
    (m.State, "device", ["", "Dev", "d1\n", "a/b", "x" * 33, "dé", 5, None, b"d1"]),
    (m.State, "state", ["", "ONLINE", "online\n", 1, None]),
    (m.State, "session", [-1, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 1.5, "1", True, None]),
    (m.Update, "round", [0, -1, 1_000_001, 2**32 - 1, 1.5, True]),
    (m.Update, "samples", [0, -1, 10_000_001, 2**32 - 1, 2**63, 1.5, True, None]),
    (m.Update, "update_id", [b"", bytes(15), bytes(17), "x" * 16, [0] * 16]),
    (m.Update, "base", [b"", bytes(15), bytes(17), bytes(32), "x" * 16]),
    (m.Update, "job", ["", "../job", "Job", "j\n", "x" * 65]),
    (m.Update, "body", ["text", None, [1, 2], 5]),
    (m.Update, "class_counts", [[-1], [1.5], [True], [2**32 - 1], [0] * 65_537, "text", {}]),
    (m.Update, "evaluation", [[1], [1, 2, 3], [-1, 2], [1, 10_000_001], 5]),
    (m.Update, "train_seconds", [-1.0, 1e9, "1", True]),
    (m.Capability, "public_key", [b"", bytes(31), bytes(33)]),
    (m.Capability, "tier", ["FULL", "", "root"]),
    (m.Capability, "cores", [0, -4, 4097]),
    (m.Capability, "cpu_share", [0.0, -1.0, 4097.0]),
    (m.Capability, "families", [["x" * 33], ["cnn"] * 65, [5], "cnn"]),
    (m.Capability, "data", [{"input_shape": [2**40], "classes": 2}, {"input_shape": [8]}, []]),
    (m.Offer, "size_bytes", [0, -1, 64 * 2**20 + 1, 2**63]),
    (m.Offer, "chunk_bytes", [0, 1, 1023, 262_145, -131_072]),
    (
        m.Offer,
        "transfer",
        ["", "a" * 25, "a" * 27, "A" * 26, "a" * 25 + "1", "a" * 26 + "\n", "../" + "a" * 23],
    ),
    (m.Credit, "have", [bytes(513), "x"]),
    (m.Credit, "chunks", [-1, 5]),
    (m.Task, "density", [0.0, -0.1, 1.0001]),
    (m.Task, "spec", [{}, [], ["a" * 26], ["a" * 25, 5], ["a" * 26, 0], 5]),
    (m.Task, "held", [bytes(17), "x" * 16]),
    (m.Task, "steps", [[{}], [5], {"a": 1}, [[1, ["a" * 26, 5], bytes(32)]]]),
    (m.TaskSpec, "deadline_s", [-1.0, 2_592_001.0]),
    (
        m.TaskSpec,
        "training",
        [{"epochs": 0}, {"epochs": 10**6}, {"learning_rate": 0.0}, {"optimizer": "eval"}, {"loss": "x"}, []],
    ),
    (m.TaskSpec, "residual_decay", [-0.1, 1.1]),
    (m.TaskSpec, "residual_limit", [-1, 1_000_001]),
    (m.BlobManifest, "chunk_bytes", [0, 1023, 2**31]),
    (m.Head, "chains", [{"x" * 129: []}, {"m": [5]}, {str(i): [] for i in range(65)}, []]),
    (m.Event, "text", ["x" * 513, 5]),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        pytest.param(kind, field, value, id=f"{kind.__name__}.{field}-{place}")
        for kind, field, values in BAD_VALUES
        for place, value in enumerate(values)
    ],
)
def test_a_value_out_of_bounds_does_not_decode(kind: Any, field: str, value: Any) -> None:
    body = make.changed(make.SPEC if kind is m.TaskSpec else make.MINIMAL[kind], field, value)
    with pytest.raises(msgspec.ValidationError, match=make.where(kind, field)):
        msgspec.msgpack.decode(ENCODE(body), type=kind)
