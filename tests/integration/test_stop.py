"""A coordinator that is told to stop stops, whatever it does; its folder is its own until then."""

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import asyncio, sys, time
from pathlib import Path
from tests.integration.kit import devices, job_yaml
from liberatai_coordinator import wiring
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_coordinator.models import aggregation
from liberatai_core.link.memory import MemoryBroker, MemoryLink

folder = Path(sys.argv[1])

def endless(*_):
    print("aggregating", flush=True)
    time.sleep(600)

aggregation.advance = endless

async def main():
    broker = MemoryBroker()
    config = CoordinatorConfig(fleet="test", state_dir=str(folder), enrolment="open")
    (folder / "coordinator.key").write_bytes(b"c" * 32)
    (folder / "coordinator.key").chmod(0o600)
    async with devices(broker, "a", "b"):
        running = asyncio.create_task(wiring.run(config, lambda _, will: MemoryLink(broker, "co1", will=will)))
        while not (folder / config.socket).exists():
            await asyncio.sleep(0.05)
        client = Client(folder / config.socket)
        await asyncio.to_thread(client.jobs.create, job_yaml(rounds=1, devices=2), str(folder))
        await running

asyncio.run(main())
"""


def test_a_coordinator_stops_in_the_middle_of_an_aggregation(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "aggregating\n"
            running.send_signal(signal.SIGTERM)
            # The thread would work for ten minutes.
            assert running.wait(timeout=120) == 0
        finally:
            running.kill()
