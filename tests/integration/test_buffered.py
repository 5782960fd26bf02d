"""Buffered jobs over the in-memory link: the slow device gates nobody, and its late update counts once."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.kit import (
    ScriptedDevice,
    coordinator,
    ended,
    job_yaml,
    until,
)

from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.jobs import records
from liberatai_coordinator.models.updates import decode_update
from liberatai_coordinator.models.versions import Versions
from liberatai_coordinator.service import Service
from liberatai_coordinator.store.manifests import decode_manifest
from liberatai_core.contract.messages import Event, Task
from liberatai_core.errors import ConfigError
from liberatai_core.link.memory import MemoryBroker
from liberatai_core.sparsifier.top_k import densify
from liberatai_core.weights import from_bytes

SID = "mlp-hidden8"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


def finished(service: Service) -> bool:
    return service.ledger.jobs.get("tiny").state == "finished"


def buffered(
    *, rounds: int = 5, buffer: int = 2, devices: int = 3, deadline_s: float = 60, more: str = ""
) -> str:
    text = job_yaml(rounds=rounds, devices=devices, deadline_s=deadline_s)
    return text.replace("rounds: {", f"rounds: {{mode: buffered, buffer: {buffer}, {more}")


@dataclass
class Paced(ScriptedDevice):
    """Answers tasks of rounds up to `until_round` only: so a test decides who is in which version."""

    until_round: int = 0

    async def _answer(self, task: Task) -> None:
        if task.round <= self.until_round:
            await super()._answer(task)

    async def go(self, until_round: int) -> None:
        self.until_round = until_round
        await self._answer(self.tasks[-1])

    @property
    def accepted(self) -> int:
        return len({receipt.update_id for receipt in self.receipts if receipt.accepted})

    @property
    def round(self) -> int:
        return self.tasks[-1].round if self.tasks else 0


@contextlib.asynccontextmanager
async def fleet_of(broker: MemoryBroker, **until_round: int) -> AsyncIterator[list[Paced]]:
    made = [Paced(broker, name, until_round=number) for name, number in until_round.items()]
    running = [asyncio.create_task(device.run()) for device in made]
    try:
        yield made
    finally:
        for device, task in zip(made, running, strict=True):
            await device.link.close()
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def drive(fleet: list[Paced]) -> None:
    """Let versions 1-3 be of (a, b), 4 of (a, c: three versions late), 5 of (c, b: one version late)."""
    a, b, c = fleet
    await until(lambda: a.round == b.round == 4)
    assert c.round == 1
    await c.go(1)
    await until(lambda: c.accepted == 1)
    await a.go(4)
    await until(lambda: c.round == 5)
    await b.go(4)
    await until(lambda: b.accepted == 4)
    await c.go(5)


def test_the_slow_device_gates_nobody_and_its_late_update_counts_once_for_less(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=3, b=3, c=0) as fleet, coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(buffered(), str(tmp_path))
            await drive(fleet)
            await until(lambda: finished(service))
            versions = await Operations.of(service).models.log("tiny")
            assert [v.updates for v in versions] == [2, 2, 2, 2, 2, 0]
            counted = [decode_manifest(row.manifest).updates for row in service.ledger.versions.all("tiny")]
            late = fleet[2].receipts[0].update_id.hex()
            assert [late in ids for ids in counted] == [False, False, False, False, True, False]
            assert [device.accepted for device in fleet] == [4, 4, 2]
            assert all(receipt.accepted for device in fleet for receipt in device.receipts)
            assert_version_counts(service, 4, {"a": 0, "c": 3})
            assert_version_counts(service, 5, {"c": 0, "b": 1})

    run(scenario())


def assert_version_counts(service: Service, number: int, staleness: dict[str, int]) -> None:
    """The coordinator's weights moved by the mean of the differences, each over the root of 1 + staleness."""
    masters = [
        from_bytes(service.repository.get(decode_manifest(row.manifest).structures[SID].master))
        for row in service.ledger.versions.all("tiny")
    ]
    structure = (
        decode_manifest(service.ledger.versions.get("tiny", number).manifest).structures[SID].structure
    )
    stored = service.ledger.updates.of_round("tiny", number)
    assert {update.device for update in stored} == set(staleness)
    total, samples = np.zeros(structure.parameters), 0
    for one in stored:
        update = decode_update(one.frame)
        weight = update.samples / np.sqrt(1.0 + staleness[update.device])
        total += weight * densify(update.body, structure)
        samples += update.samples
    moved = masters[number].astype(np.float64) - masters[number - 1]
    assert np.abs(total).max() > 0
    np.testing.assert_allclose(moved, total / samples, atol=1e-7)


async def undisturbed(folder: Path) -> dict[str, str]:
    broker = MemoryBroker()
    async with fleet_of(broker, a=3, b=3, c=0) as fleet, coordinator(broker, folder) as service:
        await Operations.of(service).jobs.create(buffered(), str(folder))
        await drive(fleet)
        await until(lambda: finished(service))
        return (await Operations.of(service).models.version("tiny", "latest")).digests


