"""How both programs write their logs: one line each, to stderr, for people or as JSON for programs.

A record's `extra={"device": …, "job": …}` are fields of their own in JSON; the line for people has them in
words. Under systemd the journal knows time and speaker: a line begins with its priority (sd-daemon(3)).
"""

import json
import logging
import os
import sys
import time
from typing import Final, Literal, TextIO

Form = Literal["auto", "text", "json"]
FORMS: Final = ("auto", "text", "json")
TIMES: Final = "%Y-%m-%dT%H:%M:%S%z"
MAX_LINE: Final = 8192
"""Characters of a line: what devices say is in some of them."""

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITY: Final = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}


def set_up(form: Form = "auto", *, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Let everything that is logged be written.

    Args:
        form: text, json, or auto: text, with priorities where stderr is the journal's.
        verbose: details as well (DEBUG).
        stream: where to; None: stderr.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(form, journal=is_journal(stream)))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO, force=True)
    if verbose:  # what these say in detail is about themselves
        for name in ("asyncio", "uvicorn", "urllib3", "matplotlib", "PIL", "alembic"):
            logging.getLogger(name).setLevel(logging.INFO)


def is_journal(stream: TextIO) -> bool:
    """Whether a stream goes to the journal: systemd names its device and inode."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def formatter(form: Form, *, journal: bool = False) -> logging.Formatter:
    """Return what makes a line of a record."""
    if form == "json":
        return JsonLines()
    if form == "auto" and journal:
        return JournalLines()
    return TextLines("%(asctime)s %(levelname)s %(message)s", TIMES)


class TextLines(logging.Formatter):
    """`2026-11-30T18:19:29+0000 INFO round 3 of digits: open`: one line, but for tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of logging
        """Return the line, whatever a device has put into it."""
        record.message = one_line(record.message)
        return super().formatMessage(record)


class JournalLines(TextLines):
    """`<6>round 3 of digits: open`."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines, every one with its priority."""
        prefix = f"<{_PRIORITY.get(record.levelname, 6)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


class JsonLines(logging.Formatter):
    """`{"time": …, "level": "info", "logger": …, "message": …, "job": …}`, one object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_LINE],
        }
        told |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def one_line(text: str) -> str:
    """Return a text as one line that cannot steer a terminal, nor look like two lines of a log."""
    text = text[:MAX_LINE]
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else " " if c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(shown)
