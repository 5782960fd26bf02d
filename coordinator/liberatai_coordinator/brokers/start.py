"""Start a broker for the demo and the tests: Mosquitto if it is installed, else amqtt.

The broker is a process of its own on a port of this machine, with a password for every device and an access
list, and dies with the process that started it. Nobody is ever anonymous: amqtt drops the waiting messages of
nameless clients.

Not for production: see `docs/broker.md`.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from liberatai_coordinator.authority.mosquitto import device_acl
from liberatai_core import processes
from liberatai_core.errors import ConfigError, LinkError, MissingExtraError, NotFoundError

HOST = "127.0.0.1"
SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/sbin")  # often not on a user's PATH
START_TIMEOUT_S = 20.0  # amqtt imports for a second; a busy machine needs a multiple
STOP_TIMEOUT_S = 5.0  # then SIGKILL
PORT_TRIES = 5  # somebody else may take a free port before the broker does
PR_SET_PDEATHSIG = 1  # linux/prctl.h
IDENTIFIER = re.compile(r"[a-z0-9-]{1,32}")  # device and fleet ids: no wildcard, no level, no colon
AMQTT_LOST = (
    "amqtt speaks MQTT 3.1.1 only: refused messages are not reported, no message or session expires, "
    "a restart of the broker loses all it holds, and it moves about a fifth of Mosquitto's bytes"
)

BrokerKind = Literal["auto", "mosquitto", "amqtt"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to start one kind of broker on a port: `prepare` writes its files and returns the command."""

    kind: Literal["mosquitto", "amqtt"]
    version: str
    lost: str
    prepare: Callable[[int], list[str]]


class RunningBroker:
    """A broker process; use it in a `with` statement or call `stop`.

    Attributes:
        kind: "mosquitto" or "amqtt".
        version: of the program.
        lost: one sentence on what this kind cannot do; empty if nothing.
        folder: its files, among them `broker.log`.
        host: always this machine.
        port: the port; stays the same over `restart`.
    """

    def __init__(self, recipe: Recipe, folder: Path, port: int) -> None:
        self.kind, self.version, self.lost = recipe.kind, recipe.version, recipe.lost
        self.folder, self.host, self.port = folder, HOST, port
        self._command = recipe.prepare(port)
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def url(self) -> str:
        """Where to connect to, without credentials."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process, None if it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def stop(self) -> None:
        """End the broker properly; idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker as a crash does (SIGKILL)."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start again on the same port with the same files; stops it first if it runs."""
        self.stop()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(how)  # without effect on a process that has ended
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def _start(self) -> None:
        if _answers(self.port):
            raise LinkError(f"{self.kind} cannot start: port {self.port} is in use")
        with (self.folder / "broker.log").open("ab") as log_file:
            self._process = _spawn(self._command, log_file.fileno())
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise LinkError(f"{self.kind} did not start on port {self.port}: {_tail(self.folder)}")
            time.sleep(0.02)


def start_broker(
    kind: BrokerKind,
    folder: Path,
    credentials: dict[str, str],
    fleet: str,
    *,
    coordinator_user: str = "coordinator",
    port: int | None = None,
    persistence: bool = False,
) -> RunningBroker:
    """Start a broker on this machine and wait until it answers.

    Args:
        kind: which one; "auto" takes Mosquitto where it is installed.
        folder: for its files; made if missing, readable by this user only.
        credentials: password by user name; a device's user name is its id.
        fleet: the fleet whose topics the access list opens.
        coordinator_user: may read and write everything of the fleet; must be in `credentials`.
        port: a fixed port; None takes a free one.
        persistence: Mosquitto only: keep sessions and retained messages over a proper restart.

    Raises:
        ConfigError: bad fleet, user name or password.
        NotFoundError: Mosquitto is wanted and not installed.
        MissingExtraError: amqtt is needed and not installed.
        LinkError: it does not start; the text ends with its last log lines.
    """
    _check(credentials, fleet, coordinator_user)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    program = find_mosquitto() if kind != "amqtt" else None
    if program is None and kind == "mosquitto":
        raise NotFoundError("mosquitto is not installed: apt install mosquitto")
    if program is not None:
        recipe = _mosquitto(program, folder, credentials, fleet, coordinator_user, persistence=persistence)
    else:
        recipe = _amqtt(folder, credentials, fleet, coordinator_user)
    for attempt in range(PORT_TRIES):
        try:
            return RunningBroker(recipe, folder, port if port is not None else free_port())
        except LinkError as error:
            if port is not None or attempt == PORT_TRIES - 1 or "in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def find_mosquitto() -> Path | None:
    """Return the Mosquitto program, also where administrators' programs lie."""
    return _find("mosquitto")


def _find(program: str) -> Path | None:
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]))
    return Path(found) if found else None


