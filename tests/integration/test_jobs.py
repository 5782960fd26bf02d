"""Several jobs at once, their ends, and names that are used again."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.integration.kit import coordinator, decode, devices, job_yaml, until

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.models import aggregation
from liberatai_coordinator.rounds.round import Failed, Gone, Invitation
from liberatai_coordinator.service import Service
from liberatai_core.contract.messages import Cancel, Task
from liberatai_core.errors import ConfigError, LiberataiError, StateError
from liberatai_core.link.memory import MemoryBroker


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


def named(name: str, **changes: Any) -> str:
    return job_yaml(**changes).replace("name: tiny", f"name: {name}")


def state(service: Service, job: str) -> str:
    return service.ledger.jobs.get(job).state


def invited(service: Service, job: str) -> list[set[str]]:
    rows = service.ledger.rounds.all(job)
    return [
        {one.device for one in msgspec.msgpack.decode(row.invited, type=list[Invitation])} for row in rows
    ]


def test_two_jobs_share_the_devices_and_none_serves_both_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b", "c", "d") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            for device in fleet:
                device.answers = False
            await jobs.create(named("first", rounds=3, devices=2), str(tmp_path))
            await until(lambda: len(invited(service, "first")) == 1)
            await jobs.create(named("second", rounds=3, devices=2), str(tmp_path))
            assert invited(service, "first") == [{"a", "b", "c", "d"}]
            await until(lambda: "first" in service.runners["second"].waits)
            assert (await jobs.show("second")).reason == "waits: devices serve first first"
            for device in fleet:
                device.answers = True
                await device._answer(device.tasks[-1])
            await until(lambda: len(invited(service, "second")) >= 1 and len(invited(service, "first")) >= 2)
            await until(lambda: state(service, "first") == state(service, "second") == "finished", 60)
            assert all(len(names) >= 2 for names in invited(service, "second"))
            counted = Counter(
                update_id
                for name in ("first", "second")
                for row in service.ledger.rounds.all(name)
                for update_id in row.frozen
            )
            assert set(counted.values()) == {1}

    run(scenario())


def test_an_aborted_job_gives_its_devices_to_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            fleet[1].answers = False
            await jobs.create(named("stuck", rounds=2, devices=2), str(tmp_path))
            await until(lambda: bool(fleet[0].receipts) and bool(fleet[1].tasks))
            await jobs.create(named("next", rounds=1, devices=2), str(tmp_path))
            await until(lambda: bool(service.runners["next"].waits))
            for device in fleet:
                device.answers = True
                device.sent.clear()
            await jobs.abort("stuck")
            (row,) = service.ledger.rounds.all("stuck")
            assert row.state == "abandoned"
            assert len(row.frozen) == 1, "what was receipted is listed"
            await until(lambda: state(service, "next") == "finished")
            slots = [decode(broker.retained[f"lai/v1/test/dn/{name}/task"]) for name in ("a", "b")]
            assert [(type(slot), slot.job) for slot in slots] == [(Cancel, "next")] * 2  # type: ignore[attr-defined]
            assert "stuck" not in service.runners

    run(scenario())


def test_a_word_about_an_ended_job_never_takes_the_place_of_a_task(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            await jobs.create(named("first", rounds=1, devices=2), str(tmp_path))
            await until(lambda: state(service, "first") == "finished")
            for device in fleet:
                device.answers = False
                device.sent.clear()
            await jobs.create(named("second", rounds=1, devices=2), str(tmp_path))
            await until(lambda: all(device.tasks[-1].job == "second" for device in fleet))
            await service.jobs.slots.end(
                [Cancel(device=name, epoch=1, coordinator="co1", job="first", round=1) for name in ("a", "b")]
            )
            slot = decode(broker.retained["lai/v1/test/dn/a/task"])
            assert isinstance(slot, Task)
            assert slot.job == "second"
            for device in fleet:
                device.answers = True
                await device._answer(device.tasks[-1])
            await until(lambda: state(service, "second") == "finished")
            assert not service.jobs.slots.ends

    run(scenario())


def test_the_way_to_a_finished_model_stays_when_another_job_is_aborted(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            for device in fleet:
                device.answers = False
            await jobs.create(named("aborted", rounds=1, devices=2, quorum=0.1, deadline_s=60), str(tmp_path))
            await until(lambda: all(device.tasks for device in fleet))
            for name in ("a", "b"):  # both say that they failed: their work is done for this job
                service.runners["aborted"].collecting.decide(Failed(device=name))
            await until(
                lambda: state(service, "aborted") == "running" and not service.jobs.slots.sharing.holder("a")
            )
            for device in fleet:
                device.answers = True
            await jobs.pause("aborted")
            await jobs.create(named("finished", rounds=1, devices=2), str(tmp_path))
            await until(lambda: state(service, "finished") == "finished")
            await jobs.abort("aborted")
            slot = decode(broker.retained["lai/v1/test/dn/a/task"])
            assert isinstance(slot, Cancel)
            assert (slot.job, bool(slot.final or slot.held)) == ("finished", True)

    run(scenario())


def test_a_job_that_is_paused_while_it_waits_opens_no_round(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            fleet[1].answers = False
            await jobs.create(named("first", rounds=1, devices=2), str(tmp_path))
            await until(lambda: bool(fleet[1].tasks))
            await jobs.create(named("second", rounds=1, devices=2), str(tmp_path))
            await until(lambda: "first" in service.runners["second"].waits)
            await jobs.pause("second")
            assert (await jobs.show("second")).reason == ""
            fleet[1].answers = True
            await fleet[1]._answer(fleet[1].tasks[-1])
            await until(lambda: state(service, "first") == "finished")
            await asyncio.sleep(0.2)
            assert service.ledger.rounds.all("second") == []
            await jobs.resume("second")
            await until(lambda: state(service, "second") == "finished")

    run(scenario())


def test_who_lost_its_files_is_answered_by_the_job_whose_task_it_has(tmp_path: Path) -> None:
    """Also in the moment after its connection broke, when the round does not wait for it."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            await jobs.create(named("first", rounds=1, devices=2), str(tmp_path))
            await until(lambda: state(service, "first") == "finished")
            await jobs.create(named("second", rounds=2, devices=2), str(tmp_path))
            lost = fleet[1]
            await until(
                lambda: bool(lost.tasks) and (lost.tasks[-1].job, lost.tasks[-1].round) == ("second", 1)
            )
            lost.answers = False
            await until(lambda: lost.tasks[-1].round == 2 and bool(lost.tasks[-1].held))
            service.runners["second"].collecting.decide(Gone(device="b"))
            before = len(lost.tasks)
            lost.cancels.clear()
            await service.jobs.base_missing("b")
            await until(lambda: len(lost.tasks) > before)
            assert (lost.tasks[-1].job, lost.tasks[-1].held) == ("second", b"")
            assert not lost.cancels

    run(scenario())


