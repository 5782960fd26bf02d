"""A whole fleet on one machine: broker, coordinator and agents, each an operating-system process of its own.

For the demo, the tests and a user's first steps. Every file lies in one folder: settings, keys, passwords,
state, logs. Every process dies with the one that started it. Links and processors are this machine's; limits
of storage and memory are the profiles'.
"""

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from liberatai_coordinator.brokers.start import RunningBroker, start_broker
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import JobView, VersionView
from liberatai_coordinator.config import parse_job
from liberatai_core import processes
from liberatai_core.errors import ConfigError, LiberataiError, LinkError, TrainingError
from liberatai_core.structure import DataContract, Structure
from liberatai_core.weights import Vector

COORDINATOR: Final = "coordinator"
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
MAX_SOCKET_PATH: Final = 107  # Linux: sizeof(sun_path) - 1
READY_TIMEOUT_S: Final = 60.0
"""The coordinator imports torch: two seconds, and a multiple while eight agents start beside it."""
STOP_TIMEOUT_S: Final = 10.0
"""An agent says goodbye and writes its counters; then it is killed."""
CONNECT_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.1
TRAINER_IDLE_S: Final = 600.0
"""Trainers stay: importing torch for every round would take longer than the round."""
TAIL_LINES: Final = 15
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",  # a dozen processes share the processors: more threads are in each other's way
    "OMP_WAIT_POLICY": "PASSIVE",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """One agent to start.

    Attributes:
        id: the device's name.
        data: its private .npz.
        profile: name of a hardware class, or path of its file; None: only this machine limits it.
    """

    id: str
    data: Path
    profile: str | Path | None = None


