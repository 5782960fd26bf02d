"""Certificates renewed under load: does a job, or an update, notice?

    python -m benchmarks.renewal [--devices N] [--renewals N] [--life S] [--quick] [--seed N]

A broker with mutual TLS, a coordinator and agents, each its own process; the agents join with tokens, get
certificates that live for a minute, and train in rounds that want every device's update. Certificates are
renewed meanwhile, and three times something is killed (SIGKILL) at the worst moment: the coordinator when it
has just signed a certificate and nobody has it; the broker, and an agent, when a new certificate lies beside
the old one. Every round must end with all its updates. The baseline, in the same run, is the median round:
few rounds see a renewal, and the longest one sees an outage.
"""

import argparse
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.wire import InvitationRequest
from liberatai_coordinator.local.process import Process
from liberatai_core import processes
from liberatai_core.certificate_file import read_dates
from liberatai_core.errors import LiberataiError

JOB = """
name: renewal
data: {{input_shape: [8], classes: 2}}
structures: [{{family: mlp, params: {{hidden: 8}}}}]
rounds: {{count: 100000, quorum: 1.0, min_devices: {devices}, deadline_s: 300}}
training: {{epochs: 1}}
sparsify: {{up_density: 0.5, down_density: 0.5}}
seed: {seed}
"""
DAY_S = 86_400.0
LOOK_S = 0.02
PATIENCE_S = 1200.0


@dataclass(slots=True)
class World:
    """Everything that runs."""

    folder: Path
    names: list[str]
    life_s: float
    seed: int
    broker: SecureBroker = field(init=False)
    coordinator: Process = field(init=False)
    agents: dict[str, Process] = field(default_factory=dict)
    client: Client = field(init=False)

    def start(self) -> None:
        """Start broker and coordinator, let the devices join, start the agents."""
        self.broker = start_secure_broker(self.folder)
        pem = str(self.broker.credential("co1", "coordinator"))
        state = self.folder / "coordinator"
        settings: dict[str, Any] = {
            "fleet": "default",
            "broker": self.broker.url,
            "ca_file": str(self.broker.ca_file),
            "cert_file": pem,
            "key_file": pem,
            "state_dir": str(state),
            "ca_dir": str(self.broker.authority.folder),
            "joining": {
                "claim_port": self.broker.claim_port,
                "certificate_days": self.life_s / DAY_S,
                "rejoin_days": 1,
            },
        }
        path = self.folder / "coordinator.yaml"
        path.write_text(json.dumps(settings))
        command = processes.command("liberatai_coordinator", "serve", "--config", str(path))
        self.coordinator = Process("coordinator", command, self.folder / "coordinator.log")
        self.coordinator.start()
        self.client = Client(state / "api.sock")
        self.answers()
        for name, one in zip(self.names, self._tokens(), strict=True):
            self._join(name, one)
        for agent in self.agents.values():
            agent.start()

    def _tokens(self) -> list[str]:
        made = self.client.invitations.create(InvitationRequest(count=len(self.names)))
        return [one.token for one in made]

    def answers(self) -> None:
        """Wait until the coordinator answers and has its broker."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                if self.client.health()["protocol"]:
                    return
            except LiberataiError:
                self.coordinator.require_alive()
            time.sleep(0.1)
        raise SystemExit("the coordinator does not answer")

    def _join(self, name: str, token: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        rng = np.random.default_rng([self.seed, self.names.index(name)])
        x = rng.normal(size=(64, 8)).astype(np.float32)
        np.savez(folder / "data.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
        config = folder / "agent.yaml"
        words = [
            "enrol",
            "-",
            "--config",
            str(config),
            "--state-dir",
            str(folder / "state"),
            "--device",
            name,
        ]
        command = processes.command("liberatai_agent", *words, "--data", str(folder / "data.npz"))
        subprocess.run(command, input=token, text=True, check=True, capture_output=True, timeout=300)
        config.write_text(config.read_text() + "trainer_idle_s: 600\n")
        run = processes.command("liberatai_agent", "run", "--config", str(config))
        self.agents[name] = Process(name, run, folder / "agent.log")

    def tls(self, name: str) -> Path:
        """Return the folder with a device's certificates."""
        return self.folder / name / "state" / "tls"

    def waiting(self) -> str:
        """Return a device whose new certificate lies beside the old one; "": none has one."""
        return next((name for name in self.names if (self.tls(name) / "device.next.pem").exists()), "")

    def serial(self, name: str) -> str:
        """Return the number of a device's certificate."""
        return read_dates(self.tls(name) / "device.pem").serial

    def stop(self) -> None:
        """End everything."""
        for process in [*self.agents.values(), self.coordinator]:
            process.signal(signal.SIGTERM)
        for process in [*self.agents.values(), self.coordinator]:
            process.wait()
        self.broker.stop()


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument("--renewals", type=int, default=20)
    parser.add_argument("--life", type=float, default=60.0, help="seconds that a certificate lives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two devices, six renewals")
    given = parser.parse_args()
    devices, wanted = (2, 6) if given.quick else (given.devices, given.renewals)
    life_s = 30.0 if given.quick else given.life
    names = [f"dev-{number}" for number in range(devices)]
    with tempfile.TemporaryDirectory(prefix="liberatai-renewal-") as folder:
        world = World(Path(folder), names, life_s, given.seed)
        try:
            world.start()
            found = measure(world, wanted)
        finally:
            world.stop()
    found |= {"devices": devices, "life_s": life_s, "seed": given.seed, "python": platform.python_version()}
    for name, value in found.items():
        print(f"{name:<28} {value}")
    print(json.dumps({"benchmark": "renewal", **found}))
    return 1 if found["jobs_disturbed"] or found["updates_lost"] else 0


