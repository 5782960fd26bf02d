"""What people notice of a device that trains: latency of their own work, beside a training and without.

    python -m benchmarks.good_guest [--seed N] [--seconds S] [--quick]

One program per processor works without a pause, in pieces of some milliseconds; each piece is timed. First on
the machine alone, then beside an agent that trains, in turn: `liberatai-agent pause` and `resume` switch
between the two, so that whatever else the machine does hits both. Baseline in the same run: the same agent at
rest; and once more without any agent.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ["LIBERATAI_TRAIN_PRIORITY"] = "idle"  # an agent on a device of its own, not in a simulated fleet

from liberatai_coordinator.local import LocalDevice, LocalFleet
from liberatai_core.errors import LiberataiError

DEVICE = "guest"
PIECE = 100_000
"""Steps of one piece of the foreground's work: some milliseconds."""
WAIT_S = 120.0
SAMPLES = 20_000

PROBE = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
ends, steps = time.perf_counter() + float(sys.argv[2]), int(sys.argv[3])
took = []
while time.perf_counter() < ends:
    began = time.perf_counter()
    for _ in range(steps):
        pass
    took.append(time.perf_counter() - began)
print(*took)
"""


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    parser.add_argument("--turns", type=int, default=4, help="how often both are measured")
    parser.add_argument("--quick", action="store_true", help="two short turns")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.turns = 3.0, 2
    alone = foreground(given.seconds)
    resting: list[float] = []
    training: list[float] = []
    with tempfile.TemporaryDirectory(prefix="liberatai-guest-") as name:
        folder = Path(name)
        device = LocalDevice(id=DEVICE, profile=None, data=samples(folder / "data.npz", given.seed))
        with LocalFleet(folder / "fleet", [device]) as fleet:
            create(fleet, folder)
            steps = 0
            for _ in range(given.turns):
                wait_for(fleet, "training")
                before = cpu_s(trainer_of(fleet))
                training += foreground(given.seconds)
                wait_for(fleet, "training")
                steps += cpu_s(trainer_of(fleet)) > before
                switch(fleet, "pause")
                wait_for(fleet, "gated")
                resting += foreground(given.seconds)
                switch(fleet, "resume")
    result = {
        "benchmark": "good_guest",
        "alone_ms": percentiles(alone),
        "resting_ms": percentiles(resting),
        "training_ms": percentiles(training),
        "p95_more_percent": more(training, resting),
        "p95_more_than_alone_percent": more(training, alone),
        "resting_more_than_alone_percent": more(resting, alone),
        "turns_in_which_it_trained": steps,
        "turns": given.turns,
        "processors": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_before": round(os.getloadavg()[0], 1),
    }
    for key, value in result.items():
        print(f"{key:>32}  {value}")
    print(json.dumps(result))
    return 0


def foreground(seconds: float) -> list[float]:
    """Return how long pieces of work took, in seconds, with one program on every processor."""
    command = [sys.executable, "-c", PROBE]
    probes = [
        subprocess.Popen([*command, str(cpu), str(seconds), str(PIECE)], stdout=subprocess.PIPE, text=True)
        for cpu in sorted(os.sched_getaffinity(0))
    ]
    return [float(word) for probe in probes for word in probe.communicate()[0].split()]


def percentiles(took: Sequence[float]) -> dict[str, float]:
    """Return median, p95 and p99 in milliseconds."""
    return {f"p{p}": round(float(np.percentile(took, p)) * 1e3, 2) for p in (50, 95, 99)}


def more(some: Sequence[float], base: Sequence[float]) -> float:
    """Return by how many percent the p95 is higher."""
    return round(100 * (float(np.percentile(some, 95) / np.percentile(base, 95)) - 1), 1)


def samples(path: Path, seed: int) -> Path:
    """Write pictures of nothing: what counts is how long they are trained on."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SAMPLES, 1, 28, 28)).astype(np.float32)
    np.savez(path, x=x, y=rng.integers(0, 10, SAMPLES))
    return path


def create(fleet: LocalFleet, folder: Path) -> None:
    """Start a job whose first round takes longer than the measurement."""
    text = """
name: guest
data: {input_shape: [1, 28, 28], classes: 10}
structures: [{family: cnn, params: {width: 16}}]
rounds: {count: 1, min_devices: 1, deadline_s: 80000}
training: {epochs: 100}
"""
    fleet.client.jobs.create(text, folder)


def wait_for(fleet: LocalFleet, phase: str) -> None:
    """Wait until the agent is in this phase."""
    ends_s = time.monotonic() + WAIT_S
    while fleet.status(DEVICE).get("phase") != phase:
        fleet.require_alive()
        if time.monotonic() > ends_s:
            raise LiberataiError(f"not {phase} after {WAIT_S:.0f} s: {fleet.status(DEVICE)}\n{fleet.logs()}")
        threading.Event().wait(0.1)


def switch(fleet: LocalFleet, what: str) -> None:
    """Let the agent pause or go on."""
    settings = fleet.folders.agent(DEVICE) / "agent.yaml"
    command = [sys.executable, "-m", "liberatai_agent", what, "--config", str(settings)]
    subprocess.run(command, check=True, capture_output=True)


def trainer_of(fleet: LocalFleet) -> int | None:
    """Return the process that trains: the agent's child that has used the processor most."""
    agent = int(fleet.status(DEVICE)["pid"])
    children: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = stat(path)
        if fields and int(fields[1]) == agent:
            children[int(path.parent.name)] = cpu_s(int(path.parent.name))
    return max(children, key=lambda pid: children[pid], default=None)


def cpu_s(pid: int | None) -> float:
    """Return the processor time that a process has used; 0 if it is gone."""
    fields = stat(Path(f"/proc/{pid}/stat"))
    return sum(map(float, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def stat(path: Path) -> list[Any]:
    """Return the fields of a process from its state on; [] if it is gone."""
    try:
        return path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
