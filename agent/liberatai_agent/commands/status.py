"""`liberatai-agent status`: what the agent is doing."""

import argparse
from pathlib import Path
from typing import Any

from liberatai_agent.commands.kit import FAILED, OK, add_command, add_config, add_output, show
from liberatai_core.errors import NotFoundError


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "status",
        _status,
        text="Show what the agent is doing.",
        example="liberatai-agent status --state-dir DIR",
    )
    where = parser.add_mutually_exclusive_group()
    add_config(where)
    where.add_argument("--state-dir", type=Path, default=None, metavar="DIR", help="the agent's state folder")
    add_output(parser)


def _status(args: argparse.Namespace) -> int:
    import time  # noqa: PLC0415

    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.store.status import last_error, read_status  # noqa: PLC0415

    folder = args.state_dir if args.state_dir is not None else load_config(args.config).state_path
    found = read_status(folder)
    if found is None:
        raise NotFoundError(f"{folder}: no status: the agent has never run with this state folder")
    if found.get("running") and not _alive(found.get("pid")):
        found |= {"running": False, "connected": False, "phase": "dead"}
    now = time.time()
    found |= last_error(str(found.get("last_error", "")), float(found.get("last_error_at") or 0.0), now)
    found["age_s"] = round(max(0.0, now - float(found.get("updated_at", 0.0))), 1)
    show(found, args.output, found.get("device", ""))
    return OK if found.get("running") else FAILED


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()
