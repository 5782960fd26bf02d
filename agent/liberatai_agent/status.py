"""The status file, for whoever reads it: nothing heavy is imported to print a file."""

import json
from pathlib import Path
from typing import Any

FILE = "status.json"


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the status file of a state folder, None if there is none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
