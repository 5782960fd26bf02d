"""The status file, for whoever reads it: nothing heavy is imported to print a file."""

import json
from pathlib import Path
from typing import Any

FILE = "status.json"
LASTS_S = 3600.0
"""So long an error is shown after it was met last: later it is in the log only."""


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the status file of a state folder, None if there is none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def last_error(text: str, met_at: float, now: float) -> dict[str, Any]:
    """Return the two fields of the newest error; both empty once nobody has met it for an hour.

    Args:
        text: "E_DISK: full", "" for none.
        met_at: when it was met last, Unix seconds.
        now: likewise.
    """
    # A clock that was set back makes it new, not old.
    if not text or now - met_at > LASTS_S:
        return {"last_error": "", "last_error_at": None}
    return {"last_error": text, "last_error_at": met_at}
