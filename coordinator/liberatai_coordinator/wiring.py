"""The one place where a coordinator's parts are put together from its settings, and run."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from liberatai_coordinator.api.guard import Guard
from liberatai_coordinator.api.listener import serve_https, serve_tcp, serve_uds
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.routes import make_app
from liberatai_coordinator.api.watching import make_watching_app
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.control.broker_lists import BrokerLists
from liberatai_coordinator.fleet.devices import Fleet
from liberatai_coordinator.intake.fencing import first_epoch, presence_frame
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_coordinator.jobs.renewal import renew
from liberatai_coordinator.link_settings import mqtt_settings
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.database import REPLACED
from liberatai_coordinator.store.ledger import Ledger
from liberatai_coordinator.store.repository import Repository
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.messages import RUN_BYTES
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import ConfigError, DiskError, MissingExtraError, ReplacedError
from liberatai_core.files import write_durably
from liberatai_core.learning.families import require_torch
from liberatai_core.link.link import Link, Will
from liberatai_core.link.mqtt import MqttLink
from liberatai_core.sd_notify import notify, pause_s

log = logging.getLogger(__name__)

YOUNG_OBJECTS = 10_000
"""So many new objects are looked at together by the garbage collector."""


REMOTE_DAYS = 365.0
"""Of the certificate for the API; every start makes a new one."""


MakeLink = Callable[[CoordinatorConfig, Will], Link]
"""What makes the link of a coordinator: the will is published if its connection dies."""


def mqtt_link(config: CoordinatorConfig, will: Will) -> Link:
    """Return the link to the broker that the settings name.

    Raises:
        ConfigError: the URL is wrong, or the password file cannot be read.
    """
    return MqttLink(mqtt_settings(config), will=will)


@contextmanager
def build(
    config: CoordinatorConfig,
    make_link: MakeLink = mqtt_link,
    *,
    jumps: int = 0,
    threaded: bool = True,
    take_over: bool = False,
) -> Iterator[Service]:
    """Put a coordinator together; its ledger is closed at the end.

    Args:
        config: settings.
        make_link: makes its link.
        jumps: see `Fencing`.
        threaded: see `Ledger.open`.
        take_over: take the place of every other coordinator with this key.

    Raises:
        LockedError: another coordinator uses the state folder.
        ReplacedError: another one took the place of this one.
        ConfigError, DiskError: a file is missing, unreadable or wrong.
    """
    folder = Path(config.state_dir)
    ledger = Ledger.open(folder, threaded=threaded, epoch_after=taking_over if take_over else None)
    try:
        if jumps or take_over:
            renew(ledger, os.urandom(RUN_BYTES))
        signer = Signer.from_seed(load_key(folder / "coordinator.key"), config.fleet)
        topics = Topics(fleet=config.fleet)
        will = Will(
            topic=topics.coordinator(config.coordinator),
            payload=presence_frame(signer, config.coordinator, ledger.epoch, "lost"),
        )
        link = make_link(config, will)
        service = Service(
            config=config,
            link=link,
            ledger=ledger,
            repository=Repository(folder),
            signer=signer,
            fleet=Fleet(
                enrolment=config.enrolment,
                max_devices=config.max_devices,
                allowed={name: bytes.fromhex(key) for name, key in config.devices.items()},
            ),
            publisher=Publisher(link=link, signer=signer, topics=topics),
            topics=topics,
            authority=Authority(Path(config.ca_dir)) if config.ca_dir is not None else None,
            jumps=jumps,
        )
        if config.broker_dir is not None or config.ca_dir is not None:
            service.doors.broker = BrokerLists(
                folder=None if config.broker_dir is None else Path(config.broker_dir),
                authority=None if config.ca_dir is None else Path(config.ca_dir),
                fleet=config.fleet,
                coordinator=config.coordinator,
            )
        yield service
    finally:
        ledger.close()


def taking_over(before: int) -> int:
    """Return the epoch of a coordinator that now takes the place of one that was at epoch `before`."""
    return first_epoch(before, time.time())


def load_key(path: Path) -> bytes:
    """Return the 32-byte private key in a file that only we can read; made at the first start.

    Raises:
        ConfigError: others can read it, or it is no key. DiskError: it cannot be written.
    """
    try:
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(32))
                file.flush()
                os.fsync(file.fileno())
        if path.stat().st_mode & 0o077:
            raise ConfigError(str(path), ["others can read this private key: `chmod 600` it"])
        key = path.read_bytes()
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    if len(key) != 32:
        raise ConfigError(str(path), [f"{len(key)} bytes, a private key has 32"])
    return key


def serve(config: CoordinatorConfig, *, take_over: bool = False) -> int:
    """Run a coordinator until SIGTERM or SIGINT; returns the exit code.

    Args:
        config: settings.
        take_over: see `build`.

    Raises:
        LockedError: another coordinator uses this state folder.
        ReplacedError: another one took, or takes, the place of this one.
        ConfigError, DiskError: it cannot start.
    """
    prepare()
    return asyncio.run(run(config, take_over=take_over))


def prepare() -> None:
    """Do what would make an event loop silent later; call it before there is one.

    Importing torch keeps every other thread waiting for a quarter of a second at a time, and a full garbage
    collection has to look at the 200 000 objects that the imports leave behind. They stay for good.
    """
    gc.disable()  # an import leaves no garbage
    with contextlib.suppress(MissingExtraError):
        require_torch()
    gc.freeze()
    gc.enable()
    # Most objects of a message are gone before the next one comes. Python would look after 700 new ones.
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


async def run(config: CoordinatorConfig, make_link: MakeLink = mqtt_link, *, take_over: bool = False) -> int:
    """Run a coordinator in this event loop until SIGTERM or SIGINT; returns the exit code.

    Raises:
        LockedError, ReplacedError, ConfigError, DiskError: see `serve`.
    """
    jumps = 0
    while True:
        with build(config, make_link, jumps=jumps, take_over=take_over and not jumps) as service:
            code = await _run(service)
            if service.jobs.working:
                _leave(service, code)
        if service.fencing.replaced and code != 0:
            raise ReplacedError(f"{config.state_dir}: {REPLACED}")
        if not service.fencing.behind or code == 0:
            return code
        jumps += 1


def _leave(service: Service, code: int) -> NoReturn:
    """End this process at once, although a thread still aggregates: the next start does that again.

    The folder stays locked until the process is gone: no other coordinator writes beside the thread.
    """
    log.info("work under way is left to the next start")
    service.ledger.writer.stop()
    logging.shutdown()
    os._exit(code)


async def _run(service: Service) -> int:
    config = service.config
    log.info(
        "coordinator %s of fleet %s, epoch %d; agents need coordinator_key: %s",
        config.coordinator,
        config.fleet,
        service.ledger.epoch,
        service.signer.public_key.hex(),
    )
    await service.restore()
    running = asyncio.create_task(service.run())
    socket = Path(config.state_dir) / config.socket
    operations = Operations.of(service)
    api = asyncio.create_task(serve_uds(make_app(operations), socket, config.socket_group))
    watched = [*_watched(operations, config.metrics), *_remote(operations, config)]
    # Its first step comes after those of the two: whoever is told that we are ready can ask at once.
    beat = asyncio.create_task(_beat(service))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    parts = (running, api, *watched, beat, stopping)
    await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    code = 0 if stop.is_set() else 1
    if not service.fencing.behind or stop.is_set():
        notify("STOPPING=1")
    for task in parts:
        task.cancel()
    results = await asyncio.gather(*parts, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return code


def _watched(operations: Operations, address: str | None) -> "list[asyncio.Task[None]]":
    """Return what answers those who watch the coordinator, if the settings want it."""
    if address is None:
        return []
    return [asyncio.create_task(serve_tcp(make_watching_app(operations), address))]


def _remote(operations: Operations, config: CoordinatorConfig) -> "list[asyncio.Task[None]]":
    """Return what answers other machines, if the settings want it.

    Raises:
        ConfigError: there is no certificate for it.
    """
    remote = config.remote
    if remote.address is None:
        return []
    guarded = Guard(make_app(operations), operations.tokens.who)
    if remote.cert_file is not None:
        cert, key = Path(remote.cert_file), Path(remote.key_file or remote.cert_file)
    elif config.ca_dir is not None:
        cert = key = _own_certificate(config, remote.address.rpartition(":")[0])
    else:
        raise ConfigError("remote", ["cert_file: needed, because there is no ca_dir to make one"])
    return [asyncio.create_task(serve_https(guarded, remote.address, cert, key))]


def _own_certificate(config: CoordinatorConfig, host: str) -> Path:
    """Return a file with a new certificate of our own authority for a host, and its key."""
    made = new_key()
    der = Authority(Path(config.ca_dir or "")).issue(
        made.public_key(), "server", host, REMOTE_DAYS * 86_400.0, hosts=(host,)
    )
    path = Path(config.state_dir) / "api.pem"
    write_durably(path, certificate_pem(der) + key_pem(made), mode=0o600)
    return path


async def _beat(service: Service) -> None:
    """Tell the service manager that we are ready, and as long as the loop turns, that we live."""
    notify("READY=1")
    while True:
        notify("WATCHDOG=1", f"STATUS={_status(service)}")
        await asyncio.sleep(pause_s())


def _status(service: Service) -> str:
    broker = "connected" if service.connected else "no broker"
    return (
        f"epoch {service.ledger.epoch} · {broker} · devices ready: {len(service.fleet.ready_names)}"
        f" · jobs: {len(service.runners)}"
    )
