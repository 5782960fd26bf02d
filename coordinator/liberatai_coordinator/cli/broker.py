"""`liberatai broker`: a Mosquitto for a fleet, set up, proven from outside, kept up to date."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from liberatai_coordinator.cli.kit import FAILED, coordinator_config, group
from liberatai_coordinator.cli.tables import Column, Output, OutputOption, progress, show
from liberatai_core.errors import ConfigError, DiskError

if TYPE_CHECKING:
    from liberatai_coordinator.authority.authority import Authority
    from liberatai_coordinator.authority.mosquitto import Release
    from liberatai_coordinator.brokers.check import Finding

DEFAULT_FOLDER: Final = "/etc/mosquitto/liberatai"
DEFAULT_CONFIG: Final = "/etc/liberatai/coordinator.yaml"
COORDINATOR_DAYS: Final = 365.0
Config = Annotated[Path, typer.Option("--config", "-c", help="Settings of the coordinator (YAML).")]

app = group("The fleet's broker: set it up, prove it, keep it up to date.", "liberatai broker check")


@app.command("init", epilog="Example: liberatai broker init --host broker.example.org")
def broker_init(
    host: Annotated[list[str], typer.Option(help="Name or address by which devices reach the broker.")],
    fleet: Annotated[str, typer.Option(help="Name of the fleet, as in every topic.")] = "default",
    coordinator: Annotated[str, typer.Option(help="Name of the coordinator.")] = "co1",
    config: Config = Path(DEFAULT_CONFIG),
    state: Annotated[
        Path, typer.Option(help="The coordinator's state folder, with the authority in ca/.")
    ] = Path("/var/lib/liberatai"),
    folder: Annotated[Path, typer.Option("--dir", help="What the broker reads.")] = Path(DEFAULT_FOLDER),
    mosquitto: Annotated[str, typer.Option(help="auto, 2.0 or 2.1: the form of the settings.")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices that are expected; bounds connections.")] = 5000,
    memory: Annotated[int, typer.Option(help="MiB that the broker may take.")] = 1024,
    port: Annotated[int, typer.Option(help="Of the door for devices and the coordinator.")] = 8883,
    claim_port: Annotated[int, typer.Option(help="Of the door for claims: devices that join.")] = 8884,
    bind: Annotated[str, typer.Option(help="Address to listen on; empty: all.")] = "",
    user: Annotated[str, typer.Option(help="Whom the broker becomes when root starts it.")] = "mosquitto",
    plugins: Annotated[str, typer.Option(help="Folder of Mosquitto's plugins (2.1).")] = "",
    broker_state: Annotated[Path, typer.Option(help="Where the broker keeps its own state.")] = Path(
        "/var/lib/mosquitto"
    ),
) -> None:
    """Write all that a Mosquitto needs: settings, access lists, certificates; and the coordinator's, too.

    What is missing is made: the authority, the coordinator's certificate, its settings file. What is there
    stays, but for the broker's own files.
    """
    from liberatai_coordinator.authority import broker_files
    from liberatai_coordinator.authority.mosquitto import MosquittoPlan

    release = _release(mosquitto)
    plan = MosquittoPlan(
        folder=folder.absolute(),
        release=release,
        user=user,
        devices=devices,
        memory_mib=memory,
        port=port,
        claim_port=claim_port,
        bind=bind,
        state_dir=broker_state.absolute(),
        plugins=plugins or _plugins(),
    )
    _make_state(state)
    authority = _authority(state / "ca", fleet)
    # The coordinator on this machine reaches it by these names, too.
    broker_files.init(plan, authority, coordinator, list(dict.fromkeys((*host, "localhost", "127.0.0.1"))))
    print(f"{folder}: settings for Mosquitto {release}, access lists, certificates")
    _coordinator_files(authority, coordinator, state, folder, config, host[0], port, claim_port)
    print(f"now: mosquitto -c {folder}/mosquitto.conf (or the packaged unit), liberatai serve -c {config}")
    print("then: liberatai broker check, liberatai devices invite")


@app.command("check", epilog="Example: liberatai broker check --config /etc/liberatai/coordinator.yaml")
def broker_check(config: Config = Path(DEFAULT_CONFIG), output: OutputOption = Output.TABLE) -> None:
    """Prove from outside, with real connections, what the broker lets devices do and what not; exit 1 if not.

    It needs the authority's key, makes certificates for ten minutes, and revokes them at the end.
    """
    import asyncio
    import tempfile

    from liberatai_coordinator.authority.authority import Authority
    from liberatai_coordinator.brokers.check import BrokerCheck

    settings = coordinator_config(config)
    if settings.ca_dir is None or settings.ca_file is None:
        raise ConfigError("ca_dir", ["missing: a check makes certificates, and needs the authority's key"])
    claim_url = claim_url_of(settings.broker, settings.joining.claim_port)
    with tempfile.TemporaryDirectory(prefix="liberatai-check-") as folder:
        check = BrokerCheck(
            settings.broker, claim_url, Authority(Path(settings.ca_dir)), Path(settings.ca_file), Path(folder)
        )
        with progress("checking the broker"):
            found = asyncio.run(check.run())
    show(found, _CHECK_COLUMNS, output)
    if not all(one.ok for one in found):
        raise typer.Exit(FAILED)


def claim_url_of(broker: str, port: int) -> str:
    """Return the URL of the door for claims beside a broker's door for devices."""
    from liberatai_core.link.mqtt.settings import broker_address

    address = broker_address(broker)
    if not address.secure:
        raise ConfigError("broker", [f"{broker}: a check needs mqtts://"])
    return f"mqtts://{_bracketed(address.host)}:{port}"


