"""What the commands share: exit codes, options that several have, how values are printed.

A command's file has `register(commands)`, which adds its parser, and the function that runs. The files are
imported for `--help` too: what is heavy is imported inside the functions.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, NOT_FOUND = 0, 1, 2, 4
DEFAULT_CONFIG = Path("/etc/liberatai/agent.yaml")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, text: str, example: str
) -> argparse.ArgumentParser:
    """Add the parser of a command that `run` carries out; return it for more options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    parser.set_defaults(command=run)
    return parser


def add_config(parser: Any) -> None:
    """Add `--config`; a group of options will do as well."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="settings (default: %(default)s)",
    )


def add_output(parser: Any) -> None:
    """Add `-o table|json`."""
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json"),
        default="table",
        help="how to print (default: %(default)s)",
    )


def complain(line: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(" ".join(line.split()) + "\n")


def show(values: dict[str, Any], output: str) -> None:
    """Print names with their values, as a table or as JSON."""
    if output == "json":
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        text = "-" if value is None or value in ("", [], {}) else value
        if isinstance(text, list):
            text = ", ".join(map(str, text))
        if isinstance(text, dict):
            text = "  ".join(f"{key}={inner}" for key, inner in text.items())
        if name.endswith("_bytes") and isinstance(value, int):
            text = f"{value} ({value / (1 << 20):.1f} MiB)"
        print(f"{name:<{width}}  {text}")
