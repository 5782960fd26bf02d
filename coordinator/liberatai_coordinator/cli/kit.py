"""What the commands of `liberatai` share: asking, reading settings, and saying what failed."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liberatai_coordinator.cli.tables import clean
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import VersionView
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.errors import (
    ConfigError,
    LiberataiError,
    NotFoundError,
    ReplacedError,
    RoundUnknownError,
    UnknownDeviceError,
)
from liberatai_core.spelling import meant

if TYPE_CHECKING:
    from liberatai_coordinator.config import CoordinatorConfig

Model = Annotated[str, typer.Argument(help="Name of the model.")]
Version = Annotated[str, typer.Option("--version", help="Number, tag or latest.")]

SERVER = "liberatai.server"
"""Where a context has the coordinator elsewhere, if the command line names one."""
FAILED, USAGE, PARTLY, NOT_FOUND = 1, 2, 3, 4
DEFAULT_SOCKET: Final = "/var/lib/liberatai/api.sock"
COMPLETE_S: Final = 1.0
"""Longest wait for names that a shell wants to complete."""
STAY_STOPPED = 78
"""EX_CONFIG of sysexits.h: the service's unit does not start it again by itself."""

_SIZE = re.compile(r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z]{0,3})")
_UNITS = {
    **dict.fromkeys(("", "b"), 1),
    **{name: 1000**power for power, names in enumerate((("k", "kb"), ("m", "mb")), 1) for name in names},
    "kib": 1024,
    "mib": 1024**2,
}


def group(help_text: str, example: str, *, add_completion: bool = False, alone: bool = False) -> typer.Typer:
    """Return an empty group of commands.

    Args:
        help_text: what it is for.
        example: shown below its help.
        add_completion: the whole program adds `--install-completion` for the shell.
        alone: its callback does something where no command is given; otherwise help is shown.
    """
    return typer.Typer(
        help=help_text,
        epilog=f"Example: {example}",
        no_args_is_help=not alone,
        invoke_without_command=alone,
        rich_markup_mode=None,  # plain help: the same on a screen, in a pipe and in a manual
        pretty_exceptions_enable=False,
        add_completion=add_completion,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


# --- asking ---------------------------------------------------------------------------------------


@contextmanager
def client_of(context: typer.Context) -> Iterator[Client]:
    """Connect to the coordinator that the command line names."""
    with Client(context.meta.get(SERVER) or context.obj) as client:
        yield client


def complete_device(context: typer.Context, incomplete: str) -> list[str]:
    """Return the devices whose names begin so, for the shell."""
    return _complete(context, lambda client: (one.id for one in client.devices.list()), incomplete)


def complete_job(context: typer.Context, incomplete: str) -> list[str]:
    """Return the jobs whose names begin so, for the shell."""
    return _complete(context, lambda client: (one.name for one in client.jobs.list()), incomplete)


def _complete(context: typer.Context, names: Callable[[Client], Iterable[str]], incomplete: str) -> list[str]:
    """Ask the coordinator; nobody waits for an answer behind a key."""
    import os

    root = context.find_root()
    socket = root.params.get("socket") or os.environ.get("LIBERATAI_SOCKET") or DEFAULT_SOCKET
    try:
        with Client(Path(socket), timeout_s=COMPLETE_S) as client:
            return [name for name in names(client) if name.startswith(incomplete)]
    except LiberataiError:
        return []


def read_text(path: Path) -> str:
    """Return a text file of the operator, or raise ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(str(path), [f"cannot be read: {reason}"]) from None


def complain(error: LiberataiError) -> int:
    """Write one line per fault to stderr and return the exit code."""
    for line in str(error).splitlines() or [""]:
        print(f"liberatai: {error.code}: {clean(line)}", file=sys.stderr)
    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, ReplacedError):
        return STAY_STOPPED
    if isinstance(error, NotFoundError | UnknownDeviceError | RoundUnknownError):
        return NOT_FOUND
    return FAILED


def budget_of(text: str, where: str) -> int:
    """Return the bytes that an operator wrote: "120KB" (1000), "64KiB" (1024), "1.5MB", or a plain number.

    Raises:
        ConfigError: it is no size, or none that a model file may have.
    """
    size = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(size["unit"].lower()) if size else None
    if size is None or unit is None:
        raise ConfigError(where, [f"{text!r} is no size: write it like 120KB, 64KiB or 1.5MB"])
    size_bytes = int(Decimal(size["number"]) * unit)
    if not 1 <= size_bytes <= MAX_OBJECT_BYTES:
        raise ConfigError(where, [f"{text}: a model file has 1 … {MAX_OBJECT_BYTES} bytes"])
    return size_bytes


def budget_of_profile(name: str) -> int:
    """Return what a class of hardware lets the files of one model take: what the plan goes by, too.

    Args:
        name: of a shipped profile, or the path of a profile's file (with a slash).

    Raises:
        ConfigError: no such profile, or a faulty one.
    """
    from liberatai_core.profile import load_profile

    storage_bytes = load_profile(name, "--profile").storage_bytes
    return min(storage_bytes, MAX_OBJECT_BYTES)


def only_structure(view: VersionView, wanted: str | None) -> str:
    """Return the structure that an operator means: the one named, or the only one of a version."""
    known = ", ".join(sorted(view.digests))
    if wanted is None and len(view.digests) == 1:
        return next(iter(view.digests))
    if wanted is None:
        raise ConfigError("--structure", [f"missing: {view.model} has {known}"])
    if wanted not in view.digests:
        hint = meant(wanted, view.digests)
        raise NotFoundError(
            f"{view.model} version {view.version}: no structure {wanted!r}{hint} (known: {known})"
        )
    return wanted


def job_text(path: Path) -> str:
    """Return a job's YAML, checked here so that the faults name the operator's own file."""
    from liberatai_coordinator.config import parse_job

    text = read_text(path)
    parse_job(text, str(path))
    return text


def coordinator_config(path: Path) -> "CoordinatorConfig":
    """Return the settings of a coordinator, or raise ConfigError."""
    from liberatai_coordinator.config import CoordinatorConfig
    from liberatai_core.settings import parse

    return parse(read_text(path), CoordinatorConfig, str(path)).relative_to(path.absolute().parent)
