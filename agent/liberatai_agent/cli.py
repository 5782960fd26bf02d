"""`liberatai-agent`: the device's command line. Everything heavy is imported by the command that needs it.

Exit codes: 0 ok, 1 failed, 2 wrong usage or settings, 4 not found. Errors are one line: code, what, where.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liberatai_core.errors import ConfigError, DamagedError, LiberataiError, NotFoundError

if TYPE_CHECKING:
    from liberatai_agent.config import AgentConfig
    from liberatai_core.link.link import Will
    from liberatai_core.link.mqtt import MqttLink, MqttSettings

OK, FAILED, USAGE, NOT_FOUND = 0, 1, 2, 4
DEFAULT_CONFIG = Path("/etc/liberatai/agent.yaml")
REACH_TIMEOUT_S = 8.0
CLOCK_FLOOR = 1_735_689_600
"""2025-01-01: a clock before that was never set, and certificates look invalid to it."""

Checks = list[tuple[bool | None, str, str]]
"""(ok, None: a warning; what; what to do)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    say_what_the_terminal_can()
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except ConfigError as error:
        for fault in error.faults:
            _complain(f"{error.code}: {error.where}: {fault}")
        return USAGE
    except NotFoundError as error:
        _complain(f"{error.code}: {error}")
        return NOT_FOUND
    except LiberataiError as error:
        _complain(f"{error.code}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED


def say_what_the_terminal_can() -> None:
    """Print a question mark for what the terminal's encoding lacks, instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _complain(line: str) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liberatai-agent",
        description="Trains on this device's own data and sends only sparse updates.",
        epilog="example: liberatai-agent run --config agent.yaml",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, example: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        sub.set_defaults(command=command)
        return sub

    def config(sub: Any) -> None:
        sub.add_argument(
            "--config",
            type=Path,
            default=DEFAULT_CONFIG,
            metavar="FILE",
            help="settings (default: %(default)s)",
        )

    def output(sub: Any) -> None:
        sub.add_argument(
            "-o",
            "--output",
            choices=("table", "json"),
            default="table",
            help="how to print (default: %(default)s)",
        )

    run = add("run", _run, "Run the agent until SIGTERM.", "liberatai-agent run --config agent.yaml")
    config(run)
    run.add_argument("-v", "--verbose", action="store_true", help="log details")

    probe = add("probe", _probe, "Show what this device can do.", "liberatai-agent probe -o json")
    probe.add_argument("--config", type=Path, default=None, metavar="FILE", help="settings, if there are any")
    probe.add_argument("--bench", action="store_true", help="measure again instead of using what is kept")
    output(probe)

    status = add("status", _status, "Show what the agent is doing.", "liberatai-agent status --state-dir DIR")
    where = status.add_mutually_exclusive_group()
    config(where)
    where.add_argument("--state-dir", type=Path, default=None, metavar="DIR", help="the agent's state folder")
    output(status)

    doctor = add(
        "doctor",
        _doctor,
        "Check settings, data, broker, clock and disk; say what to do.",
        "liberatai-agent doctor --config agent.yaml",
    )
    config(doctor)

    enrol = add(
        "enrol",
        _enrol,
        "Make this device's key, if it has none, and print the line that lets it into a fleet.",
        "liberatai-agent enrol --config agent.yaml",
    )
    config(enrol)

    add("version", _version, "Print the version.", "liberatai-agent version")
    return parser


# --- run ---------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    import logging  # noqa: PLC0415

    from liberatai_agent.config import load_config, load_profile  # noqa: PLC0415

    config = load_config(args.config)
    load_profile(config)
    mqtt_settings(config)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )
    import asyncio  # noqa: PLC0415

    return asyncio.run(_serve(config))


async def _serve(config: "AgentConfig") -> int:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from liberatai_agent.service import Service  # noqa: PLC0415
    from liberatai_agent.supervisor import StandstillError  # noqa: PLC0415
    from liberatai_core.link.mqtt import MqttLink  # noqa: PLC0415

    def make_link(will: "Will") -> "MqttLink":
        return MqttLink(mqtt_settings(config), will)

    loop = asyncio.get_running_loop()
    damaged = ""
    while True:
        service = Service(config, make_link, damaged=damaged)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.stop)
        try:
            await service.run()
        except StandstillError as error:
            _complain(f"E_INTERNAL: {error}")
            return FAILED
        except DamagedError as error:
            # It was set aside: a fresh one is made.
            damaged = str(error)
            _complain(f"{error.code}: {damaged}")
        else:
            return OK


def mqtt_settings(config: "AgentConfig") -> "MqttSettings":
    """Return how to reach the broker.

    Raises:
        ConfigError: a file is missing, unreadable or empty.
    """
    from dataclasses import replace  # noqa: PLC0415

    from liberatai_core.link.mqtt import MqttSettings  # noqa: PLC0415

    settings = MqttSettings.from_files(
        config.broker,
        client_id=config.device,
        username=config.username,
        password_file=config.password_file,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
    )
    return replace(settings, keepalive_s=config.keepalive_s)


# --- looking -----------------------------------------------------------------------------------


def _probe(args: argparse.Namespace) -> int:
    from liberatai_agent import probe  # noqa: PLC0415
    from liberatai_agent.config import AgentConfig, load_config, load_profile  # noqa: PLC0415
    from liberatai_agent.link_estimate import NOTHING, announce  # noqa: PLC0415
    from liberatai_agent.link_meter import read_link  # noqa: PLC0415

    if args.config is None:
        config = AgentConfig(fleet="none", device="this", coordinator_key="0" * 64, state_dir="/nonexistent")
    else:
        config = load_config(args.config)
    machine = probe.measure(config.state_path)
    found = probe.bench(config.state_path, config.data, again=args.bench)
    link = announce(read_link(config.state_path), NOTHING, 0.0)
    caps = probe.capability(
        config, load_profile(config), machine, found, session=0, public_key=bytes(32), link=link
    )
    shown: dict[str, Any] = {
        # Without settings the question is what the machine could do if it had data.
        "tier": probe.tier_of(
            machine, caps.memory_bytes, config.data or ("any" if args.config is None else None)
        ),
        "profile": caps.profile,
        "arch": caps.arch,
        "cores": caps.cores,
        "cpu_share": caps.cpu_share,
        "memory_bytes": caps.memory_bytes,
        "storage_bytes": caps.storage_bytes,
        "disk_free_bytes": caps.disk_free_bytes,
        "gflops": caps.gflops,
        "up_bits_s": caps.up_bits_s,
        "down_bits_s": caps.down_bits_s,
        "link_measured": caps.link_measured,
        "metered": caps.metered,
        "day_quota_bytes": caps.day_quota_bytes or None,
        "runtimes": list(caps.runtimes),
        "families": list(caps.families),
        "codecs": list(caps.codecs),
        "samples": caps.samples,
        "input_shape": list(caps.data.input_shape) if caps.data else None,
        "classes": caps.data.classes if caps.data else None,
        "data_fault": found.fault,
        "temperature_c": probe.temperature_c(),
        "battery_percent": probe.battery()[0],
    }
    _show(shown, args.output)
    return OK


def _status(args: argparse.Namespace) -> int:
    import time  # noqa: PLC0415

    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.status import read_status  # noqa: PLC0415

    folder = args.state_dir if args.state_dir is not None else load_config(args.config).state_path
    found = read_status(folder)
    if found is None:
        raise NotFoundError(f"{folder}: no status: the agent has never run with this state folder")
    if found.get("running") and not _alive(found.get("pid")):
        found |= {"running": False, "connected": False, "phase": "dead"}
    found["age_s"] = round(max(0.0, time.time() - float(found.get("updated_at", 0.0))), 1)
    _show(found, args.output)
    return OK if found.get("running") else FAILED


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def _show(values: dict[str, Any], output: str) -> None:
    if output == "json":
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        text = "-" if value is None or value in ("", [], {}) else value
        if isinstance(text, list):
            text = ", ".join(map(str, text))
        if isinstance(text, dict):
            text = "  ".join(f"{key}={inner}" for key, inner in text.items())
        if name.endswith("_bytes") and isinstance(value, int):
            text = f"{value} ({value / (1 << 20):.1f} MiB)"
        print(f"{name:<{width}}  {text}")


# --- doctor ------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415

    from liberatai_agent.config import load_config, load_profile  # noqa: PLC0415

    config = load_config(args.config)
    profile = load_profile(config)
    checks: Checks = [(True, f"settings: {args.config}, device {config.device} of fleet {config.fleet}", "")]
    checks += _check_machine(config)
    checks += _check_clock()
    checks += _check_data(config, profile)
    checks += asyncio.run(_check_broker(config))
    for ok, what, advice in checks:
        mark = {True: "ok  ", None: "warn", False: "FAIL"}[ok]
        print(f"{mark}  {what}{': ' + advice if advice else ''}")
    return FAILED if any(ok is False for ok, _, _ in checks) else OK


def _check_machine(config: "AgentConfig") -> Checks:
    from liberatai_agent import gate, probe  # noqa: PLC0415
    from liberatai_agent.identity import Identity  # noqa: PLC0415
    from liberatai_agent.link_meter import read_link  # noqa: PLC0415
    from liberatai_agent.machine_watch import snapshot  # noqa: PLC0415

    found: Checks = []
    try:
        Identity(config.state_path, config.device, config.fleet)
        found.append((True, f"state folder {config.state_dir}, device key", ""))
    except LiberataiError as error:
        found.append((False, f"state folder: {error.code}: {error}", "see state_dir in the settings"))
    free = probe.disk_free(config.state_path)
    enough = free >= 64 << 20
    found.append((enough, f"disk: {free >> 20} MiB free", "" if enough else "free at least 64 MiB"))
    machine = probe.measure(config.state_path)
    has_torch = "torch" in machine.runtimes
    advice = "to train: pip install 'liberatai[train]'"
    found.append(
        (True if has_torch else None, "torch" if has_torch else "no torch", "" if has_torch else advice)
    )
    now = gate.decide(snapshot(config), config.gate)
    is_open, reason = now.open, now.reason
    found.append(
        (
            True if is_open else None,
            "gate open" if is_open else f"gate closed: {reason}",
            "waits" if reason else "",
        )
    )
    quota, used = config.link.quota_bytes, read_link(config.state_path).day_bytes
    if quota is not None:
        is_left = not gate.quota_spent(used, quota)
        text = f"link quota: {used / gate.MIB:.1f} of {quota / gate.MIB:.4g} MiB on its last day"
        found.append((True if is_left else None, text, "" if is_left else "waits for the next day (UTC)"))
    return found


def _check_clock() -> Checks:
    import time  # noqa: PLC0415

    if time.time() >= CLOCK_FLOOR:
        return [(True, f"clock: {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}", "")]
    return [(False, f"clock: {time.strftime('%Y-%m-%d', time.gmtime())}", "set it (NTP): TLS needs it")]


def _check_data(config: "AgentConfig", profile: Any) -> Checks:
    from liberatai_agent import probe  # noqa: PLC0415

    if config.data is None:
        return [(None, "no data", "this device only observes: set data: to an .npz file to train")]
    found = probe.bench(config.state_path, config.data, again=True)
    if found.fault:
        return [(False, found.fault, "give a file with x (n, …) and y (n,); see the data contract")]
    if found.data is None:
        return [(False, "E_DATA: nothing known about the data", "run liberatai-agent probe --bench")]
    shape = "x".join(map(str, found.data.input_shape))
    checks: Checks = [(True, f"data: {found.samples} samples of {shape}, {found.data.classes} classes", "")]
    if found.warning:
        checks.append((None, found.warning, ""))
    machine = probe.measure(config.state_path)
    caps = probe.capability(config, profile, machine, found, session=0, public_key=bytes(32))
    enough = caps.tier == "full" or "torch" not in machine.runtimes
    what = f"tier {caps.tier}, {caps.memory_bytes >> 20} MiB of memory for training"
    advice = "" if enough else f"training needs {probe.FULL_MEMORY_BYTES >> 20} MiB"
    checks.append((True if enough else None, what, advice))
    return checks


async def _check_broker(config: "AgentConfig") -> Checks:
    import asyncio  # noqa: PLC0415
    from dataclasses import replace  # noqa: PLC0415

    from liberatai_core.link.link import Connected  # noqa: PLC0415
    from liberatai_core.link.mqtt import MqttLink  # noqa: PLC0415

    try:
        settings = mqtt_settings(config)
        # Another client id and no session: a running agent of this device is not thrown out.
        link = MqttLink(replace(settings, client_id=f"{config.device}-doctor", session_expiry_s=0))
    except ConfigError as error:
        return [(False, f"broker settings: {'; '.join(error.faults)}", "")]
    reason = "no answer"
    await link.open()
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            async for event in link.events():
                if isinstance(event, Connected):
                    answers: Checks = [(True, f"broker: {config.broker} answers ({event.protocol})", "")]
                    return answers + await _check_rights(config, link)
                reason = getattr(event, "reason", reason)
                if "authori" in reason.lower() and config.cert_file is not None:
                    # A broker that ties names to certificates refuses the other client id.
                    return [(None, f"broker: {config.broker} is there, but refuses: {reason}", "")]
    except TimeoutError:
        pass
    finally:
        await link.close()
    return [(False, f"broker: {config.broker}: {reason}", "start it, or correct broker: in the settings")]


async def _check_rights(config: "AgentConfig", link: "MqttLink") -> Checks:
    """Say whether the broker lets this device speak; an empty message says nothing to the coordinator."""
    from liberatai_agent.status import read_status  # noqa: PLC0415
    from liberatai_core.contract.topics import Topics  # noqa: PLC0415
    from liberatai_core.errors import LinkError  # noqa: PLC0415

    topic = Topics(fleet=config.fleet).up(config.device, "tele")
    told = (read_status(config.state_path) or {}).get("broker_refuses", [])
    found: Checks = [(False, line, "as the running agent was told") for line in told]
    try:
        await link.publish(topic, b"")
    except LinkError as error:
        advice = (
            f"the broker must know this device as {config.device!r} (username, certificate, list of rights)"
        )
        found.append((False, f"rights: {error.code}: {error}", advice))
    return found


def _enrol(args: argparse.Namespace) -> int:
    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.identity import Identity  # noqa: PLC0415

    config = load_config(args.config)
    identity = Identity(config.state_path, config.device, config.fleet)
    print(f"{config.device}: {identity.signer.public_key.hex()}")
    return OK


def _version(_args: argparse.Namespace) -> int:
    from liberatai_core import __version__  # noqa: PLC0415

    print(f"liberatai-agent {__version__}")
    return OK