@app.command("sync", epilog="Example: liberatai broker sync --config /etc/liberatai/coordinator.yaml")
def broker_sync(
    config: Config = Path(DEFAULT_CONFIG),
    reload: Annotated[
        bool, typer.Option("--reload/--no-reload", help="Let the packaged broker load it at once.")
    ] = True,
) -> None:
    """Bring the broker's access lists, revoked certificates and its own certificate up to date."""
    from liberatai_coordinator.authority import broker_files

    settings = coordinator_config(config)
    folder = _broker_dir(settings.broker_dir)
    authority = None
    if settings.ca_dir is not None:
        from liberatai_coordinator.authority.authority import Authority

        authority = Authority(Path(settings.ca_dir))
    denied = broker_files.denied(folder)
    changed = broker_files.sync(folder, authority, settings.fleet, settings.coordinator, denied)
    command = broker_files.default_reload()
    if changed and reload and command:
        broker_files.reload(command)
    done = "changed" if changed else "up to date"
    hint = "" if not changed or (reload and command) else "; now send the broker SIGHUP"
    print(f"{folder}: {done}{hint}")


def _broker_dir(folder: str | None) -> Path:
    if folder is None:
        fault = "missing: the folder that `liberatai broker init` wrote (other brokers: docs/broker.md)"
        raise ConfigError("broker_dir", [fault])
    return Path(folder)


def _release(wanted: str) -> "Release":
    from liberatai_coordinator.authority.mosquitto import RELEASES

    if wanted == "auto":
        from liberatai_coordinator.brokers.start import find_mosquitto, mosquitto_version

        program = find_mosquitto()
        number = mosquitto_version(program) if program is not None else ""
        return "2.0" if not number or number.startswith(("1.", "2.0")) else "2.1"
    for release in RELEASES:
        if wanted == release:
            return release
    raise ConfigError("--mosquitto", [f"{wanted!r}: must be auto, {' or '.join(RELEASES)}"])


def _plugins() -> str:
    from liberatai_coordinator.authority.mosquitto import PLUGINS

    found = sorted(Path(PLUGINS).glob("*-linux-gnu*/mosquitto_acl_file.so"))
    return str(found[0].parent) if found else PLUGINS


def _make_state(state: Path) -> None:
    from liberatai_core.files import make_folder

    try:
        make_folder(state)
    except OSError as error:
        raise DiskError(f"{state}: {error.strerror}") from error


def _authority(folder: Path, fleet: str) -> "Authority":
    from liberatai_coordinator.authority.authority import Authority

    if not (folder / "ca.crt").exists():
        made = Authority.create(folder, fleet)
        print(f"{folder}: new authority of fleet {fleet}: keep a copy of its keys")
        return made
    authority = Authority(folder)
    if authority.fleet != fleet:
        raise ConfigError("--fleet", [f"{fleet!r}: the authority in {folder} is that of {authority.fleet!r}"])
    return authority


def _coordinator_files(
    authority: "Authority",
    name: str,
    state: Path,
    folder: Path,
    config: Path,
    host: str,
    port: int,
    claim_port: int,
) -> None:
    from liberatai_coordinator.authority.signing import DAY_S
    from liberatai_core.certificates import certificate_pem, key_pem, new_key
    from liberatai_core.files import make_folder, write_durably

    own, root = state / "tls" / "coordinator.pem", state / "tls" / "ca.crt"
    try:
        make_folder(own.parent)
        if not own.exists():
            key = new_key()
            der = authority.issue(key.public_key(), "coordinator", name, COORDINATOR_DAYS * DAY_S)
            write_durably(own, certificate_pem(der) + key_pem(key))
            print(f"{own}: certificate and key of coordinator {name}")
        write_durably(root, certificate_pem(authority.certificates["ca"]), mode=0o644)
        if not config.exists():
            make_folder(config.parent, mode=0o755)
            text = _settings(authority.fleet, name, state, folder, host, port, claim_port)
            write_durably(config, text.encode(), mode=0o644)
            print(f"{config}: settings of the coordinator")
    except OSError as error:
        raise DiskError(f"{error.filename or state}: {error.strerror}") from error


def _settings(fleet: str, name: str, state: Path, folder: Path, host: str, port: int, claim_port: int) -> str:
    return (
        f"fleet: {fleet}\n"
        f"coordinator: {name}\n"
        f"broker: mqtts://localhost:{port}\n"
        f"ca_file: {state.absolute()}/tls/ca.crt\n"
        f"cert_file: {state.absolute()}/tls/coordinator.pem\n"
        f"key_file: {state.absolute()}/tls/coordinator.pem\n"
        f"state_dir: {state.absolute()}\n"
        f"ca_dir: {state.absolute()}/ca\n"
        f"broker_dir: {folder.absolute()}\n"
        f"joining:\n"
        f"  broker: mqtts://{_bracketed(host)}:{port}\n"
        f"  claim_port: {claim_port}\n"
    )


_CHECK_COLUMNS: "list[Column[Finding]]" = [
    Column("CHECK", lambda row: row.check),
    Column("OK", lambda row: "ok" if row.ok else "FAIL"),
    Column("DETAIL", lambda row: row.text, note=True),
]


def _bracketed(host: str) -> str:
    """Return a host as a URL carries it."""
    bare = urlsplit(f"//{host}").hostname
    return f"[{host}]" if ":" in host and bare != host else host
