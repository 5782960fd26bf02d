"""How the commands of `liberatai` write lists and records: the one place where tables are made.

A list fits the screen: what is empty is left out first, then columns from the right; a remark that does not
fit beside its row stands below it; where even the first columns do not fit, a row takes two lines. Names are
never cut. `-o wide` shows every column in one line, however long. In a pipe nothing is left out either.
"""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
import typer

from liberatai_core.errors import LinkError
from liberatai_core.units import (
    ago_text,
    count_text,
    duration_text,
    rate_text,
    record_lines,
    share_text,
    size_text,
    when_text,
    wrapped,
)

__all__ = [
    "WATCH_S",
    "Column",
    "Output",
    "OutputOption",
    "WatchOption",
    "ago_text",
    "clean",
    "count_text",
    "dump",
    "duration_text",
    "encoded",
    "on_screen",
    "patiently",
    "progress",
    "rate_text",
    "redraw",
    "rendered",
    "screen_width",
    "share_text",
    "show",
    "show_list",
    "show_one",
    "shown",
    "size_text",
    "when_text",
    "wrapped",
]


class Output(StrEnum):
    """How a result is written."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"

    @property
    def is_table(self) -> bool:
        """Whether it is for people."""
        return self in (Output.TABLE, Output.WIDE)


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table, wide, json, yaml or name.")]
WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Go on: show what changes, until Ctrl-C.")]

Row = TypeVar("Row")

LEAST: Final = 4
"""Columns that a row keeps: where they do not fit into one line, it takes two."""
GAP: Final = "  "
INDENT: Final = "    "
QUIET_S: Final = 2.0
"""What takes longer says what it does, where no wheel turns."""
WATCH_S: Final = 2.0
"""Between two looks of `--watch`."""
PATIENCE_S: Final = 600.0
"""How long a coordinator that went away is waited for: longer than any restart."""


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One column of a list. The first one of a list is its name.

    Attributes:
        wide: only `-o wide` has it.
        right: numbers stand at the right.
        note: a sentence: where it does not fit, it stands below its row.
        rare: left out everywhere where no row has it.
    """

    title: str
    text: Callable[[Row], str]
    wide: bool = False
    right: bool = False
    note: bool = False
    rare: bool = False


