"""A real agent follows what a real coordinator wishes, and answers what it asks."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.integration.kit import coordinator, until
from tests.integration.test_agent_service import DEVICE, a_config, an_agent, no_bench, status_file

from liberatai_agent.config import GateSettings
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.service import Service
from liberatai_core.contract.frame import Signer, fingerprint, seal
from liberatai_core.contract.messages import Request, Want, Wishes
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import ConfigError, LinkError, StateError
from liberatai_core.link.memory import MemoryBroker

pytestmark = pytest.mark.anyio
__all__ = ["no_bench"]
TOPICS = Topics(fleet="test")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


async def ready(service: Service) -> Operations:
    await until(lambda: DEVICE in service.fleet.ready_names)
    return Operations.of(service)


async def test_settings_are_followed_told_and_kept_over_restarts(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    config = a_config(tmp_path, gate=GateSettings(max_temp_c=60.0, min_battery_percent=None))
    async with coordinator(broker, tmp_path / "co") as service:
        async with an_agent(broker, config) as agent:
            ask = await ready(service)
            assert (await ask.shadows.show(DEVICE)).state == ""
            wished = {"telemetry_s": 300.0, "max_temp_c": 80.0, "min_free_disk_mb": 500.0, "pause": True}
            assert (await ask.shadows.change(DEVICE, wished)).state == "not heard"
            await until(lambda: service.shadows.of(DEVICE).is_done)
            shown = await ask.shadows.show(DEVICE)
            assert (shown.state, shown.limited, shown.differs) == ("done", ("max_temp_c",), ("max_temp_c",))
            assert shown.reported["max_temp_c"] == 60.0  # its owner's limit is tighter
            assert shown.reported["min_free_disk_mb"] == 500.0
            assert agent._shadow.config.telemetry_s == 300.0
            await until(lambda: "paused" in agent._machine._gate.reason)
            assert (await ask.shadows.change(DEVICE, {"max_temp_c": None})).desired == {
                "telemetry_s": 300.0,
                "min_free_disk_mb": 500.0,
                "pause": True,
            }
            await until(lambda: service.shadows.of(DEVICE).is_done)
        # without a broker the newest wish holds, too
        broker.stop(forget=True)
        async with an_agent(broker, config) as agent:
            await until(lambda: hasattr(agent, "_shadow") and agent._shadow.config.telemetry_s == 300.0)
            assert agent._shadow.wishes.pause
    broker.start()
    async with coordinator(broker, tmp_path / "co") as service, an_agent(broker, config) as agent:
        ask = await ready(service)
        await until(lambda: service.shadows.of(DEVICE).is_done)
        assert "pause" not in (await ask.shadows.change(DEVICE, {"pause": False})).desired
        await until(lambda: agent._machine._gate.reason == "")


async def test_only_what_is_on_the_list_may_be_wished(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path / "co") as service, an_agent(broker, a_config(tmp_path)):
        ask = await ready(service)
        for settings, words in (
            ({"state_dir": 1.0}, "may not be wished"),
            ({"telemtry_s": 3.0}, "did you mean telemetry_s"),
            ({"telemetry_s": 0.0}, ">= 1"),
            ({"pause": 3.0}, "bool"),
        ):
            with pytest.raises(ConfigError, match=words):
                await ask.shadows.change(DEVICE, settings)
        assert service.shadows.of(DEVICE).version == 0


async def test_old_and_foreign_wishes_and_requests_are_refused(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path / "co") as service, an_agent(broker, a_config(tmp_path)) as agent:
        ask = await ready(service)
        await ask.shadows.change(DEVICE, {"telemetry_s": 30.0})
        await ask.shadows.change(DEVICE, {"telemetry_s": 60.0})
        await until(lambda: service.shadows.of(DEVICE).is_done)
        epoch = service.ledger.epoch

        async def say(leaf: str, message: Any, signer: Signer = service.signer) -> None:
            await service.link.publish(TOPICS.down(DEVICE, leaf), seal(message, signer))

        wish = Wishes(telemetry_s=5.0)
        await say("want", Want(device=DEVICE, epoch=epoch, version=1, settings=wish))
        await say("want", Want(device=DEVICE, epoch=epoch - 1, version=9, settings=wish))
        await until(lambda: agent._faults.refused.get("E_REPLAY", 0) >= 2)
        await say("want", Want(device="dev-b", epoch=epoch, version=9, settings=wish))
        await until(lambda: agent._faults.refused.get("E_TOPIC", 0) >= 1)
        stranger = Signer.from_seed(b"x" * 32, "test")
        await say("want", Want(device=DEVICE, epoch=epoch, version=9, settings=wish), stranger)
        await until(lambda: agent._faults.refused.get("E_UNKNOWN_DEVICE", 0) >= 1)
        assert agent._shadow.config.telemetry_s == 60.0
        assert (await ask.devices.ping(DEVICE)).seconds >= 0
        before = agent._faults.refused.get("E_REPLAY", 0)
        await say("req", Request(device=DEVICE, epoch=epoch, number=1, what="logs", lines=200))
        await until(lambda: agent._faults.refused.get("E_REPLAY", 0) > before)


async def test_a_device_answers_while_it_is_there(
    broker: MemoryBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with coordinator(broker, tmp_path / "co") as service:
        async with an_agent(broker, a_config(tmp_path)) as agent:
            ask = await ready(service)
            pinged = await ask.devices.ping(DEVICE)
            assert pinged.session == agent._identity.session
            assert (await ask.devices.probe(DEVICE)).samples == 60
            lines = (await ask.devices.logs(DEVICE, 50)).lines
            key = fingerprint(agent._identity.signer.public_key)
            assert any(f"session 1, key {key}" in line for line in lines)
            assert status_file(tmp_path)["deployed"] == {}
        await until(lambda: not service.fleet.devices[DEVICE].online)
        with pytest.raises(StateError, match="cannot answer"):
            await ask.devices.ping(DEVICE)


async def test_who_does_not_answer_or_shares_no_log_says_so(broker: MemoryBroker, tmp_path: Path) -> None:
    config = a_config(tmp_path, share_logs=False)
    async with coordinator(broker, tmp_path / "co") as service, an_agent(broker, config) as agent:
        ask = await ready(service)
        with pytest.raises(StateError, match="shares no log"):
            await ask.devices.logs(DEVICE)
        service.asking.answer_s = 0.1
        agent._replying._say = lambda _answer: None
        with pytest.raises(LinkError, match="did not answer"):
            await asyncio.wait_for(ask.devices.ping(DEVICE), 30)


async def test_a_released_device_says_again_what_the_broker_was_made_to_forget(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    """Else the next start of the coordinator knows nothing of a device that is there all the time."""
    async with an_agent(broker, a_config(tmp_path)):
        async with coordinator(broker, tmp_path / "co") as service:
            ask = await ready(service)
            await ask.devices.approve(DEVICE, "")
            await ask.devices.quarantine(DEVICE, "looks odd")
            await service.doors.settled()
            assert TOPICS.up(DEVICE, "state") not in broker.retained
            await ask.devices.release(DEVICE)
            await until(lambda: TOPICS.up(DEVICE, "state") in broker.retained)
        async with coordinator(broker, tmp_path / "co") as service:
            await until(lambda: DEVICE in service.fleet.ready_names)


async def test_a_device_with_a_new_key_is_ready_once_that_was_taken(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    """It is connected already: nobody has to start it again."""
    async with coordinator(broker, tmp_path / "co") as service:
        async with an_agent(broker, a_config(tmp_path)):
            ask = await ready(service)
        (tmp_path / "anew").mkdir()
        async with an_agent(broker, a_config(tmp_path / "anew")):
            await until(lambda: DEVICE in service.fleet.knocks)
            assert (await ask.devices.rekey(DEVICE, "")).state == "unknown"
            await until(lambda: DEVICE in service.fleet.ready_names)
