"""What the commands of `liberatai` share: asking the coordinator, and writing lists, records and errors."""

# ruff: noqa: PLC0415 - what only a screen needs is imported for a screen, see `cli`

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import typer

from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import VersionView
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.errors import (
    ConfigError,
    LiberataiError,
    NotFoundError,
    RoundUnknownError,
    UnknownDeviceError,
)

FAILED, USAGE, PARTLY, NOT_FOUND = 1, 2, 3, 4

_SIZE = re.compile(r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z]{0,3})")
_UNITS = {
    **dict.fromkeys(("", "b"), 1),
    **{name: 1000**power for power, names in enumerate((("k", "kb"), ("m", "mb")), 1) for name in names},
    "kib": 1024,
    "mib": 1024**2,
}


class Output(StrEnum):
    """How a result is written."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table, wide, json or yaml.")]


def group(help_text: str, example: str) -> typer.Typer:
    """Return an empty group of commands."""
    return typer.Typer(
        help=help_text,
        epilog=f"Example: {example}",
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help: the same on a screen, in a pipe and in a manual
        pretty_exceptions_enable=False,
        add_completion=False,
    )


# --- asking ---------------------------------------------------------------------------------------


@contextmanager
def client_of(context: typer.Context) -> Iterator[Client]:
    """Connect to the coordinator that the command line names."""
    with Client(context.obj) as client:
        yield client


def read_text(path: Path) -> str:
    """Return a text file of the operator, or raise ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(str(path), [f"cannot be read: {reason}"]) from None


def complain(error: LiberataiError) -> int:
    """Write one line per fault to stderr and return the exit code."""
    for line in str(error).splitlines() or [""]:
        print(f"liberatai: {error.code}: {clean(line)}", file=sys.stderr)
    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, NotFoundError | UnknownDeviceError | RoundUnknownError):
        return NOT_FOUND
    return FAILED


def budget_of(text: str, where: str) -> int:
    """Return the bytes that an operator wrote: "120KB" (1000), "64KiB" (1024), "1.5MB", or a plain number.

    Raises:
        ConfigError: it is no size, or none that a model file may have.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found["unit"].lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(where, [f"{text!r} is no size: write it like 120KB, 64KiB or 1.5MB"])
    size_bytes = int(Decimal(found["number"]) * unit)
    if not 1 <= size_bytes <= MAX_OBJECT_BYTES:
        raise ConfigError(where, [f"{text}: a model file has 1 … {MAX_OBJECT_BYTES} bytes"])
    return size_bytes


def budget_of_profile(name: str) -> int:
    """Return what a class of hardware lets the files of one model take: what the plan goes by, too.

    Args:
        name: of a shipped profile, or the path of a profile's file (with a slash).

    Raises:
        ConfigError: no such profile, or a faulty one.
    """
    from liberatai_core.profile import parse_profile, shipped_profiles

    path = Path(name)
    if "/" not in name:
        folder = shipped_profiles()
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none"
            raise ConfigError("--profile", [f"no profile {name!r} (known: {known})"])
    storage_bytes = parse_profile(read_text(path), str(path)).storage_bytes
    return min(storage_bytes, MAX_OBJECT_BYTES)


def only_structure(view: VersionView, wanted: str | None) -> str:
    """Return the structure that an operator means: the one named, or the only one of a version."""
    known = ", ".join(sorted(view.digests))
    if wanted is None and len(view.digests) == 1:
        return next(iter(view.digests))
    if wanted is None:
        raise ConfigError("--structure", [f"missing: {view.model} has {known}"])
    if wanted not in view.digests:
        raise NotFoundError(f"{view.model} version {view.version}: no structure {wanted!r}; it has {known}")
    return wanted


# --- showing --------------------------------------------------------------------------------------

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One column of a list; a wide one is left out of narrow tables."""

    title: str
    text: Callable[[Row], str]
    wide: bool = False
    right: bool = False


def size_text(size_bytes: float) -> str:
    """Return bytes in the unit that people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError


def rate_text(bits_s: float | None) -> str:
    """Return the speed of a link; "-" if nobody knows it."""
    if bits_s is None:
        return "-"
    return f"{bits_s / 1e6:.1f} Mbit/s" if bits_s >= 1e6 else f"{bits_s / 1e3:.1f} kbit/s"


def when_text(seconds: float) -> str:
    """Return a Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def clean(text: str) -> str:
    """Take away what could steer a terminal: devices choose some of these texts."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def on_screen() -> bool:
    """Whether a person looks at what is written."""
    return sys.stdout.isatty()


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something is going on, on a screen only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def show_one(view: Any, output: Output) -> None:
    """Write all fields of one record."""
    if output in (Output.JSON, Output.YAML):
        dump(view, output)
        return
    fields = msgspec.to_builtins(view).items()
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name:<{width}}  {_field(name, value, width)}")


def _field(name: str, value: Any, width: int) -> str:
    if isinstance(value, dict):
        lines = [f"{key}: {_field(name, inner, 0)}" for key, inner in value.items()]
        return ("\n" + " " * (width + 2)).join(lines) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(str(inner) for inner in value) or "-"
    if name.endswith("_bits_s"):
        return rate_text(value)
    if name.endswith("_s") and isinstance(value, int | float):
        return when_text(value) if value else "never"
    if name.rsplit("_", maxsplit=1)[-1] == "bytes" and isinstance(value, int):
        return f"{value} ({size_text(value)})"
    return "-" if value is None or value == "" else clean(str(value))


def show(rows: Sequence[Row], columns: Sequence[Column[Row]], output: Output) -> None:
    """Write a list."""
    if output in (Output.JSON, Output.YAML):
        dump(rows, output)
        return
    shown = list(columns) if output is Output.WIDE else plain(columns)
    if on_screen():
        from rich.console import Console

        Console().print(rich_table(rows, shown))
        return
    lines = [[column.title for column in shown]]
    lines += [[clean(column.text(row)) or "-" for column in shown] for row in rows]
    widths = [max(map(len, place)) for place in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, shown, strict=True)
        ]
        print("  ".join(cells).rstrip())


def plain(columns: Sequence[Column[Row]]) -> list[Column[Row]]:
    """Return the columns of a narrow table."""
    return [column for column in columns if not column.wide]


def rich_table(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> Any:
    """Return a list as rich draws it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left")
    for row in rows:
        # Text, not str: a name in square brackets is no markup
        table.add_row(*(Text(clean(column.text(row)) or "-") for column in columns))
    return table


def dump(value: Any, output: Output) -> None:
    """Write a value for programs."""
    if output is Output.YAML:
        print(msgspec.yaml.encode(value).decode(), end="")
        return
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
