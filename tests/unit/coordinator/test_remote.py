"""The API for other machines: over TLS, with tokens and roles, and every change with its name."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.unit.coordinator.api_kit import MemoryOperations

from liberatai_coordinator.api.guard import Guard, may
from liberatai_coordinator.api.listener import serve_https
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.api.routes import make_app
from liberatai_coordinator.api.tokens import TokenOperations
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.brokers.start import free_port
from liberatai_coordinator.cli.app import main
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.fleet_views import TokenView
from liberatai_coordinator.client.https import Server
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.ledger import Ledger
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.errors import ConfigError, LinkError, NotFoundError, RoleError, StateError, TokenError


class Remote:
    """A coordinator in memory behind the real door, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, Ledger.open(folder / "state")
        self.operations = MemoryOperations()
        service = cast("Service", SimpleNamespace(ledger=self.ledger))
        self.tokens = self.operations.tokens = TokenOperations(service)
        authority = Authority.create(folder / "ca", "default")
        key = new_key()
        der = authority.issue(key.public_key(), "server", "localhost", 86_400.0, hosts=("localhost",))
        self.pem, self.ca_file = folder / "api.pem", folder / "ca" / "ca.crt"
        self.pem.write_bytes(certificate_pem(der) + key_pem(key))
        self.address = f"127.0.0.1:{free_port()}"
        self.loop = asyncio.new_event_loop()
        app = make_app(cast("Operations", self.operations))
        door = serve_https(Guard(app, self.tokens.who), self.address, self.pem, self.pem)
        self.task = self.loop.create_task(door)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))

    def make(self, name: str, role: str, ttl_s: float = 3600.0) -> TokenView:
        work = self.tokens.create(name, role, ttl_s)  # type: ignore[arg-type]
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def client(self, token: str, ca_file: Path | None = None) -> Client:
        url = f"https://localhost:{self.address.rpartition(':')[2]}"
        return Client(Server(url=url, token=token, ca_file=ca_file or self.ca_file), timeout_s=30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(30)
        self.loop.close()
        self.ledger.close()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    made = Remote(tmp_path_factory.mktemp("remote"))
    yield made
    made.close()


def test_a_viewer_looks_an_operator_acts_and_an_admin_decides_who_may(remote: Remote) -> None:
    viewer = remote.client(remote.make("eve", "viewer").token)
    operator = remote.client(remote.make("anna", "operator").token)
    admin = remote.client(remote.make("root", "admin").token)
    assert [one.id for one in viewer.devices.list()] == ["camera", "gateway"]
    with pytest.raises(RoleError, match="eve is viewer"):
        viewer.devices.drain("gateway", "")
    assert operator.devices.drain("gateway", "fans").drained
    for forbidden in (
        lambda: operator.devices.decommission("camera", ""),
        lambda: operator.tokens.list(),
        lambda: operator.audit.last(1),
    ):
        with pytest.raises(RoleError):
            forbidden()
    made = admin.tokens.create("ci", "viewer", 60.0)
    assert made.token.startswith("lai_")
    assert {one.name: one.token for one in admin.tokens.list()}.items() >= {"ci": "", "anna": ""}.items()
    with pytest.raises(StateError):
        admin.tokens.create("ci", "admin", 0.0)
    assert remote.client(made.token).health()["ok"]
    admin.tokens.revoke("ci")
    with pytest.raises(TokenError):
        remote.client(made.token).health()
    with pytest.raises(NotFoundError):
        admin.tokens.revoke("ci")
    told = [(one.actor, one.role, one.action, one.target) for one in admin.audit.after(0)]
    assert ("anna", "operator", "devices drain", "gateway") in told
    assert ("root", "admin", "tokens create", "ci") in told
    assert not any("lai_" in one.detail for one in admin.audit.after(0))


@pytest.mark.parametrize("token", ["", "lai_guessed", "x" * 500])
def test_who_has_no_token_learns_nothing(remote: Remote, token: str) -> None:
    with pytest.raises(TokenError, match="no token, a wrong one"):
        remote.client(token).devices.list()


def test_a_token_ends_and_is_kept_as_a_digest_only(remote: Remote) -> None:
    secret = remote.make("late", "admin", 1e-6).token
    with pytest.raises(TokenError):
        remote.client(secret).devices.list()
    content = b"".join(path.read_bytes() for path in (remote.folder / "state").glob("ledger.db*"))
    assert secret.encode() not in content
    assert b"late" in content


def test_a_server_that_is_not_the_coordinator_gets_no_token(remote: Remote, tmp_path: Path) -> None:
    Authority.create(tmp_path / "other", "default")
    client = remote.client(remote.make("x", "viewer").token, tmp_path / "other" / "ca.crt")
    with pytest.raises(LinkError, match="not to be believed"):
        client.devices.list()
    with pytest.raises(ConfigError, match="ca-file"):
        remote.client("t", tmp_path / "nowhere").devices.list()


def test_the_command_line_asks_a_coordinator_elsewhere(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(remote.make("cli", "viewer").token + "\n")
    url = f"https://localhost:{remote.address.rpartition(':')[2]}"
    there = ["--server", url, "--token-file", str(token), "--ca-file", str(remote.ca_file)]
    assert main([*there, "devices", "list", "-o", "name"]) == 0
    assert capsys.readouterr().out == "camera\ngateway\n"
    assert main([*there, "devices", "drain", "camera"]) == 1
    assert "E_ROLE" in capsys.readouterr().err
    token.chmod(0o644)
    assert main([*there, "devices", "list"]) == 2
    assert "chmod 600" in capsys.readouterr().err
    assert main(["--server", "http://x", "--token-file", str(token), "devices", "list"]) == 2
    assert main(["--server", url, "devices", "list"]) == 2


@pytest.mark.parametrize(
    ("role", "method", "path", "allowed"),
    [
        ("viewer", "GET", "/v1/devices", True),
        ("viewer", "POST", "/v1/plan", True),
        ("viewer", "POST", "/v1/jobs", False),
        ("viewer", "GET", "/v1/tokens", False),
        ("operator", "POST", "/v1/jobs", True),
        ("operator", "DELETE", "/v1/jobs/x", True),
        ("operator", "POST", "/v1/devices/a/decommission", False),
        ("operator", "POST", "/v1/devices/a/rekey", False),
        ("operator", "POST", "/v1/tokens", False),
        ("admin", "POST", "/v1/tokens", True),
        ("admin", "POST", "/v1/devices/a/decommission", True),
        ("nobody", "GET", "/v1/devices", False),
    ],
)
def test_what_a_role_may_do(role: str, method: str, path: str, allowed: bool) -> None:
    assert may(role, method, path) is allowed


def test_a_token_goes_into_a_file_of_its_owners_alone(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, out = tmp_path / "boss.token", tmp_path / "carl.token"
    key.write_text(remote.make("boss", "admin").token)
    key.chmod(0o600)
    url = f"https://localhost:{remote.address.rpartition(':')[2]}"
    server = ["--server", url, "--token-file", str(key), "--ca-file", str(remote.ca_file)]

    def create(name: str, file: Path) -> int:
        return main([*server, "tokens", "create", name, "--role", "operator", "--out", str(file)])

    assert create("carl", out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: token carl, operator, until ")
    assert out.stat().st_mode & 0o777 == 0o600
    token = out.read_text().strip()
    assert token not in said
    assert remote.client(token).health()["ok"]
    assert create("dora", out) == 2, "a file that is there stays as it is"
    assert out.read_text().strip() == token
    assert create("dora", tmp_path / "none" / "x") == 2
    assert create("carl", tmp_path / "again") == 1, "the name is taken"
    assert not (tmp_path / "again").exists()
    assert create("dora", tmp_path / "dora") == 0, "no refused try has made it"
