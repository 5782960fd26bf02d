"""The real coordinator in a process of its own, whose event loop is watched; `fleet_scale` starts it.

    python -m benchmarks.fleet_coordinator --settings FILE --control SOCKET [--exchange SOCKET]

A task of its loop sleeps 5 ms again and again: what it sleeps longer, the loop was silent. On the control
socket every line that comes is answered with what was seen since the one before. When it closes, the process
ends.
"""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.fleet_link import SocketLink
from liberatai_coordinator import wiring
from liberatai_coordinator.config import CoordinatorConfig
from liberatai_core.link.link import Link, Will
from liberatai_core.settings import parse

TICK_S: Final = 0.005


STEP_MS: Final = 0.1


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """How long an event loop did not turn.

    Attributes:
        silent: ticks by how late they were, in units of STEP_MS.
        max_ms: the longest silence.
        busy_ms_max: the most that the loop's own thread computed between two ticks. Less than `max_ms` where
            it waited: for the disk, for another thread, or for a processor of a busy machine.
    """

    silent: dict[int, int] = {}
    max_ms: float = 0.0
    busy_ms_max: float = 0.0

    def joined(self, other: "Silence") -> "Silence":
        """Return both as one."""
        return Silence(
            silent=dict(Counter(self.silent) + Counter(other.silent)),
            max_ms=max(self.max_ms, other.max_ms),
            busy_ms_max=max(self.busy_ms_max, other.busy_ms_max),
        )

    def percentile_ms(self, share: float) -> float:
        """Return the silence that this share of all ticks does not exceed."""
        left = share * sum(self.silent.values())
        for step, ticks in sorted(self.silent.items()):
            left -= ticks
            if left <= 0:
                return (step + 1) * STEP_MS
        return 0.0


class Ticker:
    """Measures silences of the event loop: on the clock, and what its own thread computed in them."""

    def __init__(self) -> None:
        self._silent: Counter[int] = Counter()  # ticks by silence in units of STEP_MS
        self._longest = self._busiest = 0.0

    async def run(self) -> None:
        """Tick until cancelled."""
        last, computed = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(TICK_S)
            now, thread = time.monotonic(), time.thread_time()
            silent = max(0.0, now - last - TICK_S)
            self._silent[int(silent * 1e3 / STEP_MS)] += 1
            self._longest = max(self._longest, silent)
            self._busiest = max(self._busiest, thread - computed)
            last, computed = now, thread

    def take(self) -> Silence:
        """Return the silences since the last call, and begin anew."""
        found = Silence(
            silent=dict(self._silent), max_ms=self._longest * 1e3, busy_ms_max=self._busiest * 1e3
        )
        self._silent.clear()
        self._longest = self._busiest = 0.0
        return found


async def answer(ticker: Ticker, control: Path) -> None:
    """Answer the benchmark's questions; end this process with it."""
    reader, writer = await asyncio.open_unix_connection(str(control))
    while await reader.readline():
        writer.write(msgspec.json.encode(ticker.take()) + b"\n")
        await writer.drain()
    os._exit(1)


async def serve(config: CoordinatorConfig, control: Path, exchange: Path | None) -> int:
    """Run the coordinator and watch its loop."""

    def link(config: CoordinatorConfig, will: Will) -> Link:
        return wiring.mqtt_link(config, will) if exchange is None else SocketLink(exchange, will)

    ticker = Ticker()
    beside = [asyncio.create_task(ticker.run()), asyncio.create_task(answer(ticker, control))]
    try:
        return await wiring.run(config, link)
    finally:
        for task in beside:
            task.cancel()


def main() -> int:
    """Run until SIGTERM, or until the benchmark is gone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--exchange", type=Path)
    given = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    config = parse(given.settings.read_text(encoding="utf-8"), CoordinatorConfig, str(given.settings))
    wiring.prepare()
    return asyncio.run(serve(config, given.control, given.exchange))


if __name__ == "__main__":
    sys.exit(main())
