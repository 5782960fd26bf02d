"""LiberatAI as a fleet has it: Mosquitto with mutual TLS, one coordinator, one agent process per device."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.measure import DAY_S, Found, Processes, installed, memory_mb, wait
from benchmarks.relay import Relay
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import JobView
from liberatai_coordinator.local.files import new_key
from liberatai_core import processes
from liberatai_core.errors import LinkError

FLEET, COORDINATOR, JOB = "peers", "co1", "peer"
START_S, ROUND_S = 120.0, 120.0
BASE = ["numpy", "paho-mqtt", "msgspec", "psutil", "pyyaml", "cryptography", "cffi", "pycparser"]
"""What `pip install liberatai` brings besides itself."""
TEXT = """
name: peer
data: {{input_shape: [784], classes: 10}}
structures: [{{family: mlp, params: {{hidden: 128}}}}]
rounds: {{count: {rounds}, target: {devices}, overselect: 1.0, min_devices: 1, deadline_s: 600}}
training: {{epochs: {epochs}, batch_size: {batch_size}, learning_rate: {learning_rate}}}
evaluate: {{test: {test}}}
seed: {seed}
"""


class Fleet:
    """The processes; use it in a `with` statement.

    Attributes:
        client: the coordinator's API.
        relay: between the devices and the broker.
        devices: their names.
    """

    def __init__(self, folder: Path, count: int) -> None:
        """Set up, without starting anything."""
        self.folder, self.devices = folder, [f"device-{number}" for number in range(count)]
        self._children = Processes(folder)
        self._socket = folder / "api.sock"

    def __enter__(self) -> Self:
        """Start broker, coordinator and agents, and wait until all are there."""
        self._broker: SecureBroker = start_secure_broker(self.folder / "broker", FLEET, COORDINATOR)
        self.relay = Relay("127.0.0.1", self._broker.port)
        keys = {name: new_key(self.folder / name / "state" / "device.key") for name in self.devices}
        coordinator_key = new_key(self.folder / "co" / "coordinator.key")
        settings = {
            "fleet": FLEET,
            "coordinator": COORDINATOR,
            **self._login(COORDINATOR, "coordinator", self._broker.port),
            "state_dir": str(self.folder / "co"),
            "socket": str(self._socket),
            "enrolment": "allowlist",
            "devices": keys,
        }
        (self.folder / "coordinator.yaml").write_text(json.dumps(settings))
        self.client = Client(self._socket)
        self.start_coordinator()
        for name in self.devices:
            agent = {
                "fleet": FLEET,
                "device": name,
                **self._login(name, "device", self.relay.port),
                "coordinator_key": coordinator_key,
                "state_dir": str(self.folder / name / "state"),
                "data": str(self.folder / f"{name}.npz"),
                "trainer_idle_s": 600.0,
            }
            (self.folder / f"{name}.yaml").write_text(json.dumps(agent))
            command = processes.command(
                "liberatai_agent", "run", "--config", str(self.folder / f"{name}.yaml")
            )
            self._children.start(name, command, {}, self.folder)
        wait(self._all_there, "devices", START_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._children.__exit__(*error)
        self.relay.close()
        self._broker.stop()

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it answers."""
        command = processes.command(
            "liberatai_coordinator", "serve", "--config", str(self.folder / "coordinator.yaml")
        )
        self._children.start("coordinator", command, {}, self.folder)
        wait(self._answers, "the coordinator", START_S)

    def kill(self, name: str) -> None:
        """End a process as a crash does."""
        self._children.kill(name)

    def idle(self, seconds: float) -> tuple[float, float, float]:
        """Watch the devices do nothing; return RSS MB, PSS MB and bytes per day of one of them."""
        before, began = sum(self.relay.carried()), time.monotonic()
        time.sleep(seconds)
        rate = (sum(self.relay.carried()) - before) / (time.monotonic() - began)
        rss, pss = memory_mb(map(self._children.pid, self.devices))
        count = len(self.devices)
        return rss / count, pss / count, rate / count * DAY_S

    def job(self) -> JobView | None:
        """Return the job, None while the coordinator does not answer."""
        try:
            return self.client.jobs.show(JOB)
        except LinkError:
            return None

    def _answers(self) -> bool:
        try:
            self.client.health()
        except LinkError:
            return False
        return True

    def _all_there(self) -> bool:
        there = [one for one in self.client.devices.list() if one.state == "online"]
        return len(there) == len(self.devices)

    def _login(self, name: str, role: str, port: int) -> dict[str, str]:
        pem = str(self._broker.credential(name, role))
        return {
            "broker": f"mqtts://127.0.0.1:{port}",
            "ca_file": str(self._broker.ca_file),
            "cert_file": pem,
            "key_file": pem,
        }


def run(
    folder: Path, given: dict[str, Any], idle_s: float, accident: str = ""
) -> tuple[Found, dict[str, str]]:
    """Run the work.

    Args:
        folder: with the work, see `work.Work`.
        given: the work's settings.
        idle_s: for how long the devices are watched before the job.
        accident: in the middle of the second round: "device" ends one of them, "server" ends the coordinator
            and starts it again.

    Returns:
        What was found, and digests of the final weights by structure.
    """
    found = Found()
    with Fleet(folder, given["devices"]) as fleet:
        if idle_s:
            time.sleep(10)
            found.idle_rss_mb, found.idle_pss_mb, found.idle_bytes_day = fleet.idle(idle_s)
        text = TEXT.format(**given, test=folder / "test.npz")
        start, submitted = fleet.relay.carried(), time.monotonic()
        fleet.client.jobs.create(text, str(folder))
        if accident:
            wait(lambda: _second_trains(fleet), "second round", ROUND_S)
            time.sleep(given["accident_s"])
            fleet.kill(fleet.devices[-1] if accident == "device" else "coordinator")
            if accident == "server":
                fleet.start_coordinator()
        ended = wait(lambda: _ended(fleet), "the end", ROUND_S * given["rounds"])
        found.wall_s = time.monotonic() - submitted
        time.sleep(1)
        end = fleet.relay.carried()
        found.up, found.down = end[0] - start[0], end[1] - start[1]
        digests = fleet.client.models.log(JOB)[-1].digests
    for one in ended.rounds:
        found.accuracy.append(one.test.ensemble if one.test else 0.0)
        found.round_s.append(one.seconds)
        found.training_s.append(one.train_seconds_max)
    found.packages, found.installed_mb = installed(Path(sys.executable), BASE)
    found.packages += 1
    return found, digests


def _second_trains(fleet: Fleet) -> bool:
    """Return whether the second round is open and every device trains."""
    view = fleet.job()
    if view is None or not view.rounds or view.rounds[-1].round < 2:
        return False
    return all(one.phase in {"training", "invited"} for one in fleet.client.devices.list())


def _ended(fleet: Fleet) -> JobView | None:
    view = fleet.job()
    if view is not None and view.state in {"failed", "aborted"}:
        raise RuntimeError(f"the job {view.state}: {view.reason}")
    return view if view is not None and view.state == "finished" else None