class Process:
    """One child process with a log file; it dies with us, and Ctrl-C does not reach it."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log, self._command = name, log, list(command)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process, None if it is not running."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Start it, unless it runs.

        The kernel's "dies with its parent" means the parent's thread: so a thread that lives as long as the
        child starts it.
        """
        if self.pid is not None:
            return
        ready = threading.Event()
        failed: list[OSError] = []

        def keep() -> None:
            try:
                with self.log.open("ab") as log:
                    child = _popen(self._command, log.fileno())
            except OSError as error:
                failed.append(error)
                ready.set()
                return
            self._child = child
            ready.set()
            child.wait()

        threading.Thread(target=keep, name=f"keeper-{self.name}", daemon=True).start()
        ready.wait()
        if failed:
            raise LinkError(f"{self.name}: cannot be started: {failed[0]}")

    def signal(self, how: signal.Signals) -> None:
        """Send a signal; without effect on a process that has ended."""
        if self._child is not None:
            self._child.send_signal(how)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait for its end; after the time, kill it."""
        if self._child is None:
            return
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """End it as a crash does; from now on it is not missed."""
        self.signal(signal.SIGKILL)
        self.wait()
        self._child = None

    def require_alive(self) -> None:
        """Raise LinkError with the end of its log if the process has ended by itself."""
        if self._child is not None and (code := self._child.poll()) is not None:
            raise LinkError(f"{self.name} ended with code {code}; its log ends:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines of its log, indented."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            lines = []
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"


class LocalFleet:
    """Broker, coordinator and agents; use it in a `with` statement, or call `start` and `stop`.

    Attributes:
        folder: everything lies below it.
        devices: what was asked for.
        fleet: name in every topic.
        broker: the broker process, None if an outside one is used.
        client: the coordinator's API, once `start` has returned.
    """

    client: Client

    def __init__(
        self,
        folder: Path,
        devices: Sequence[LocalDevice],
        *,
        broker: str = "auto",
        fleet: str = "demo",
        profiles_dir: Path | None = None,
    ) -> None:
        """Set up, without starting anything.

        Args:
            folder: for all files; made if missing.
            devices: the agents.
            broker: "auto", "mosquitto", "amqtt", or the URL of a broker that runs already, with
                name:password@ where it wants them (one account must then do for all).
            fleet: name in every topic.
            profiles_dir: folder of the hardware classes that `devices` name.
        """
        self.folder, self.devices, self.fleet = folder.absolute(), tuple(devices), fleet
        self.broker: RunningBroker | None = None
        self._wanted, self._profiles_dir = broker, profiles_dir
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self._agents: dict[str, Process] = {}
        self._coordinator: Process | None = None

    # --- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until the coordinator answers.

        Raises:
            LinkError: a process ended or does not answer; the text holds the end of its log.
            LiberataiError: see `start_broker`.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End agents, coordinator and broker, in this order; idempotent."""
        for agent in self._agents.values():
            agent.signal(signal.SIGTERM)
        for agent in self._agents.values():
            agent.wait()
        if self._coordinator is not None:
            self._coordinator.signal(signal.SIGTERM)
            self._coordinator.wait()
        if self.broker is not None:
            self.broker.stop()
        if self._sockets is not None:
            self._sockets.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- accidents --------------------------------------------------------------------------

    def kill_agent(self, device: str) -> None:
        """End one agent as a crash does (SIGKILL)."""
        self._agents[device].kill()

    def restart_agent(self, device: str) -> None:
        """Start an agent again on its old state; kills it first if it runs."""
        self._agents[device].kill()
        self._agents[device].start()

    def kill_coordinator(self) -> None:
        """End the coordinator as a crash does (SIGKILL)."""
        self._coordinator_process.kill()

    def restart_coordinator(self) -> None:
        """Start the coordinator again on its old state and wait until it answers."""
        self._coordinator_process.kill()
        self._coordinator_process.start()
        self._wait_for_coordinator()

    def require_alive(self) -> None:
        """Raise LinkError with the end of the log if a process has ended by itself."""
        for process in (self._coordinator_process, *self._agents.values()):
            process.require_alive()

    # --- looking ----------------------------------------------------------------------------

    @property
    def broker_name(self) -> str:
        """What carries the messages, for people."""
        return (
            f"{self.broker.kind} {self.broker.version}" if self.broker else _without_account(self._wanted)[0]
        )

    @property
    def broker_lost(self) -> str:
        """What this broker cannot do; "" if nothing is known to be lost."""
        return self.broker.lost if self.broker else ""

    @property
    def protocol(self) -> str:
        """What coordinator and broker speak, e.g. "MQTT 5"; "" without a connection."""
        return str(self.client.health().get("protocol", ""))

    @property
    def coordinator_state(self) -> Path:
        """The coordinator's state folder."""
        return self.folder / COORDINATOR / "state"

    @property
    def socket(self) -> Path:
        """The API's socket: in the state folder, or in a temporary one where its path would be too long."""
        usual = self.coordinator_state / "api.sock"
        if len(os.fsencode(usual)) <= MAX_SOCKET_PATH:
            return usual
        if self._sockets is None:
            self._sockets = tempfile.TemporaryDirectory(prefix="liberatai-")
        return Path(self._sockets.name) / "api.sock"

    def agent_folder(self, device: str) -> Path:
        """Return the folder with an agent's settings, state and log."""
        return self.folder / "agents" / device

    def status(self, device: str) -> dict[str, Any]:
        """Return what the agent last wrote about itself, {} if nothing yet."""
        try:
            found = json.loads((self.agent_folder(device) / "state" / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def logs(self) -> str:
        """Return the ends of all logs, for a bug report."""
        processes = [self._coordinator, *self._agents.values()]
        return "\n".join(f"{process.name}:\n{process.tail()}" for process in processes if process)

    # --- inside -----------------------------------------------------------------------------

    @property
    def _coordinator_process(self) -> Process:
        if self._coordinator is None:
            raise LinkError("the fleet is not started")
        return self._coordinator

    def _start(self) -> None:
        passwords = {name: secrets.token_urlsafe(24) for name in (COORDINATOR, *(d.id for d in self.devices))}
        if "://" in self._wanted:
            url, user, password = _without_account(self._wanted)
            _require_reachable(url)
            accounts = dict.fromkeys(passwords, (user, password))
        else:
            self.broker = start_broker(
                _kind(self._wanted),
                self.folder / "broker",
                passwords,
                self.fleet,
                coordinator_user=COORDINATOR,
                persistence=_kind(self._wanted) != "amqtt",
            )
            url = self.broker.url
            accounts = {name: (name, password) for name, password in passwords.items()}
        coordinator_key = _new_key(self.coordinator_state / "coordinator.key")
        device_keys = {d.id: _new_key(self.agent_folder(d.id) / "state" / "device.key") for d in self.devices}
        self._coordinator = self._prepare_coordinator(url, accounts[COORDINATOR], device_keys)
        self._coordinator.start()
        for device in self.devices:
            agent = self._prepare_agent(device, url, accounts[device.id], coordinator_key)
            self._agents[device.id] = agent
            agent.start()
        self.client = Client(self.socket)
        self._wait_for_coordinator()

    def _prepare_coordinator(
        self, url: str, account: tuple[str | None, str | None], device_keys: Mapping[str, str]
    ) -> Process:
        folder = self.folder / COORDINATOR
        settings = {
            "fleet": self.fleet,
            "broker": url,
            **_login(folder, account),
            "state_dir": str(self.coordinator_state),
            "socket": str(self.socket),
            "enrolment": "allowlist",
            "devices": dict(device_keys),
        }
        path = _write_settings(folder / "coordinator.yaml", settings)
        command = _command("liberatai_coordinator", "serve", path)
        return Process(COORDINATOR, command, folder / "coordinator.log")

    def _prepare_agent(
        self, device: LocalDevice, url: str, account: tuple[str | None, str | None], coordinator_key: str
    ) -> Process:
        folder = self.agent_folder(device.id)
        profile = device.profile
        settings = {
            "fleet": self.fleet,
            "device": device.id,
            "broker": url,
            **_login(folder, account),
            "coordinator_key": coordinator_key,
            "state_dir": str(folder / "state"),
            "data": str(device.data.absolute()),
            "profile": str(profile.absolute()) if isinstance(profile, Path) else profile,
            "profiles_dir": str(self._profiles_dir) if self._profiles_dir else None,
            "trainer_idle_s": TRAINER_IDLE_S,
        }
        path = _write_settings(folder / "agent.yaml", settings)
        return Process(device.id, _command("liberatai_agent", "run", path), folder / "agent.log")

    def _wait_for_coordinator(self) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            self._coordinator_process.require_alive()
            try:
                self.client.health()
            except LiberataiError:
                if time.monotonic() > deadline_s:
                    raise LinkError(
                        f"the coordinator does not answer after {READY_TIMEOUT_S:.0f} s; its log ends:\n"
                        f"{self._coordinator_process.tail()}"
                    ) from None
                time.sleep(POLL_S)
            else:
                return


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What `run` returns.

    Attributes:
        job: the finished job with its rounds.
        versions: of the model, as the coordinator lists them.
        structures: structure by its id.
        weights: newest weights by structure id, flat float32.
        data: the job's data contract.
    """

    job: JobView
    versions: tuple[VersionView, ...]
    structures: dict[str, Structure]
    weights: dict[str, Vector]
    data: DataContract

    def predict(self, x: Any, structure: str | None = None) -> Any:
        """Return the most probable class of each input, shape (n,), by one structure.

        Args:
            x: inputs, shape (n, *input_shape).
            structure: id of one; None takes the one with the most parameters.
        """
        from liberatai_core.learning.training import log_probabilities  # noqa: PLC0415 - imports torch

        name = structure or max(self.structures, key=lambda known: self.structures[known].parameters)
        inputs = np.asarray(x, dtype=np.float32)
        return log_probabilities(self.structures[name], self.data, self.weights[name], inputs).argmax(axis=1)


def run(
    job: Path | str,
    data: Mapping[str, Path | str],
    *,
    profiles: Mapping[str, str | Path] | None = None,
    broker: str = "auto",
    folder: Path | None = None,
    on_progress: Callable[[JobView], None] | None = None,
) -> Result:
    """Run one job on a fleet of this machine, from nothing to the final weights.

    Args:
        job: file with the job's YAML.
        data: device name -> its private .npz.
        profiles: device name -> hardware class; a device without one is limited by this machine only.
        broker: see `LocalFleet`.
        folder: keeps all files; None: a temporary folder that is removed.
        on_progress: called with the job a few times per second.

    Raises:
        ConfigError: a faulty job, with all its faults.
        TrainingError: the job failed; the text says why.
        LinkError: a process ended; the text holds the end of its log.
    """
    path = Path(job)
    text = path.read_text(encoding="utf-8")
    spec = parse_job(text, str(path))
    devices = [
        LocalDevice(id=name, data=Path(file), profile=(profiles or {}).get(name))
        for name, file in data.items()
    ]
    with tempfile.TemporaryDirectory(prefix="liberatai-") as temporary:
        fleet = LocalFleet(folder or Path(temporary), devices, broker=broker)
        with fleet:
            fleet.client.jobs.create(text, str(path.parent.absolute()))
            finished = wait(fleet, spec.name, on_progress)
            versions = tuple(fleet.client.models.log(spec.name))
            loaded = {
                structure: fleet.client.models.weights(spec.name, "latest", structure)
                for structure in versions_structures(versions)
            }
    return Result(
        job=finished,
        versions=versions,
        structures={name: found[0] for name, found in loaded.items()},
        weights={name: np.frombuffer(found[2], dtype="<f4").copy() for name, found in loaded.items()},
        data=spec.data,
    )


def wait(fleet: LocalFleet, job: str, on_progress: Callable[[JobView], None] | None = None) -> JobView:
    """Return the job once it is finished; a coordinator that was killed on purpose is waited for.

    Raises:
        TrainingError: it failed or was aborted.
        LinkError: a process of the fleet ended.
    """
    while True:
        try:
            view = fleet.client.jobs.show(job)
        except LinkError:
            fleet.require_alive()
            time.sleep(POLL_S)
            continue
        if on_progress is not None:
            on_progress(view)
        if view.state == "finished":
            return view
        if view.state in ("failed", "aborted"):
            raise TrainingError(f"job {job} {view.state}: {view.reason or 'no reason given'}")
        fleet.require_alive()
        time.sleep(POLL_S)


def versions_structures(versions: Sequence[VersionView]) -> list[str]:
    """Return the ids of the structures that the newest version holds."""
    return sorted(max(versions, key=lambda version: version.version).digests) if versions else []


def _popen(command: list[str], log_fd: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        env=processes.environment(also=ENVIRONMENT),
        start_new_session=True,  # Ctrl-C is ours: we stop them in order
        preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one system call
    )


def _command(module: str, verb: str, settings: Path) -> list[str]:
    return processes.command(module, verb, "--config", str(settings))


def _kind(wanted: str) -> Any:
    if wanted not in ("auto", "mosquitto", "amqtt"):
        raise ConfigError("broker", [f'must be auto, mosquitto, amqtt or a URL mqtt://… (got "{wanted}")'])
    return wanted


def _without_account(url: str) -> tuple[str, str | None, str | None]:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}", parts.username, parts.password


def _require_reachable(url: str) -> None:
    """Raise unless somebody listens there: agents would wait for ever, as they should elsewhere."""
    try:
        parts = urlsplit(url)
        port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise LinkError(f"no broker at {url}: {error}") from None


def _login(folder: Path, account: tuple[str | None, str | None]) -> dict[str, str]:
    user, password = account
    if user is None:
        return {}
    _write_private(folder / "password", (password or "").encode())
    return {"username": user, "password_file": str(folder / "password")}


def _new_key(path: Path) -> str:
    """Make a device's or coordinator's key, unless it exists, and return its public half in hex."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes()).public_key().public_bytes_raw().hex()


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(content)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write settings as JSON, which is YAML; None is left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    _write_private(path, json.dumps(given, indent=2).encode())
    return path
