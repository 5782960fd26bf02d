"""What the commands of `liberatai models` share: the repository that they work on, and refs."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import getpass
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liberatai_core.errors import NotFoundError

if TYPE_CHECKING:
    from liberatai_coordinator.repository.store import Loaded, Store

STORE: Final = "liberatai.store"


def complete_ref(context: typer.Context, incomplete: str) -> list[str]:
    """Return the refs that begin so, for the shell."""
    from liberatai_core.errors import LiberataiError

    try:
        names = open_store(context).names()
    except LiberataiError:
        return []
    return [text for one in names if (text := f"{one.model}:{one.tag}").startswith(incomplete)]


Ref = Annotated[
    str,
    typer.Argument(
        help="Commit: MODEL, MODEL:TAG, MODEL:VERSION, MODEL@DIGEST, DIGEST; ~N goes back.",
        autocompletion=complete_ref,
    ),
]


def choose_store(context: typer.Context, folder: Path | None) -> None:
    """Remember which repository the commands work on."""
    context.meta[STORE] = folder


def store_folder(context: typer.Context) -> Path:
    """Return the folder of the repository: named, else that of this machine's coordinator, else one's own."""
    named: Path | None = context.meta.get(STORE)
    if named is not None:
        return named
    beside: Path = context.obj.parent / "models"
    if beside.is_dir() and os.access(beside, os.W_OK):
        return beside
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "liberatai" / "models"


def open_store(context: typer.Context, *, make: bool = False) -> "Store":
    """Return the repository; `make` it if there is none.

    Raises:
        NotFoundError: there is none, and it shall not be made.
    """
    from liberatai_coordinator.repository.store import Store

    folder = store_folder(context)
    if not make and not (folder / "oci-layout").is_file():
        raise NotFoundError(
            f"{folder}: no model repository here; `liberatai models commit` makes one, --store names another"
        )
    return Store(folder)


def load(store: "Store", ref: str) -> "Loaded":
    """Return the commit that a text names, verified."""
    return store.read(store.find(ref))


def author_of(given: str | None) -> str:
    """Return who commits: told, else from the environment as git has it, else user and machine."""
    name = given or os.environ.get("LIBERATAI_AUTHOR") or os.environ.get("GIT_AUTHOR_NAME")
    if name:
        return name[:512]
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return socket.gethostname()
