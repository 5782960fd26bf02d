"""A version of a model, or settings, reach a fleet in stages; a bad one goes back, and says why."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tests.integration.kit import (
    DATA,
    FLEET,
    ScriptedDevice,
    coordinator,
    decode,
    devices,
    ended,
    job_yaml,
    until,
)
from tests.integration.test_agent_service import DEVICE, a_config, an_agent, no_bench, status_file

from liberatai_agent.children.trainer import Trainer
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.client.wire import RolloutPlan, RolloutRequest
from liberatai_coordinator.service import Service
from liberatai_core.contract.messages import Have, Want
from liberatai_core.errors import ConfigError, NotFoundError, StateError
from liberatai_core.link.link import Received
from liberatai_core.link.memory import MemoryBroker

pytestmark = pytest.mark.anyio
__all__ = ["no_bench"]
QUICK = RolloutPlan(stages=(0.1, 1.0), soak_s=0.0, failed_min=2, accuracy_answers=15)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@dataclass
class Follower(ScriptedDevice):
    """A device that does what is wished of it, and tells how models do on its data."""

    scores: dict[int, int] = field(default_factory=dict)
    fails: str = ""
    model: tuple[str, int] = ("", 0)
    wants: list[Want] = field(default_factory=list)

    async def _received(self, event: Received) -> None:
        message = decode(event.payload) if event.topic.endswith("/want") and event.payload else None
        if not isinstance(message, Want):
            await super()._received(event)
            return
        self.wants.append(message)
        before = self.model
        if not self.fails or message.model is None:
            self.model = (message.model.model, message.model.version) if message.model else ("", 0)
        have = Have(
            device=self.name,
            session=1,
            version=message.version,
            state="failed" if self.fails and message.model else "done",
            code=self.fails if message.model else "",
            settings=message.settings,
            model=self.model[0],
            model_version=self.model[1],
            evaluation=(self.scores.get(self.model[1], 9), 10) if self.model[0] else None,
            before=(self.scores.get(before[1], 9), 10) if before[0] else None,
        )
        await self.say(self.topics.up(self.name, "have"), have, retain=True)


@contextlib.asynccontextmanager
async def followers(broker: MemoryBroker, count: int) -> AsyncIterator[list[Follower]]:
    made = [Follower(broker, f"dev-{number:02}") for number in range(count)]
    running = [asyncio.create_task(device.run()) for device in made]
    try:
        yield made
    finally:
        for device, task in zip(made, running, strict=True):
            await device.link.close()
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def trained(service: Service, broker: MemoryBroker, tmp_path: Path) -> Operations:
    """Let three devices make two versions of a model."""
    ask = Operations.of(service)
    async with devices(broker, "t-a", "t-b", "t-c"):
        await until(lambda: len(service.fleet.ready_names) >= 3)
        await ask.jobs.create(job_yaml(rounds=2, devices=3), str(tmp_path))
        await until(lambda: ended(service))
    for name in ("t-a", "t-b", "t-c"):
        await ask.devices.decommission(name, "")
    await service.doors.settled()
    service.rollouts.tick_s = 0.01
    return ask


async def over(service: Service, name: str, *states: str) -> None:
    await until(lambda: service.rollouts.get(name).rollout.state in states)


async def test_a_bad_model_fails_at_ten_per_cent_goes_back_and_says_why(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    async with coordinator(broker, tmp_path) as service:
        ask = await trained(service, broker, tmp_path)
        async with followers(broker, 20) as fleet:
            for device in fleet:
                device.scores = {1: 9, 2: 3}
            await until(lambda: len(service.fleet.ready_names) == 20)
            await ask.rollouts.create(RolloutRequest(name="good", model="tiny:1", plan=QUICK))
            await over(service, "good", "finished")
            assert {device.model for device in fleet} == {("tiny", 1)}
            shown = await ask.rollouts.show("good")
            assert shown.counts == {"done": 20}
            assert shown.accuracy == pytest.approx(0.9)

            await ask.rollouts.create(RolloutRequest(name="bad", model="tiny:2", plan=QUICK))
            await over(service, "bad", "rolled back")
            shown = await ask.rollouts.show("bad")
            assert shown.reason == (
                "accuracy on the devices fell from 90.0% to 30.0% over 20 answers (at most 2.0% less)"
            )
            assert (shown.stage, shown.counts) == (1, {"back": 2})
            assert {device.model for device in fleet} == {("tiny", 1)}
            reached = {
                device.name for device in fleet if any(w.model and w.model.version == 2 for w in device.wants)
            }
            assert len(reached) == 2  # the others never heard of it
            told = [one.name for one in await ask.events.last(100, "") if one.name.startswith("rollout_")]
            assert told[-3:] == ["rollout_running", "rollout_rolling_back", "rollout_rolled_back"]


async def test_devices_that_cannot_take_it_stop_it(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path) as service:
        ask = await trained(service, broker, tmp_path)
        async with followers(broker, 4) as fleet:
            for device in fleet:
                device.fails = "E_DIGEST"
            await until(lambda: len(service.fleet.ready_names) == 4)
            plan = RolloutPlan(stages=(0.5, 1.0), soak_s=0.0, failed_min=2)
            await ask.rollouts.create(RolloutRequest(name="r", model="tiny", plan=plan))
            await over(service, "r", "rolled back")
            assert (await ask.rollouts.show("r")).reason == "2 of 2 failed (100%; at most 5%): E_DIGEST"
            assert {device.model for device in fleet} == {("", 0)}


async def test_what_fits_no_device_fails_before_it_is_sent(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path) as service:
        ask = await trained(service, broker, tmp_path)
        async with followers(broker, 2) as fleet:
            for device in fleet:
                device.storage_bytes = 10
                await until(lambda device=device: device.name in service.fleet.ready_names)  # type: ignore[misc]
                await device._introduce()
            await until(
                lambda: all(
                    one.capability is not None and one.capability.storage_bytes == 10
                    for one in service.fleet.devices.values()
                )
            )
            await ask.rollouts.create(RolloutRequest(name="r", model="tiny", plan=QUICK))
            await over(service, "r", "rolling back", "rolled back")
            assert "E_BUDGET" in (await ask.rollouts.show("r")).reason
            assert not any(want.model for device in fleet for want in device.wants)


async def test_settings_roll_out_pause_outlive_a_restart_and_roll_back(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    async with followers(broker, 4) as fleet:
        async with coordinator(broker, tmp_path) as service:
            service.rollouts.tick_s = 0.01
            ask = Operations.of(service)
            await until(lambda: len(service.fleet.ready_names) == 4)
            await ask.shadows.change("dev-00", {"max_temp_c": 70.0})
            await ask.groups.create("all-of-them", "name like 'dev-*'")
            plan = RolloutPlan(stages=(0.5, 1.0), soak_s=0.0, pause_after=(1,))
            wanted = RolloutRequest(
                name="slow", settings={"telemetry_s": 300.0}, group="all-of-them", plan=plan
            )
            await ask.rollouts.create(wanted)
            with pytest.raises(StateError, match="exists already"):
                await ask.rollouts.create(wanted)
            await over(service, "slow", "paused")
            assert (await ask.rollouts.show("slow")).counts == {"done": 2}
        async with coordinator(broker, tmp_path) as service:
            service.rollouts.tick_s = 0.01
            ask = Operations.of(service)
            await until(lambda: len(service.fleet.ready_names) == 4)
            assert (await ask.rollouts.show("slow")).state == "paused"
            await ask.rollouts.resume("slow")
            await over(service, "slow", "finished")
            assert {want.settings.telemetry_s for want in (d.wants[-1] for d in fleet)} == {300.0}
            assert fleet[0].wants[-1].settings.max_temp_c == 70.0
            await ask.rollouts.rollback("slow", "people complain")
            await over(service, "slow", "rolled back")
            assert {d.wants[-1].settings.telemetry_s for d in fleet} == {None}
            assert fleet[0].wants[-1].settings.max_temp_c == 70.0
            assert (await ask.rollouts.list())[0].reason == "people complain"


async def test_what_is_asked_for_wrongly_is_refused_with_words(broker: MemoryBroker, tmp_path: Path) -> None:
    async with coordinator(broker, tmp_path) as service:
        ask = Operations.of(service)
        for wanted, kind, words in (
            (RolloutRequest(name="r"), ConfigError, "one of"),
            (RolloutRequest(name="r", model="x:1", agent="2"), ConfigError, "one of"),
            (RolloutRequest(name="r", model="x:1"), NotFoundError, "x"),
            (RolloutRequest(name="r", agent="2"), ConfigError, "bundle"),
            (RolloutRequest(name="r", agent="2", bundle="/nowhere"), ConfigError, "nowhere"),
            (RolloutRequest(name="r", settings={"data": 1.0}), ConfigError, "may not be wished"),
            (RolloutRequest(name="r", settings={"pause": True}, group="g"), NotFoundError, "group g"),
            (
                RolloutRequest(name="r", settings={"pause": True}, plan=RolloutPlan(stages=(0.5, 0.1))),
                ConfigError,
                "stages",
            ),
        ):
            with pytest.raises(kind, match=words):
                await ask.rollouts.create(wanted)
        with pytest.raises(NotFoundError):
            await ask.rollouts.show("r")


async def test_a_real_agent_fetches_verifies_scores_uses_and_goes_back(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "private.npz", x=random.random((60, *DATA.input_shape), np.float32), y=np.arange(60) % 3
    )
    config = a_config(tmp_path)
    async with coordinator(broker, tmp_path / "co") as service:
        ask = await trained(service, broker, tmp_path)
        async with an_agent(broker, config, Trainer(60.0, state_dir=config.state_path)) as agent:
            await until(lambda: DEVICE in service.fleet.ready_names)
            plan = RolloutPlan(stages=(1.0,), soak_s=0.0, accuracy_drop=None)
            for version in (1, 2):
                name = f"r{version}"
                await ask.rollouts.create(RolloutRequest(name=name, model=f"tiny:{version}", plan=plan))
                await over(service, name, "finished", "rolling back")
                shown = await ask.rollouts.show(name)
                assert shown.state == "finished", shown
                assert shown.parts[0].evaluation is not None
                assert shown.parts[0].evaluation[1] == 9  # 15 % of 60 samples are held out
                assert (shown.parts[0].before is None) == (version == 1)
            await until(lambda: status_file(tmp_path)["deployed"].get("version") == 2)
            files = status_file(tmp_path)["deployed"]["files"]
            assert files
            assert all(Path(path).is_file() for path in files)
            await ask.rollouts.rollback("r2", "")
            await over(service, "r2", "rolled back")
            assert agent._models.current is not None
            assert agent._models.current.wish.version == 1
        async with an_agent(broker, config, Trainer(60.0, state_dir=config.state_path)) as agent:
            await until(lambda: hasattr(agent, "_models") and agent._models.current is not None)
            assert agent._models.current is not None
            assert agent._models.current.wish.version == 1
    assert config.fleet == FLEET
