"""`liberatai-agent run`: the agent itself."""

import argparse
from typing import TYPE_CHECKING, Any

from liberatai_agent.commands.kit import FAILED, OK, add_command, add_config, complain
from liberatai_core.errors import DamagedError

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
    from liberatai_agent.broker import mqtt_settings  # noqa: PLC0415
    from liberatai_agent.config import load_config, load_profile  # noqa: PLC0415
    from liberatai_core import logs  # noqa: PLC0415

    config = load_config(args.config)
    load_profile(config)
    mqtt_settings(config)
    logs.set_up(args.log_format, verbose=args.verbose)
    import asyncio  # noqa: PLC0415

    return asyncio.run(_serve(config))


async def _serve(config: "AgentConfig") -> int:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from liberatai_agent.broker import mqtt_settings  # noqa: PLC0415
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
        else:
            return OK
