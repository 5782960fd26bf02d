"""The agent measures what it sends and fetches, tells the coordinator, and keeps to its day's quota."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from tests.integration.test_agent_service import (
    DEVICE,
    Coordinator,
    QuickTrainer,
    a_config,
    a_keyframe,
    an_agent,
    scenario,
    status_file,
)

from liberatai_agent.config import LinkSettings
from liberatai_agent.exchange.link_estimate import DAY_S, LinkEstimate
from liberatai_agent.exchange.link_meter import FILE, read_link
from liberatai_agent.machine import machine_watch, probe
from liberatai_core.contract.messages import Capability, Report, State, Telemetry, Update
from liberatai_core.link.memory import MemoryBroker, MemoryLink

KIB, MIB = 1024, 1 << 20
UP_BYTES_S = 200_000
BLOB_S = 0.1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process for the probe, and looks at the gate and the machine that follow each other soon."""
    found = {"families": ["mlp"], "gflops": 1.0, "data": {"samples": 60, "input_shape": [4], "classes": 3}}

    async def run_bench(*_: object) -> dict[str, object]:
        return found

    monkeypatch.setattr(probe, "_run_bench", run_bench)
    monkeypatch.setattr(machine_watch, "BUSY_S", 0.2)
    monkeypatch.setattr(machine_watch, "MACHINE_S", 0.2)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of its own speed: inside of one process bytes take no time at all."""
    publish, subscribe = MemoryLink.publish, MemoryLink.subscribe

    async def slow_publish(
        self: MemoryLink, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1
    ) -> None:
        if f"/up/{DEVICE}/" in topic:
            await asyncio.sleep(len(payload) / UP_BYTES_S)
        await publish(self, topic, payload, retain=retain, qos=qos)

    async def slow_subscribe(self: MemoryLink, *filters: str) -> None:
        if any("/pub/b/" in one and "#" not in one for one in filters):
            await asyncio.sleep(BLOB_S)
        await subscribe(self, *filters)

    monkeypatch.setattr(MemoryLink, "publish", slow_publish)
    monkeypatch.setattr(MemoryLink, "subscribe", slow_subscribe)


def a_state(folder: Path, link: LinkEstimate) -> None:
    """Leave what an earlier start of the agent counted."""
    (folder / "state").mkdir()
    (folder / "state" / FILE).write_bytes(msgspec.json.encode(link))


def today() -> int:
    return int(time.time() // DAY_S)


@scenario
async def test_a_download_is_measured_and_told(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co, an_agent(broker, a_config(tmp_path)) as agent:
        assert (await co.first(Capability)).down_bits_s is None
        await co.task(await a_keyframe(co, b"keyframe" * 40_000))
        caps = await co.first(Capability, number=2)
        assert caps.down_bits_s is not None
        # 320 kB in at least two waits: for the manifest, then for the chunks.
        assert 1e6 < caps.down_bits_s < 8 * 330_000 / BLOB_S
        assert agent._meter.link.down_bits_s == pytest.approx(caps.down_bits_s)
    assert read_link(tmp_path / "state").received_bytes > 320_000


@scenario
async def test_an_upload_is_measured_and_the_next_start_knows_it(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = QuickTrainer(body_bytes=20 * KIB)
    async with Coordinator(broker) as co:
        async with an_agent(broker, a_config(tmp_path), trainer):
            await co.first(Report, phase="idle")
            await co.task(await a_keyframe(co))
            await co.first(Update)
        measured = read_link(tmp_path / "state").up_bits_s
        assert measured == pytest.approx(8 * UP_BYTES_S, rel=0.3)
        assert status_file(tmp_path)["link"]["up_bits_s"] == measured
        first = len(co.all(Capability))
        async with an_agent(broker, a_config(tmp_path), trainer):
            await co.until(lambda: len(co.all(Capability)) > first)
            told = co.all(Capability)[first]
            assert told.link_measured
            assert told.up_bits_s == pytest.approx(measured)


@scenario
async def test_a_used_up_quota_closes_the_gate_holds_downloads_and_says_why(tmp_path: Path) -> None:
    a_state(tmp_path, LinkEstimate(day=today(), day_bytes=2 * MIB))
    broker = MemoryBroker()
    config = a_config(tmp_path, link=LinkSettings(quota_mb_per_day=1))
    async with Coordinator(broker) as co, an_agent(broker, config) as agent:
        report = await co.first(Report, phase="gated")
        assert "link quota is used up: 2.0 of 1 MiB" in report.reason
        caps = await co.first(Capability, quota_spent=True)
        assert (caps.metered, caps.day_quota_bytes) == (True, MIB)
        await co.task(await a_keyframe(co))
        waiting = await co.first(Report, phase="fetching")
        assert "link quota is used up" in waiting.reason
        assert not list((tmp_path / "state" / "blobs").iterdir())
        # The next day, as far as the counters know: the earlier one is over.
        agent._meter.link = msgspec.structs.replace(agent._meter.link, day=today() - 1)
        update = await co.first(Update)
        assert update.samples == 5
        await co.first(Capability, quota_spent=False)


@scenario
async def test_a_training_that_runs_when_the_quota_ends_is_finished_and_sent(tmp_path: Path) -> None:
    broker = MemoryBroker()
    trainer = QuickTrainer(body_bytes=8 * KIB)
    config = a_config(tmp_path, link=LinkSettings(quota_mb_per_day=1))
    async with Coordinator(broker) as co, an_agent(broker, config, trainer) as agent:
        trainer.hold = asyncio.Event()
        await co.first(Report, phase="idle")
        await co.task(await a_keyframe(co))
        await co.until(lambda: trainer.works)
        agent._meter.link = msgspec.structs.replace(agent._meter.link, day_bytes=MIB)
        await co.first(Capability, quota_spent=True)
        trainer.hold.set()
        update = await co.first(Update)
        await co.receipt(update)
        assert "link quota" in (await co.first(Report, phase="gated")).reason


@scenario
async def test_a_restart_does_not_renew_the_quota(tmp_path: Path) -> None:
    broker = MemoryBroker()
    config = a_config(tmp_path, link=LinkSettings(quota_mb_per_day=0.0005))
    async with Coordinator(broker) as co:
        async with an_agent(broker, config):
            await co.first(Capability, quota_spent=True)
        counted = read_link(tmp_path / "state")
        assert counted.day == today()
        assert counted.day_bytes >= (config.link.quota_bytes or 0) > 0
        first = len(co.all(Capability))
        async with an_agent(broker, config):
            await co.until(lambda: len(co.all(Capability)) > first)
            assert co.all(Capability)[first].quota_spent


@scenario
async def test_the_goodbye_tells_the_last_counters(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with Coordinator(broker) as co:
        async with an_agent(broker, a_config(tmp_path)):
            await co.first(State, state="online")
            await co.first(Report, phase="idle")
        last = await co.first(Telemetry)
        assert last.sent_bytes > 0
    assert status_file(tmp_path)["link"]["ever_sent_bytes"] >= last.sent_bytes
