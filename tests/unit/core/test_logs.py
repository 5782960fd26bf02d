"""One line per event, the same form in both programs; JSON and the journal by option."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator

import pytest

from liberatai_core import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = before
    root.setLevel(level)


def test_a_line_for_people_has_time_level_and_words_and_is_one_line(stream: io.StringIO) -> None:
    logs.set_up("text", stream=stream)
    logging.getLogger("x").info("device %s: online", "a\n2026 ERROR forged\x1b[31m", extra={"device": "a"})
    logging.getLogger("x").debug("details")
    (line,) = stream.getvalue().splitlines()
    when, level, words = line.split(" ", 2)
    assert len(when) == len("2026-11-30T18:19:29+0000")
    assert level == "INFO"
    assert words == "device a 2026 ERROR forged\N{REPLACEMENT CHARACTER}[31m: online"


def test_verbose_shows_details(stream: io.StringIO) -> None:
    logs.set_up("text", verbose=True, stream=stream)
    logging.getLogger("x").debug("details")
    logging.getLogger("asyncio").debug("Using selector")
    assert stream.getvalue().split(" ", 1)[1] == "DEBUG details\n"


def test_json_has_the_fields_of_a_record_and_the_traceback(stream: io.StringIO) -> None:
    logs.set_up("json", stream=stream)
    log = logging.getLogger("liberatai.x")
    log.warning("round %d of %s abandoned", 3, "digits", extra={"job": "digits", "round": 3})
    try:
        [].pop()
    except IndexError:
        log.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert {name: first[name] for name in first if name != "time"} == {
        "level": "warning",
        "logger": "liberatai.x",
        "message": "round 3 of digits abandoned",
        "job": "digits",
        "round": 3,
    }
    assert first["time"].endswith("Z")
    assert "IndexError: pop from empty list" in second["traceback"]


def test_under_systemd_lines_begin_with_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logs.formatter("auto", journal=True)
    record = logging.makeLogRecord({"msg": "one", "levelname": "WARNING", "levelno": logging.WARNING})
    assert lines.format(record) == "<4>one"
    with open(os.devnull, "w") as file:  # noqa: PTH123 - a stream with a number
        found = os.fstat(file.fileno())
        assert not logs.is_journal(file)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert logs.is_journal(file)
    assert not logs.is_journal(io.StringIO())
    assert not logs.is_journal(sys.stderr)
