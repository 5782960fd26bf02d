"""What an idle agent costs its device: memory, wakeups, processor time, bytes on the link and on the disk.

    python -m benchmarks.idle_agent [--minutes N] [--tls] [--broker auto|mosquitto|amqtt|mqtt://HOST:PORT]

Starts a broker (or uses the one at the URL), a coordinator and one agent as processes of their own, waits
until the agent has settled, and looks at it from outside for some minutes. Wakeups are voluntary context
switches of all the agent's threads; bytes are counted by a relay between agent and broker, so TLS and
reconnects are in them; drops are connections that ended, as the relay sees them. `--tls` is mutual TLS with
the shipped Mosquitto settings. Baseline in the same run: a bare interpreter's memory.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.relay import Relay
from liberatai_coordinator.brokers.secure import start_secure_broker
from liberatai_coordinator.brokers.start import start_broker
from liberatai_core.contract.frame import Signer
from liberatai_core.errors import NotFoundError
from liberatai_core.link.mqtt import broker_address

FLEET, DEVICE = "default", "dev-a"
USERS = {"coordinator": "coordinator-password", DEVICE: "device-password"}
SETTLE_S = 45.0
"""The first looks at the machine, capability and reports are over, and so is the child that measures."""
SAMPLE_S = 5.0
"""Between two looks; threads that end in between take their last counts with them."""
PAGE = 4096


def main() -> int:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--broker", default="auto", help="auto, mosquitto, amqtt, or mqtt://HOST:PORT")
    parser.add_argument("--tls", action="store_true", help="mutual TLS; needs Mosquitto")
    parser.add_argument("--data", type=Path, default=None, help="the device's .npz; a small one is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one minute")
    given = parser.parse_args()
    minutes = 1.0 if given.quick else given.minutes
    if minutes <= 0:
        parser.error("--minutes: must be more than 0")
    with tempfile.TemporaryDirectory(prefix="liberatai-idle-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        broker = stack.enter_context(tls_broker(folder) if given.tls else plain_broker(folder, given.broker))
        relay = Relay(broker.host, broker.port)
        stack.callback(relay.close)
        measured = measure(folder, broker, relay, given.data or made_data(folder, given.seed), minutes)
    result = {
        "benchmark": "idle_agent",
        "minutes": minutes,
        "tls": given.tls,
        "broker": broker.kind,
        **measured,
        "bare_python_rss_mb": bare_rss_mb(),
        "seed": given.seed,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for key, value in result.items():
        print(f"{key:>22}  {value}")
    print(json.dumps(result))
    return 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the broker is, and what a client's settings must say to get in."""

    kind: str
    host: str
    port: int
    settings: Callable[[str], dict[str, str]]
    scheme: str = "mqtt"


@contextlib.contextmanager
def plain_broker(folder: Path, kind: str) -> Iterator[Place]:
    """Run a broker with passwords, or name the one that runs already."""
    if "://" in kind:
        address = broker_address(kind)
        yield Place(kind, address.host, address.port, lambda _: {})
        return
    broker = start_broker(kind, folder / "broker", USERS, FLEET)  # type: ignore[arg-type]

    def settings(name: str) -> dict[str, str]:
        path = folder / f"{name}.password"
        path.write_text(USERS[name])
        return {"username": name, "password_file": str(path)}

    try:
        yield Place(broker.kind, broker.host, broker.port, settings)
    finally:
        broker.stop()


@contextlib.contextmanager
def tls_broker(folder: Path) -> Iterator[Place]:
    """Run Mosquitto as a fleet has it, with certificates of its own."""
    try:
        broker = start_secure_broker(folder, FLEET, "coordinator")
    except NotFoundError as error:
        raise SystemExit(f"--tls needs mosquitto: {error}") from None
    roles = {name: "coordinator" if name == "coordinator" else "device" for name in USERS}
    files = {name: str(broker.credential(name, role)) for name, role in roles.items()}

    def settings(name: str) -> dict[str, str]:
        return {"ca_file": str(broker.ca_file), "cert_file": files[name], "key_file": files[name]}

    try:
        yield Place(broker.kind, broker.host, broker.port, settings, "mqtts")
    finally:
        broker.stop()


@dataclass(slots=True)
class Watch:
    """Reads one process's counters from the kernel.

    Attributes:
        switches: voluntary context switches by thread, the newest word of each.
    """

    pid: int
    switches: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Take the switches of all threads that live."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                self.switches[task.name] = self._field(task / "status", "voluntary_ctxt_switches")

    @property
    def rss_mb(self) -> float:
        """Resident memory, MiB."""
        return self._field(Path(f"/proc/{self.pid}/status"), "VmRSS") / 1024

    @property
    def cpu_s(self) -> float:
        """Processor time of the process and its ended children, seconds."""
        text = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(ticks) for ticks in text[11:15]) / os.sysconf("SC_CLK_TCK")

    @property
    def disk_bytes(self) -> int:
        """Bytes that went, or are to go, to a disk."""
        path = Path(f"/proc/{self.pid}/io")
        return self._field(path, "write_bytes") - self._field(path, "cancelled_write_bytes")

    def _field(self, path: Path, name: str) -> int:
        for line in path.read_text().splitlines():
            found, _, value = line.partition(":")
            if found == name:
                return int(value.split()[0])
        raise SystemExit(f"{path} has no {name}")


