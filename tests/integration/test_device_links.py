"""What devices say of their links reaches the plan, their tasks, and what operators see; it survives restarts."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
from tests.integration.kit import (
    ScriptedDevice,
    coordinator,
    devices,
    job_yaml,
    runner_of,
    until,
)

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.fleet.plan import OVERHEAD_BYTES, density
from liberatai_coordinator.jobs.materials import candidates_of
from liberatai_coordinator.service import Service
from liberatai_core.contract.messages import Capability, State, Telemetry
from liberatai_core.link.memory import MemoryBroker


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


async def says(device: ScriptedDevice, session: int, sent: int, received: int) -> None:
    message = Telemetry(device=device.name, session=session, sent_bytes=sent, received_bytes=received)
    await device.say(device.topics.up(device.name, "tele"), message)


def a_capability(service: Service, name: str, **changes: Any) -> Capability:
    known = service.fleet.devices[name].capability
    assert known is not None
    return msgspec.structs.replace(known, **changes)


async def tells(service: Service, device: ScriptedDevice, **changes: Any) -> None:
    """Let a device say something new of itself, and wait until the coordinator has heard it."""
    wanted = a_capability(service, device.name, **changes)
    await device.say(device.topics.up(device.name, "caps"), wanted, retain=True)
    await until(lambda: service.fleet.devices[device.name].capability == wanted)


def test_a_devices_bytes_in_total_and_per_round_survive_restarts_of_both_sides(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (device,):
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=1), str(tmp_path))
                await until(lambda: finished(service))
                await says(device, 1, 1000, 5000)
                await until(lambda: service.fleet.devices["a"].traffic.sent_bytes == 1000)
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: bool(service.fleet.ready()))
                await says(device, 1, 1200, 5000)
                await says(device, 2, 800, 1000)
                await until(lambda: service.fleet.devices["a"].traffic.session == 2)
                view = await Operations.of(service).devices.show("a")
                assert (view.sent_bytes, view.received_bytes) == (2000, 6000)
                assert view.updates == 2
                assert (view.round_sent_bytes, view.round_received_bytes) == (1000, 3000)

    run(scenario())


def test_the_form_of_the_model_that_suits_a_device_follows_what_it_says_of_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (device,), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 1)
            assert (await Operations.of(service).devices.show("a")).form == "liberatai"
            await tells(service, device, tier="observe", runtimes=("onnxruntime",))
            assert (await Operations.of(service).devices.show("a")).form == "onnx-int8"

    run(scenario())


def test_a_slow_link_gets_a_smaller_share_in_its_task_and_the_plan_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (slow, fast), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            await tells(service, slow, up_bits_s=(8 * OVERHEAD_BYTES + 80) / 6, link_measured=True)
            await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=2), str(tmp_path))
            await until(lambda: finished(service))
            assert fast.tasks[0].density == 0.3
            assert 0 < slow.tasks[0].density < 0.3
            shown = {
                row.device: row for row in (await Operations.of(service).plans.show("tiny", None)).assignments
            }
            assert "instead of 30.00 % of the parameters per round" in shown["a"].link
            assert "measured" in shown["a"].link
            assert shown["a"].density < shown["b"].density == 0.3
            # The link gets better: what the plan shows follows at once.
            await tells(service, slow, up_bits_s=1e6)
            shown = {
                row.device: row for row in (await Operations.of(service).plans.show("tiny", None)).assignments
            }
            assert shown["a"].density == 0.3
            job = (await runner_of(service)).roster
            (candidate,), _ = candidates_of(job.job)
            assert density(job.job, candidate, a_capability(service, "a"))[0] == 0.3

    run(scenario())


def test_a_device_without_quota_is_not_invited_until_it_has_some_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (poor, other), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            await tells(service, poor, day_quota_bytes=50 << 20, metered=True, quota_spent=True)
            await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=1), str(tmp_path))
            await until(lambda: finished(service))
            assert len(other.tasks) == 1
            assert poor.tasks == []
            view = await Operations.of(service).devices.show("a")
            assert (view.metered, view.day_quota_bytes, view.quota_spent) == (True, 50 << 20, True)
            await tells(service, poor, quota_spent=False)
            assert [device.id for device in service.fleet.ready()] == ["a", "b"]

    run(scenario())


def test_the_bytes_of_all_rounds_are_added_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(job_yaml(rounds=2, devices=2), str(tmp_path))
            await until(lambda: finished(service))
            job = await Operations.of(service).jobs.show("tiny")
            assert job.updates == 4
            assert job.up_bytes == sum(view.up_bytes for view in job.rounds)
            assert job.down_bytes == sum(view.down_bytes for view in job.rounds)

    run(scenario())


def test_an_older_session_does_not_change_a_devices_totals(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (device,), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 1)
            await says(device, 5, 100, 100)
            await says(device, 4, 9000, 9000)
            await device.say(
                device.topics.up("a", "state"), State(device="a", state="online", session=5), retain=True
            )
            await until(lambda: service.fleet.refusals.get("a", Counter())["E_REPLAY"] == 1)
            assert (await Operations.of(service).devices.show("a")).sent_bytes == 100

    run(scenario())
