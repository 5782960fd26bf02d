"""Typical mistakes in settings, certificates and data: does `doctor` name cause and remedy, and how soon?

    python -m benchmarks.doctor [--quick]

Every mistake is made once in a fleet that works otherwise: a Mosquitto with mutual TLS or with passwords,
an authority, a coordinator's presence, a device with data. The answer must name what is wrong and what to do.
The time is that of the command without the start of Python. Baseline: the same where nothing is wrong.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from liberatai_agent.cli import main as agent_main
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.broker_files import sync
from liberatai_coordinator.brokers.secure import SecureBroker, start_secure_broker
from liberatai_coordinator.brokers.start import RunningBroker, free_port, start_broker
from liberatai_coordinator.cli.app import main as coordinator_main
from liberatai_coordinator.intake.fencing import presence_frame
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.topics import Topics
from liberatai_core.doctor.broker import reach
from liberatai_core.doctor.certificates import TlsFiles
from liberatai_core.doctor.finding import failed
from liberatai_core.link.link import Connected
from liberatai_core.link.mqtt import MqttLink, MqttSettings, TlsSettings

FLEET, DEVICE, COORDINATOR = "home", "dev-a", "co1"
DAY_S = 86_400.0
LIMIT_S = 3.0


@dataclass(slots=True, kw_only=True)
class World:
    """A fleet that works, in a folder.

    Attributes:
        secure: broker with mutual TLS, where `home` has a coordinator.
        plain: broker with passwords, likewise.
        signer: the coordinator's key.
        folder: of this one question; settings and state lie there.
        pem: certificate and key of the device.
    """

    secure: SecureBroker
    plain: RunningBroker
    passwords: dict[str, str]
    signer: Signer
    root: Path
    folder: Path = field(default_factory=Path)
    pem: Path = field(default_factory=Path)
    coordinator_pem: Path = field(default_factory=Path)

    def is_alive(self) -> bool:
        """Say whether the broker runs: Mosquitto 2.0.11 rarely ends itself (free(): invalid pointer)."""
        return self.secure.pid is not None

    def revive(self) -> None:
        """Start the broker again if it has ended."""
        if not self.is_alive():
            self.secure.restart()
            self.speak()

    def speak(self) -> None:
        """Leave the coordinator's presence at both brokers."""
        pem = self.coordinator_pem
        tls = TlsSettings(ca_file=self.secure.ca_file, cert_file=pem, key_file=pem)
        asyncio.run(
            _speak(MqttSettings.from_url(self.secure.url, client_id=COORDINATOR, tls=tls), self.signer)
        )
        login = MqttSettings.from_url(self.plain.url, client_id=COORDINATOR)
        login = dataclasses.replace(login, username=COORDINATOR, password=self.passwords[COORDINATOR])
        asyncio.run(_speak(login, self.signer))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return working settings of the device, with some of them changed; None takes one away."""
        given: dict[str, Any] = {
            "fleet": FLEET,
            "device": DEVICE,
            "broker": self.secure.url,
            "ca_file": str(self.secure.ca_file),
            "cert_file": str(self.pem),
            "key_file": str(self.pem),
            "coordinator_key": self.signer.public_key.hex(),
            "state_dir": str(self.folder / "state"),
        }
        return {name: value for name, value in (given | changes).items() if value is not None}

    def by_password(self, **changes: Any) -> dict[str, Any]:
        """Return working settings of the device at the broker with passwords."""
        secret = self.folder / "password"
        secret.write_text(self.passwords[DEVICE])
        given = {"broker": self.plain.url, "username": DEVICE, "password_file": str(secret)}
        return self.settings(**dict.fromkeys(("ca_file", "cert_file", "key_file")), **(given | changes))

    def data(self, **arrays: Any) -> Path:
        """Return a file of data; some arrays changed, None takes one away."""
        x = np.linspace(0, 1, 80, dtype=np.float32).reshape(40, 2)
        given: dict[str, Any] = {"x": x, "y": np.arange(40) % 2} | arrays
        path = self.folder / f"data-{len(arrays)}.npz"
        np.savez(path, **{name: value for name, value in given.items() if value is not None})
        return path

    def issue(self, name: str, role: str = "device", *, days: float = 30.0, start_days: float = 0.0) -> Path:
        """Return a certificate of this fleet's authority with its key, also one that is not valid now."""
        path = self.folder / f"{name}-{role}-{days:g}.pem"
        if start_days == 0.0 and days > 0:
            source = self.secure.credential(name, role, days=days)
            path.touch(mode=0o600)
            path.write_bytes(source.read_bytes())
            return path
        root = self.secure.authority.folder
        signed = x509.load_pem_x509_certificate((root / "ca.crt").read_bytes())
        signing = serialization.load_pem_private_key((root / "ca.key").read_bytes(), None)
        path.write_bytes(certificate(name, signed.subject, signing, start_days, days))
        return path