def measure(folder: Path, broker: Place, relay: Relay, data: Path, minutes: float) -> dict[str, Any]:
    """Run a coordinator and an agent, and return what the agent costs while it is idle."""
    with contextlib.ExitStack() as stack:
        host = "localhost" if broker.scheme == "mqtts" else "127.0.0.1"
        url = f"{broker.scheme}://{host}:{broker.port}"
        if "://" in broker.kind:
            url = broker.kind
        settings = {
            "fleet": FLEET,
            "coordinator": "coordinator",
            "broker": url,
            "state_dir": str(folder / "coordinator"),
            "enrolment": "open",
            **broker.settings("coordinator"),
        }
        (folder / "coordinator.yaml").write_text(json.dumps(settings))
        serve = "from liberatai_coordinator.cli import main; main()"
        stack.enter_context(
            running(
                folder / "coordinator.log",
                ["-c", serve, "serve", "--config", str(folder / "coordinator.yaml")],
            )
        )
        key = folder / "coordinator" / "coordinator.key"
        wait(
            lambda: key.exists() and key.stat().st_size == 32,
            "the coordinator's key",
            folder / "coordinator.log",
        )
        state = folder / "agent"
        settings = {
            "fleet": FLEET,
            "device": DEVICE,
            "broker": f"{broker.scheme}://{host}:{relay.port}",
            "coordinator_key": Signer.from_seed(key.read_bytes(), "").public_key.hex(),
            "state_dir": str(state),
            "data": str(data),
            **broker.settings(DEVICE),
        }
        (folder / "agent.yaml").write_text(json.dumps(settings))
        began = time.monotonic()
        agent = stack.enter_context(
            running(
                folder / "agent.log",
                ["-P", "-m", "liberatai_agent", "run", "--config", str(folder / "agent.yaml")],
            )
        )
        wait(lambda: is_idle(state), "the agent to be idle", folder / "agent.log")
        start_s = time.monotonic() - began
        time.sleep(SETTLE_S)
        return {"start_s": round(start_s, 2), **watch(agent.pid, relay, minutes, folder)}


def watch(pid: int, relay: Relay, minutes: float, folder: Path) -> dict[str, Any]:
    """Look at an agent for some minutes."""
    agent = Watch(pid)
    agent.look()
    before = dict(agent.switches)
    cpu, disk, moved, ended = agent.cpu_s, agent.disk_bytes, relay.up + relay.down, relay.ended
    began = time.monotonic()
    while (left := began + 60 * minutes - time.monotonic()) > 0:
        time.sleep(min(left, SAMPLE_S))
        agent.look()
    seconds = time.monotonic() - began
    day = 86_400 / seconds
    by_thread = {
        name: round((count - before.get(name, 0)) * 60 / seconds, 1) for name, count in agent.switches.items()
    }
    return {
        "rss_mb": round(agent.rss_mb, 1),
        "wakeups_per_min": round(sum(by_thread.values()), 1),
        "wakeups_by_thread": sorted(by_thread.values(), reverse=True),
        "cpu_s_per_h": round((agent.cpu_s - cpu) * 3600 / seconds, 2),
        "bytes_per_day": round((relay.up + relay.down - moved) * day),
        "disk_bytes_per_day": round((agent.disk_bytes - disk) * day) if disk_is_counted(folder) else None,
        "drops": relay.ended - ended,
    }


def disk_is_counted(folder: Path) -> bool:
    """Say whether the kernel counts what is written here; it does not in memory."""
    own = Watch(os.getpid())
    before = own.disk_bytes
    with (folder / "counted").open("wb") as file:
        file.write(bytes(16 * PAGE))
        file.flush()
        os.fsync(file.fileno())
    return own.disk_bytes - before >= 16 * PAGE


def is_idle(state: Path) -> bool:
    """Say whether the agent calls itself connected and idle."""
    try:
        status = json.loads((state / "status.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(status.get("connected")) and status.get("phase") == "idle"


@contextlib.contextmanager
def running(log: Path, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program until the end of the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def wait(there: Callable[[], bool], what: str, log: Path) -> None:
    """Wait for something of a process."""
    until = time.monotonic() + 120
    while not there():
        if time.monotonic() > until:
            raise SystemExit(f"waited for {what} in vain:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


def made_data(folder: Path, seed: int) -> Path:
    """Write 200 samples of two classes."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(200, 16)).astype(np.float32)
    path = folder / "data.npz"
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64))
    return path


def bare_rss_mb() -> float:
    """Return the memory of an interpreter that does nothing, MiB."""
    code = "print(open('/proc/self/status').read())"
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return round(int(text.split("VmRSS:")[1].split()[0]) / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
