"""Flower's deployment runtime: a SuperLink, a SuperNode per device, no Ray; plain TCP as in its tutorial."""

import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import (
    CALM,
    DAY_S,
    Found,
    Processes,
    free_port,
    installed,
    listening,
    memory_mb,
    notes,
    rounds_of,
    wait,
)
from benchmarks.relay import Relay

HERE = Path(__file__).parent
START_S, ROUND_S = 180.0, 300.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_LOG_LEVEL": "WARNING"}


def run(
    environment: Path, folder: Path, given: dict[str, Any], idle_s: float, *, kill: bool = False
) -> Found:
    """Run the work.

    Args:
        environment: virtual environment with flwr.
        folder: with the work, see `work.Work`; everything else is written there too.
        given: the work's settings.
        idle_s: for how long the devices are watched before the job.
        kill: end one device in the middle of the second round's training.

    Raises:
        TimeoutError: something did not come in time.
    """
    commands = environment / "bin"
    app = folder / "app"
    shutil.copytree(HERE / "flower_app", app)
    shutil.copy(HERE / "work.py", app / "liberatai_peer" / "work.py")
    home = folder / "home"
    home.mkdir()
    port = free_port()
    env = {**QUIET, "FLWR_HOME": str(home), "HOME": str(home), "PATH": f"{commands}:/usr/bin:/bin"}
    found = Found()
    with Processes(folder) as children, closing(Relay("127.0.0.1", port)) as proxy:
        children.start(
            "superlink",
            [
                commands / "flower-superlink",
                "--insecure",
                "--disable-runtime-dependency-installation",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env,
            folder,
        )
        wait(lambda: listening(port), "SuperLink", START_S)
        devices = [f"supernode-{number}" for number in range(given["devices"])]
        for number, name in enumerate(devices):
            command: list[str | Path] = [commands / "flower-supernode", "--insecure"]
            command += ["--superlink", f"127.0.0.1:{proxy.port}", "--port", str(free_port())]
            command += ["--node-config", f"partition-id={number} num-partitions={len(devices)}"]
            children.start(name, command, env, folder)
        wait(lambda: proxy.connections >= len(devices), "SuperNodes", START_S)
        time.sleep(10)  # they are there once they registered; then memory and traffic are those of waiting
        before, began = sum(proxy.carried()), time.monotonic()
        time.sleep(idle_s)
        waited = time.monotonic() - began
        found.idle_bytes_day = (sum(proxy.carried()) - before) / waited / len(devices) * DAY_S
        rss, pss = memory_mb(map(children.pid, devices))
        found.idle_rss_mb, found.idle_pss_mb = rss / len(devices), pss / len(devices)

        (home / "config.toml").write_text(
            f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        start, submitted = proxy.carried(), time.monotonic()
        told = subprocess.run(
            [commands / "flwr", "run", str(app), "local", "--run-config", f'work="{folder}"'],
            env={**CALM, **env},
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if told.returncode:
            raise RuntimeError(f"flwr run: {told.stdout[-800:]} {told.stderr[-800:]}")
        if kill:
            wait(lambda: _training(folder, 2), "second round", ROUND_S)
            time.sleep(given["slow_s"] / 3)
            children.kill(devices[-1])

        def ended() -> bool:
            return any(one["what"] == "round" and one["round"] == given["rounds"] for one in notes(folder))

        wait(ended, "the last round", ROUND_S * given["rounds"])
        found.wall_s = time.monotonic() - submitted
        time.sleep(1)
        end = proxy.carried()
        found.up, found.down = end[0] - start[0], end[1] - start[1]
    found.accuracy, found.round_s, found.training_s = rounds_of(notes(folder), given["rounds"])
    found.packages, found.installed_mb = installed(commands / "python")
    found.notes.append("plain TCP: TLS would add to its bytes")
    return found


def _training(folder: Path, number: int) -> bool:
    """Return whether the round before has ended and a client trains again."""
    ended = any(one["what"] == "round" and one["round"] == number - 1 for one in notes(folder))
    return ended and any(one["what"] == "begin" and one["round"] == number for one in notes(folder))
