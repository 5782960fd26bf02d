"""The benchmark of many devices runs the real coordinator in a process of its own, kills it, and counts right."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.fleet_link import Exchange, SocketLink

from liberatai_core.link.link import Connected, Received

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_is_measured_and_every_update_has_its_receipt() -> None:
    command = [sys.executable, "-m", "benchmarks.fleet_scale"]
    command += ["--devices", "60", "--invited", "20", "--rounds", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["devices"], result["invited"], result["rounds"], result["seed"]) == (60, 20, 2, 0)
    asked = (
        "join_s stall_ms_p99 stall_ms_max updates_per_cpu_s receipt_p99_s close_s finish_s recover_s list_s"
    )
    assert all(result[name] > 0 for name in [*asked.split(), "rss_mb", "ledger_mb"])
    assert result["stall_ms_p99"] <= result["stall_ms_max"]
    assert round(result["stall_ms_max"]) == max(silent for silent, _ in result["stalls_ms"].values())
    assert 4000 < result["update_bytes"] < 5500


def test_the_exchange_repeats_first_what_was_not_acknowledged(tmp_path: Path) -> None:
    asyncio.run(repeats(tmp_path / "exchange.sock"))


async def repeats(path: Path) -> None:
    heard: list[tuple[str, bytes]] = []
    exchange = Exchange(lambda topic, payload: heard.append((topic, payload)), window=2)
    await exchange.open(path)
    exchange.publish("state", b"online", retain=True)
    exchange.publish("one", b"1")
    exchange.publish("two", b"2")

    async def taken(link: SocketLink, count: int) -> list[Received]:
        found: list[Received] = []
        async for event in link.events():
            if isinstance(event, Received):
                found.append(event)
                if len(found) == count:
                    break
        return found

    first = SocketLink(path)
    await first.open()
    async with asyncio.timeout(60):
        assert [one.topic for one in await taken(first, 2)] == ["state", "one"]  # no more than the window
        await first.publish("said", b"words")
        assert heard == [("said", b"words")]
        await first.close()
        second = SocketLink(path)
        await second.open()
        events = second.events()
        assert isinstance(await anext(events), Connected)
        topics = []
        for _ in range(4):
            event = await anext(events)
            assert isinstance(event, Received)
            topics.append((event.topic, event.retained))
            second.ack(event.token)
        assert topics == [("state", False), ("one", False), ("two", False), ("state", True)]
        await exchange.all_taken()
        await second.close()
    await exchange.close()
