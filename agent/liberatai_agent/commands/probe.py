"""`liberatai-agent probe`: what this device can do."""

import argparse
from pathlib import Path
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_output, show


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "probe",
        _probe,
        text="Show what this device can do.",
        example="liberatai-agent probe -o json",
    )
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="settings, if there are any"
    )
    parser.add_argument("--bench", action="store_true", help="measure again instead of using what is kept")
    add_output(parser)


def _probe(args: argparse.Namespace) -> int:
    from liberatai_agent.config import AgentConfig, load_config, load_profile  # noqa: PLC0415
    from liberatai_agent.exchange.link_estimate import NOTHING, announce  # noqa: PLC0415
    from liberatai_agent.exchange.link_meter import read_link  # noqa: PLC0415
    from liberatai_agent.machine import probe  # noqa: PLC0415

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
    show(shown, args.output, config.device)
    return OK