def measure(world: World, wanted: int) -> dict[str, Any]:
    """Run the job until enough certificates were renewed and all outages are over."""
    client = world.client
    client.jobs.create(JOB.format(devices=len(world.names), seed=world.seed), world.folder)
    listed = world.broker.authority.folder / "issued.jsonl"
    serials = {name: world.serial(name) for name in world.names}
    renewed_at: list[float] = []
    outages: list[str] = []
    size = listed.stat().st_size
    until = time.monotonic() + PATIENCE_S
    while len(renewed_at) < wanted or len(outages) < 3:
        if time.monotonic() > until:
            raise SystemExit(f"only {len(renewed_at)} renewals: {world.coordinator.tail()}")
        waiting, signed = world.waiting(), listed.stat().st_size > size
        size = listed.stat().st_size
        if signed and "coordinator" not in outages and len(renewed_at) >= wanted // 5:
            outages.append("coordinator")
            world.coordinator.kill()
            time.sleep(1.0)
            world.coordinator.start()
        elif waiting and "broker" not in outages and len(renewed_at) >= 2 * wanted // 5:
            outages.append("broker")
            world.broker.kill()
            time.sleep(2.0)
            world.broker.restart()
        elif waiting and "agent" not in outages and len(renewed_at) >= 3 * wanted // 5:
            outages.append("agent")
            world.agents[waiting].kill()
            world.agents[waiting].start()
        for name in world.names:
            now = world.serial(name)
            if now != serials[name]:
                serials[name] = now
                renewed_at.append(time.time())
                sys.stderr.write(f"renewed: {len(renewed_at)} of {wanted}, outages: {outages}\n")
        time.sleep(LOOK_S)
    world.answers()
    settled = len(client.jobs.show("renewal").rounds) + 3
    while len(client.jobs.show("renewal").rounds) < settled:
        time.sleep(0.2)
    client.jobs.pause("renewal")
    return judged(world, client.jobs.show("renewal"), renewed_at, outages)


def judged(world: World, job: Any, renewed_at: list[float], outages: list[str]) -> dict[str, Any]:
    """Count what was lost, and compare rounds with and without a renewal."""
    over = [one for one in job.rounds if one.state != "open"]
    lost = sum(max(0, one.invited - one.updates) for one in over)
    disturbed = [one.round for one in over if one.state == "abandoned"]
    seconds = [one.seconds for one in over]
    refused: dict[str, int] = {}
    for device in world.client.devices.list():
        for code, count in device.refusals.items():
            refused[code] = refused.get(code, 0) + count
    return {
        "renewals": len(renewed_at),
        "outages": outages,
        "rounds": len(over),
        "updates": sum(one.updates for one in over),
        "updates_lost": lost,
        "jobs_disturbed": int(job.state in ("failed", "aborted") or bool(disturbed)),
        "rounds_abandoned": disturbed,
        "round_seconds_median": round(statistics.median(seconds), 2),
        "round_seconds_max": round(max(seconds), 2),
        "rounds_per_renewal": round(len(over) / len(renewed_at), 2),
        "refusals": refused,
    }


if __name__ == "__main__":
    sys.exit(main())
