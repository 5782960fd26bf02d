"""Who is there, who failed, who is silent: what devices say reaches jobs, lists and the disk, and nothing stalls."""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.integration import kit
from tests.integration.kit import (
    COORDINATOR_KEY,
    FLEET,
    ScriptedDevice,
    coordinator,
    devices,
    job_yaml,
)

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.fleet import devices as fleet_devices
from liberatai_coordinator.fleet.devices import Device
from liberatai_coordinator.intake.fencing import presence_frame
from liberatai_coordinator.intake.presence import Jobs
from liberatai_coordinator.jobs import attendance
from liberatai_coordinator.service import Service
from liberatai_core.contract.frame import Signer, open_frame
from liberatai_core.contract.messages import EpochSeen, Report, SessionSeen, State, Telemetry
from liberatai_core.errors import DiskError
from liberatai_core.link.link import Received
from liberatai_core.link.memory import MemoryBroker, MemoryLink


async def until(condition: Callable[[], bool]) -> None:
    await kit.until(condition, 100)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 300))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


async def reports(device: ScriptedDevice, phase: str, number: int, reason: str = "") -> None:
    message = Report(device=device.name, session=1, phase=phase, job="tiny", round=number, reason=reason)  # type: ignore[arg-type]
    await device.say(device.topics.up(device.name, "rep"), message, retain=True)


async def says(device: ScriptedDevice, state: str, session: int = 1) -> None:
    message = State(device=device.name, state=state, session=session)  # type: ignore[arg-type]
    await device.say(device.topics.up(device.name, "state"), message, retain=True)


def of(service: Service, name: str) -> Device:
    return service.fleet.devices[name]


def test_a_device_that_failed_is_not_waited_for_and_not_asked_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as (a, b, c), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 3)
            c.answers = False
            text = job_yaml(rounds=3, devices=2, quorum=0.6, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(c.tasks))
            await reports(c, "failed", 1, "E_DATA: the device's log says why")
            await until(lambda: finished(service))  # in an hour, if a round waited for the third one
            assert len(c.tasks) == 1
            assert [len(d.tasks) for d in (a, b)] == [3, 3]
            assert (await Operations.of(service).devices.show("c")).reason.startswith("E_DATA")

    run(scenario())