def certificate(name: str, issuer: x509.Name, signing: Any, start_days: float, end_days: float) -> bytes:
    """Return a certificate and its key (PEM), valid between two days from now."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(tz=UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=start_days))
        .not_valid_after(now + timedelta(days=end_days))
        .sign(signing, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return made.public_bytes(form) + key.private_bytes(form, serialization.PrivateFormat.PKCS8, plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question to `doctor`.

    Attributes:
        settings: of the device or the coordinator; text: as it stands in the file.
        program: which doctor.
        arguments: before its name (coordinator).
        now_s: what its clock says; None: the truth.
    """

    settings: dict[str, Any] | str | None
    program: str = "agent"
    arguments: tuple[str, ...] = ()
    now_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One mistake, and what must be said of it.

    Attributes:
        name: for people.
        make: makes it and returns the question.
        says: pattern of the line that names the cause.
        remedy: pattern of what to do.
    """

    name: str
    make: Callable[[World], Asked]
    says: str
    remedy: str


def device(**changes: Any) -> Callable[[World], Asked]:
    """Return a mistake that is a wrong setting of the device."""
    return lambda world: Asked(settings=world.settings(**changes))


def _text(change: Callable[[str], str]) -> Callable[[World], Asked]:
    return lambda world: Asked(settings=change(written(world.settings())))


def written(settings: dict[str, Any]) -> str:
    """Return settings as YAML."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


def _file(world: World, name: str, content: bytes, mode: int = 0o600) -> str:
    path = world.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def _foreign(world: World) -> Asked:
    other = Authority.create(world.folder / "other", FLEET)
    root = x509.load_pem_x509_certificate((other.folder / "ca.crt").read_bytes())
    signing = serialization.load_pem_private_key((other.folder / "ca.key").read_bytes(), None)
    path = _file(world, "foreign.pem", certificate(DEVICE, root.subject, signing, 0, 30))
    return Asked(settings=world.settings(cert_file=path, key_file=path))


def _wrong_ca(world: World) -> Asked:
    other = Authority.create(world.folder / "other", FLEET)
    return Asked(settings=world.settings(ca_file=str(other.folder / "ca.crt")))


def _key_of_another(world: World) -> Asked:
    return Asked(settings=world.settings(key_file=str(world.issue("dev-b"))))


def _reloaded(world: World, path: Path, name: str) -> None:
    """Let the broker read its lists anew, and wait until it has."""
    tls = TlsSettings(ca_file=world.secure.ca_file, cert_file=path, key_file=path)
    settings = MqttSettings.from_url(world.secure.url, client_id=name, tls=tls)
    files = TlsFiles(ca_file=tls.ca_file, cert_file=path, key_file=path, name=name, fleet=FLEET)
    word = Topics(fleet=FLEET).test_word("up", name)
    world.secure.reload()
    until_s = time.monotonic() + 60
    while not failed(asyncio.run(reach(settings, files, word)).findings):
        if time.monotonic() > until_s:
            raise SystemExit("the broker does not read its lists anew")


def _revoked(world: World) -> Asked:
    path = world.issue("dev-r")
    world.secure.authority.revoke("dev-r")
    sync(world.secure.files, world.secure.authority, FLEET, COORDINATOR, ())
    _reloaded(world, path, "dev-r")
    return Asked(settings=world.settings(device="dev-r", cert_file=str(path), key_file=str(path)))


