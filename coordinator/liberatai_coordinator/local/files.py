"""Files of a fleet on one machine: where they lie, keys, passwords and settings."""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from liberatai_coordinator.local.process import Process
from liberatai_core import processes
from liberatai_core.errors import LinkError

COORDINATOR: Final = "coordinator"
MAX_SOCKET_PATH: Final = 107  # Linux: sizeof(sun_path) - 1
CONNECT_TIMEOUT_S: Final = 10.0
TRAINER_IDLE_S: Final = 600.0
"""Trainers stay: importing torch for every round would take longer than the round."""

Account = tuple[str | None, str | None]
"""Name and password at the broker; None: it wants none."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How a program proves at a broker with mutual TLS who it is.

    Attributes:
        ca_file: certificate of the authority that both trust.
        pem_file: certificate and key, in one file.
    """

    ca_file: Path
    pem_file: Path


Login = Account | Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """One agent to start.

    Attributes:
        id: the device's name.
        data: its private .npz.
        profile: name of a hardware class, or path of its file; None: only this machine limits it.
    """

    id: str
    data: Path
    profile: str | Path | None = None


class Folders:
    """Where everything of a fleet lies."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.absolute()
        self._sockets: tempfile.TemporaryDirectory[str] | None = None

    @property
    def coordinator(self) -> Path:
        """The coordinator's settings, password and log."""
        return self.root / COORDINATOR

    @property
    def coordinator_state(self) -> Path:
        """The coordinator's state."""
        return self.coordinator / "state"

    @property
    def socket(self) -> Path:
        """The API's socket: in the state folder, or in a temporary one where its path would be too long."""
        usual = self.coordinator_state / "api.sock"
        if len(os.fsencode(usual)) <= MAX_SOCKET_PATH:
            return usual
        if self._sockets is None:
            self._sockets = tempfile.TemporaryDirectory(prefix="liberatai-")
        return Path(self._sockets.name) / "api.sock"

    def agent(self, device: str) -> Path:
        """Return the folder with an agent's settings, state and log."""
        return self.root / "agents" / device

    def close(self) -> None:
        """Remove what does not lie below the folder."""
        if self._sockets is not None:
            self._sockets.cleanup()


def coordinator_process(
    folders: Folders, fleet: str, url: str, account: Login, device_keys: Mapping[str, str]
) -> Process:
    """Write a coordinator's settings, and return its process, not yet started.

    Args:
        folders: where to.
        fleet: name in every topic.
        url: of the broker.
        account: at the broker.
        device_keys: public keys of the devices that are let in, in hex, by name.
    """
    folder = folders.coordinator
    settings = {
        "fleet": fleet,
        "broker": url,
        **_login(folder, account),
        "state_dir": str(folders.coordinator_state),
        "socket": str(folders.socket),
        "enrolment": "allowlist",
        "devices": dict(device_keys),
    }
    path = _write_settings(folder / "coordinator.yaml", settings)
    command = processes.command("liberatai_coordinator", "serve", "--config", str(path))
    return Process(COORDINATOR, command, folder / "coordinator.log")


def agent_process(
    folder: Path,
    fleet: str,
    device: LocalDevice,
    url: str,
    account: Login,
    coordinator_key: str,
    profiles_dir: Path | None,
    prepare: Callable[[], None] | None = None,
) -> Process:
    """Write an agent's settings, and return its process, not yet started.

    Args:
        folder: where to.
        fleet: name in every topic.
        device: that it stands for.
        url: of the broker.
        account: at the broker.
        coordinator_key: public key of the coordinator, in hex.
        profiles_dir: folder of the hardware classes that devices name.
        prepare: sets limits, in the child.
    """
    profile = device.profile
    settings = {
        "fleet": fleet,
        "device": device.id,
        "broker": url,
        **_login(folder, account),
        "coordinator_key": coordinator_key,
        "state_dir": str(folder / "state"),
        "data": str(device.data.absolute()),
        "profile": str(profile.absolute()) if isinstance(profile, Path) else profile,
        "profiles_dir": str(profiles_dir) if profiles_dir else None,
        "trainer_idle_s": TRAINER_IDLE_S,
    }
    path = _write_settings(folder / "agent.yaml", settings)
    return Process(
        device.id,
        processes.command("liberatai_agent", "run", "--config", str(path)),
        folder / "agent.log",
        prepare,
    )


def without_account(url: str) -> tuple[str, Account]:
    """Return a broker's URL without the name and password in it, and these."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}", (parts.username, parts.password)


def require_reachable(url: str) -> None:
    """Raise unless somebody listens there: agents would wait for ever, as they should elsewhere."""
    try:
        parts = urlsplit(url)
        port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise LinkError(f"no broker at {url}: {error}") from None


def _login(folder: Path, account: Login) -> dict[str, str]:
    if isinstance(account, Certificate):
        _write_private(folder / "ca.crt", account.ca_file.read_bytes())
        _write_private(folder / "own.pem", account.pem_file.read_bytes())
        own = str(folder / "own.pem")
        return {"ca_file": str(folder / "ca.crt"), "cert_file": own, "key_file": own}
    user, password = account
    if user is None:
        return {}
    _write_private(folder / "password", (password or "").encode())
    return {"username": user, "password_file": str(folder / "password")}


def new_key(path: Path) -> str:
    """Make a device's or coordinator's key, unless it exists, and return its public half in hex."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes()).public_key().public_bytes_raw().hex()


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(content)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write settings as JSON, which is YAML; None is left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    _write_private(path, json.dumps(given, indent=2).encode())
    return path
