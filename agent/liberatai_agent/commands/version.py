"""`liberatai-agent version`."""

import argparse
from typing import Any

from liberatai_agent.commands.kit import OK, add_command


def register(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "version",
        _version,
        text="Print the version.",
        example="liberatai-agent version",
    )


def _version(_args: argparse.Namespace) -> int:
    from liberatai_core import __version__  # noqa: PLC0415

    print(f"liberatai-agent {__version__}")
    return OK