def _denied(world: World) -> Asked:
    path = world.issue("dev-d")
    sync(world.secure.files, world.secure.authority, FLEET, COORDINATOR, ("dev-d",))
    _reloaded(world, path, "dev-d")
    return Asked(settings=world.settings(device="dev-d", cert_file=str(path), key_file=str(path)))


def _with(world: World, path: Path) -> Asked:
    return Asked(settings=world.settings(cert_file=str(path), key_file=str(path)))


def _expired(world: World) -> Asked:
    return _with(world, world.issue(DEVICE, days=-1.0, start_days=-30.0))


def _state(make: Callable[[Path], None]) -> Callable[[World], Asked]:
    def made(world: World) -> Asked:
        state = world.folder / "state"
        state.mkdir(mode=0o700)
        make(state)
        return Asked(settings=world.settings())

    return made


def _open_key(state: Path) -> None:
    (state / "device.key").write_bytes(bytes(32))
    (state / "device.key").chmod(0o644)


def _short_key(state: Path) -> None:
    (state / "device.key").write_bytes(bytes(7))
    (state / "device.key").chmod(0o600)


def _data(**arrays: Any) -> Callable[[World], Asked]:
    return lambda world: Asked(settings=world.settings(data=str(world.data(**arrays))))


def _no_archive(world: World) -> Asked:
    return Asked(settings=world.settings(data=_file(world, "data.csv", b"a,b\n1,2\n")))


def _coordinator(**changes: Any) -> Callable[[World], Asked]:
    def made(world: World) -> Asked:
        given = {
            "fleet": FLEET,
            "broker": world.secure.url,
            "ca_file": str(world.secure.ca_file),
            "cert_file": str(world.coordinator_pem),
            "key_file": str(world.coordinator_pem),
            "state_dir": str(world.folder / "state"),
        } | changes
        settings = {name: value for name, value in given.items() if value is not None}
        return Asked(settings=settings, program="coordinator")

    return made


def _wrong_socket(world: World) -> Asked:
    path = _file(world, "api.sock", b"no socket")
    return dataclasses.replace(_coordinator()(world), arguments=("--socket", path))


def _coordinator_key(world: World) -> Asked:
    _file(world, "state/coordinator.key", bytes(32), 0o640)
    return _coordinator()(world)


def _server_for_another_host(world: World) -> Asked:
    # "localhost" and the address are in the certificate; this name leads to the same machine.
    return Asked(settings=world.settings(broker=world.secure.url.replace("127.0.0.1", "127.1")))


def _in_ca_file(world: World) -> Asked:
    return Asked(settings=world.settings(ca_file=str(world.secure.authority.folder / "ca.key")))


def _nonsense_key(world: World) -> Asked:
    return Asked(settings=world.settings(key_file=_file(world, "k.pem", b"-----BEGIN nonsense")))


def _plain_to_tls(world: World) -> Asked:
    return Asked(settings=world.by_password(broker=world.secure.url.replace("mqtts", "mqtt")))


def _wrong_password(world: World) -> Asked:
    return Asked(settings=world.by_password(password_file=_file(world, "wrong", b"nonsense")))


def _wrong_fleet(world: World) -> Asked:
    """No list of rights stands in between: this account may read everything."""
    secret = _file(world, "open", world.passwords[COORDINATOR].encode())
    return Asked(settings=world.by_password(fleet="hoem", username=COORDINATOR, password_file=secret))


NOWHERE = "/proc/liberatai"
"""A folder that nobody can make, not even root."""

