"""`liberatai-agent`: the device's command line. A command is a file of `commands`, registered here.

Exit codes: 0 ok, 1 failed, 2 wrong usage or settings, 4 not found. Errors are one line: code, what, where.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from liberatai_agent.commands import (
    doctor,
    enrol,
    install,
    pause,
    predict,
    probe,
    run,
    status,
    update,
    version,
)
from liberatai_agent.commands.kit import FAILED, NOT_FOUND, USAGE, complain
from liberatai_core.errors import ConfigError, LiberataiError, NotFoundError

COMMANDS = (run, probe, status, predict, pause, update, doctor, enrol, install, version)
"""In the order of `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    say_what_the_terminal_can()
    args = _parser().parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except ConfigError as error:
        for fault in error.faults:
            complain(f"{error.code}: {error.where}: {fault}")
        return USAGE
    except NotFoundError as error:
        complain(f"{error.code}: {error}")
        return NOT_FOUND
    except LiberataiError as error:
        complain(f"{error.code}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED


def say_what_the_terminal_can() -> None:
    """Print a question mark for what the terminal's encoding lacks, instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liberatai-agent",
        description="Trains on this device's own data and sends only sparse updates.",
        epilog="example: liberatai-agent run --config agent.yaml",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser
