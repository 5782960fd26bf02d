"""kill -9 of coordinator, an agent or the broker at random moments: nothing lost, nothing doubled.

    python -m benchmarks.kills_fleet --kills 20 --seed 0

Runs one job twice with real processes and fixed participants: undisturbed, then with kills. Baseline in the
same run: the undisturbed job. Claims checked: the run ends, the digests of the final weights are identical,
every round of every version counts one update of each device, and every receipted update is among them.
"""

import argparse
import json
import platform
import random
import sqlite3
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from liberatai_coordinator.demo import digits
from liberatai_coordinator.demo.world import PROFILES_DIR
from liberatai_coordinator.local import LocalDevice, LocalFleet
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_core.errors import LiberataiError

JOB = """
name: kills
data: {{input_shape: [1, 8, 8], classes: 10}}
structures: [{{family: cnn, params: {{width: 16, hidden: 96}}}}, {{family: ds_cnn, params: {{width: 64}}}}]
rounds: {{count: {rounds}, min_devices: {devices}, target: {devices}, quorum: 1.0, deadline_s: 3600}}
training: {{epochs: 3}}
teach: {{unlabeled: {unlabeled}, steps: 30}}
seed: {seed}
"""


def main() -> int:
    """Run both, compare, print; exit code 0 only if every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broker", default="auto")
    parser.add_argument("--quick", action="store_true", help="6 kills, 4 rounds")
    given = parser.parse_args()
    kills, rounds = (6, 4) if given.quick else (given.kills, given.rounds)
    with tempfile.TemporaryDirectory(prefix="liberatai-kills-") as folder:
        calm = run(Path(folder) / "calm", given, rounds, kills=0)
        print(f"undisturbed: {calm.seconds:.1f} s, digests {short(calm.digests)}")
        wild = run(Path(folder) / "wild", given, rounds, kills, pause_s=calm.seconds / rounds)
    print(f"with {len(wild.log)} kills: {wild.seconds:.1f} s, digests {short(wild.digests)}")
    for line in wild.log:
        print(f"  {line}")
    result = {
        "benchmark": "kills_fleet",
        "seed": given.seed,
        "kills": len(wild.log),
        "identical": wild.digests == calm.digests,
        "lost": wild.lost,
        "doubled": wild.doubled,
        "rounds": rounds,
        "devices": given.devices,
        "broker": wild.broker,
        "seconds_undisturbed": round(calm.seconds, 1),
        "seconds_with_kills": round(wild.seconds, 1),
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    return 0 if result["identical"] and not result["lost"] and not result["doubled"] else 1


def short(digests: dict[str, str]) -> str:
    """Return the beginnings of digests, for people."""
    return ", ".join(f"{name} {value[:12]}" for name, value in sorted(digests.items()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run."""

    digests: dict[str, str]
    seconds: float
    log: list[str]
    lost: int
    doubled: int
    broker: str


def run(folder: Path, given: argparse.Namespace, rounds: int, kills: int, pause_s: float = 0.0) -> Outcome:
    """Run the job once and return what came of it."""
    names = [f"d{number}" for number in range(given.devices)]
    samples = digits.load()
    parts = digits.split(samples.y, given.devices, given.seed)
    folder.mkdir(parents=True)
    data = digits.write(samples, parts, folder / "data", names)
    # The last device is small, so that unlike structures are trained.
    profiles = {names[-1]: PROFILES_DIR / "demo-pi-zero-2w.yaml"}
    devices = [LocalDevice(id=name, data=data[name], profile=profiles.get(name)) for name in names]
    unlabeled = folder / "data" / "unlabeled.npz"
    text = JOB.format(rounds=rounds, devices=given.devices, unlabeled=unlabeled, seed=given.seed)
    with LocalFleet(folder, devices, broker=given.broker, fleet="kills") as fleet:
        fleet.client.jobs.create(text, str(folder))
        started = time.monotonic()
        log = disturb(fleet, names, rounds, kills, pause_s, random.Random(given.seed))
        wait(fleet)
        seconds = time.monotonic() - started
        version = fleet.client.models.version("kills", "latest")
        broker = fleet.broker_name
    lost, doubled = audit(folder, rounds, given.devices)
    return Outcome(
        digests=version.digests, seconds=seconds, log=log, lost=lost, doubled=doubled, broker=broker
    )


def disturb(
    fleet: LocalFleet, names: list[str], rounds: int, kills: int, pause_s: float, draw: random.Random
) -> list[str]:
    """Kill something at random moments until enough was killed; the job must still be running each time."""
    log = []
    for number in range(kills):
        due = number * rounds // kills  # spread over the whole run, at a random moment of that round
        while (rounds_done := done(fleet)) < due:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, pause_s))
        victim = draw.choice(["coordinator", "agent", "broker"])
        if victim == "coordinator":
            fleet.kill_coordinator()
            time.sleep(draw.uniform(0.0, 0.5))
            fleet.restart_coordinator()
        elif victim == "agent":
            victim = draw.choice(names)
            fleet.kill_agent(victim)
            time.sleep(draw.uniform(0.0, 0.5))
            fleet.restart_agent(victim)
        elif fleet.broker is not None:
            fleet.broker.kill()
            time.sleep(draw.uniform(0.0, 0.5))
            fleet.broker.restart()
        log.append(f"kill {number + 1}: {victim} in round {rounds_done + 1}")
        print(f"  {log[-1]}", file=sys.stderr, flush=True)
    return log


def done(fleet: LocalFleet) -> int:
    """Return how many rounds are published."""
    try:
        return fleet.client.jobs.show("kills").rounds_done
    except LiberataiError:
        return -1


def wait(fleet: LocalFleet, limit_s: float = 900.0) -> None:
    """Wait for the end of the job."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        view = fleet.client.jobs.show("kills")
        if view.state == "finished":
            return
        if view.state not in {"running", "waiting"}:
            raise SystemExit(f"job {view.state}: {view.reason}\n{fleet.logs()}")
        time.sleep(0.2)
    raise SystemExit(f"the job did not end within {limit_s} s\n{fleet.logs()}")


def audit(folder: Path, rounds: int, devices: int) -> tuple[int, int]:
    """Return (lost, doubled) from the ledger itself: stored updates against those that versions count."""
    with sqlite3.connect(folder / "coordinator" / "state" / "ledger.db") as ledger:
        stored = [bytes(row[0]).hex() for row in ledger.execute("SELECT update_id FROM updates")]
        manifests = [decode_manifest(row[0]) for row in ledger.execute("SELECT manifest FROM versions")]
        abandoned = [
            update.hex()
            for (frozen,) in ledger.execute("SELECT frozen FROM rounds WHERE state = 'abandoned'")
            for update in (frozen[n : n + 16] for n in range(0, len(frozen), 16))
        ]
    counted = [update for manifest in manifests for update in manifest.updates]
    lost = len(set(stored) - set(counted) - set(abandoned)) + max(0, rounds * devices - len(set(counted)))
    doubled = len(counted) - len(set(counted))
    return lost, doubled


if __name__ == "__main__":
    sys.exit(main())