def test_a_name_can_be_used_again_and_nothing_of_the_first_job_is_taken_for_work(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b") as fleet, coordinator(broker, tmp_path) as service:
            operations = Operations.of(service)
            await operations.jobs.create(named("tiny", rounds=2, devices=2), str(tmp_path))
            with pytest.raises(StateError):
                await operations.jobs.delete("tiny")
            await until(lambda: state(service, "tiny") == "finished")
            first = {task.task_id for task in fleet[0].tasks}
            await operations.jobs.delete("tiny")
            assert "lai/v1/test/pub/head/tiny" not in broker.retained
            for device in fleet:
                device.sent.clear()
                device.tasks.clear()
            await operations.jobs.create(named("tiny", rounds=2, devices=2), str(tmp_path))
            await until(lambda: state(service, "tiny") == "finished")
            again = {task.task_id for task in fleet[0].tasks}
            assert len(first) == len(again) == 2
            assert not first & again, "equal weights, other work"
            assert [view.version for view in await operations.models.log("tiny")] == [5, 4, 3, 2, 1, 0]

    run(scenario())


def test_a_job_that_fails_at_a_restart_leaves_no_task_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        text = named("tiny", rounds=3, devices=2)
        async with devices(broker, "a", "b") as fleet:
            fleet[1].answers = False
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(text, str(tmp_path))
                await until(lambda: bool(fleet[1].tasks) and bool(fleet[0].receipts))
            for path in (tmp_path / "blobs").rglob("*"):
                if path.is_file():
                    path.write_bytes(b"damaged")
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: state(service, "tiny") == "failed")
                await until(lambda: isinstance(decode(broker.retained["lai/v1/test/dn/b/task"]), Cancel))
                (row,) = service.ledger.rounds.all("tiny")
                assert (row.state, len(row.frozen)) == ("abandoned", 1)
                await until(lambda: not [topic for topic in broker.retained if "/pub/b/" in topic])

    run(scenario())


def test_any_fault_of_an_aggregation_is_tried_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        broker, calls = MemoryBroker(), []
        advance = aggregation.advance

        def faulty(*args: Any) -> Any:
            calls.append(1)
            if len(calls) <= 2:
                raise ZeroDivisionError("a bug")
            return advance(*args)

        monkeypatch.setattr(aggregation, "advance", faulty)
        async with devices(broker, "a", "b"), coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(named("tiny", rounds=1, devices=2), str(tmp_path))
            await until(lambda: state(service, "tiny") == "finished")
            rows = service.ledger.rounds.all("tiny")
            assert [row.state for row in rows] == ["abandoned", "abandoned", "published"]
            assert rows[0].reason == "E_INTERNAL: ZeroDivisionError: a bug"

    run(scenario())


def test_a_job_of_another_release_is_left_alone_and_stops_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with devices(broker, "a", "b"):
            async with coordinator(broker, tmp_path) as service:
                service.ledger.jobs.create("newer", b'{"name":"newer","unknown":1}', str(tmp_path), 1.0)
            async with coordinator(broker, tmp_path) as service:
                jobs = Operations.of(service).jobs
                await jobs.create(named("tiny", rounds=1, devices=2), str(tmp_path))
                await until(lambda: state(service, "tiny") == "finished")
                shown = {view.name: view for view in await jobs.list()}
                assert "another release" in shown["newer"].reason
                assert state(service, "newer") == "waiting"

    run(scenario())


def test_a_check_finds_what_create_would_find_and_creates_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with coordinator(broker, tmp_path) as service:
            jobs = Operations.of(service).jobs
            assert (await jobs.check(named("first"), str(tmp_path))).name == "first"
            with pytest.raises(LiberataiError, match="absent"):
                await jobs.check(named("first") + "evaluate: {test: absent.npz}\n", str(tmp_path))
            assert await jobs.list() == ()
            await jobs.create(named("first"), str(tmp_path))
            with pytest.raises(ConfigError, match="exists already"):
                await jobs.check(named("first"), str(tmp_path))

    run(scenario())