class Crash(BaseException):
    """Not an Exception: nothing in the product may catch it, like a kill -9."""


def crash_at(service: Service, name: str, call: int, *, after: bool) -> None:
    """Let the n-th call of a store's method end the job's task, before or after it is done."""
    store, method = name.split(".")
    owner = getattr(service.ledger, store)
    real, calls = getattr(owner, method), itertools.count(1)

    def wrapped(*args: Any, **more: Any) -> Any:
        if next(calls) != call:
            return real(*args, **more)
        if after:
            real(*args, **more)
        raise Crash

    setattr(owner, method, wrapped)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rounds.open", 1),
        ("rounds.open", 4),
        ("rounds.open", 5),
        ("rounds.close", 4),
        ("versions.add", 5),
        ("rounds.set_aggregated", 4),
        ("rounds.set_published", 4),
        ("rounds.close", 5),
    ],
)
def test_a_crash_at_any_step_changes_nothing(tmp_path: Path, name: str, call: int, after: bool) -> None:
    """P1, P2, P4: the final weights are those of the undisturbed run, bit for bit."""

    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "crashed"
        async with fleet_of(broker, a=3, b=3, c=0) as fleet:
            driver = asyncio.create_task(drive(fleet))
            async with coordinator(broker, folder) as service:
                crash_at(service, name, call, after=after)
                await Operations.of(service).jobs.create(buffered(), str(folder))
                await until(lambda: ended(service))
                assert isinstance(service.jobs._running["tiny"].exception(), Crash)
            async with coordinator(broker, folder) as service:
                await until(lambda: finished(service))
                await driver
                assert (await Operations.of(service).models.version("tiny", "latest")).digests == wanted
                assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [
                    2,
                    2,
                    2,
                    2,
                    2,
                    0,
                ]
                assert [device.accepted for device in fleet] == [4, 4, 2]

    run(scenario())


def test_a_kill_after_the_late_update_was_receipted_counts_it_all_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        wanted = await undisturbed(tmp_path / "calm")
        broker, folder = MemoryBroker(), tmp_path / "killed"
        async with fleet_of(broker, a=3, b=3, c=0) as fleet:
            a, b, c = fleet
            async with coordinator(broker, folder) as service:
                await Operations.of(service).jobs.create(buffered(), str(folder))
                await until(lambda: a.round == b.round == 4)
                await c.go(1)
                await until(lambda: c.accepted == 1)
            async with coordinator(broker, folder) as service:
                await drive(fleet)
                await until(lambda: finished(service))
                assert (await Operations.of(service).models.version("tiny", "latest")).digests == wanted

    run(scenario())


def test_a_late_update_that_comes_between_two_rounds_waits_for_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker, slow = MemoryBroker(), Versions.commit
        aggregating = asyncio.Event()
        loop = asyncio.get_running_loop()

        def commit(self: Versions, *args: Any) -> str:
            if self.now.number == 2:
                loop.call_soon_threadsafe(aggregating.set)
                time.sleep(0.5)
            return slow(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Versions, "commit", commit)
            async with fleet_of(broker, a=3, b=3, c=0) as fleet, coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(buffered(rounds=4), str(tmp_path))
                await aggregating.wait()
                await fleet[2].go(1)
                await until(lambda: fleet[2].accepted == 1)
                assert all(receipt.accepted for receipt in fleet[2].receipts)
                await fleet[0].go(4)
                await until(lambda: finished(service))

    run(scenario())


def test_an_update_that_is_too_late_is_refused_and_its_device_has_a_newer_task(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=3, b=3, c=0) as fleet, coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(
                buffered(rounds=4, more="max_staleness: 1, "), str(tmp_path)
            )
            a, _, c = fleet
            await until(lambda: a.round == 4 and c.round == 3)
            first, second = c.tasks[0], c.tasks[-1]
            c.until_round = 1
            await c._answer(first)
            await until(lambda: bool(c.receipts))
            assert [(r.accepted, r.retry, r.code) for r in c.receipts] == [(False, False, "E_ROUND_UNKNOWN")]
            await c.go(3)
            await until(lambda: c.accepted == 1)
            assert c.receipts[-1].update_id == second.task_id
            await a.go(4)
            await until(lambda: finished(service))
            assert_version_counts(service, 4, {"a": 0, "c": 1})

    run(scenario())


def test_a_busy_device_that_lost_its_files_is_asked_for_the_newest_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=0, b=1, c=1) as fleet, coordinator(broker, tmp_path) as service:
            a, b, c = fleet
            await Operations.of(service).jobs.create(buffered(rounds=3), str(tmp_path))
            await until(lambda: b.round == c.round == 2)
            await a.go(1)
            await b.go(2)
            await until(lambda: a.round == b.round == 3)
            assert (c.round, bool(c.tasks[-1].held)) == (2, True)
            c.path = ()
            missing = Event(device="c", session=1, number=1, name="base_missing", code="E_BASE")
            await c.say(c.topics.up("c", "ev"), missing)
            await until(lambda: c.round == 3)
            assert not c.tasks[-1].held
            await c.go(3)
            await until(lambda: c.accepted == 2)
            await a.go(3)
            await until(lambda: finished(service))
            assert_version_counts(service, 3, {"a": 0, "c": 0})

    run(scenario())


