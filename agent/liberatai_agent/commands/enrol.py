"""`liberatai-agent enrol`: the device's key."""

import argparse
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_config


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "enrol",
        _enrol,
        text="Make this device's key, if it has none, and print the line that lets it into a fleet.",
        example="liberatai-agent enrol --config agent.yaml",
    )
    add_config(parser)


def _enrol(args: argparse.Namespace) -> int:
    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.identity import Identity  # noqa: PLC0415

    config = load_config(args.config)
    identity = Identity(config.state_path, config.device, config.fleet)
    print(f"{config.device}: {identity.signer.public_key.hex()}")
    return OK
