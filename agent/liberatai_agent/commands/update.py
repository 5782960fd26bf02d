"""`liberatai-agent update`: another release of the agent, and the way back."""

import argparse
from pathlib import Path
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_config, tell_agent
from liberatai_core.errors import ConfigError, NotFoundError


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "update",
        _update,
        text="Try a signed release of the agent; if it does not get well, what ran before runs again.",
        example="liberatai-agent update --bundle liberatai-agent-0.2.0.release",
    )
    add_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--bundle", type=Path, default=None, metavar="FILE", help="the release; without one, show what runs"
    )
    what.add_argument("--back", action="store_true", help="go back to the installed program")
    parser.add_argument("--again", action="store_true", help="try one that failed here before")


def _update(args: argparse.Namespace) -> int:
    import time  # noqa: PLC0415

    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.updates import plan, slots  # noqa: PLC0415

    config = load_config(args.config)
    folder = config.state_path
    if args.back:
        state = slots.read_state(folder)
        slots.write_state(folder, plan.back(state))
        print("the installed program runs from the next start on")
        return OK
    if args.bundle is None:
        state = slots.read_state(folder)
        print(state.said or "the installed program runs; there was never another release")
        return OK
    key = config.update.key_bytes
    if key is None:
        raise ConfigError(
            str(args.config), ["update.release_key: missing: no release is believed without it"]
        )
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no state folder: the agent has never run")
    state = slots.install(folder, args.bundle, key, now_s=time.time(), again=args.again)
    print(state.said)
    print(tell_agent(folder, "it begins as soon as no work is in hand"))
    return OK