MISTAKES: tuple[Mistake, ...] = (
    # --- settings
    Mistake(
        name="no settings file", make=lambda _: Asked(settings=None), says="no such file", remedy="--config"
    ),
    Mistake(name="not YAML", make=lambda _: Asked(settings="fleet: [home"), says="line 1", remedy="jobs.md"),
    Mistake(
        name="misspelt key",
        make=_text(lambda text: text.replace("state_dir", "state_dri")),
        says="state_dri: unknown key; did you mean state_dir",
        remedy="jobs.md",
    ),
    Mistake(
        name="wrong value",
        make=device(keepalive_s="soon"),
        says='keepalive_s: must be a whole number.*got "soon"',
        remedy="jobs.md",
    ),
    Mistake(
        name="name with capitals",
        make=device(device="Dev-A"),
        says="device: must be text like",
        remedy="jobs.md",
    ),
    Mistake(
        name="key of the documents",
        make=device(coordinator_key="0" * 64),
        says="coordinator_key: it is still the placeholder",
        remedy="copy coordinator_key",
    ),
    Mistake(
        name="http broker", make=device(broker="http://b"), says="broker: must be mqtt://", remedy="jobs.md"
    ),
    Mistake(
        name="certificates with mqtt://",
        make=lambda world: Asked(settings=world.settings(broker=world.plain.url)),
        says="ca_file, cert_file: need broker: mqtts://",
        remedy="jobs.md",
    ),
    Mistake(
        name="certificate without key",
        make=device(key_file=None),
        says="cert_file and key_file: give both",
        remedy="jobs.md",
    ),
    Mistake(
        name="no such profile",
        make=device(profile="p4"),
        says="no profile 'p4'.*did you mean pi4",
        remedy="profiles list",
    ),
    # --- certificates
    Mistake(
        name="missing CA",
        make=device(ca_file="/nowhere/ca.crt"),
        says="ca_file: no such file: /nowhere/ca.crt",
        remedy="correct ca_file",
    ),
    Mistake(
        name="CA that is a key",
        make=_in_ca_file,
        says="ca_file: .*ca.key: it holds a key, not a certificate",
        remedy="in PEM",
    ),
    Mistake(
        name="wrong CA",
        make=_wrong_ca,
        says="ca_file .* does not vouch for: a wrong CA",
        remedy="ca.crt of this fleet",
    ),
    Mistake(
        name="foreign certificate",
        make=_foreign,
        says="cert_file .*foreign.pem: .*(does not know who signed it|another authority made it)",
        remedy="this fleet's authority",
    ),
    Mistake(
        name="key mismatch",
        make=_key_of_another,
        says="key_file: .*does not belong to cert_file",
        remedy="that the certificate was asked for with",
    ),
    Mistake(
        name="key that is none",
        make=_nonsense_key,
        says="key_file: .*k.pem: holds no private key",
        remedy="in PEM",
    ),
    Mistake(
        name="revoked", make=_revoked, says="cert_file .* says that it was revoked", remedy="devices invite"
    ),
    Mistake(
        name="expired",
        make=_expired,
        says=r"cert_file: .*expired on \d{4}-\d\d-\d\d",
        remedy="liberatai ca renew",
    ),
    Mistake(
        name="not valid yet",
        make=lambda world: _with(world, world.issue(DEVICE, days=40.0, start_days=20.0)),
        says=r"valid only from \d{4}-\d\d-\d\d",
        remedy="set the clock",
    ),
    Mistake(
        name="CN of another device",
        make=lambda world: _with(world, world.issue("dev-b")),
        says="it is for 'dev-b', the settings say 'dev-a'",
        remedy="use the certificate of dev-a",
    ),
    Mistake(
        name="certificate of another fleet",
        make=device(fleet="hom"),
        says="it is for fleet 'home', the settings say fleet 'hom'",
        remedy="correct fleet:",
    ),
    Mistake(
        name="broker of another name",
        make=_server_for_another_host,
        says="the broker's certificate is for .*localhost.*, not for '127.1'",
        remedy="reach it by one of those names",
    ),
    # --- broker
    Mistake(
        name="broker is off",
        make=lambda world: Asked(settings=world.settings(broker=f"mqtts://127.0.0.1:{free_port()}")),
        says="nobody listens there",
        remedy="start it",
    ),
    Mistake(
        name="host without address",
        make=device(broker="mqtts://broker.invalid:8883"),
        says="no address for 'broker.invalid'",
        remedy="name resolution",
    ),
    Mistake(
        name="plain TCP to TLS",
        make=_plain_to_tls,
        says="speaks TLS, the settings say plain TCP",
        remedy="mqtts://",
    ),
    Mistake(
        name="TLS to plain TCP",
        make=lambda world: Asked(settings=world.settings(broker=world.plain.url.replace("mqtt:", "mqtts:"))),
        says="does not speak TLS on this port",
        remedy="8883",
    ),
    Mistake(
        name="wrong password",
        make=_wrong_password,
        says="does not let username 'dev-a' in",
        remedy="password_file",
    ),
    Mistake(
        name="list of rights denies",
        make=_denied,
        says="list of rights refuses 'dev-d'",
        remedy="broker sync",
    ),
    # --- coordinator
    Mistake(
        name="wrong coordinator_key",
        make=device(coordinator_key="ab" * 32),
        says="coordinator co1 signs with key [0-9a-f]{16}, coordinator_key in the settings is",
        remedy="copy coordinator_key",
    ),
    Mistake(
        name="wrong fleet",
        make=lambda world: Asked(
            settings=world.by_password(
                fleet="hoem",
                username=COORDINATOR,
                password_file=_file(world, "co", world.passwords[COORDINATOR].encode()),
            )
        ),
        says="list of rights refuses 'dev-a' on lai/v1/hoem/|no coordinator has ever spoken for fleet 'hoem'",
        remedy="fleet",
    ),
    # --- state and clock
    Mistake(
        name="state folder that cannot be written",
        make=device(state_dir=NOWHERE),
        says=f"state_dir: {NOWHERE}: cannot be written",
        remedy="state_dir",
    ),
    Mistake(
        name="blobs cannot be written",
        make=_state(lambda state: (state / "blobs").touch()),
        says="blobs: is a file, not a folder",
        remedy="move the file away",
    ),
    Mistake(
        name="device key that others can read",
        make=_state(_open_key),
        says=r"device.key: others may read this private key \(mode 0644\)",
        remedy="chmod 600",
    ),
    Mistake(
        name="damaged device key", make=_state(_short_key), says="device.key: 7 bytes", remedy="join anew"
    ),
    Mistake(
        name="clock never set",
        make=lambda world: Asked(settings=world.settings(), now_s=86_400.0),
        says="clock: it says 1970-01-02",
        remedy="NTP",
    ),
    # --- data
    Mistake(
        name="no data file",
        make=device(data="/nowhere/d.npz"),
        says="data: .*/nowhere/d.npz",
        remedy="npz with x",
    ),
    Mistake(name="data that are no archive", make=_no_archive, says="data: .*data.csv", remedy="npz with x"),
    Mistake(
        name="data without labels", make=_data(y=None), says="data: .*(no labels|y)", remedy="npz with x"
    ),
    Mistake(name="too few labels", make=_data(y=np.zeros(7, int)), says="data: .*7", remedy="npz with x"),
    Mistake(
        name="numbers that are none",
        make=_data(x=np.full((40, 2), np.nan, np.float32)),
        says="data: .*(finite|NaN|nan)",
        remedy="npz with x",
    ),
    Mistake(
        name="negative labels",
        make=_data(y=np.full(40, -1)),
        says="data: .*-1|data: .*label",
        remedy="npz with x",
    ),
    # --- the coordinator's own
    Mistake(name="wrong socket", make=_wrong_socket, says="api.sock: is no socket", remedy="--socket"),
    Mistake(
        name="coordinator key that others can read",
        make=_coordinator_key,
        says=r"coordinator.key: others may read this private key \(mode 0640\)",
        remedy="chmod 600",
    ),
    Mistake(
        name="coordinator state folder that cannot be written",
        make=_coordinator(state_dir=NOWHERE),
        says=f"state_dir: {NOWHERE}: cannot be written",
        remedy="state_dir",
    ),
    Mistake(
        name="coordinator under another name",
        make=_coordinator(coordinator="co2"),
        says="it is for 'co1', the settings say 'co2'",
        remedy="use the certificate of co2",
    ),
    Mistake(
        name="no such group",
        make=_coordinator(socket_group="no-such-group"),
        says="no group 'no-such-group'",
        remedy="groupadd",
    ),
)


