"""`liberatai-agent enrol`: a device joins a fleet with a token; without one, it shows its key."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liberatai_agent.commands.kit import OK, add_command, add_config
from liberatai_core.errors import ConfigError, DiskError, LiberataiError, LinkError

if TYPE_CHECKING:
    from liberatai_agent.config import AgentConfig
    from liberatai_core.contract.messages import CertificateReply
    from liberatai_core.token import Token

STDIN = "-"
DEFAULT_STATE = Path("/var/lib/liberatai-agent")


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "enrol",
        _enrol,
        text="Join a fleet: make this device's keys, get its certificate, write its settings. "
        "Without a token: print the line that lets its key into a fleet.",
        example="liberatai-agent enrol TOKEN",
    )
    parser.add_argument(
        "token",
        nargs="?",
        default="",
        metavar="TOKEN",
        help="of `liberatai devices invite`; -: standard input",
    )
    add_config(parser)
    parser.add_argument("--device", default="", metavar="NAME", help="name (default: this machine's name)")
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"the agent's state folder (default: {DEFAULT_STATE})",
    )
    parser.add_argument("--data", type=Path, default=None, metavar="FILE", help="private .npz of this device")
    parser.add_argument("--profile", default="", metavar="NAME", help="hardware class")
    parser.add_argument(
        "--replace", action="store_true", help="leave the fleet that the settings file names for this one"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="do not wait for an approval: `run` goes on asking"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="give up after so long without an answer (default: %(default)s)",
    )


def _enrol(args: argparse.Namespace) -> int:
    if args.token:
        return _join(args)
    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.membership.identity import Identity  # noqa: PLC0415

    config = load_config(args.config)
    identity = Identity(config.state_path, config.device, config.fleet)
    print(f"{config.device}: {identity.signer.public_key.hex()}")
    return OK


def _join(args: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415
    import sys  # noqa: PLC0415

    from liberatai_agent.membership.identity import Identity  # noqa: PLC0415
    from liberatai_core.contract.frame import fingerprint  # noqa: PLC0415
    from liberatai_core.token import read_token  # noqa: PLC0415

    token = read_token(sys.stdin.read() if args.token == STDIN else args.token)
    device = _name(args.device or token.device)
    state = (args.state_dir or DEFAULT_STATE).absolute()
    settings = _settings(args, token, device, state)
    _require_same(args, token, device)
    config = _prepare(args.config, settings, token, state)
    identity = Identity(config.state_path, device, config.fleet)
    print(f"fleet {token.fleet}, coordinator {token.coordinator} (key {fingerprint(token.coordinator_key)})")
    print(f"device {device}, key {fingerprint(identity.signer.public_key)}")
    # The settings come last: where a service waits for them, it starts in that moment, and two programs
    # that ask with one claim throw each other out.
    try:
        reply = asyncio.run(_ask(args, config, identity))
    except LinkError as error:
        _settle(args.config, settings)
        raise LinkError(f"{error}; `liberatai-agent run` goes on asking") from None
    except KeyboardInterrupt:
        _settle(args.config, settings)
        raise
    if reply is not None and reply.profile and not args.profile:
        settings = _with_profile(args.config, settings, reply.profile)
    _settle(args.config, settings)
    if reply is None:
        print("waits for approval; `liberatai-agent run` goes on asking")
    else:
        _report(args.config, config)
    return OK


async def _ask(args: argparse.Namespace, config: "AgentConfig", identity: Any) -> "CertificateReply | None":
    import asyncio  # noqa: PLC0415

    from liberatai_agent.membership.joining import join  # noqa: PLC0415

    pending = asyncio.Event()
    last = ("", "")

    def say(phase: str, text: str) -> None:
        nonlocal last
        if phase == "pending":
            pending.set()
        if (phase, text) != last:
            last = (phase, text)
            sys.stderr.write(f"{'waits for approval: ' if phase == 'pending' else ''}{text}\n")

    asking = asyncio.create_task(join(config, identity, say))
    waiting = asyncio.create_task(pending.wait())
    try:
        await asyncio.wait({asking, waiting}, timeout=args.timeout, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        if not pending.is_set():
            raise LinkError(f"no answer in {args.timeout:.0f} s")
        return None if args.no_wait else await asking
    finally:
        asking.cancel()
        waiting.cancel()
        await asyncio.gather(asking, waiting, return_exceptions=True)


def _name(wanted: str) -> str:
    """Return the device's name: the one that is wanted, or what the machine's name gives."""
    import socket  # noqa: PLC0415

    from liberatai_core.contract.topics import CLAIM_PREFIX, require_id  # noqa: PLC0415

    name = (
        wanted or re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")[:32]
    )
    if not name or name.startswith(CLAIM_PREFIX):
        raise ConfigError(
            "--device", [f"{name!r} is no name for a device: give one (a-z, 0-9, -, at most 32)"]
        )
    return require_id(name, "--device")


def _settings(args: argparse.Namespace, token: "Token", device: str, state: Path) -> dict[str, Any]:
    """Return what the settings file holds: what was there, and how the fleet is reached."""
    from liberatai_core.settings import parse_mapping  # noqa: PLC0415

    before: dict[str, Any] = {}
    if args.config.exists():
        before = parse_mapping(args.config.read_text(encoding="utf-8"), str(args.config))
    tls = state / "tls"
    found = before | {
        "fleet": token.fleet,
        "device": device,
        "coordinator_key": token.coordinator_key.hex(),
        "broker": token.broker,
        "ca_file": str(tls / "ca.crt"),
        "cert_file": str(tls / "device.pem"),
        "key_file": str(tls / "device.pem"),
        "claim_broker": token.claim_broker,
        "claim_file": str(tls / "claim.pem"),
        "state_dir": str(state),
    }
    if args.data is not None:
        found["data"] = str(args.data.absolute())
    if args.profile:
        found["profile"] = args.profile
    return {name: value for name, value in found.items() if name not in ("username", "password_file")}


def _require_same(args: argparse.Namespace, token: "Token", device: str) -> None:
    """Refuse to make another fleet's device of one that is in a fleet already."""
    if args.replace or not args.config.exists():
        return
    from liberatai_core.settings import parse_mapping  # noqa: PLC0415

    before = parse_mapping(args.config.read_text(encoding="utf-8"), str(args.config))
    wanted = {"fleet": token.fleet, "device": device, "coordinator_key": token.coordinator_key.hex()}
    other = [name for name, value in wanted.items() if before.get(name) not in (None, value)]
    if other:
        faults = [
            f"{name}: is {before[name]!r}, the token says {wanted[name]!r}: --replace leaves the old one"
            for name in other
        ]
        raise ConfigError(str(args.config), faults)


