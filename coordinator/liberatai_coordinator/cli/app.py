"""`liberatai`: the operator's command line, put together. Nouns, then verbs; the coordinator decides.

Exit codes: 0 ok, 1 failed, 2 usage or settings, 3 partly, 4 not found. Tables are for people and become
plain columns when piped; programs take `-o json`. Everything heavy is imported by the command that needs
it, so that `liberatai --help` is quick.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli import (
    backup,
    broker,
    ca,
    devices,
    doctor,
    groups,
    jobs,
    journal,
    models,
    plan,
    profiles,
    programs,
    release,
    rollout,
    shadow,
    sim,
    tokens,
)
from liberatai_coordinator.cli.kit import DEFAULT_SOCKET, FAILED, SERVER, complain, group
from liberatai_coordinator.client.https import Server
from liberatai_core.errors import LiberataiError

app = group("Train one model together on devices that differ.", "liberatai devices list", add_completion=True)
app.add_typer(backup.app, name="backup")
app.add_typer(broker.app, name="broker")
app.add_typer(ca.app, name="ca")
app.add_typer(devices.app, name="devices")
app.add_typer(jobs.app, name="jobs")
app.add_typer(groups.app, name="groups")
app.add_typer(rollout.app, name="rollout")
app.add_typer(tokens.app, name="tokens")
app.add_typer(shadow.app, name="shadow")
app.add_typer(journal.events, name="events")
app.add_typer(journal.audit, name="audit")
app.add_typer(models.app, name="models")
app.add_typer(plan.app, name="plan")
app.add_typer(profiles.app, name="profiles")
app.add_typer(release.app, name="release")
app.add_typer(sim.app, name="sim")
app.command(epilog="Example: liberatai serve --config /etc/liberatai/coordinator.yaml")(programs.serve)
app.command(epilog="Example: liberatai demo --devices 8 --rounds 12 --report demo-report")(programs.demo)
app.command(epilog="Example: liberatai version")(programs.version)
app.command(epilog="Example: liberatai doctor --config /etc/liberatai/coordinator.yaml")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A question mark for what the terminal's encoding lacks, instead of a traceback.
            stream.reconfigure(errors="replace")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="liberatai")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    except LiberataiError as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    return 0


@app.callback()
def _options(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option("--socket", envvar="LIBERATAI_SOCKET", help="Unix socket of the coordinator.")
    ] = Path(DEFAULT_SOCKET),
    server: Annotated[
        str,
        typer.Option("--server", envvar="LIBERATAI_SERVER", help="Coordinator elsewhere: https://host:port."),
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option("--token-file", envvar="LIBERATAI_TOKEN_FILE", help="Token for --server.")
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option("--ca-file", envvar="LIBERATAI_CA_FILE", help="Authority of the server's certificate."),
    ] = None,
) -> None:
    context.obj = socket
    if server:
        context.meta[SERVER] = Server.from_files(server, token_file, ca_file)