def _check(credentials: dict[str, str], fleet: str, coordinator_user: str) -> None:
    faults = [] if IDENTIFIER.fullmatch(fleet) else [f"fleet {fleet!r}: must match {IDENTIFIER.pattern}"]
    faults += [
        f"user {user!r}: must match {IDENTIFIER.pattern}"
        for user in credentials
        if not IDENTIFIER.fullmatch(user)
    ]
    faults += [
        f"password of {user!r}: must have 8 to 256 printable characters"
        for user, password in credentials.items()
        if not (8 <= len(password) <= 256 and password.isprintable())
    ]
    if coordinator_user not in credentials:
        faults.append(f"credentials: {coordinator_user!r} is missing")
    if faults:
        raise ConfigError("broker", faults)


# --- Mosquitto -----------------------------------------------------------------------------------


def _mosquitto(
    program: Path,
    folder: Path,
    credentials: dict[str, str],
    fleet: str,
    coordinator_user: str,
    *,
    persistence: bool,
) -> Recipe:
    _write(folder / "passwords", "".join(f"{user}:{word}\n" for user, word in credentials.items()))
    hasher = _find("mosquitto_passwd")
    if hasher is None:
        raise NotFoundError("mosquitto_passwd is not installed: it belongs to mosquitto")
    subprocess.run([hasher, "-U", folder / "passwords"], check=True, capture_output=True)
    _write(folder / "acl", device_acl(fleet, coordinator_user))

    def prepare(port: int) -> list[str]:
        _write(folder / "mosquitto.conf", _mosquitto_conf(folder, port, persistence=persistence))
        return [str(program), "-c", str(folder / "mosquitto.conf")]

    return Recipe("mosquitto", mosquitto_version(program), "", prepare)


def _mosquitto_conf(folder: Path, port: int, *, persistence: bool) -> str:
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous false",
        f"password_file {folder / 'passwords'}",
        f"acl_file {folder / 'acl'}",
        # Started by root it would become the user mosquitto, which may not read these files; anybody else
        # stays who it is, with a name or without.
        *(["user root"] if os.geteuid() == 0 else []),
        f"persistence {'true' if persistence else 'false'}",
        f"persistence_location {folder}/",
        "max_packet_size 1048576",
        "max_inflight_messages 20",
        "max_queued_messages 1000",
        "max_queued_bytes 67108864",
        "persistent_client_expiration 14d",
        "set_tcp_nodelay true",
        "sys_interval 0",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages true",
    ]
    return "\n".join(lines) + "\n"


def mosquitto_version(program: Path) -> str:
    """Return the release of a Mosquitto program."""
    # `-h` ends with code 1 or 0, depending on the version.
    shown = subprocess.run([program, "-h"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"mosquitto version (\S+)", shown)
    return found[1] if found else "unknown"


# --- amqtt ---------------------------------------------------------------------------------------


def _amqtt(folder: Path, credentials: dict[str, str], fleet: str, coordinator_user: str) -> Recipe:
    if importlib.util.find_spec("amqtt") is None:
        raise MissingExtraError("no broker here: apt install mosquitto, or pip install 'liberatai[demo]'")
    from pwdlib.hashers.argon2 import Argon2Hasher  # noqa: PLC0415 - comes with amqtt

    # The passwords are long and random: 1 MiB instead of 64 MiB for every device that connects.
    hasher = Argon2Hasher(time_cost=1, memory_cost=1024, parallelism=1)
    _write(
        folder / "passwords", "".join(f"{user}:{hasher.hash(word)}\n" for user, word in credentials.items())
    )
    root = f"lai/v1/{fleet}"
    devices = [user for user in credentials if user != coordinator_user]
    everything = {coordinator_user: [f"{root}/#"]}
    reads = {user: [f"{root}/dn/{user}/#", f"{root}/pub/#", f"{root}/co/#"] for user in devices}
    access = {
        "publish_acl": {user: [f"{root}/up/{user}/#"] for user in devices} | everything,
        "subscribe_acl": reads | everything,
        "receive_acl": reads | everything,
    }

    def prepare(port: int) -> list[str]:
        plugins = {
            "amqtt.plugins.authentication.FileAuthPlugin": {"password_file": str(folder / "passwords")},
            "liberatai_coordinator.brokers.amqtt_broker.AccessList": access,
        }
        listeners = {"default": {"type": "tcp", "bind": f"{HOST}:{port}"}}
        _write(folder / "amqtt.json", json.dumps({"listeners": listeners, "plugins": plugins}, indent=1))
        return processes.command("liberatai_coordinator.brokers.amqtt_broker", str(folder / "amqtt.json"))

    return Recipe("amqtt", importlib.metadata.version("amqtt"), AMQTT_LOST, prepare)


# --- processes and files -------------------------------------------------------------------------


def _spawn(command: list[str], log_fd: int) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills when we are gone.

    The kernel means the *thread* that started it. So a thread of its own does, and waits as long as the
    broker lives.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def keep() -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                env=processes.environment(),
                start_new_session=True,  # Ctrl-C is ours: we stop the broker last
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one system call
            )
        except OSError as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=keep, name="broker-keeper", daemon=True).start()
    ready.wait()
    if isinstance(started[0], OSError):
        raise LinkError(f"{command[0]}: {started[0]}") from started[0]
    return started[0]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)


def _tail(folder: Path) -> str:
    lines = (folder / "broker.log").read_text(errors="replace").splitlines()
    return " | ".join(lines[-3:]) or "it wrote nothing"