def test_files_that_a_busy_device_was_told_to_fetch_are_made_again_after_a_restart(tmp_path: Path) -> None:
    """Its merged delta leads to a version that is not the newest any more."""

    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=3, b=3, c=0) as fleet:
            a, b, c = fleet
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(buffered(rounds=8), str(tmp_path))
                await until(lambda: a.round == b.round == 4)
                await c.go(1)
                await until(lambda: c.accepted == 1)
                await a.go(4)
                await until(lambda: c.round == 5)
                (merged,) = c.tasks[-1].steps
                await b.go(4)
                await a.go(5)
                await until(lambda: a.round == 6)
            broker.stop(forget=True)
            broker.start()
            c.blobs.pop(merged.blob.blob)
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: len(c.tasks) >= 3 and merged.blob.blob in c.blobs)
                assert c.round == 5
                assert c.tasks[-1].steps == (merged,)
                for device in fleet:
                    await device.go(8)
                await until(lambda: finished(service))
                assert all(receipt.accepted for receipt in c.receipts)

    run(scenario())


def test_a_version_is_made_of_what_has_come_when_the_deadline_passes(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=99, b=0, c=0) as _, coordinator(broker, tmp_path) as service:
            await Operations.of(service).jobs.create(buffered(rounds=2, deadline_s=1), str(tmp_path))
            await until(lambda: finished(service))
            assert [v.updates for v in await Operations.of(service).models.log("tiny")] == [1, 1, 0]

    run(scenario())


def test_no_more_devices_than_the_target_have_a_task_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        async with fleet_of(broker, a=99, b=99, c=99) as _, coordinator(broker, tmp_path) as service:
            text = buffered(rounds=6, buffer=1, devices=2, more="target: 2, select: fair, ")
            await Operations.of(service).jobs.create(text, str(tmp_path))
            await until(lambda: finished(service))
            job = await Operations.of(service).jobs.show("tiny")
            assert {r.invited for r in job.rounds} == {2}
            assert all(1 <= r.updates <= 2 for r in job.rounds)

    run(scenario())


@pytest.mark.parametrize("select", ["fair", "utility"])
def test_who_took_part_is_known_after_a_restart(tmp_path: Path, select: str) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        text = job_yaml(rounds=6).replace(
            "rounds: {", f"rounds: {{target: 1, overselect: 1, select: {select}, "
        )
        async with fleet_of(broker, a=99, b=99, c=99):
            async with coordinator(broker, tmp_path) as service:
                await Operations.of(service).jobs.create(
                    text.replace("min_devices: 3", "min_devices: 1"), str(tmp_path)
                )
                crash_at(service, "rounds.close", 4, after=True)
                await until(lambda: ended(service))
            async with coordinator(broker, tmp_path) as service:
                await until(lambda: "tiny" in service.runners)
                runner = service.runners["tiny"]
                await until(lambda: finished(service))
                rows = service.ledger.rounds.all("tiny")
                asked = Counter(one.device for row in rows for one in records.invited_in(row))
                assert sum(asked.values()) == 6
                history = runner.roster.history
                assert service.ledger.jobs.value("tiny", "history") is None  # an ended job needs none
                assert {name: past.invited for name, past in history.devices.items()} == Counter(
                    one.device for row in rows[:-1] for one in records.invited_in(row)
                )
                assert all(past.samples == 10 for past in history.devices.values() if past.round)
                if select == "fair":
                    assert asked == {"a": 2, "b": 2, "c": 2}

    run(scenario())


@pytest.mark.parametrize(
    ("rounds", "fault"),
    [
        ("{buffer: 2}", "goes with rounds.mode: buffered only"),
        ("{mode: buffered, buffer: 3, target: 2}", "more updates than devices have a task"),
    ],
)
def test_faults_of_a_buffer_come_when_the_job_is_created(tmp_path: Path, rounds: str, fault: str) -> None:
    async def scenario() -> None:
        async with coordinator(MemoryBroker(), tmp_path) as service:
            text = job_yaml().splitlines()
            text = [f"rounds: {rounds}" if line.startswith("rounds:") else line for line in text]
            with pytest.raises(ConfigError, match=fault):
                await Operations.of(service).jobs.create("\n".join(text), str(tmp_path))
            robust = "rounds: {mode: buffered, buffer: 2}\naggregate: {rule: median}"
            text = [robust if line.startswith("rounds:") else line for line in text]
            with pytest.raises(ConfigError, match="needs 3 updates against 1 hostile"):
                await Operations.of(service).jobs.create("\n".join(text), str(tmp_path))

    run(scenario())
