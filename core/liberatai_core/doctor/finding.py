"""One line of `doctor`: what was looked at, how it is, and what to do."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from liberatai_core.units import wrapped

State = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        check: what was looked at: "certificate", "broker", "data".
        state: "fail": it does not work like this; "warn": it does, but not well or not for long.
        text: what is the matter; it names the file or the setting.
        remedy: what to do; "" where nothing needs to be done.
    """

    check: str
    state: State
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """Return that all is well."""
    return Finding(check=check, state="ok", text=text)


def warn(check: str, text: str, remedy: str) -> Finding:
    """Return what is not as it should be, but works."""
    return Finding(check=check, state="warn", text=text, remedy=remedy)


def fail(check: str, text: str, remedy: str) -> Finding:
    """Return what does not work, and what to do about it."""
    return Finding(check=check, state="fail", text=text, remedy=remedy)


def failed(findings: Iterable[Finding]) -> bool:
    """Say whether something must be mended."""
    return any(one.state == "fail" for one in findings)


def lines(findings: Sequence[Finding], width: int | None = None) -> list[str]:
    """Return findings for people: `FAIL  certificate: …`, and below it what to do.

    Args:
        findings: in the order in which they were looked at.
        width: of the screen, in characters; None: one line each.
    """
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    told = []
    for one in findings:
        text = wrapped(f"{one.check}: {one.text}", width, "      ").lstrip()
        told.append(f"{marks[one.state]}  {text}")
        if one.remedy:
            told.append(wrapped(f"→ {one.remedy}", width, "      "))
    return told
