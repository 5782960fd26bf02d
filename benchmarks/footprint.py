"""What a device pays for the agent: packages, import time, resident memory while idle and connected.

    python -m benchmarks.footprint [--seed N] [--quick]

Installs the base distribution into a fresh virtual environment (nothing of the development one), starts a
broker, a coordinator and one agent **from that environment**, waits until the agent is connected and idle,
and reads its memory from the kernel. Baseline in the same run: a bare
interpreter.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from liberatai_coordinator.demo import digits
from liberatai_coordinator.local import LocalDevice, LocalFleet

ROOT = Path(__file__).resolve().parent.parent
SETTLE_S = 8.0
"""Long enough for the probe's child and the first reports to be over."""


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="use this environment instead of a fresh one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="liberatai-footprint-") as folder:
        python = Path(sys.executable) if given.quick else install(Path(folder) / "venv")
        packages = installed(python)
        imports = statistics.median(seconds(python, "import liberatai_agent.cli") for _ in range(7))
        bare = statistics.median(seconds(python, "pass") for _ in range(7))
        memory = idle(Path(folder) / "fleet", python, given.seed)
    result = {
        "benchmark": "footprint",
        "packages": len(packages),
        "package_names": packages,
        "import_s": round(imports - bare, 3),
        "start_s": round(imports, 3),
        "bare_start_s": round(bare, 3),
        **memory,
        "fresh_environment": not given.quick,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    print(json.dumps(result))
    return 0


def install(folder: Path) -> Path:
    """Install the base distribution into a new environment and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    quiet = ["-q", "--disable-pip-version-check"]
    subprocess.run([str(python), "-m", "pip", "install", *quiet, str(ROOT)], check=True)
    return python


def installed(python: Path) -> list[str]:
    """Return the distributions of an environment, without pip and setuptools."""
    code = "import importlib.metadata as m; print(*sorted({d.name for d in m.distributions()}))"
    out = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return [name for name in out.split() if name.lower() not in {"pip", "setuptools", "wheel"}]


def seconds(python: Path, code: str) -> float:
    """Return how long an interpreter takes for some code, start included."""
    started = time.perf_counter()
    subprocess.run([str(python), "-c", code], check=True)
    return time.perf_counter() - started


def idle(folder: Path, python: Path, seed: int) -> dict[str, float | str | list[str]]:
    """Start a fleet whose one agent runs in `python`; return what the idle, connected agent takes."""
    samples = digits.load()
    parts = digits.split(samples.y, 2, seed)
    folder.mkdir(parents=True)
    data = digits.write(samples, parts, folder / "data", ["idle", "unused"])
    fleet = LocalFleet(folder, [LocalDevice(id="idle", data=data["idle"])], fleet="footprint")
    with fleet:
        settings = folder / "agents" / "idle" / "agent.yaml"
        fleet.kill_agent("idle")
        command = [str(python), "-P", "-m", "liberatai_agent", "run", "--config", str(settings)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as agent:
            try:
                connected(fleet, agent.pid)
                time.sleep(SETTLE_S)
                status = kernel(agent.pid)
                maps = Path(f"/proc/{agent.pid}/maps").read_text()
                broker = fleet.broker_name
            finally:
                agent.terminate()
    bare = int(
        subprocess.run(
            [str(python), "-c", "print(open('/proc/self/status').read())"],
            check=True,
            capture_output=True,
            text=True,
        )
        .stdout.split("VmRSS:")[1]
        .split()[0]
    )
    return {
        "idle_rss_mb": round(status["VmRSS"] / 1024, 1),
        "idle_anonymous_mb": round(status["RssAnon"] / 1024, 1),
        "threads": float(status["Threads"]),
        "bare_python_rss_mb": round(bare / 1024, 1),
        "heavy_libraries": [name for name in ("numpy", "torch", "onnxruntime") if f"/{name}/" in maps],
        "broker": broker,
    }


def connected(fleet: LocalFleet, pid: int) -> None:
    """Wait until the agent with this process id says that it is connected and idle."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        status = fleet.status("idle")
        if status.get("pid") == pid and status.get("connected") and status.get("phase") == "idle":
            return
        time.sleep(0.1)
    raise SystemExit(f"the agent did not connect: {fleet.status('idle')}")


def kernel(pid: int) -> dict[str, int]:
    """Return numbers of /proc/PID/status, sizes in KiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"VmRSS", "RssAnon", "RssFile", "Threads"}:
            found[name] = int(value.split()[0])
    return found


if __name__ == "__main__":
    sys.exit(main())
