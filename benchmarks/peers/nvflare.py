"""NVIDIA FLARE as its proof-of-concept set-up has it: one server, one process per site, mutual TLS."""

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
START_S, ROUND_S = 180.0, 120.0
USUAL_PORT = "8002"


def run(environment: Path, folder: Path, given: dict[str, Any], idle_s: float) -> Found:
    """Run the work; the arguments are those of `flower.run`.

    Raises:
        TimeoutError: something did not come in time.
    """
    commands = environment / "bin"
    home = folder / "home"
    home.mkdir()
    for name in ("client.py", "export.py"):
        shutil.copy(HERE / "nvflare_app" / name, folder / name)
    shutil.copy(HERE / "work.py", folder / "work.py")
    port = free_port()
    env = {
        "HOME": str(home),
        "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
        "PATH": f"{commands}:/usr/bin:/bin",
        "PYTHONPATH": str(folder),
    }
    found = Found()

    def command(*arguments: str | Path) -> str:
        told = subprocess.run(
            list(map(str, arguments)),
            env={**CALM, **env},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if told.returncode:
            raise RuntimeError(f"{arguments[:3]}: {told.stdout[-800:]} {told.stderr[-800:]}")
        return told.stdout

    command(commands / "nvflare", "poc", "prepare", "-n", str(given["devices"]))
    kits = folder / "poc" / "example_project" / "prod_00"
    sites = [f"site-{number + 1}" for number in range(given["devices"])]
    with Processes(folder) as children, closing(Relay("127.0.0.1", port)) as proxy:
        _redirect(kits / "server" / "startup" / "fed_server.json", port)
        _redirect(kits / "admin@nvidia.com" / "startup" / "fed_admin.json", port)
        for site in sites:
            _redirect(kits / site / "startup" / "fed_client.json", proxy.port)
        children.start(
            "server", ["bash", kits / "server" / "startup" / "sub_start.sh", "--once"], env, folder
        )
        wait(lambda: listening(port), "NVFLARE's server", START_S)
        for site in sites:
            children.start(site, ["bash", kits / site / "startup" / "sub_start.sh", "--once"], env, folder)
        wait(lambda: proxy.connections >= len(sites), "sites", START_S)
        time.sleep(10)
        before, began = sum(proxy.carried()), time.monotonic()
        time.sleep(idle_s)
        waited = time.monotonic() - began
        found.idle_bytes_day = (sum(proxy.carried()) - before) / waited / len(sites) * DAY_S
        rss, pss = memory_mb(map(children.pid, sites))
        found.idle_rss_mb, found.idle_pss_mb = rss / len(sites), pss / len(sites)

        command(commands / "python", folder / "export.py", folder, folder / "job", folder / "client.py")
        start, submitted = proxy.carried(), time.monotonic()
        kit = kits / "admin@nvidia.com"
        command(commands / "nvflare", "job", "submit", "-j", folder / "job" / "peer", "--startup-kit", kit)

        def ended() -> bool:
            return any(one["what"] == "round" and one["round"] == given["rounds"] for one in notes(folder))

        wait(ended, "the last round", ROUND_S * given["rounds"])
        end = proxy.carried()
        found.wall_s = time.monotonic() - submitted
        found.up, found.down = end[0] - start[0], end[1] - start[1]
    found.accuracy, found.round_s, found.training_s = rounds_of(notes(folder), given["rounds"])
    found.packages, found.installed_mb = installed(commands / "python")
    return found


def _redirect(path: Path, port: int) -> None:
    """Let a kit's settings name another port than the one that all kits share."""
    text = path.read_text().replace(f"server:{USUAL_PORT}", f"localhost:{USUAL_PORT}")
    path.write_text(text.replace(USUAL_PORT, str(port)))
