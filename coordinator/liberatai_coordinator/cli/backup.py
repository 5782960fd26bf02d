"""`liberatai backup`: the coordinator in one file, and back again."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.kit import coordinator_config, group
from liberatai_core.units import date_text, size_text

if TYPE_CHECKING:
    from liberatai_coordinator.backup.archive import Contents

FileArgument = Annotated[Path, typer.Argument(help="The backup.")]
PROGRESS_S = 1.0
SERVICE, BROKER = "liberatai-coordinator", "mosquitto"
"""Names of the units, see deploy/systemd."""

app = group("Keep the coordinator in one file, and put it back.", "liberatai backup create /mnt/backups")


@app.command("create", epilog="Example: liberatai backup create /mnt/backups --keep 14")
def backup_create(
    target: Annotated[Path, typer.Argument(help="File, or folder for a file with a name of its own.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="Settings of the coordinator.")] = Path(
        "/etc/liberatai/coordinator.yaml"
    ),
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="In a folder: remove all but so many backups of this coordinator."),
    ] = None,
) -> None:
    """Write a backup of a coordinator, whether it runs or not: ledger, models, keys, settings."""
    settings = coordinator_config(config)
    from liberatai_coordinator.backup import taking

    now_s = time.time()
    folder = target if target.is_dir() else None
    if folder is not None:
        stamp = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%SZ")
        target = folder / taking.default_name(settings, stamp)
    taking.require_target(target)
    contents = taking.take(settings, config, target, now_s=now_s, progress=_progress("reading and writing"))
    print(f"{target}: {_summary(contents)}; read again and checked")
    for line in contents.lacks:
        print(f"  without {line}")
    print("It holds private keys: keep it where only you can read it.")
    if folder is not None and keep is not None:
        for old in taking.older(folder, settings, keep):
            old.unlink()
            print(f"removed {old}")


@app.command("check", epilog="Example: liberatai backup check liberatai-default-co1-20261130T120000Z.tar")
def backup_check(file: FileArgument) -> None:
    """Read a backup, check every byte, and say what is in it."""
    from liberatai_coordinator.backup import archive

    contents = archive.extract(file, None, _progress("checking"))
    print(f"{file}: {_summary(contents)}; all of it is as it was written")


@app.command("restore", epilog="Example: liberatai backup restore backup.tar --serve")
def backup_restore(
    file: FileArgument,
    into: Annotated[
        Path | None, typer.Option(help="Folder for everything [default: where it was on the other machine].")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="URL of the broker, if it is another one now.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Rename what stands in the way.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run the coordinator in the foreground then.")
    ] = False,
    start: Annotated[
        bool, typer.Option("--start", help="Start the services then, the broker's too if it is ours.")
    ] = False,
) -> None:
    """Put a coordinator back from its backup. It takes the place of the one that was backed up, for good."""
    from liberatai_coordinator.backup import restoring

    done = restoring.restore(file, into=into, broker=broker, force=force, progress=_progress("restoring"))
    print(f"{done.state_dir}: {_summary(done.contents)}")
    for path in done.renamed:
        print(f"  kept what was there: {path}")
    for line in done.contents.lacks:
        print(f"  the backup was made without {line}")
    print("Whoever still runs with its key is shut out: it stops by itself, and does not start again.")
    if start:
        _start_services(with_broker=coordinator_config(done.settings).broker_dir is not None)
        return
    if not serve:
        print(f"next: liberatai serve --config {done.settings}")
        return
    settings = coordinator_config(done.settings)
    from liberatai_core import logs

    logs.set_up("auto")
    from liberatai_coordinator import wiring

    raise typer.Exit(wiring.serve(settings))


def _start_services(*, with_broker: bool) -> None:
    import subprocess

    from liberatai_core.errors import StateError

    services = [BROKER, SERVICE] if with_broker else [SERVICE]
    command = ["systemctl", "enable", "--now", *services]
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        raise StateError(f"{' '.join(command)}: {error.strerror}") from None
    if done.returncode:
        raise StateError(f"{' '.join(command)} failed: see `systemctl status {' '.join(services)}`")
    print(f"{' and '.join(services)} run")


def _summary(contents: "Contents") -> str:
    jobs = f", {len(contents.jobs)} jobs under way" if contents.jobs else ""
    return (
        f"coordinator {contents.coordinator} of fleet {contents.fleet}, {date_text(contents.created_s)}, "
        f"{len(contents.files)} files, {size_text(contents.size_bytes)}{jobs}"
    )


def _progress(what: str) -> Callable[[int, int], None]:
    said_s = time.monotonic()

    def told(done: int, of: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= PROGRESS_S:
            said_s = time.monotonic()
            print(f"{what}: {size_text(done)} of {size_text(of)}", file=sys.stderr)

    return told
