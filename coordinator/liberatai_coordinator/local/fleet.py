"""A whole fleet on one machine: broker, coordinator and agents, each an operating-system process of its own.

For the demo, the tests and a user's first steps. Every file lies in one folder: settings, keys, passwords,
state, logs. Every process dies with the one that started it. Links and processors are this machine's; limits
of storage and memory are the profiles'.
"""

import json
import secrets
import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, Self

from liberatai_coordinator.brokers.secure import start_secure_broker
from liberatai_coordinator.brokers.start import RunningBroker, start_broker
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.local.files import (
    COORDINATOR,
    Certificate,
    Folders,
    LocalDevice,
    Login,
    agent_process,
    coordinator_process,
    new_key,
    require_reachable,
    without_account,
)
from liberatai_coordinator.local.process import Process
from liberatai_core.errors import ConfigError, LiberataiError, LinkError

READY_TIMEOUT_S: Final = 60.0
"""The coordinator imports torch: two seconds, and a multiple while eight agents start beside it."""
POLL_S: Final = 0.1
MUTUAL_TLS: Final = "mtls"
COORDINATOR_NAME: Final = "co1"
"""Of the coordinator, as its certificate has it: the usual one of its settings."""


class LocalFleet:
    """Broker, coordinator and agents; use it in a `with` statement, or call `start` and `stop`.

    Attributes:
        folders: where everything lies.
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
        url_of: Callable[[str, str], str] = lambda _, url: url,
        limits_of: Callable[[str], Callable[[], None] | None] = lambda _: None,
        housed: Callable[[Process], Process] = lambda agent: agent,
        idle: Collection[str] = (),
    ) -> None:
        """Set up, without starting anything.

        Args:
            folder: for all files; made if missing.
            devices: the agents.
            broker: "auto", "mosquitto", "amqtt", or the URL of a broker that runs already, with
                name:password@ where it wants them (one account must then do for all), or "mtls": a
                Mosquitto with certificates for everybody.
            fleet: name in every topic.
            profiles_dir: folder of the hardware classes that `devices` name.
            url_of: gives the URL at which a device finds the broker, from its name and the broker's own URL.
            limits_of: gives what sets the limits of a device's process, in the child.
            housed: gives what runs an agent instead of a child process of this one.
            idle: devices that are not started yet.
        """
        self._url_of, self._limits_of, self._housed = url_of, limits_of, housed
        self._idle = frozenset(idle)
        self.folders, self.devices, self.fleet = Folders(folder), tuple(devices), fleet
        self.broker: RunningBroker | None = None
        self._wanted, self._profiles_dir = broker, profiles_dir
        self._agents: dict[str, Process] = {}
        self._coordinator: Process | None = None

    # --- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until the coordinator answers.

        Raises:
            LinkError: a process ended or does not answer; the text holds the end of its log.
            LiberataiError: see `start_broker`.
        """
        self.folders.root.mkdir(parents=True, exist_ok=True, mode=0o700)
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
        self.folders.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_reason: object) -> None:
        self.stop()

    # --- accidents --------------------------------------------------------------------------

    def kill_agent(self, device: str) -> None:
        """End one agent as a crash does (SIGKILL)."""
        self._agents[device].kill()

    def restart_agent(self, device: str) -> None:
        """Start an agent again on its old state; kills it first if it runs."""
        self._agents[device].kill()
        self._agents[device].start()

    def start_agent(self, device: str) -> None:
        """Start an agent, unless it runs."""
        self._agents[device].start()

    def stop_agent(self, device: str) -> None:
        """Let an agent say goodbye and end."""
        self._agents[device].stop()

    def is_running(self, device: str) -> bool:
        """Whether an agent's process runs."""
        agent = self._agents.get(device)
        return agent is not None and agent.pid is not None

    def kill_coordinator(self) -> None:
        """End the coordinator as a crash does (SIGKILL)."""
        self._coordinator_process.kill()

    def restart_coordinator(self) -> None:
        """Start the coordinator again on its old state and wait until it answers."""
        self._coordinator_process.kill()
        self._coordinator_process.start()
        _wait_for(self.client, self._coordinator_process)

    def require_alive(self) -> None:
        """Raise LinkError with the end of the log if a process has ended by itself."""
        for process in (self._coordinator_process, *self._agents.values()):
            process.require_alive()

    # --- looking ----------------------------------------------------------------------------

    @property
    def broker_name(self) -> str:
        """What carries the messages, for people."""
        return (
            f"{self.broker.kind} {self.broker.version}" if self.broker else without_account(self._wanted)[0]
        )

    @property
    def broker_lost(self) -> str:
        """What this broker cannot do; "" if nothing is known to be lost."""
        return self.broker.lost if self.broker else ""

    def status(self, device: str) -> dict[str, Any]:
        """Return what the agent last wrote about itself, {} if nothing yet."""
        try:
            status = json.loads((self.folders.agent(device) / "state" / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return status if isinstance(status, dict) else {}

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
        folders = self.folders
        url, accounts = self._start_broker()
        coordinator_key = new_key(folders.coordinator_state / "coordinator.key")
        keys = {d.id: new_key(folders.agent(d.id) / "state" / "device.key") for d in self.devices}
        self._coordinator = coordinator_process(folders, self.fleet, url, accounts[COORDINATOR], keys)
        self._coordinator.start()
        for device in self.devices:
            agent = agent_process(
                folders.agent(device.id),
                self.fleet,
                device,
                self._url_of(device.id, url),
                accounts[device.id],
                coordinator_key,
                self._profiles_dir,
                self._limits_of(device.id),
            )
            agent = self._housed(agent)
            self._agents[device.id] = agent
            if device.id not in self._idle:
                agent.start()
        self.client = Client(folders.socket)
        _wait_for(self.client, self._coordinator)

    def _start_broker(self) -> tuple[str, dict[str, Login]]:
        """Return the broker's URL, and everybody's account there."""
        names = (COORDINATOR, *(device.id for device in self.devices))
        if "://" in self._wanted:
            url, account = without_account(self._wanted)
            require_reachable(url)
            return url, dict.fromkeys(names, account)
        if self._wanted == MUTUAL_TLS:
            return self._start_secure(names)
        kind = _kind(self._wanted)
        passwords = {name: secrets.token_urlsafe(24) for name in names}
        self.broker = start_broker(
            kind,
            self.folders.root / "broker",
            passwords,
            self.fleet,
            coordinator_user=COORDINATOR,
            persistence=kind != "amqtt",
        )
        return self.broker.url, {name: (name, password) for name, password in passwords.items()}

    def _start_secure(self, names: Sequence[str]) -> tuple[str, dict[str, Login]]:
        """Start a Mosquitto as a fleet has it; everybody gets a certificate."""
        broker = start_secure_broker(self.folders.root / "broker", self.fleet, COORDINATOR_NAME)
        self.broker = broker
        roles = {name: "coordinator" if name == COORDINATOR else "device" for name in names}
        own = {name: COORDINATOR_NAME if name == COORDINATOR else name for name in names}
        return broker.url, {
            name: Certificate(broker.ca_file, broker.credential(own[name], role))
            for name, role in roles.items()
        }


def _wait_for(client: Client, coordinator: Process) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        coordinator.require_alive()
        try:
            client.health()
        except LiberataiError:
            if time.monotonic() > deadline_s:
                raise LinkError(
                    f"the coordinator does not answer after {READY_TIMEOUT_S:.0f} s; its log ends:\n"
                    f"{coordinator.tail()}"
                ) from None
            time.sleep(POLL_S)
        else:
            return


def _kind(wanted: str) -> Any:
    if wanted not in ("auto", "mosquitto", "amqtt"):
        raise ConfigError("broker", [f'must be auto, mosquitto, amqtt or a URL mqtt://… (got "{wanted}")'])
    return wanted
