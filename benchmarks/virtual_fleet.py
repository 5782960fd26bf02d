"""Ten thousand devices of virtual time in one process: what a simulated round takes.

    python -m benchmarks.virtual_fleet --devices 10000 --rounds 100 --participants 1000

Session, rounds, plan, frames, signatures and codecs are the product's; links, clocks, disks of devices and
training are replaced (`liberatai_coordinator.sim.virtual`). `--known 1000000` lets the coordinator know so
many devices, of which `--devices` are there. The last line:

- `seconds`, `cpu_s`: all of it; `rss_mb`: most memory (10^6 bytes); `job_s`: the same job in virtual time.
- `updates`: receipted; `bytes_up`, `bytes_down`: through all links.
- `verifications_per_update`: processor time of an update, all sides together, in units of checking one
  signature on this machine in the same run: a figure that does not depend on how fast the machine is.
- `digests`: of the newest weights: the same for the same arguments.
"""

import argparse
import hashlib
import json
import time

from liberatai_coordinator.config import parse_job
from liberatai_coordinator.sim.fleet_file import FleetFile, check
from liberatai_coordinator.sim.scenario import load_scenario
from liberatai_coordinator.sim.virtual.world import Given, quick_folder, simulate
from liberatai_core.contract.frame import Signer, open_frame, seal
from liberatai_core.contract.messages import State

JOB = """
name: virtual
data: {{input_shape: [1, 16, 16], classes: 10}}
structures: [{{family: mlp, params: {{hidden: 8}}}}]
rounds:
  {{count: {rounds}, target: {target}, overselect: 1.0, min_devices: {target}, quorum: 0.5, deadline_s: 600}}
sparsify: {{up_density: 0.05, trained_share: 1.0}}
seed: {seed}
"""
"""2 154 parameters: what is measured is the way of an update, not the length of its stream."""
CHECKS = 2000


def verification_s(fleet: str) -> float:
    """Return processor seconds of opening one signed frame."""
    signer = Signer.from_seed(hashlib.sha256(b"benchmark").digest(), fleet)
    frame = seal(State(device="d", state="online", session=1), signer)
    started = time.process_time()
    for _ in range(CHECKS):
        open_frame(frame, fleet, lambda _: signer.public_key)
    return (time.process_time() - started) / CHECKS


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--participants", type=int, default=1000)
    parser.add_argument(
        "--known", type=int, default=0, help="devices that the coordinator knows (default: --devices)"
    )
    parser.add_argument("--scenario", default="steady")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 devices, 5 rounds of 50")
    given = parser.parse_args()
    if given.quick:
        given.devices, given.rounds, given.participants = 200, 5, 50
    known = max(given.known, given.devices)
    half = known // 2
    fleet = check(
        FleetFile(
            devices={"pi4": known - half, "pi5": half},
            training="drawn",
            telemetry_s=3600,
            seed=given.seed,
            awake=given.devices / known,
        ),
        "--devices",
    )
    text = JOB.format(rounds=given.rounds, target=given.participants, seed=given.seed)
    one_s = verification_s(fleet.fleet)
    computed = time.process_time()
    with quick_folder() as folder:
        record = simulate(
            Given(
                fleet=fleet, scenario=load_scenario(given.scenario), job=parse_job(text, "job"), base_dir="."
            ),
            folder,
        )
    computed = time.process_time() - computed
    found = {
        "benchmark": "virtual_fleet",
        "devices": given.devices,
        "known": known,
        "rounds": given.rounds,
        "participants": given.participants,
        "scenario": given.scenario,
        "state": record.state,
        "seconds": round(record.wall_s, 1),
        "cpu_s": round(computed, 1),
        "rss_mb": record.rss_mb,
        "job_s": record.job_s,
        "updates": record.updates,
        "lost": record.lost,
        "bytes_up": record.up_bytes,
        "bytes_down": record.down_bytes,
        "verifications_per_update": round(computed / max(1, record.updates) / one_s, 1),
        "digests": record.digests,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
