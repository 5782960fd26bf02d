"""`liberatai-agent run`: the agent itself."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liberatai_agent.commands.kit import FAILED, OK, add_command, add_config, complain
from liberatai_core.errors import DamagedError, ExpiredError

AGAIN = -1
"""The agent ended to be started anew: a release waits for its trial."""

if TYPE_CHECKING:
    from liberatai_agent.config import AgentConfig
    from liberatai_core.link.link import Will
    from liberatai_core.link.mqtt import MqttLink


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "run",
        _run,
        text="Run the agent until SIGTERM.",
        example="liberatai-agent run --config agent.yaml",
    )
    add_config(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    parser.add_argument(
        "--log-format",
        choices=("auto", "text", "json"),
        default="auto",
        help="how to log: text (with priorities for the journal), or json (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    from liberatai_agent.config import load_config, load_profile  # noqa: PLC0415
    from liberatai_agent.exchange.broker import mqtt_settings  # noqa: PLC0415
    from liberatai_agent.membership.joining import why_join  # noqa: PLC0415
    from liberatai_core import logs  # noqa: PLC0415

    config = load_config(args.config)
    load_profile(config)
    if not why_join(config):
        mqtt_settings(config)
    logs.set_up(args.log_format, verbose=args.verbose)
    from liberatai_agent.updates import keeper  # noqa: PLC0415

    update = config.update
    code = keeper.lead(config.state_path, update.key_bytes, args.arguments, patience_s=update.patience_s)
    if code is not None:
        return code
    import asyncio  # noqa: PLC0415

    code = asyncio.run(_serve(config))
    if code == AGAIN:
        keeper.restart(args.arguments)
    return code


async def _serve(config: "AgentConfig") -> int:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from liberatai_agent.exchange.broker import mqtt_settings  # noqa: PLC0415
    from liberatai_agent.health.supervisor import StandstillError  # noqa: PLC0415
    from liberatai_agent.service import Service  # noqa: PLC0415
    from liberatai_agent.store.files import set_aside  # noqa: PLC0415
    from liberatai_core.link.mqtt import MqttLink  # noqa: PLC0415

    def make_link(will: "Will") -> "MqttLink":
        return MqttLink(mqtt_settings(config), will)

    loop = asyncio.get_running_loop()
    damaged = ""
    while True:
        if not await _joined(config):
            return OK
        service = Service(config, make_link, damaged=damaged)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.stop)
        loop.add_signal_handler(signal.SIGHUP, service.look_soon)
        try:
            await service.run()
        except StandstillError as error:
            complain(f"E_INTERNAL: {error}")
            return FAILED
        except DamagedError as error:
            # It was set aside: a fresh one is made.
            damaged = str(error)
            complain(f"{error.code}: {damaged}")
        except ExpiredError as error:
            complain(f"{error.code}: {error}")
            # The broker has said so, whatever our own clock says.
            with contextlib.suppress(OSError):
                set_aside(Path(config.cert_file or ""))
        else:
            return AGAIN if service.again else OK


async def _joined(config: "AgentConfig") -> bool:
    """Ask for a certificate until there is one, if there is none; False: the agent shall end."""
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from liberatai_agent.membership.joining import why_join  # noqa: PLC0415

    if not why_join(config):
        return True
    from liberatai_agent.membership.waiting import wait_for_certificate  # noqa: PLC0415

    waiting = asyncio.create_task(wait_for_certificate(config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, waiting.cancel)
    try:
        await waiting
    except asyncio.CancelledError:
        return False
    return True
