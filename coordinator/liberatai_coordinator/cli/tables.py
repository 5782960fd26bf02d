"""How the commands of `liberatai` write lists, records, sizes and times."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
import typer


class Output(StrEnum):
    """How a result is written."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table, wide, json or yaml.")]


Row = TypeVar("Row")

MAX_DRAWN: Final = 200
"""Rows that are drawn as a table on a screen: rich takes a second for each thousand of them."""


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


def share_text(share: float | None) -> str:
    """Return a share in per cent; "-" if nobody measured it."""
    return "-" if share is None else f"{share:.2%}"


def count_text(number: int) -> str:
    """Return a number in groups of three digits."""
    return f"{number:,}"


def duration_text(seconds: float) -> str:
    """Return how long something took."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ago_text(seen_s: float) -> str:
    """Return how long ago a Unix time was; "never" for 0."""
    if not seen_s:
        return "never"
    seconds = max(0.0, time.time() - seen_s)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def clean(text: str) -> str:
    """Take away what could steer a terminal: devices choose some of these texts."""
    if text.isprintable():
        return text
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
    if on_screen() and len(rows) <= MAX_DRAWN:
        from rich.console import Console

        Console().print(rich_table(rows, shown))
        return
    print("\n".join(_lines(rows, shown)))


def _lines(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> Iterator[str]:
    """Yield the lines of a list in plain columns."""
    places = []
    for column in columns:
        cells = [column.title, *(clean(column.text(row)) or "-" for row in rows)]
        width = max(map(len, cells))
        places.append([cell.rjust(width) if column.right else cell.ljust(width) for cell in cells])
    for line in zip(*places, strict=True):
        yield "  ".join(line).rstrip()


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
