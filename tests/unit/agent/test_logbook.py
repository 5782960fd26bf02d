"""What a fleet may read of a device's log: never what could quote its data."""

import logging

import pytest

from liberatai_agent.health.logbook import Logbook, outward_line
from liberatai_core.contract.limits import MAX_LINES, MAX_TEXT


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("connected to mqtts://b", "connected to mqtts://b"),
        ("failed · E_DATA: row 7: label 'Alice'", "failed · E_DATA (the rest stays on the device)"),
        ("training_failed E_TRAIN x=0.25", "training_failed E_TRAIN (the rest stays on the device)"),
        ("E_DISK: full, then E_DATA: 3 rows", "E_DISK: full, then E_DATA (the rest stays on the device)"),
        ("one\ntwo\x1b[31m", "one two [31m"),
    ],
)
def test_a_line_ends_where_words_about_data_begin(text: str, told: str) -> None:
    assert outward_line(text) == told


def test_only_our_own_lines_are_kept_and_the_oldest_go_first() -> None:
    book = Logbook()
    for number in range(MAX_LINES + 5):
        book.emit(
            logging.makeLogRecord({"name": "liberatai_agent.x", "msg": f"line {number}", "levelno": 20})
        )
    book.emit(logging.makeLogRecord({"name": "urllib3", "msg": "secret", "levelno": 40}))
    assert len(book.last(1000)) == MAX_LINES
    assert book.last(1)[0].endswith(f"line {MAX_LINES + 4}")
    assert book.last(0) == ()
    book.emit(logging.makeLogRecord({"name": "liberatai_agent.x", "msg": "y" * 9000, "levelno": 20}))
    assert len(book.last(1)[0]) == MAX_TEXT