def test_a_device_that_ran_out_of_memory_gets_something_lighter_in_the_next_round(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (_, b), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            b.answers, b.runtimes = False, ("torch", "numpy")
            await b._introduce()
            await until(lambda: of(service, "b").capability.runtimes == b.runtimes)  # type: ignore[union-attr]
            text = job_yaml(rounds=3, devices=1, quorum=0.5, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(b.tasks))
            roster = service.runners["tiny"].roster
            assert roster.assigned["b"].tier == "full"
            b.answers = True
            await reports(b, "failed", 1, "E_MEMORY: the training process was killed for want of memory")
            await until(lambda: finished(service))
            assert len(b.tasks) > 1  # without a pause
            assert roster.assigned["b"].tier == "numpy"
            assert "with torch it ran out of memory" in roster.assigned["b"].why
            roster.lighten("b")  # nothing is lighter: it keeps what it has
            assert roster.assigned["b"].tier == "numpy"

    run(scenario())


def test_a_device_that_failed_is_asked_again_when_something_about_it_changed(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (a, b), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            b.answers = False
            text = job_yaml(rounds=4, devices=1, quorum=0.5, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(b.tasks) and bool(a.receipts))
            roster = service.runners["tiny"].roster
            a.answers = False  # the second round stays open
            await reports(b, "failed", 1)
            await until(lambda: len(a.tasks) == 2)
            assert len(b.tasks) == 1
            b.answers, b.samples = True, 11
            await b._introduce()
            await until(lambda: of(service, "b").capability.samples == 11)  # type: ignore[union-attr]
            a.answers = True
            await a._answer(a.tasks[-1])
            await until(lambda: finished(service))
            assert len(b.tasks) > 1
            roster.assign_newcomers()
            assert "b" not in roster.failures

    run(scenario())


def test_a_job_of_which_nobody_can_take_part_says_so_and_goes_on_when_somebody_can(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (a, b), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            for device in (a, b):
                device.samples = 0
                await device._introduce()
            await until(lambda: all(of(service, n).capability.samples == 0 for n in "ab"))  # type: ignore[union-attr]
            operations = Operations.of(service)
            await operations.jobs.create(job_yaml(rounds=1, devices=2, deadline_s=3600), str(tmp_path))
            await until(lambda: "no device can take part" in service.runners["tiny"].waits)
            assert "a: no usable local data" in (await operations.jobs.show("tiny")).reason
            for device in (a, b):
                device.samples = 10
                await device._introduce()
            await until(lambda: finished(service))

    run(scenario())


def test_a_device_that_lost_its_data_between_two_rounds_is_not_invited(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (a, b), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            a.answers = False
            text = job_yaml(rounds=3, devices=1, quorum=0.5, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(a.tasks) and bool(b.receipts))
            b.samples = 0
            await b._introduce()
            await until(lambda: of(service, "b").capability.samples == 0)  # type: ignore[union-attr]
            a.answers = True
            await a._answer(a.tasks[-1])
            await until(lambda: finished(service))
            assert len(b.tasks) == 1

    run(scenario())


def test_a_lost_device_is_waited_for_a_moment_and_not_to_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "GRACE_S", 0.2)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as (_, _, c), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 3)
            c.answers = False
            text = job_yaml(rounds=1, devices=3, quorum=0.6, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(c.tasks))
            await says(c, "lost")
            await until(lambda: finished(service))

    run(scenario())


def test_the_last_one_that_is_away_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "GRACE_S", 3600.0)
    monkeypatch.setattr(attendance, "LAST_S", 0.2)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as (_, b, c), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 3)
            b.answers = c.answers = False
            text = job_yaml(rounds=1, devices=3, quorum=0.6, deadline_s=14400)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(b.tasks) and bool(c.tasks))
            now = service.runners["tiny"].open_round
            assert now is not None
            await until(lambda: "a" in now.stored)
            await says(c, "lost")
            await until(lambda: of(service, "c").said == "lost")
            service.devices.jobs.tick(time.monotonic() + 60)
            assert now.gone == frozenset(), "another one is still at it: nobody is held up"
            b.answers = True
            await b._answer(b.tasks[-1])
            await until(lambda: finished(service))

    run(scenario())


