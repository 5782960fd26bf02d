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
from liberatai_coordinator.client.wire import InvitationRequest
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
    plugins = request.config.pluginmanager
    terminal, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")

    def say(line: str) -> None:
        if terminal is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                terminal.write_line(f"\n{line.strip()}")

    return say


@dataclass
class FleetHost:
    """A broker and a coordinator, real processes on this host."""

    folder: Path
    broker: "subprocess.Popen[bytes] | None" = None

    @property
    def client(self) -> Client:
        return Client(self.folder / "state" / "api.sock")

    def start_broker(self) -> None:
        assert MOSQUITTO is not None
        self.broker = subprocess.Popen([MOSQUITTO, "-c", str(self.folder / "broker" / "mosquitto.conf")])

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

    def invite(self, device: str) -> str:
        """Return a token for one device."""
        (made,) = self.client.invitations.create(InvitationRequest(device=device))
        return made.token


@contextmanager
def fleet_host(folder: Path, address: str, *more: str) -> Iterator[FleetHost]:
    """Run a fleet with mutual TLS, as `liberatai broker init` makes it; `more` are lines of its settings."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("", 0))
        ports = [str(probe.getsockname()[1]) for probe in (one, other)]
    settings = folder / "coordinator.yaml"
    places = ["--config", settings, "--state", folder / "state", "--dir", folder / "broker"]
    doors = ["--host", address, "--port", ports[0], "--claim-port", ports[1]]
    (folder / "broker-state").mkdir()
    rest = ["--broker-state", folder / "broker-state", "--user", "root", "--devices", "100"]
    coordinator = [sys.executable, "-m", "liberatai_coordinator"]
    made = [*coordinator, "broker", "init", *map(str, [*places, *doors, *rest])]
    run = subprocess.run(made, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    settings.write_text(settings.read_text() + "".join(f"{line}\n" for line in more))
    host = FleetHost(folder)
    host.start_broker()
    with (folder / "coordinator.log").open("wb") as log:
        serving = subprocess.Popen([*coordinator, "serve", "--config", str(settings)], stderr=log)
    try:
        until(lambda: _answers(host.client), "the coordinator answers")
        yield host
    finally:
        host.stop_broker()
        serving.terminate()
        serving.wait(60)


def _answers(client: Client) -> bool:
    try:
        return bool(client.health()["protocol"])
    except LiberataiError:
        return False


def seconds_since(start: float) -> float:
    return time.monotonic() - start