@contextmanager
def a_world(root: Path) -> Iterator[World]:
    """Start a fleet that works."""
    with ExitStack() as stack:
        secure = start_secure_broker(root / "secure", FLEET, COORDINATOR)
        stack.callback(secure.stop)
        passwords = {DEVICE: "a password of dev-a", COORDINATOR: "a password of co1"}
        plain = start_broker("mosquitto", root / "plain", passwords, FLEET, coordinator_user=COORDINATOR)
        stack.callback(plain.stop)
        signer = Signer.from_seed(bytes(range(32)), FLEET)
        world = World(secure=secure, plain=plain, passwords=passwords, signer=signer, root=root)
        world.coordinator_pem = secure.credential(COORDINATOR, "coordinator", days=60)
        world.pem = secure.credential(DEVICE, days=60)
        world.speak()
        yield world


async def _speak(settings: MqttSettings, signer: Signer) -> None:
    """Leave a coordinator's presence at a broker."""
    link = MqttLink(settings)
    await link.open()
    try:
        async with asyncio.timeout(30):
            async for event in link.events():
                if isinstance(event, Connected):
                    break
        topic = Topics(fleet=FLEET).coordinator(COORDINATOR)
        await link.publish(topic, presence_frame(signer, COORDINATOR, 1, "online"), retain=True)
    finally:
        await link.close()