def test_while_the_broker_is_away_nobody_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is restarted says the will of all: its outage must not cost the round."""
    monkeypatch.setattr(attendance, "GRACE_S", 1.0)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (a, b), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 2)
            a.answers = b.answers = False
            text = job_yaml(rounds=1, devices=2, quorum=1.0, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(a.tasks) and bool(b.tasks))
            await says(a, "lost")
            await until(lambda: of(service, "a").said == "lost")
            broker.block("co1")
            await until(lambda: not service.connected)
            await asyncio.sleep(2.5)  # longer than the grace and a tick
            broker.unblock("co1")
            await until(lambda: bool(service.connected))
            now = service.runners["tiny"].open_round
            assert now is not None
            assert now.gone == frozenset()

            def given_up() -> bool:
                open_round = service.runners["tiny"].open_round
                return open_round is None or "a" in open_round.gone

            await until(given_up)  # its time began again with the link

    run(scenario())


def test_a_device_at_rest_is_not_waited_for_not_asked_and_asked_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "GRACE_S", 0.1)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c") as (a, b, c), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 3)
            c.answers = False
            text = job_yaml(rounds=3, devices=2, quorum=0.6, deadline_s=3600)
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: bool(c.tasks))
            await says(c, "draining")
            await reports(c, "gated", 1, "paused at the device: we measure")
            await until(lambda: finished(service))  # in an hour, if a round waited for the third one
            assert len(c.tasks) == 1
            assert [len(d.tasks) for d in (a, b)] == [3, 3]
            shown = await Operations.of(service).devices.show("c")
            assert (shown.state, shown.reason) == ("draining", "paused at the device: we measure")
            assert [one.reason for one in shown.conditions if one.name == "Resting"] == [shown.reason]
            await says(c, "online")
            await until(lambda: len(service.fleet.ready()) == 3)

    run(scenario())


def test_after_a_restart_who_says_nothing_or_was_lost_before_is_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "GRACE_S", 0.5)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as (a, b):
            async with devices(broker, "c", "d") as (c, d), coordinator(broker, tmp_path) as service:
                await until(lambda: len(service.fleet.ready()) == 4)
                for device in (a, b, c, d):
                    device.answers = False
                text = job_yaml(rounds=1, devices=4, quorum=0.4, deadline_s=3600)
                await Operations.of(service).jobs.create(text, str(tmp_path))
                await until(lambda: all(device.tasks for device in (a, b, c, d)))
            broker.stop(forget=True)  # of d nothing is left, and nobody says anything of it
            broker.start()
            # Of c the broker has its will.
            c.link = MemoryLink(broker, "c")
            await c.link.open()
            async for _ in c.link.events():
                break  # connected
            await says(c, "lost")
            for device in (a, b):
                device.answers = True
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: finished(service))
            await c.link.close()

    run(scenario())


def test_a_silent_device_is_unknown_and_its_round_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_devices, "SILENT_LEAST_S", 0.5)
    monkeypatch.setattr(fleet_devices, "SILENT_INTERVALS", 0.0)
    monkeypatch.setattr(attendance, "GRACE_S", 0.2)

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (a,), coordinator(broker, tmp_path) as service:
            await until(lambda: "a" in service.fleet.devices and of(service, "a").silent)
            view = await Operations.of(service).devices.show("a")
            assert view.state == "unknown"
            assert "nothing heard" in view.reason
            assert service.fleet.ready() == []
            await a.say(a.topics.up("a", "tele"), Telemetry(device="a", session=1))
            await until(lambda: not of(service, "a").silent)

    run(scenario())


def test_without_a_broker_nobody_is_online_and_health_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a"), coordinator(broker, tmp_path) as service:
            operations = Operations.of(service)
            await until(lambda: len(service.fleet.ready()) == 1)
            assert (await operations.health())["ok"]
            broker.stop()
            await until(lambda: not service.fleet.ready())
            (view,) = await operations.devices.list()
            assert (view.state, view.reason) == ("unknown", "the coordinator has no broker")
            health = await operations.health()
            assert not health["ok"]
            assert health["faults"] == ["no broker: nothing is heard of any device"]
            broker.start()
            await until(lambda: len(service.fleet.ready()) == 1)
            assert (await operations.health())["ok"]

    run(scenario())


def test_a_device_put_back_from_a_copy_is_told_the_number_to_go_above(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        key = Signer.from_seed(COORDINATOR_KEY, FLEET).public_key
        async with devices(broker, "a") as (a,), coordinator(broker, tmp_path) as service:
            await until(lambda: len(service.fleet.ready()) == 1)
            await says(a, "online", session=7)
            await until(lambda: of(service, "a").session == 7)
            told: list[SessionSeen] = []
            eavesdropper = MemoryLink(broker, "eavesdropper")
            await eavesdropper.subscribe(a.topics.down("a", "xa"))
            await eavesdropper.open()

            async def listen() -> None:
                async for event in eavesdropper.events():
                    if isinstance(event, Received):
                        message = open_frame(event.payload, FLEET, lambda _: key).message
                        told.extend([message] if isinstance(message, SessionSeen) else [])

            listening = asyncio.create_task(listen())
            for _ in range(50):
                await says(a, "online", session=2)
            await until(lambda: service.ledger.refusals.all().get("a", {}).get("E_REPLAY") == 50)
            view = await Operations.of(service).devices.show("a")
            assert "went back from 7 to 2" in view.reason
            await says(a, "online", session=8)
            await until(lambda: of(service, "a").session == 8)
            assert told == [SessionSeen(device="a", session=7)]
            assert (await Operations.of(service).devices.show("a")).reason == ""
            listening.cancel()
            await eavesdropper.close()

    run(scenario())


def test_what_was_heard_while_the_disk_was_full_is_on_it_when_it_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (a,), coordinator(broker, tmp_path) as service:
            await until(lambda: bool(service.ledger.devices.all()))
            store = service.ledger.devices
            healthy = store._heard._apply

            def full(*_: Any) -> None:
                raise DiskError("full")

            monkeypatch.setattr(store._heard, "_apply", full)
            a.samples = 99
            await a._introduce()
            await until(lambda: of(service, "a").capability.samples == 99)  # type: ignore[union-attr]
            await until(lambda: len(store._heard) == 1)
            monkeypatch.setattr(store._heard, "_apply", healthy)
            await until(lambda: b"\xa7samples\x63" in (store.all()[0].capability or b""))

    run(scenario())


def test_refusals_are_counted_on_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a") as (a,):
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: len(service.fleet.ready()) == 1)
                await a.link.publish(a.topics.up("a", "rep"), b"no frame at all" * 10)
                await until(lambda: bool(service.fleet.refusals))
                before = service.fleet.refusals
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: len(service.fleet.ready()) == 1)
                assert service.fleet.refusals == before

    run(scenario())


class Counting:
    """Stands between what devices say and the jobs, and counts."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.told: list[int] = []
        self.reported, self.base_missing, self.tick = jobs.reported, jobs.base_missing, jobs.tick
        self.connected_again = jobs.connected_again

    def devices_changed(self, devices: Collection[Device], now_s: float) -> None:
        self.told.append(len(devices))
        self.jobs.devices_changed(devices, now_s)


