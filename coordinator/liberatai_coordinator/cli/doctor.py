"""`liberatai doctor`: what is wrong on this machine, in the settings, at the broker, with the coordinator."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import importlib.util
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liberatai_coordinator.cli.kit import FAILED, coordinator_config
from liberatai_coordinator.cli.tables import Output, OutputOption, dump, duration_text, screen_width
from liberatai_coordinator.client.client import Client
from liberatai_core.errors import ConfigError, LiberataiError

if TYPE_CHECKING:
    from liberatai_coordinator.config import CoordinatorConfig
    from liberatai_core.doctor.finding import Finding

MIN_FREE_BYTES: Final = 256 * 1024 * 1024
"""Less than this on the state folder's disk: not even the blobs of a few rounds fit."""
SETTINGS: Final = "what each key means: docs/jobs.md#coordinatoryaml"


def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings to check too.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Check this machine, settings, broker and coordinator; say what to do; exit 1 if something is wrong."""
    from liberatai_core.doctor.finding import failed, lines

    findings = check_machine()
    socket: Path = context.obj
    if config is not None:
        settings, found = check_settings(config)
        findings += found
        if settings is not None:
            own = Path(settings.state_dir) / settings.socket
            findings += check_fleet(settings, connected=_is_connected(own))
            if not _named(context):
                socket = own
    findings += check_socket(socket)
    if output is Output.NAME:
        print("\n".join(one.check for one in findings if one.state == "fail"))
    elif output.is_table:
        print("\n".join(lines(findings, None if output is Output.WIDE else screen_width())))
    else:
        dump(findings, output)
    if failed(findings):
        raise typer.Exit(FAILED)


def _named(context: typer.Context) -> bool:
    """Whether the operator has named a socket: else it is the one of the settings."""
    source = (context.parent or context).get_parameter_source("socket")
    return source is not None and source.name != "DEFAULT"


# --- this machine ---------------------------------------------------------------------------------


def check_machine() -> "list[Finding]":
    """Look at what is installed here."""
    from liberatai_core.doctor.finding import fail, ok, warn

    found = [ok("python", f"{platform.python_version()} on {platform.machine()}")]
    parts = ("torch", "fastapi", "uvicorn", "sqlalchemy", "optuna", "safetensors", "onnx")
    if missing := _missing(*parts):
        text = f"missing {', '.join(missing)}"
        found.append(fail("coordinator parts", text, "pip install 'liberatai[coordinator]'"))
    else:
        found.append(ok("coordinator parts", "installed"))
    if missing := _missing("amqtt", "sklearn", "matplotlib", "jinja2"):
        text = f"missing {', '.join(missing)}"
        found.append(warn("demo parts", text, "for `liberatai demo` only: pip install 'liberatai[demo]'"))
    else:
        found.append(ok("demo parts", "installed"))
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    if program := shutil.which("mosquitto", path=places):
        found.append(ok("mosquitto", program))
    else:
        text = "not installed on this machine"
        found.append(warn("mosquitto", text, "fine if the broker runs elsewhere; else apt install mosquitto"))
    return found


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


# --- settings, state, broker ----------------------------------------------------------------------


def check_settings(path: Path) -> "tuple[CoordinatorConfig | None, list[Finding]]":
    """Read the settings; None: they cannot be used, and the findings say why."""
    from liberatai_core.doctor.finding import fail, ok

    try:
        settings = coordinator_config(path)
    except ConfigError as error:
        return None, [fail("settings", f"{error.where}: {fault}", SETTINGS) for fault in error.faults]
    text = f"{path}: coordinator {settings.coordinator} of fleet {settings.fleet}"
    return settings, [ok("settings", text)]


def _is_connected(socket: Path) -> bool:
    """Whether the coordinator of these settings runs, and the broker has let it in."""
    try:
        with Client(socket, timeout_s=2) as client:
            return bool(client.health().get("protocol"))
    except LiberataiError:
        return False


def check_fleet(settings: "CoordinatorConfig", *, connected: bool = False) -> "list[Finding]":
    """Look at everything that the settings name, and go to the broker.

    Not if the coordinator is connected: a broker throws the first one of a name out when a second one comes.
    """
    import asyncio
    import time

    from liberatai_core.doctor.certificates import TlsFiles, check_files
    from liberatai_core.doctor.finding import failed, ok, warn
    from liberatai_core.doctor.machine import check_clock

    now_s = time.time()
    found = [*check_state(settings), check_clock(now_s)]
    files = TlsFiles(
        ca_file=_path(settings.ca_file),
        cert_file=_path(settings.cert_file),
        key_file=_path(settings.key_file),
        name=settings.coordinator,
        fleet=settings.fleet,
    )
    certificates = check_files(files, now_s)
    found += certificates
    if failed(certificates):
        found.append(warn("broker", "not tried: the certificates come first", "mend them, and ask again"))
        return found
    if connected:
        return [*found, ok("broker", f"{settings.broker}: the running coordinator is connected")]
    return found + asyncio.run(check_broker(settings, files))


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def check_state(settings: "CoordinatorConfig") -> "list[Finding]":
    """Look at the state folder, what lies in it, and the disk."""
    from liberatai_core.doctor.finding import fail, failed, ok
    from liberatai_core.doctor.machine import check_disk, check_folder, check_owners, check_private
    from liberatai_core.files import closed_to, group_number

    folder = Path(settings.state_dir)
    found = [check_folder(folder, "state_dir")]
    if not failed(found):
        key = check_private(folder / "coordinator.key", "coordinator key", 32)
        found.append(key or ok("coordinator key", "none yet: the first start makes it"))
        for inner in ("blobs", "models"):
            if (folder / inner).exists():
                one = check_folder(folder / inner, "state_dir")
                found += [one] if failed([one]) else []
        found += check_owners(folder)
    for setting in ("ca_dir", "broker_dir"):
        if (named := getattr(settings, setting)) is not None:
            found.append(check_folder(Path(named), setting))
    if settings.socket_group is not None:
        socket = folder / settings.socket
        try:
            number = group_number(settings.socket_group)
            closed = closed_to(socket, number) if folder.is_dir() else None
        except ConfigError as error:
            text, _, remedy = error.faults[0].partition(": ")
            found.append(fail("socket_group", text, remedy))
        else:
            if closed is not None:
                text = f"{closed}: members of {settings.socket_group} cannot enter it"
                remedy = f"`chgrp {settings.socket_group} {closed}; chmod g+x {closed}`, or move socket:"
                found.append(fail("socket_group", text, remedy))
    found.append(check_disk(folder, MIN_FREE_BYTES))
    return found


async def check_broker(settings: "CoordinatorConfig", files: object) -> "list[Finding]":
    """Go to the broker and say a word there."""
    from liberatai_coordinator.link_settings import mqtt_settings
    from liberatai_core.contract.topics import Topics
    from liberatai_core.doctor.broker import reach
    from liberatai_core.doctor.certificates import TlsFiles
    from liberatai_core.doctor.finding import fail

    assert isinstance(files, TlsFiles)  # noqa: S101 - the type is imported late
    try:
        link = mqtt_settings(settings)
    except ConfigError as error:
        return [fail("broker", fault, "correct it in the settings") for fault in error.faults]
    word = Topics(fleet=settings.fleet).test_word("co", settings.coordinator)
    return list((await reach(link, files, word)).findings)


# --- the running coordinator ----------------------------------------------------------------------


def check_socket(path: Path) -> "list[Finding]":
    """Ask the running coordinator."""
    from liberatai_core.doctor.finding import fail, warn

    if fault := _no_socket(path):
        return [fault]
    try:
        with Client(path, timeout_s=2) as client:
            health = client.health()
    except LiberataiError as error:
        return [warn("coordinator", str(error), "`liberatai serve`, or give --socket")]
    found = [fail("coordinator", line, "see what is said of the broker") for line in health.get("faults", [])]
    for line in health.get("broker_refuses", []):
        state = fail if "E_BROKER" in line else warn
        found.append(state("coordinator", f"the broker refuses: {line}", "`liberatai broker check`, its log"))
    return found or [_healthy(health)]


def _no_socket(path: Path) -> "Finding | None":
    """Say why nobody can answer on a socket; None: somebody may."""
    from liberatai_core.doctor.finding import fail, warn

    try:
        found = path.stat()
    except FileNotFoundError:
        remedy = "start it (`liberatai serve`), or give --socket (setting socket:, LIBERATAI_SOCKET)"
        return warn("coordinator", f"{path}: no such socket: no coordinator runs here", remedy)
    except OSError as error:
        remedy = "be a member of its group (setting socket_group), or its user"
        return fail("socket", f"{path}: {error.strerror}", remedy)
    if not stat.S_ISSOCK(found.st_mode):
        return fail("socket", f"{path}: is no socket", "give --socket what the setting socket: names")
    if not os.access(path, os.R_OK | os.W_OK):
        remedy = "be a member of its group (setting socket_group), or its user"
        return fail("socket", f"{path}: this user may not use it", remedy)
    return None


def _healthy(health: "dict[str, object]") -> "Finding":
    from liberatai_core.doctor.finding import ok

    name, fleet = health.get("coordinator", ""), health.get("fleet", "")
    words = [f"{name} of fleet {fleet}, epoch {health.get('epoch')}"]
    if "uptime_s" in health:
        words.append(f"up for {duration_text(float(str(health['uptime_s'])))}")
    if "devices_online" in health:
        words.append(f"{health['devices_online']} devices online")
    if health.get("protocol"):
        words.append(f"connected to {health.get('broker')} ({health['protocol']})")
    if health.get("public_key"):
        words.append(f"coordinator_key: {health['public_key']}")
    return ok("coordinator", ", ".join(words))