def _prepare(path: Path, settings: dict[str, Any], token: "Token", state: Path) -> "AgentConfig":
    """Write what the token brings into the state folder; return the settings, which are not written yet."""
    from liberatai_agent.config import parse_config  # noqa: PLC0415
    from liberatai_core.certificates import certificate_pem, key_of_number, key_pem  # noqa: PLC0415
    from liberatai_core.files import make_folder, write_durably  # noqa: PLC0415

    config = parse_config(_yaml(settings), str(path), path.parent.absolute())
    claim = certificate_pem(token.certificate) + key_pem(key_of_number(token.key))
    try:
        make_folder(state)
        make_folder(state / "tls")
        write_durably(state / "tls" / "ca.crt", certificate_pem(token.authority), mode=0o644)
        write_durably(state / "tls" / "claim.pem", claim)
        make_folder(path.parent, mode=0o755)
    except OSError as error:
        raise _denied(error, state) from error
    return config


def _settle(path: Path, settings: dict[str, Any]) -> None:
    from liberatai_core.files import write_durably  # noqa: PLC0415

    try:
        write_durably(path, _yaml(settings).encode(), mode=0o644)
    except OSError as error:
        raise _denied(error, path) from error


def _denied(error: OSError, where: Path) -> DiskError:
    hint = ": run it with sudo" if error.errno in (1, 13) else ""
    return DiskError(f"{error.filename or where}: {error.strerror}{hint}")


def _yaml(settings: dict[str, Any]) -> str:
    import msgspec  # noqa: PLC0415

    return msgspec.yaml.encode(settings).decode()


def _with_profile(path: Path, settings: dict[str, Any], profile: str) -> dict[str, Any]:
    """Return the settings with the hardware class that the invitation names, if this release knows it."""
    from liberatai_agent.config import load_profile, parse_config  # noqa: PLC0415

    found = settings | {"profile": profile}
    try:
        load_profile(parse_config(_yaml(found), str(path), path.parent.absolute()))
    except LiberataiError as error:
        sys.stderr.write(f"profile {profile} is left out: {error}\n")
        return settings
    return found


def _report(path: Path, config: "AgentConfig") -> None:
    """Say what was reached: until when the certificate is valid, what this device can do, what comes next."""
    from liberatai_agent.config import load_config, load_profile  # noqa: PLC0415
    from liberatai_agent.machine import probe  # noqa: PLC0415
    from liberatai_core.certificate_file import read_dates  # noqa: PLC0415
    from liberatai_core.units import date_text, size_text  # noqa: PLC0415

    dates = read_dates(Path(config.cert_file or ""))
    print(f"certificate until {date_text(dates.end_s)}, renewed by itself from {date_text(dates.renew_s)} on")
    config = load_config(path)
    machine = probe.measure(config.state_path)
    found = probe.bench(config.state_path, config.data)
    caps = probe.capability(config, load_profile(config), machine, found, session=0, public_key=bytes(32))
    samples = f"{caps.samples} samples" if config.data else "no data yet (data: in the settings)"
    memory = size_text(caps.memory_bytes)
    print(f"this device: tier {caps.tier}, {caps.cores} cores, {memory} for training, {samples}")
    print(f"{path}: settings written; {_next_step()}")


def _next_step() -> str:
    from liberatai_agent.machine import units  # noqa: PLC0415

    places = (*units.PACKAGED, f"{units.UNIT_FOLDER}/{units.UNITS[0]}")
    if any(Path("/", place).exists() for place in places):
        return "the service starts by itself: systemctl status liberatai-agent"
    return "now: sudo liberatai-agent install --systemd, or liberatai-agent run"