def test_many_devices_that_appear_at_once_are_told_together_and_written_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker(max_queued=100_000)
        names = [f"d{n:04d}" for n in range(200)]
        async with coordinator(broker, tmp_path) as service:
            counting = Counting(service.devices.jobs)
            service.devices.jobs = counting
            async with devices(broker, *names):
                await until(lambda: len(service.fleet.ready()) == 200)
                await until(lambda: len(service.ledger.devices.all()) == 200)
                await until(lambda: sum(counting.told) >= 200)
            assert len(counting.told) < 100  # in bunches, not one by one

    run(scenario())


def test_a_coordinator_put_back_from_a_copy_finds_its_epoch_at_the_broker_and_goes_on_above_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        for _ in range(4):
            async with coordinator(broker, tmp_path / "lost") as service:
                await until(lambda: bool(service.connected))
        assert service.ledger.epoch == 4
        async with coordinator(broker, tmp_path / "copy") as service:
            assert service.ledger.epoch == 1
            await until(lambda: service.fencing.behind)
        async with devices(broker, "a") as (a,), coordinator(broker, tmp_path / "copy") as service:
            assert service.ledger.epoch == 5
            await Operations.of(service).jobs.create(job_yaml(rounds=1, devices=1), str(tmp_path))
            await until(lambda: finished(service))
            assert not service.fencing.behind
            assert {task.epoch for task in a.tasks} == {5}

    run(scenario())


def test_a_coordinator_put_back_from_a_copy_is_shown_its_epoch_by_a_device(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        word = presence_frame(Signer.from_seed(COORDINATOR_KEY, FLEET), "co1", 9, "online")
        async with devices(broker, "a") as (a,):
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: len(service.fleet.ready()) == 1)
                await a.say(a.topics.up("a", "ev"), EpochSeen(device="a", session=1, word=word))
                await until(lambda: service.fencing.behind)
            async with coordinator(broker, tmp_path) as service:
                assert service.ledger.epoch == 10

    run(scenario())
