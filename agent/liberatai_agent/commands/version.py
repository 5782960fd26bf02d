"""`liberatai-agent version`."""

import argparse
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_output, show


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "version",
        _version,
        text="Print the version.",
        example="liberatai-agent version",
    )
    add_output(parser)


def _version(args: argparse.Namespace) -> int:
    from liberatai_core import __version__  # noqa: PLC0415

    if args.output not in ("table", "wide"):
        show({"version": __version__}, args.output, __version__)
        return OK
    print(f"liberatai-agent {__version__}")
    return OK