def clean(text: str) -> str:
    """Take away what could steer a terminal: devices choose some of these texts."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def on_screen() -> bool:
    """Whether a person looks at what is written."""
    return sys.stdout.isatty()


def screen_width() -> int | None:
    """Return the number of columns of the screen; None: no screen, nothing needs to be left out."""
    return shutil.get_terminal_size().columns if on_screen() else None


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something is going on: a wheel on a screen, elsewhere a line once it takes a while."""
    if not sys.stderr.isatty():
        with _told_late(what):
            yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def _told_late(what: str) -> Iterator[None]:
    started_s = time.monotonic()
    told = threading.Event()

    def tell() -> None:
        told.set()
        print(f"{what} …", file=sys.stderr, flush=True)

    timer = threading.Timer(QUIET_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if told.is_set():
            print(f"{what}: {duration_text(time.monotonic() - started_s)}", file=sys.stderr, flush=True)


# --- lists ----------------------------------------------------------------------------------------


def show(rows: Sequence[Row], columns: Sequence[Column[Row]], output: Output) -> None:
    """Write a list; `-o name` writes its first column, one name a line."""
    for line in shown(rows, columns, output):
        print(line)
    if not rows and output.is_table and on_screen():
        print("none", file=sys.stderr)


def shown(rows: Sequence[Row], columns: Sequence[Column[Row]], output: Output) -> list[str]:
    """Return a list as lines, in the form that was asked for."""
    if output is Output.NAME:
        return [clean(columns[0].text(row)) for row in rows]
    if not output.is_table:
        return [encoded(rows, output)]
    return rendered(rows, columns, wide=output is Output.WIDE, width=screen_width())


def rendered(
    rows: Sequence[Row], columns: Sequence[Column[Row]], *, wide: bool = False, width: int | None = None
) -> list[str]:
    """Return the lines of a table.

    Args:
        rows: of the list.
        columns: the first one is the name, which is never cut.
        wide: every column, in one line, however long.
        width: of the screen, in characters; None: as long as it gets.
    """
    written = [_Cells.of(rows, column) for column in columns if wide or not column.wide]
    cells = [one for one in written if one.said or not one.column.rare]
    if wide:
        return _lines(cells)
    if width is None:
        return _lines(cells)
    cells = [one for one in cells if one.said or not one.column.note]
    if _width(cells) <= width:
        return _lines(cells)
    name, *others = [one for one in cells if one.said or one is cells[0]]
    notes = [one for one in others if one.column.note]
    if not notes or _width([name, *others]) <= width:
        return _fitted(name, others, width)
    return _with_notes(_fitted(name, [one for one in others if one not in notes], width), notes, width)


@dataclass(frozen=True, slots=True)
class _Cells:
    """One column of a table, written: its title, then a cell per row."""

    column: Column[Any]
    texts: tuple[str, ...]
    width: int
    said: bool

    @classmethod
    def of(cls, rows: Sequence[Any], column: Column[Any]) -> "_Cells":
        texts = [clean(column.text(row)) or "-" for row in rows]
        return cls(
            column=column,
            texts=(column.title, *texts),
            width=max(map(len, (column.title, *texts))),
            said=any(text != "-" for text in texts) or not (rows or column.rare),
        )

    def placed(self) -> list[str]:
        """Return the cells, each as wide as the column."""
        right = self.column.right
        return [text.rjust(self.width) if right else text.ljust(self.width) for text in self.texts]


def _width(cells: Sequence[_Cells]) -> int:
    return sum(one.width for one in cells) + len(GAP) * (len(cells) - 1)


def _lines(cells: Sequence[_Cells]) -> list[str]:
    return [GAP.join(line).rstrip() for line in zip(*(one.placed() for one in cells), strict=True)]


def _fitted(name: _Cells, others: Sequence[_Cells], width: int) -> list[str]:
    """Return lines that fit; columns are left out from the right, or a row takes two lines."""
    for count in range(len(others), min(LEAST - 1, len(others)) - 1, -1):
        if _width([name, *others[:count]]) <= width:
            return _lines([name, *others[:count]])
    room = width - len(GAP)
    count = max([n for n in range(1, len(others) + 1) if _width(others[:n]) <= room], default=1)
    second = _lines(others[:count])
    return [f"{first}\n{GAP}{rest}" for first, rest in zip(name.texts, second, strict=True)]


def _with_notes(lines: Sequence[str], notes: Sequence[_Cells], width: int) -> list[str]:
    """Return lines with what is remarked on a row below it."""
    found = [lines[0]]
    for place, line in enumerate(lines[1:], 1):
        told = [one.texts[place] for one in notes if one.texts[place] != "-"]
        found.append("\n".join([line, *(wrapped(text, width, INDENT) for text in told)]))
    return found


# --- records and other forms ----------------------------------------------------------------------


def show_one(view: Any, output: Output) -> None:
    """Write all fields of one record; `-o name` writes its name."""
    fields = msgspec.to_builtins(view)
    if output is Output.NAME:
        print(clean(str(fields.get("name") or fields.get("id") or next(iter(fields.values()), ""))))
        return
    if not output.is_table:
        dump(view, output)
        return
    for line in record_lines(fields, None if output is Output.WIDE else screen_width()):
        print("\n".join(map(clean, line.split("\n"))))


def dump(value: Any, output: Output) -> None:
    """Write a value for programs."""
    print(encoded(value, output))


def encoded(value: Any, output: Output) -> str:
    """Return a value for programs."""
    if output is Output.YAML:
        return msgspec.yaml.encode(value).decode().rstrip("\n")
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


# --- following ------------------------------------------------------------------------------------


def show_list(
    look: Callable[[], Sequence[Row]], columns: Sequence[Column[Row]], output: Output, *, watch: bool
) -> None:
    """Write a list; with `watch` again whenever it changes.

    Args:
        look: asks for the list.
        columns: the first one is the name.
        output: how to write it.
        watch: go on until Ctrl-C.
    """
    if not watch:
        show(look(), columns, output)
        return
    for lines in patiently(lambda: shown(look(), columns, output), every_s=WATCH_S):
        redraw(lines)


Found = TypeVar("Found")


def patiently(look: Callable[[], Found], *, every_s: float) -> Iterator[Found]:
    """Yield what is seen, again and again; a coordinator that restarts is waited for.

    Args:
        look: asks the coordinator.
        every_s: seconds between two looks.

    Raises:
        LinkError: nobody answered the first question, or for `PATIENCE_S`.
    """
    heard_s: float | None = None
    silent = False
    while True:
        try:
            found = look()
        except LinkError as error:
            if heard_s is None or time.monotonic() - heard_s > PATIENCE_S:
                raise
            if not silent:
                print(f"liberatai: {error.code}: {error}; waiting for it", file=sys.stderr, flush=True)
            silent = True
        else:
            heard_s, silent = time.monotonic(), False
            yield found
        time.sleep(every_s)


class _Drawn:
    """What `redraw` wrote last, and how many lines of the screen that took."""

    lines: Sequence[str] | None = None
    taken = 0


def redraw(lines: Sequence[str]) -> None:
    """Write lines if they are not those of the last call; on a screen they take the place of those."""
    if lines == _Drawn.lines:
        return
    _Drawn.lines = list(lines)
    if on_screen():
        size = shutil.get_terminal_size()
        rows = [part for line in lines for part in line.split("\n")]
        fitting = rows[: max(1, size.lines - 2)]
        if len(fitting) < len(rows):
            fitting[-1] = f"… {len(rows) - len(fitting) + 1} lines more"
        if _Drawn.taken:
            sys.stdout.write(f"\x1b[{_Drawn.taken}A\r\x1b[J")
        _Drawn.taken = sum(max(1, -(-len(row) // size.columns)) for row in fitting)
        lines = fitting
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
