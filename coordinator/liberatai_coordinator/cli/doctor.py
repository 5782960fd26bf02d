"""`liberatai doctor`: what is missing on this machine, in the settings, and at the coordinator."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from liberatai_coordinator.cli.kit import FAILED, coordinator_config
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, show, size_text
from liberatai_coordinator.client.client import Client
from liberatai_core.errors import ConfigError, LiberataiError

MIN_FREE_BYTES: Final = 256 * 1024 * 1024
"""Less than this on the state folder's disk makes `doctor` warn: blobs of a few rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `doctor`."""

    check: str
    state: Literal["ok", "warn", "fail"]
    text: str


def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings to check too.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Check this machine, the settings and the running coordinator; exit 1 if something must be fixed."""
    findings = [_check_python(), _check_coordinator_parts(), _check_demo_parts(), _check_broker_program()]
    if config is not None:
        findings += _check_config(config)
    findings.append(_check_socket(context.obj))
    show(findings, _COLUMNS, output)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(FAILED)


def _check_python() -> Finding:
    return Finding(check="python", state="ok", text=f"{platform.python_version()} on {platform.machine()}")


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _check_coordinator_parts() -> Finding:
    missing = _missing("torch", "fastapi", "uvicorn", "sqlalchemy", "optuna", "safetensors", "onnx")
    if missing:
        text = f"missing {', '.join(missing)}: pip install 'liberatai[coordinator]'"
        return Finding(check="coordinator parts", state="fail", text=text)
    return Finding(check="coordinator parts", state="ok", text="installed")


def _check_demo_parts() -> Finding:
    missing = _missing("amqtt", "sklearn", "matplotlib", "jinja2")
    if missing:
        text = f"missing {', '.join(missing)}: pip install 'liberatai[demo]' (for `liberatai demo` only)"
        return Finding(check="demo parts", state="warn", text=text)
    return Finding(check="demo parts", state="ok", text="installed")


def _check_broker_program() -> Finding:
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which("mosquitto", path=places)
    if found:
        return Finding(check="mosquitto", state="ok", text=found)
    text = "not installed on this machine (apt install mosquitto); fine if the broker runs elsewhere"
    return Finding(check="mosquitto", state="warn", text=text)


def _check_config(path: Path) -> list[Finding]:
    try:
        settings = coordinator_config(path)
    except ConfigError as error:
        return [
            Finding(check="settings", state="fail", text=f"{error.where}: {fault}") for fault in error.faults
        ]
    return [
        Finding(check="settings", state="ok", text=str(path)),
        _check_state(Path(settings.state_dir)),
        _check_broker(settings.broker),
    ]


def _check_state(folder: Path) -> Finding:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        text = f"{there}: not writable for this user"
        return Finding(check="state folder", state="fail", text=text)
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size_text(free)} free"
    return Finding(check="state folder", state="ok" if free >= MIN_FREE_BYTES else "warn", text=text)


def _check_broker(url: str) -> Finding:
    import socket

    from liberatai_core.link.mqtt.settings import broker_address

    try:
        address = broker_address(url)
    except ConfigError as error:
        return Finding(check="broker", state="fail", text=f"{url}: {'; '.join(error.faults)}")
    try:
        socket.create_connection((address.host, address.port), timeout=3).close()
    except OSError as error:
        return Finding(check="broker", state="fail", text=f"{url}: {error}")
    return Finding(check="broker", state="ok", text=f"{url}: takes connections")


def _check_socket(socket: Path) -> Finding:
    try:
        with Client(socket, timeout_s=5) as client:
            health = client.health()
    except LiberataiError as error:
        return Finding(check="coordinator", state="warn", text=str(error))
    refused = health.pop("broker_refuses", [])
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        state: Literal["warn", "fail"] = "fail" if any("E_BROKER" in line for line in refused) else "warn"
        return Finding(check="coordinator", state=state, text=f"{refused[0]}{more}")
    if health.get("protocol") == "":
        return Finding(check="coordinator", state="fail", text=f"no connection to {health.get('broker')}")
    if faults := health.pop("faults", []):
        return Finding(check="coordinator", state="fail", text="; ".join(faults))
    text = ", ".join(f"{key} {value}" for key, value in health.items())
    return Finding(check="coordinator", state="ok" if health.get("ok", True) else "fail", text=text)


_COLUMNS: list[Column[Finding]] = [
    Column("CHECK", lambda row: row.check),
    Column("STATE", lambda row: row.state),
    Column("DETAIL", lambda row: row.text, note=True),
]
