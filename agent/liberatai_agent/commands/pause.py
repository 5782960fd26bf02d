"""`liberatai-agent pause` and `resume`: the people at the device have the last word."""

import argparse
import re
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_config, tell_agent
from liberatai_core.errors import ConfigError

_SPAN = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands,
        "pause",
        _pause,
        text="Train nothing until `resume`, also after restarts; the coordinator is told why.",
        example='liberatai-agent pause --for 2h --reason "we measure"',
    )
    add_config(parser)
    parser.add_argument("--reason", default="", metavar="TEXT", help="why: shown to the coordinator")
    parser.add_argument(
        "--for", dest="span", default=None, metavar="TIME", help="ends by itself after e.g. 30m, 2h, 1d"
    )
    parser = add_command(commands, "resume", _resume, text="End a pause.", example="liberatai-agent resume")
    add_config(parser)


def _pause(args: argparse.Namespace) -> int:
    import time  # noqa: PLC0415

    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.machine import pausing  # noqa: PLC0415

    until_s = None
    if args.span is not None:
        found = _SPAN.fullmatch(args.span)
        if found is None or not int(found[1]):
            raise ConfigError("--for", [f"{args.span!r} is no time: write it like 30m, 2h or 1d"])
        until_s = time.time() + int(found[1]) * _SECONDS[found[2]]
    folder = load_config(args.config).state_path
    wanted = pausing.Pause(reason=args.reason, since_s=time.time(), until_s=until_s)
    pausing.pause(folder, wanted)
    print(wanted.words)
    print(tell_agent(folder))
    return OK


def _resume(args: argparse.Namespace) -> int:
    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_agent.machine import pausing  # noqa: PLC0415

    folder = load_config(args.config).state_path
    if not pausing.resume(folder):
        print("it was not paused")
        return OK
    print("it takes part again")
    print(tell_agent(folder))
    return OK
