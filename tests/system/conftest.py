"""What system tests share: packages of this source tree, and a fleet on this host that a machine can join."""

import hashlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.system.machine import CACHE, ROOT, until

from liberatai_coordinator.client.client import Client
from liberatai_core.errors import LiberataiError

BUILD = ROOT / "deploy" / "packages"
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def build(package: str, out: Path, *, arch: str = "amd64") -> Path:
    """Return a package of this source tree."""
    command = [str(BUILD / "build.sh"), "--arch", arch, "--package", package, "--out", str(out)]
    run = subprocess.run(
        [*command, "--python", sys.executable], capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return Path(run.stdout.strip())


@pytest.fixture(scope="session")
def agent_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent, without torch."""
    return build("liberatai-agent", tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def train_package() -> Path:
    """What training needs: nothing of ours is in it, so it is built again only when its recipe changes."""
    recipe = [*sorted(BUILD.glob("*.*")), BUILD / "locks" / "train-amd64.txt"]
    text = "".join(path.read_text() for path in recipe) + version("liberatai")
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    kept = CACHE / f"train-{mark}"
    if not kept.exists():
        making = CACHE / f"train-{mark}.part"
        shutil.rmtree(making, ignore_errors=True)
        build("liberatai-agent-train", making)
        making.rename(kept)
    return next(kept.glob("*.deb"))


@pytest.fixture
def said(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Writes a line that is seen although the test passes: measured figures."""
    writer = request.config.get_terminal_writer()
    return lambda line: writer.line(f"\n{line}")


@dataclass
class FleetHost:
    """A broker and a coordinator, real processes on this host."""

    folder: Path
    address: str
    port: int
    broker: "subprocess.Popen[bytes] | None" = None

    @property
    def client(self) -> Client:
        return Client(self.folder / "state" / "api.sock")

    def start_broker(self) -> None:
        assert MOSQUITTO is not None
        self.broker = subprocess.Popen([MOSQUITTO, "-c", str(self.folder / "mosquitto.conf")])

    def stop_broker(self) -> None:
        if self.broker is not None:
            self.broker.kill()
            self.broker.wait(60)
            self.broker = None

    def is_online(self, device: str) -> bool:
        try:
            return self.client.devices.show(device).state == "online"
        except LiberataiError:
            return False

    def settings(self, device: str, **more: str) -> str:
        key = self.client.health()["public_key"]
        lines = [
            "fleet: test",
            f"device: {device}",
            f"broker: mqtt://{self.address}:{self.port}",
            f'coordinator_key: "{key}"',
            "keepalive_s: 5",
            *(f"{name}: {value}" for name, value in more.items()),
        ]
        return "\n".join(lines) + "\n"


@contextmanager
def fleet_host(folder: Path, address: str, *more: str) -> Iterator[FleetHost]:
    """Run a fleet that lets everybody in; `more` are lines of its settings."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    (folder / "mosquitto.conf").write_text(
        f"listener {port} {address}\nallow_anonymous true\npersistence false\nuser root\n"
    )
    (folder / "coordinator.yaml").write_text(
        f"fleet: test\nbroker: mqtt://{address}:{port}\nstate_dir: state\nenrolment: open\n" + "\n".join(more)
    )
    host = FleetHost(folder, address, port)
    host.start_broker()
    command = [sys.executable, "-m", "liberatai_coordinator", "serve", "--config", "coordinator.yaml"]
    with (
        (folder / "coordinator.log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, stderr=log) as coordinator,
    ):
        try:
            until(lambda: _answers(host.client), "the coordinator answers")
            yield host
        finally:
            host.stop_broker()
            coordinator.terminate()
            coordinator.wait(60)


def _answers(client: Client) -> bool:
    try:
        return bool(client.health()["protocol"])
    except LiberataiError:
        return False


def seconds_since(start: float) -> float:
    return time.monotonic() - start
