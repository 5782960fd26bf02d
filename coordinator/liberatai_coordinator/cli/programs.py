"""`liberatai serve`, `demo` and `version`: programs, not questions to a coordinator."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import platform
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import coordinator_config
from liberatai_coordinator.cli.tables import Output, OutputOption, show_one
from liberatai_core import logs


class LogFormat(StrEnum):
    """How a log is written."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="Settings of the coordinator (YAML).")],
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Shut out every other coordinator with this key.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="auto (text; priorities for the journal), text or json.")
    ] = LogFormat.AUTO,
) -> None:
    """Run the coordinator in the foreground until SIGTERM or SIGINT."""
    settings = coordinator_config(config)
    logs.set_up(log_format.value, verbose=verbose)
    from liberatai_coordinator import wiring

    raise typer.Exit(wiring.serve(settings, take_over=take_over))


def demo(
    devices: Annotated[int, typer.Option(min=1, max=40, help="Number of agents, each its own process.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of the job.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    broker: Annotated[str, typer.Option(help="auto, mosquitto, amqtt, or the URL of a broker.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="Folder for the report [default: demo-report].")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the state folders afterwards.")] = False,
) -> None:
    """Train on this machine: a broker, a coordinator, unlike agents, and a report of what they did."""
    from liberatai_coordinator.demo import demo as program

    raise typer.Exit(
        program.run(devices=devices, rounds=rounds, seed=seed, broker=broker, report=report, keep=keep)
    )


def version(output: OutputOption = Output.TABLE) -> None:
    """Show the version of this program and of the protocol it speaks."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from liberatai_core.contract.limits import PROTOCOL_VERSION

    try:
        number = installed("liberatai")
    except PackageNotFoundError:  # run from a source tree
        number = "unknown"
    if not output.is_table:
        python = platform.python_version()
        show_one({"version": number, "protocol": PROTOCOL_VERSION, "python": python}, output)
        return
    print(f"liberatai {number} (protocol {PROTOCOL_VERSION}, Python {platform.python_version()})")
