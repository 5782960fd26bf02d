"""`liberatai-agent doctor`: what is wrong, and what to do about it."""

import argparse
from typing import TYPE_CHECKING, Any

from liberatai_agent.commands.kit import FAILED, OK, add_command, add_config
from liberatai_core.errors import ConfigError, LiberataiError

if TYPE_CHECKING:
    from liberatai_agent.config import AgentConfig
    from liberatai_core.link.mqtt import MqttLink

REACH_TIMEOUT_S = 8.0
CLOCK_FLOOR = 1_735_689_600
"""2025-01-01: a clock before that was never set, and certificates look invalid to it."""

Checks = list[tuple[bool | None, str, str]]
"""(ok, None: a warning; what; what to do)."""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        text="Check settings, data, broker, clock and disk; say what to do.",
        example="liberatai-agent doctor --config agent.yaml",
    )
    add_config(parser)


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
    found.append((True, "torch" if has_torch else "no torch: small networks are trained with numpy", ""))
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
    from liberatai_core.profile import PROCESS_BYTES, trainers  # noqa: PLC0415

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
    able = trainers(caps.runtimes, caps.memory_bytes)
    enough = caps.tier == "full"
    with_what = f" with {able[0]}" if able else ""
    what = f"tier {caps.tier}, {caps.memory_bytes >> 20} MiB of memory for training{with_what}"
    advice = "" if enough else f"training needs {PROCESS_BYTES['numpy'] >> 20} MiB"
    checks.append((True if enough else None, what, advice))
    return checks


async def _check_broker(config: "AgentConfig") -> Checks:
    import asyncio  # noqa: PLC0415
    from dataclasses import replace  # noqa: PLC0415

    from liberatai_agent.broker import mqtt_settings  # noqa: PLC0415
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