def ask(world: World, make: Callable[[World], Asked]) -> tuple[int, str, float]:
    """Make a mistake and ask; return (exit code, what was said, seconds)."""
    while True:
        world.revive()
        answer = _ask(world, make)
        if world.is_alive():
            return answer


def _ask(world: World, make: Callable[[World], Asked]) -> tuple[int, str, float]:
    world.folder = Path(tempfile.mkdtemp(dir=world.root))
    asked = make(world)
    path = world.folder / "settings.yaml"
    if asked.settings is not None:
        path.write_text(asked.settings if isinstance(asked.settings, str) else written(asked.settings))
    out = io.StringIO()
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        if asked.now_s is not None:
            stack.enter_context(mock.patch("liberatai_agent.doctor.time.time", return_value=asked.now_s))
        if asked.program == "agent":
            code = agent_main(["doctor", "--config", str(path), "-o", "wide"])
        else:
            code = coordinator_main([*asked.arguments, "doctor", "--config", str(path), "-o", "wide"])
    return code, out.getvalue(), time.perf_counter() - started


def faults(mistake: Mistake, code: int, said: str) -> list[str]:
    """Return what is missing from an answer: the cause, the remedy, the exit code."""
    lines = said.splitlines()
    told = [place for place, line in enumerate(lines) if re.search(mistake.says, line)]
    wrong = [] if code in (1, 2) else [f"exit code {code}"]
    if not told:
        return [*wrong, "the cause is not named"]
    failing = [place for place in told if lines[place].startswith(("FAIL", "warn"))]
    if not failing:
        return [*wrong, "the cause is not marked"]
    remedies = [lines[place + 1] for place in failing if place + 1 < len(lines)]
    if not any(one.lstrip().startswith("→") and re.search(mistake.remedy, one) for one in remedies):
        return [*wrong, "the remedy is not named"]
    return wrong


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every fifth mistake")
    args = parser.parse_args()
    chosen = MISTAKES[::5] if args.quick else MISTAKES
    with tempfile.TemporaryDirectory(prefix="liberatai-doctor-") as folder, a_world(Path(folder)) as world:
        code, said, healthy_s = ask(world, lambda one: Asked(settings=one.settings(data=str(one.data()))))
        if code != 0:
            raise SystemExit(f"the healthy device is not:\n{said}")
        seconds: dict[str, float] = {}
        missing: dict[str, list[str]] = {}
        for mistake in chosen:
            code, said, seconds[mistake.name] = ask(world, mistake.make)
            if found := faults(mistake, code, said):
                missing[mistake.name] = found
            print(f"{seconds[mistake.name]:5.2f} s  {mistake.name}: {', '.join(found) or 'named'}")
    slowest = max(seconds, key=lambda name: seconds[name])
    print(
        json.dumps(
            {
                "benchmark": "doctor",
                "mistakes": len(chosen),
                "named": len(chosen) - len(missing),
                "missing": missing,
                "slowest": slowest,
                "slowest_s": round(seconds[slowest], 2),
                "within_3_s": sum(one <= LIMIT_S for one in seconds.values()),
                "healthy_s": round(healthy_s, 2),
                "ratio": round(seconds[slowest] / healthy_s, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
