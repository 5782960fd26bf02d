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
    """Add `-o table|wide|json|yaml|name`."""
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "wide", "json", "yaml", "name"),
        default="table",
        help="how to print (default: %(default)s)",
    )


def complain(line: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(" ".join(line.split()) + "\n")


def show(values: dict[str, Any], output: str, name: str = "") -> None:
    """Print a record.

    Args:
        values: its fields by name.
        output: table: what is there, numbers as people write them; wide: what is empty too, in one line each;
            json, yaml: all, for programs; name: whose record it is.
        name: for `-o name`.
    """
    if output == "name":
        print(name)
        return
    if output in ("json", "yaml"):
        show_data(values, output)
        return
    from liberatai_core.units import record_lines  # noqa: PLC0415

    wide = output == "wide"
    told = {name: value for name, value in values.items() if wide or value not in (None, "", [], {})}
    for line in record_lines(told, None if wide else screen_width()):
        print(line)


def tell_agent(folder: Path, then: str = "") -> str:
    """Let a running agent look at once; return in words what follows.

    Args:
        folder: its state folder.
        then: what it does when it has been told.
    """
    import os  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from liberatai_agent.store.state_folder import holder  # noqa: PLC0415

    pid = holder(folder)
    if pid is None:
        return "the agent is not running: it will know when it starts"
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError:
        return "the agent notices within a minute"
    return f"the agent has been told{f': {then}' if then else ''}"


def show_data(values: Any, output: str) -> None:
    """Print what programs read."""
    import msgspec  # noqa: PLC0415

    if output == "yaml":
        print(msgspec.yaml.encode(values).decode(), end="")
        return
    print(json.dumps(msgspec.to_builtins(values), indent=2))


def screen_width() -> int | None:
    """Return the number of columns of the screen; None: nobody looks."""
    import shutil  # noqa: PLC0415

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
