"""`liberatai-agent doctor`: what is wrong, and what to do about it."""

import argparse
from typing import Any

from liberatai_agent.commands.kit import FAILED, OK, USAGE, add_command, add_config, add_output


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        text="Check settings, certificates, data, broker, clock and disk; say what to do.",
        example="liberatai-agent doctor --config agent.yaml",
    )
    add_config(parser)
    add_output(parser)


def _doctor(args: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415

    from liberatai_agent.commands.kit import screen_width, show_data  # noqa: PLC0415
    from liberatai_agent.doctor import check_settings, examine  # noqa: PLC0415
    from liberatai_core.doctor.finding import failed, lines  # noqa: PLC0415

    config, findings = check_settings(args.config)
    if config is not None:
        findings += asyncio.run(examine(config, args.config.stat().st_mtime))
    if args.output in ("json", "yaml"):
        show_data(findings, args.output)
    elif args.output == "name":  # what must be mended
        print("\n".join(one.check for one in findings if one.state == "fail"))
    else:
        print("\n".join(lines(findings, None if args.output == "wide" else screen_width())))
    if config is None:
        return USAGE
    return FAILED if failed(findings) else OK
