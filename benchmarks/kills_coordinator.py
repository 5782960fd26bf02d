"""Coordinators for `kills`, forked from a process that has imported everything: a start takes 0.1 s.

    python -m benchmarks.kills_coordinator --settings FILE --exchange SOCKET --log FILE

For every line on its input it starts one and prints its process id. All end with it.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from benchmarks.fleet_link import SocketLink
from liberatai_coordinator import wiring
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_core.link.link import Link, Will
from liberatai_core.settings import parse

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def coordinate(config: CoordinatorConfig, exchange: Path, log: Path) -> int:
    """Run a coordinator until it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)

    def link(_config: CoordinatorConfig, will: Will) -> Link:
        return SocketLink(exchange, will)

    return asyncio.run(wiring.run(config, link))


def main() -> int:
    """Start coordinators until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--exchange", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    config = parse(given.settings.read_text(encoding="utf-8"), CoordinatorConfig, str(given.settings))
    wiring.prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(coordinate(config, given.exchange, given.log))
        print(child, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
